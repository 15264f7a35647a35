"""Log-probabilities of a prompt's tokens, from the workers that computed it to the client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crossdock.proto.v1 import inference_pb2
from crossdock.proto.v1 import worker_pb2 as pb


@dataclass(frozen=True)
class ScoredPrompt:
    """A whole prompt; `parts` follow each other and begin with its second token."""

    token_ids: Sequence[int]
    parts: Sequence[pb.PromptLogprobs]

    def tokens(self) -> Iterator[inference_pb2.TokenLogprobs]:
        """Of each token from the second on, made as they are asked for: a long prompt has many.
        Ranks are set."""
        entry = inference_pb2.TokenLogprob
        for part in self.parts:
            count = part.top
            for i, (logprob, rank) in enumerate(zip(part.logprobs, part.ranks)):
                token_id = self.token_ids[part.first + i]
                chosen = entry(token_id=token_id, logprob=logprob, rank=rank)
                row = slice(i * count, (i + 1) * count)
                pairs = zip(part.top_ids[row], part.top_logprobs[row])
                top = [
                    entry(token_id=id_, logprob=value, rank=place)
                    for place, (id_, value) in enumerate(pairs, 1)
                ]
                yield inference_pb2.TokenLogprobs(chosen=chosen, top=top)
