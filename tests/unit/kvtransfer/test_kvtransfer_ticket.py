"""Layouts are compared by name, tickets are believed only when everything about them holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crossdock.kvtransfer.layout import check_layouts, layout_hash
from crossdock.kvtransfer.ticket import make_ticket, new_incarnation, sign, validate, verify
from crossdock.proto.errors import LayoutMismatch, TransferFailed
from crossdock.proto.v1.worker_pb2 import KVLayout, Ticket

KEY = b"the cluster's key"
PEER = new_incarnation()
LAYOUT = layout_hash(KVLayout(model_id="m"))
PROMPT = b"forty tokens' own"


def layout(**changes: object) -> KVLayout:
    fields = {
        "wire_version": 1,
        "model_id": "smol",
        "weights_digest": "ab",
        "dtype": "float32",
        "block_size": 16,
        "layers": 30,
        "kv_heads": 3,
        "head_dim": 64,
        "tp_degree": 1,
        "engine": "native",
        "regions": "30 x 49152",
    }
    return KVLayout(**(fields | changes))


def test_the_hash_of_a_layout_sees_every_field() -> None:
    hashes = {layout_hash(layout())}
    for field in KVLayout.DESCRIPTOR.fields:
        value = getattr(layout(), field.name)
        hashes.add(layout_hash(layout(**{field.name: value * 2})))
    assert len(hashes) == 1 + len(KVLayout.DESCRIPTOR.fields)
    assert all(len(digest) == 16 for digest in hashes)
    assert layout_hash(layout()) == layout_hash(layout())
    # A value cannot pose as another field.
    assert layout_hash(KVLayout(model_id="a", dtype="b")) != layout_hash(
        KVLayout(model_id="ab", dtype="")
    )


def test_a_mismatch_names_both_values_of_each_field() -> None:
    check_layouts(layout(), layout())
    with pytest.raises(LayoutMismatch) as caught:
        check_layouts(layout(), layout(dtype="bfloat16", block_size=32))
    assert "dtype is 'float32' here and 'bfloat16' there" in str(caught.value)
    assert "block_size is 16 here and 32 there" in str(caught.value)
    assert "layers" not in str(caught.value)


def ticket(**changes: object) -> Ticket:
    fields: dict[str, object] = {
        "key": KEY,
        "prefill_worker": "p0",
        "prefill_address": "10.0.0.1:7000",
        "incarnation": PEER,
        "block_ids": [4, 5, 9],
        "generations": [1, 2, 3],
        "num_tokens": 40,
        "prompt_hash": PROMPT,
        "layout_hash": LAYOUT,
        "lease_s": 30.0,
    }
    return make_ticket(**(fields | changes))  # type: ignore[arg-type]


def check(made: Ticket) -> None:
    validate(
        made,
        key=KEY,
        incarnation=PEER,
        layout_hash=LAYOUT,
        prompt_hash=PROMPT,
        num_blocks=10,
        block_size=16,
    )


def test_a_good_ticket_is_valid() -> None:
    made = ticket()
    check(made)
    assert made.lease_ms == 30_000
    check(Ticket.FromString(made.SerializeToString()))
    assert made.ticket_id != ticket().ticket_id


@pytest.mark.parametrize(
    "forge",
    [
        lambda t: t.block_ids.append(1),
        lambda t: t.generations.__setitem__(0, 7),
        lambda t: setattr(t, "ticket_id", bytes(16)),
        lambda t: setattr(t, "lease_ms", 1 << 40),
        lambda t: setattr(t, "prefill_address", "10.6.6.6:7000"),
        lambda t: setattr(t, "prompt_hash", bytes(16)),
        lambda t: setattr(t, "mac", b""),
        lambda t: sign(t, b"another key"),
    ],
)
def test_a_forged_ticket_is_refused(forge: Callable[[Ticket], None]) -> None:
    made = ticket()
    verify(made, KEY)
    forge(made)
    with pytest.raises(TransferFailed, match="MAC"):
        check(made)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"incarnation": new_incarnation()}, "incarnation"),
        ({"prompt_hash": b"another prompt's"}, "offered for prompt"),
        ({"block_ids": [4, 5, 10]}, "from 4 to 10, the pool has 10"),
        ({"block_ids": [-1, 5, 9]}, "from -1 to 9"),
        ({"block_ids": [4, 4, 9]}, "named twice"),
        ({"generations": [1, 2]}, "3 block ids but 2 generations"),
        ({"num_tokens": 32}, "32 tokens do not fill 3 blocks of 16"),
        ({"num_tokens": 49}, "49 tokens"),
        ({"num_tokens": 0, "block_ids": [], "generations": []}, "0 tokens"),
        ({"lease_s": 0.0}, "lease of 0 ms"),
    ],
)
def test_what_cannot_be_true_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(TransferFailed, match=says):
        check(ticket(**changes))


def test_another_layout_is_refused_with_both_hashes() -> None:
    other = layout_hash(layout())
    with pytest.raises(LayoutMismatch, match=f"{other.hex()}.*{LAYOUT.hex()}"):
        check(ticket(layout_hash=other))
