"""lm-eval's local-completions: scoring by echoed log-probabilities, beside its own hf model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checking import BASE_URL, MODEL, check, command, run, setting

CAPITALS, SENTENCES = "crossdock_capitals", "crossdock_sentences"
TOLERANCE = 0.02  # of a log-likelihood, relative: both compute in their own precision
os.chdir(Path(__file__).parent)  # the tasks name their data from here

Sample = dict[str, Any]
Samples = dict[str, list[Sample]]


def served() -> Samples:
    """What `lm-eval run` writes of each task's documents, by their order."""
    told = {
        "model": MODEL,
        "base_url": f"{BASE_URL}/completions",
        "tokenizer": setting("CROSSDOCK_TOKENIZER"),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        command(
            *("lm-eval", "run", "--model", "local-completions", "--include_path", "lm_eval_tasks"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in told.items())),
            *("--tasks", f"{CAPITALS},{SENTENCES}", "--log_samples", "--output_path", folder),
        )
        return {
            task: sorted(
                (
                    json.loads(line)
                    for path in Path(folder).rglob(f"samples_{task}_*.jsonl")
                    for line in path.read_text(encoding="utf-8").splitlines()
                ),
                key=lambda sample: sample["doc_id"],
            )
            for task in (CAPITALS, SENTENCES)
        }


def strings(sample: Sample) -> list[tuple[str, ...]]:
    """What was scored of a document: a context and its continuation, or a text alone."""
    return [tuple(given.values()) for given in sample["arguments"].values()]


def likelihoods(sample: Sample) -> list[float]:
    """What came of each."""
    found = sample["filtered_resps"]
    return [float(each[0] if isinstance(each, list) else each) for each in found]


class Reference:
    """lm-eval's own hf model on the same checkpoint, in this process: one loading serves all."""

    def __init__(self) -> None:
        from lm_eval.models.huggingface import HFLM

        checkpoint = Path(setting("CROSSDOCK_CHECKPOINT"))
        self._model = HFLM(
            pretrained=str(checkpoint.parent),
            gguf_file=checkpoint.name,
            tokenizer=setting("CROSSDOCK_TOKENIZER"),
            dtype="float32",
            device="cpu",
        )

    def likelihoods(self, asked: Sequence[tuple[str, ...]]) -> list[float]:
        """Log-likelihoods of the same strings."""
        from lm_eval.api.instance import Instance

        rolling = len(asked[0]) == 1
        kind = "loglikelihood_rolling" if rolling else "loglikelihood"
        requests = [Instance(kind, {}, strings, 0) for strings in asked]
        found = getattr(self._model, kind)(requests)
        return [float(each if rolling else each[0]) for each in found]


@check
def scoring() -> None:
    """multiple choice and perplexity, equal to its hf model's on the same checkpoint"""
    ours, reference = served(), Reference()
    for task, samples in ours.items():
        assert samples, f"no samples of {task}"
        asked = [each for sample in samples for each in strings(sample)]
        found = [each for sample in samples for each in likelihoods(sample)]
        pairs = list(zip(found, reference.likelihoods(asked), strict=True))
        worst = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
        print(f"       {task}: {len(pairs)} log-likelihoods, largest difference {worst:.4f}")
        assert worst <= TOLERANCE, pairs
        if task == CAPITALS:
            right = iter(each for _, each in pairs)
            for sample in samples:
                best = [next(right) for _ in strings(sample)]
                assert sample["acc"] == (best.index(max(best)) == sample["doc"]["correct"])


if __name__ == "__main__":
    run()
