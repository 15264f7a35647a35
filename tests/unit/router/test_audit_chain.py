"""What is found where an audit log's lines, or its head, are not as they were written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from audit_kit import make

from crossdock.router.frontdoor.audit_chain import Chain, head_of, in_order, line_hash, verify


async def test_a_log_that_nobody_touched_is_whole(tmp_path: Path) -> None:
    file = await make(tmp_path, 35)
    found = verify(in_order([file]))
    assert not found.wrong
    assert found.requests == 35
    assert len(found.keys) == 1
    assert not verify(in_order([file]), trusted=found.keys).wrong
    assert verify(in_order([file]), trusted=["00" * 32]).wrong, "signed by a stranger"


async def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    file = await make(tmp_path, 12)
    good, rng = file.read_bytes(), random.Random(2)
    for at in rng.sample(range(len(good)), 300):
        changed = bytearray(good)
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        assert verify([file]).wrong, f"byte {at} of {good[max(0, at - 20) : at + 20]!r}"


async def test_missing_moved_added_and_cut_off_lines_are_found(tmp_path: Path) -> None:
    file = await make(tmp_path, 12)
    lines = file.read_bytes().splitlines(keepends=True)
    signed = [i for i, line in enumerate(lines) if b'"checkpoint"' in line]
    for spoiled in (
        lines[1:],
        lines[:4] + lines[5:],
        [*lines[:4], lines[5], lines[4], *lines[6:]],
        [*lines[:4], lines[4], *lines[4:]],
        lines[:-1],
        lines[: signed[-2] + 1],  # ends with a signature that holds
        [],
    ):
        file.write_bytes(b"".join(spoiled))
        assert verify([file]).wrong
    file.write_bytes(b"".join(lines))
    assert not verify([file]).wrong
    file.with_name(file.name + ".head").unlink()
    assert verify([file]).wrong


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"n":3', b'"n":"3"'),
        (b'"n":3', b'"n":null'),
        (b'"prev":"', b'"prev":"\\ud800'),
        (b'"prev":"', b'"prev":7,"was":"'),
        (b'"kind"', b'"deep":' + b"[" * 50_000 + b"]" * 50_000 + b',"kind"'),
    ],
)
async def test_a_line_of_another_shape_is_found(tmp_path: Path, old: bytes, new: bytes) -> None:
    """And looked past: what is after it is whole."""
    file = await make(tmp_path, 12)
    lines = file.read_bytes().splitlines(keepends=True)
    for at in (3, next(i for i, line in enumerate(lines) if b'"checkpoint"' in line)):
        spoiled = lines[at].replace(old.replace(b"3", b"%d" % at), new.replace(b"3", b"%d" % at), 1)
        assert spoiled != lines[at]
        file.write_bytes(b"".join([*lines[:at], spoiled, *lines[at + 1 :]]))
        found = verify([file])
        assert any(f":{at + 1}: " in each or f":{at + 2}: " in each for each in found.wrong)
        assert found.lines == len(lines)


async def test_a_head_of_another_shape_is_found(tmp_path: Path) -> None:
    file = await make(tmp_path, 12)
    head = file.with_name(file.name + ".head")
    good = json.loads(head.read_bytes())
    for change in ({"lines": str(good["lines"])}, {"hash": "\ud800"}, {"lines": None}):
        head.write_text(json.dumps(good | change))
        assert verify([file]).wrong


def checkpoints(lines: list[bytes]) -> list[int]:
    return [i for i, line in enumerate(lines) if b'"checkpoint"' in line]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda lines: lines[: checkpoints(lines)[-2] + 1],
        lambda lines: lines[: checkpoints(lines)[-1] - 1],
        lambda lines: [*lines[:-2], lines[-2].replace(b"acme", b"evil")],
        lambda lines: lines[:1],
        lambda lines: [b"[]\n", *lines[1:]],
    ],
)
@pytest.mark.parametrize("head", ["kept", "gone", "forged"])
async def test_who_goes_on_with_a_spoiled_log_says_so(
    tmp_path: Path, tamper: Any, head: str
) -> None:
    """What the gateway signs next would hide it."""
    file = await make(tmp_path, 25)
    lines = tamper(file.read_bytes().splitlines(keepends=True))
    file.write_bytes(b"".join(lines))
    if head == "gone":
        head_of(file).unlink()
    if head == "forged":
        forged = Chain(b"f" * 32, len(lines), line_hash(lines[-1].rstrip(b"\n")))
        head_of(file).write_bytes(forged.head())
    assert verify([file]).wrong
    await make(tmp_path, 5)
    found = verify(in_order([file]))
    assert any("when its gateway started" in each for each in found.wrong)


async def test_who_goes_on_with_a_log_that_is_ahead_of_its_head_says_nothing(
    tmp_path: Path,
) -> None:
    """Its gateway died between the two; and an empty log has a head, so that it can be missed."""
    file = await make(tmp_path, 0)
    first = head_of(file).read_bytes()
    await make(tmp_path, 12)
    then = head_of(file).read_bytes()
    for older in (first, then):
        await make(tmp_path, 12)
        head_of(file).write_bytes(older)
    await make(tmp_path, 1)
    assert not verify(in_order([file])).wrong


async def test_rotated_files_are_one_chain(tmp_path: Path) -> None:
    await make(tmp_path, 200, rotate_mb=0.005)
    file = await make(tmp_path, 200, rotate_mb=0.005)
    files = in_order([file])
    assert len(files) > 5
    found = verify(files)
    assert not found.wrong
    assert found.requests == 400
    assert verify(files[:2] + files[3:]).wrong, "one is missing"
    assert verify(files[2:]).wrong
    assert not verify(files[2:], partial=True).wrong, "the oldest were deleted"
