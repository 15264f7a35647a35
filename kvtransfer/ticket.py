"""Tickets: the signed offer of one sequence's KV blocks by a prefill worker. One is checked in full
before a byte of them is read."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

from crossdock.proto.errors import LayoutMismatch, TransferFailed
from crossdock.proto.v1.worker_pb2 import Ticket

TICKET_ID_BYTES = 16
INCARNATION_BYTES = 16


def new_incarnation() -> bytes:
    """The name of one life of one process: 16 random bytes."""
    return secrets.token_bytes(INCARNATION_BYTES)


def make_ticket(key: bytes, *, lease_s: float, **fields: Any) -> Ticket:
    """A signed ticket of these fields (see worker_pb2.Ticket) with a fresh random id. `lease_s` in
    seconds, `prompt_hash` as BlockHasher.prompt makes it of the prompt's `num_tokens` tokens."""
    ticket_id = secrets.token_bytes(TICKET_ID_BYTES)
    ticket = Ticket(ticket_id=ticket_id, lease_ms=round(lease_s * 1000), **fields)
    sign(ticket, key)
    return ticket


def sign(ticket: Ticket, key: bytes) -> None:
    """Sets `mac` over all other fields."""
    ticket.mac = _mac(ticket, key)


def verify(ticket: Ticket, key: bytes) -> None:
    """Raises TransferFailed unless the ticket was signed under `key`."""
    if not hmac.compare_digest(ticket.mac, _mac(ticket, key)):
        raise TransferFailed("ticket refused: its MAC is not of this cluster's key")


def validate(
    ticket: Ticket,
    *,
    key: bytes,
    incarnation: bytes,
    layout_hash: bytes,
    prompt_hash: bytes,
    num_blocks: int,
    block_size: int,
) -> None:
    """Checks a ticket against its peer (incarnation, num_blocks), this worker's own layout, and the
    request that it came with (prompt_hash). Raises LayoutMismatch for another layout, else
    TransferFailed saying what is wrong."""
    verify(ticket, key)
    if ticket.layout_hash != layout_hash:
        raise LayoutMismatch(
            f"ticket refused: its layout hash is {ticket.layout_hash.hex()}, "
            f"this worker's is {layout_hash.hex()}"
        )
    if ticket.incarnation != incarnation:
        raise TransferFailed(
            f"ticket refused: made by incarnation {ticket.incarnation.hex()} of "
            f"{ticket.prefill_worker}, now {incarnation.hex()}"
        )
    if ticket.prompt_hash != prompt_hash:
        raise TransferFailed(
            f"ticket refused: offered for prompt {ticket.prompt_hash.hex()}, "
            f"the request's is {prompt_hash.hex()}"
        )
    if len(ticket.ticket_id) != TICKET_ID_BYTES:
        raise TransferFailed(f"ticket refused: an id of {len(ticket.ticket_id)} bytes")
    if ticket.lease_ms <= 0:
        raise TransferFailed(f"ticket refused: a lease of {ticket.lease_ms} ms")
    _check_blocks(ticket, num_blocks, block_size)


def _check_blocks(ticket: Ticket, num_blocks: int, block_size: int) -> None:
    ids = list(ticket.block_ids)
    if len(ids) != len(ticket.generations):
        raise TransferFailed(
            f"ticket refused: {len(ids)} block ids but {len(ticket.generations)} generations"
        )
    needed = -(-ticket.num_tokens // block_size)
    if ticket.num_tokens < 1 or needed != len(ids):
        raise TransferFailed(
            f"ticket refused: {ticket.num_tokens} tokens do not fill "
            f"{len(ids)} blocks of {block_size}"
        )
    if min(ids) < 0 or max(ids) >= num_blocks:
        raise TransferFailed(
            f"ticket refused: block ids from {min(ids)} to {max(ids)}, the pool has {num_blocks}"
        )
    if len(set(ids)) != len(ids):
        raise TransferFailed("ticket refused: a block is named twice")


def _mac(ticket: Ticket, key: bytes) -> bytes:
    unsigned = Ticket()
    unsigned.CopyFrom(ticket)
    unsigned.ClearField("mac")
    return hmac.digest(key, unsigned.SerializeToString(deterministic=True), hashlib.sha256)
