"""What an engine step says to each gateway, gathered into one frame."""

from __future__ import annotations

from collections import defaultdict

from crossdock.kvcache.sequence import PromptScores, SampledToken
from crossdock.proto.convert import FINISH_TO_PB
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import inference_pb2
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.job import Job


class Outbox:
    """Filled by the engine thread; emptied once a step."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[pb.SequenceOutput]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self._outputs)

    def take(self) -> dict[str, list[pb.SequenceOutput]]:
        """Everything since the last take, by gateway."""
        taken, self._outputs = self._outputs, defaultdict(list)
        return taken

    def tokens(
        self,
        job: Job,
        tokens: list[SampledToken],
        finish: tuple[FinishReason, str] | None,
        progress: pb.PromptProgress | None = None,
    ) -> None:
        """New tokens; the first ones carry the sequence's times and counts as well."""
        alone = len(tokens) == 1 and tokens[0].logprob is None and not (finish or progress)
        if alone and job.number and job.first_output_sent:
            self._together(job, tokens[0].token_id)
            return
        output = pb.SequenceOutput(
            sequence_id=job.id,
            token_ids=[token.token_id for token in tokens],
            logprobs=[_logprobs(token) for token in tokens if token.logprob is not None],
            progress=progress,
        )
        if finish:
            output.finish_reason = FINISH_TO_PB[finish[0]]
            output.stop_reason = finish[1]
        if not job.first_output_sent:
            job.first_output_sent = True
            output.cached_tokens = job.sequence.num_cached
            if job.ticket is not None:
                output.transfer.CopyFrom(job.transfer)
            output.times.CopyFrom(pb.SequenceTimes(**job.times))
        self._outputs[job.owner].append(output)

    def _together(self, job: Job, token_id: int) -> None:
        """The most of what is ever said: an output for all of which just this is to be said."""
        outputs = self._outputs[job.owner]
        if not outputs or not outputs[-1].numbers:
            outputs.append(pb.SequenceOutput())
        outputs[-1].numbers.append(job.number)
        outputs[-1].token_ids.append(token_id)

    def scores(self, job: Job, scores: PromptScores) -> None:
        """Log-probabilities of tokens of its prompt, as long as what a step computes."""
        message = pb.PromptLogprobs(
            first=scores.first,
            logprobs=scores.logprobs.tolist(),
            ranks=scores.ranks.tolist(),
            top=scores.top,
            top_ids=scores.top_ids.ravel().tolist(),
            top_logprobs=scores.top_logprobs.ravel().tolist(),
        )
        output = pb.SequenceOutput(sequence_id=job.id, prompt_logprobs=message)
        self._outputs[job.owner].append(output)

    def progress(self, job: Job, progress: pb.PromptProgress) -> None:
        """More of its ticket's blocks can be read; the first time with the ticket."""
        self._outputs[job.owner].append(pb.SequenceOutput(sequence_id=job.id, progress=progress))

    def error(self, owner: str, sequence_id: str, code: pb.ErrorCode, message: str) -> None:
        """Ends the sequence on this worker."""
        self._outputs[owner].append(error_output(sequence_id, code, message))


def error_output(sequence_id: str, code: pb.ErrorCode, message: str) -> pb.SequenceOutput:
    """What ends a sequence on a worker that cannot go on with it."""
    return pb.SequenceOutput(
        sequence_id=sequence_id,
        finish_reason=inference_pb2.FINISH_REASON_ERROR,
        error=pb.SequenceError(code=code, message=message),
    )


def _logprobs(token: SampledToken) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob),
        top=[
            inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
            for token_id, logprob in token.top_logprobs
        ],
    )
