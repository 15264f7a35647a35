"""Turns of /v1/responses before fake workers, by the unmodified `openai` package."""

from __future__ import annotations

from typing import Any

import openai
from gateway_rig import Rig


def client_of(rig: Rig, **headers: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{rig.url}/v1", api_key="none", max_retries=0, default_headers=headers
    )


def end(text: Any) -> int:
    """The token that ends a turn, as a model draws it."""
    return min(text.eos_token_ids & text.ids_of(["<|im_end|>"]) or text.eos_token_ids)


def ending(rig: Rig, text: Any, said: str) -> list[int]:
    """Lets the workers say this and end their turn; its tokens."""
    ids = [*text.encode(said), end(text)]
    for worker in rig.workers:
        worker.script = ids
    return ids


def prompts(rig: Rig) -> list[list[int]]:
    """What was computed, in order."""
    return [list(asked.sequence.token_ids) for asked in rig.prefills[0].prefills]
