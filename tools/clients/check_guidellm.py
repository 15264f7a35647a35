"""guidellm against chat completions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from checking import API_KEY, MODEL, ROOT_URL, check, command, run, setting

COUNT = 4


@check
def concurrent() -> None:
    """4 requests, 2 at once"""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command(
            *("guidellm", "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={ROOT_URL},model={MODEL},api_key={API_KEY}"),
            *("--tokenizer", f"kind=hf_auto,model={setting('CROSSDOCK_TOKENIZER')}"),
            *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=4"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={COUNT}"),
            *("--output", f"kind=json,path={report}"),
        )
        found = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert found["successful"] >= COUNT and not found["errored"], found


if __name__ == "__main__":
    run()
