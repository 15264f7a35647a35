"""What lm-eval asks of a real gateway and workers, against the model's own log-likelihoods."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from engines_kit import EngineRig, simulated, start_engines

from crossdock.proto.types import Role

pytestmark = pytest.mark.slow

LENGTHS = (70, 5, 41)


async def complete(rig: EngineRig, tenant: str = "", **body: Any) -> Any:
    headers = {"X-Crossdock-Tenant": tenant} if tenant else {}
    url = f"{rig.url}/v1/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=headers) as response,
    ):
        answer = await response.json()
        assert response.status == 200, answer
        return answer


@pytest.mark.parametrize("roles", [(Role.PREFILL, Role.DECODE), (Role.COLOCATED,)], ids=len)
async def test_log_likelihoods_are_the_models_own(
    tiny_model: Path, roles: tuple[Role, ...]
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rng = random.Random(5)
    prompts = [rng.choices(range(reference.config.vocab_size), k=k) for k in LENGTHS]
    contexts = [rng.randrange(1, len(ids)) for ids in prompts]
    with torch.inference_mode():
        rows = [reference(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in prompts]
        greedy = reference.generate(
            torch.tensor([prompts[0][:20]]), max_new_tokens=20, do_sample=False
        )
    right = [
        sum(float(row[at - 1, ids[at]]) for at in range(context, len(ids)))
        for row, ids, context in zip(rows, prompts, contexts)
    ]
    native = simulated("native", device="cpu")
    async with start_engines(*roles, model=str(tiny_model), engine=native) as rig:
        asked = {"temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
        for max_tokens in (1, 0):
            answer = await complete(rig, prompt=prompts, max_tokens=max_tokens, **asked)
            end = -1 if max_tokens else None
            for choice, context, wanted in zip(answer["choices"], contexts, right):
                told = choice["logprobs"]["token_logprobs"]
                assert sum(told[context:end]) == pytest.approx(wanted, abs=1e-3)
            assert answer["usage"]["prompt_tokens"] == sum(LENGTHS)
            assert answer["usage"]["completion_tokens"] == max_tokens * len(prompts)
        # What greedy decoding gives is told apart by equality, as lm-eval does.
        (choice,) = (await complete(rig, prompt=greedy[0].tolist(), max_tokens=1, **asked))[
            "choices"
        ]
        told, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert [max(t.values()) for t in tops[20:-1]] == told[20:-1]
        # Whether another tenant's, or one's own, prompt is cached shows in nothing.
        for tenant in ("one", "two"):
            await complete(rig, tenant, prompt=prompts[0], max_tokens=1)
            alone = await complete(rig, tenant, prompt=prompts[0], max_tokens=0, **asked)
            assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert alone["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(
                [float(rows[0][at - 1, prompts[0][at]]) for at in range(1, LENGTHS[0])], abs=1e-4
            )
        await rig.settled()
