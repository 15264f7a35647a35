"""The prefix index against a brute-force model of the same caches."""

from __future__ import annotations

from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from crossdock.router.placement.prefix_index import PrefixIndex

CHAINS = [[bytes([chain, block]) * 8 for block in range(12)] for chain in range(3)]

# Per worker and chain, how many leading blocks it holds: the shape that caches keep (leaves first).
caches = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=70
)


def brute_force(held: list[set[bytes]], chain: list[bytes]) -> dict[int, int]:
    depths = {}
    for slot, blocks in enumerate(held):
        depth = 0
        while depth < len(chain) and chain[depth] in blocks:
            depth += 1
        if depth:
            depths[slot] = depth
    return depths


def build(workers: list[tuple[int, ...]]) -> tuple[PrefixIndex, list[set[bytes]]]:
    index = PrefixIndex()
    held: list[set[bytes]] = []
    for slot, depths in enumerate(workers):
        blocks = [name for chain, depth in zip(CHAINS, depths) for name in chain[:depth]]
        held.append(set(blocks))
        for name in blocks:
            index.add(slot, name)
    return index, held


@given(caches, st.integers(0, 12))
def test_depths_equal_brute_force(workers: list[tuple[int, ...]], length: int) -> None:
    index, held = build(workers)
    for chain in CHAINS:
        assert index.depths(chain[:length]) == brute_force(held, chain[:length])
        found = [depth for _, depth in index.levels(chain[:length])]
        assert found == sorted(set(found), reverse=True), "the deepest first, each once"


@given(caches, st.data())
@examples(50)
def test_evictions_snapshots_and_drops_are_followed(
    workers: list[tuple[int, ...]], data: st.DataObject
) -> None:
    index, held = build(workers)
    for slot in range(len(held)):
        action = data.draw(st.sampled_from(["keep", "evict", "replace", "drop"]))
        if action == "evict":
            leaves = [chain[d - 1] for chain, d in zip(CHAINS, workers[slot]) if d]
            for name in leaves:
                index.remove(slot, name)
            held[slot] -= set(leaves)
        elif action == "replace":
            depth = data.draw(st.integers(0, 12))
            index.replace(slot, CHAINS[1][:depth])
            held[slot] = set(CHAINS[1][:depth])
        elif action == "drop":
            index.drop(slot)
            held[slot] = set()
    for chain in CHAINS:
        assert index.depths(chain) == brute_force(held, chain)
    assert [index.held(slot) for slot in range(len(held))] == held
    assert index._holders.keys() == set().union(*held)


def test_removing_what_was_never_held_changes_nothing() -> None:
    index = PrefixIndex()
    index.add(0, b"a")
    index.remove(1, b"a")
    index.remove(0, b"b")
    assert index.depths([b"a"]) == {0: 1}


def test_an_empty_chain_or_index_has_no_depths() -> None:
    assert PrefixIndex().depths([b"a"]) == {}
    index = PrefixIndex()
    index.add(3, b"a")
    assert index.depths([]) == {}
