"""What hands sequences from one role to the other, on the simulated engine."""

from __future__ import annotations

from roles_kit import Site, Worker, job

from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2

PROMPT = [(7 * i) % 900 + 3 for i in range(50)]


def prefill(worker: Worker, prompt: list[int], **options: object) -> worker_pb2.SequenceOutput:
    """Token 0 and its ticket."""
    made = job(prompt, **options)  # type: ignore[arg-type]
    worker.role.submit(made)
    while made.id in worker.role.jobs:
        worker.turn()
    *announced, output = worker.take()
    for earlier in announced:
        if earlier.progress.HasField("ticket"):
            output.progress.ticket.CopyFrom(earlier.progress.ticket)
    return output


def hand_off(
    decode: Worker, prompt: list[int], first: worker_pb2.SequenceOutput, **options: object
) -> str:
    made = job(prompt, emitted=list(first.token_ids), progress=first.progress, **options)  # type: ignore[arg-type]
    decode.role.submit(made)
    return made.id


def tokens_of(outputs: list[worker_pb2.SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def pair(site: Site, **settings: object) -> tuple[Worker, Worker]:
    workers = site.worker(Role.PREFILL, **settings), site.worker(Role.DECODE, **settings)  # type: ignore[arg-type]
    site.introduce(*workers)
    return workers


def all_free(*workers: Worker) -> None:
    for worker in workers:
        worker.turn()
        worker.check()
        assert worker.role.idle and worker.role.state.pool.num_used == 0
