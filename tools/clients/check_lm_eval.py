"""lm-eval's local-completions: scoring by echoed log-probabilities, beside its own hf model."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from checking import BASE_URL, MODEL, check, command, run, setting

TASKS = ("crossdock_capitals", "crossdock_sentences")
TOLERANCE = 0.02  # of a log-likelihood, relative: both compute in their own precision
os.chdir(Path(__file__).parent)  # the tasks name their data from here

Samples = dict[str, list[dict[str, object]]]


def evaluate(model: str, **arguments: object) -> Samples:
    """The samples of each task."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        command(
            *("lm-eval", "run", "--model", model, "--include_path", "lm_eval_tasks"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--tasks", ",".join(TASKS), "--log_samples", "--output_path", folder),
        )
        return {
            task: [
                json.loads(line)
                for path in Path(folder).rglob(f"samples_{task}_*.jsonl")
                for line in path.read_text(encoding="utf-8").splitlines()
            ]
            for task in TASKS
        }


def served() -> Samples:
    return evaluate(
        "local-completions",
        model=MODEL,
        base_url=f"{BASE_URL}/completions",
        tokenizer=setting("CROSSDOCK_TOKENIZER"),
        tokenizer_backend="huggingface",
        num_concurrent=1,
    )


def likelihoods(samples: list[dict[str, object]]) -> list[tuple[float, bool]]:
    """Of each continuation: its log-likelihood, and whether it is the greedy one."""
    found = []
    for sample in sorted(samples, key=lambda each: each["doc_id"]):
        for answer in sample["filtered_resps"]:
            value, greedy = answer if isinstance(answer, list) else (answer, "False")
            found.append((float(value), str(greedy) == "True"))
    return found


@check
def scoring() -> None:
    """multiple choice and perplexity, equal to the hf model's on the same checkpoint"""
    checkpoint = Path(setting("CROSSDOCK_CHECKPOINT"))
    ours = served()
    theirs = evaluate(
        "hf",
        pretrained=checkpoint.parent,
        gguf_file=checkpoint.name,
        tokenizer=setting("CROSSDOCK_TOKENIZER"),
        dtype="float32",
    )
    for task in TASKS:
        pairs = list(zip(likelihoods(ours[task]), likelihoods(theirs[task]), strict=True))
        assert pairs, f"no samples of {task}"
        worst = max(abs(a - b) / max(1.0, abs(b)) for (a, _), (b, _) in pairs)
        print(f"       {task}: {len(pairs)} log-likelihoods, largest difference {worst:.4f}")
        assert worst <= TOLERANCE, pairs
    right = [sample["acc"] for sample in ours["crossdock_capitals"]]
    assert right == [sample["acc"] for sample in theirs["crossdock_capitals"]]


if __name__ == "__main__":
    run()
