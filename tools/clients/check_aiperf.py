"""aiperf against chat completions and completions, streamed."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from checking import API_KEY, MODEL, ROOT_URL, check, command, run, setting

COUNT = 4
os.environ.pop("HF_HUB_OFFLINE", None)  # with it, it looks for a folder's name in its cache


def profile(endpoint: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command(
            *("aiperf", "profile", "--model", MODEL, "--url", ROOT_URL, "--api-key", API_KEY),
            *("--tokenizer", setting("CROSSDOCK_TOKENIZER")),
            *("--endpoint-type", endpoint, "--streaming"),
            *("--request-count", str(COUNT), "--concurrency", "2"),
            *("--isl", "16", "--osl", "4", "--extra-inputs", "ignore_eos:true"),
            *("--ui", "none", "--output-artifact-dir", folder),
        )
        reports = list(Path(folder).rglob("profile_export_aiperf.json"))
        found = json.loads(reports[0].read_text())
    assert found["request_count"]["avg"] == COUNT, found
    assert found["time_to_first_token"]["avg"] > 0
    assert not found.get("error_summary"), found["error_summary"]


@check
def chat() -> None:
    """chat, 4 requests, 2 at once"""
    profile("chat")


@check
def completions() -> None:
    """completions, 4 requests, 2 at once"""
    profile("completions")


if __name__ == "__main__":
    run()
