"""reconcile() in a world of made-up workers: it converges and never takes away too much."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

from examples import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crossdock.deploy.reconcile import (
    Action,
    Do,
    Losses,
    Member,
    State,
    Target,
    converged,
    reconcile,
)
from crossdock.proto.settings import overlap

P = Target("prefill", "prefill", 1, "a")
D = Target("decode", "decode", 1, "a")


def ready(name: str, pool: str, revision: str = "a", role: str = "") -> Member:
    return Member(name, pool, role or pool, revision, State.READY)


def decide(targets, members=(), losses=None, now=0.0) -> list[str]:
    return [f"{a.do} {a.name}" for a in reconcile(targets, list(members), losses or {}, now)]


def test_an_empty_cluster_starts_everything_at_once():
    assert decide([replace(P, replicas=2), D]) == [
        "start prefill-0",
        "start prefill-1",
        "start decode-0",
    ]


def test_nothing_to_do():
    members = [ready("prefill-0", "prefill"), ready("decode-0", "decode")]
    assert decide([P, D], members) == []
    assert converged([P, D], members)
    assert not converged([P, replace(D, replicas=2)], members)
    assert not converged([P, D], [*members, replace(members[0], state=State.DRAINING)])


def test_scaling_down_drains_the_newest_and_stops_it_when_drained():
    members = [ready(f"decode-{i}", "decode") for i in range(3)]
    assert decide([D], members) == ["drain decode-2", "drain decode-1"]
    members[1:] = [replace(m, state=State.DRAINING, drain_deadline=60) for m in members[1:]]
    assert decide([D], members, now=59) == []
    members[1] = replace(members[1], drained=True)
    assert decide([D], members, now=59) == ["stop decode-1"]
    assert decide([D], members, now=60) == ["stop decode-1", "stop decode-2"]


def test_who_was_leaving_before_the_controller_came_gets_a_deadline():
    members = [ready("decode-0", "decode"), ready("decode-1", "decode")]
    members[1] = replace(members[1], state=State.DRAINING)
    assert decide([D], members) == ["drain decode-1"]
    assert decide([replace(D, replicas=2)], members) == ["drain decode-1", "start decode-2"]


ALIKE = [replace(P, replicas=2, kind="k"), replace(D, replicas=2, kind="k")]


def test_what_one_pool_has_too_many_of_and_an_alike_one_lacks_changes_its_role():
    members = [ready("prefill-0", "prefill"), *(ready(f"decode-{i}", "decode") for i in range(3))]
    [flip] = reconcile(ALIKE, members, {}, 0.0)
    assert str(flip) == "flip decode-2 into prefill-1: 2 wanted here, 2 in decode"
    assert (flip.pool, flip.revision) == ("prefill", "a")
    members[3] = Member("prefill-1", "prefill", "prefill", "a", State.FLIPPING)
    assert decide(ALIKE, members) == []
    assert not converged(ALIKE, members)
    members[3].state = State.READY
    assert converged(ALIKE, members)


def test_what_is_short_beyond_that_is_started_and_what_is_left_over_drained():
    members = [ready("prefill-0", "prefill"), *(ready(f"decode-{i}", "decode") for i in range(3))]
    more = [replace(ALIKE[0], replicas=3), ALIKE[1]]
    assert decide(more, members) == ["flip decode-2", "start prefill-2"]
    fewer = [ALIKE[0], replace(ALIKE[1], replicas=1)]
    assert decide(fewer, members) == ["flip decode-2", "drain decode-1"]


def test_only_ready_workers_of_alike_pools_of_one_revision_change_their_role():
    members = [ready("prefill-0", "prefill"), *(ready(f"decode-{i}", "decode") for i in range(3))]
    unlike = [ALIKE[0], replace(ALIKE[1], kind="l")]
    assert decide(unlike, members) == ["drain decode-2", "start prefill-1"]
    late = [*members[:3], replace(members[3], state=State.STARTING)]
    assert decide(ALIKE, late) == ["stop decode-2", "start prefill-1"]
    old = [replace(members[0], revision="old"), *members[1:]]
    assert not any("flip" in each for each in decide(ALIKE, old))


def test_a_worker_that_is_changing_its_role_is_left_to_it():
    members = [ready("prefill-0", "prefill"), ready("decode-0", "decode")]
    members.append(Member("prefill-1", "prefill", "prefill", "a", State.FLIPPING))
    assert decide([P, D], members) == ["drain prefill-0"] or decide([P, D], members) == []
    lost = [*members[:2], replace(members[2], state=State.LOST, why="killed")]
    assert decide(ALIKE, lost) == ["stop prefill-1", "start prefill-1", "start decode-1"]


def test_a_worker_that_is_not_ready_goes_before_a_ready_one():
    members = [
        replace(ready("decode-0", "decode"), state=State.STARTING),
        ready("decode-1", "decode"),
    ]
    assert decide([D], members) == ["stop decode-0"]


def test_a_lost_worker_is_replaced_at_once_and_a_crash_loop_is_slowed():
    lost = replace(ready("decode-0", "decode"), state=State.LOST, why="killed")
    [stop, start] = reconcile([D], [lost], {"decode": Losses(1, 100.0)}, 100.0)
    assert (stop.do, stop.name, start.do, start.name) == (Do.STOP, "decode-0", Do.START, "decode-0")
    assert "killed" in stop.reason
    for count, pause in [(2, 1), (3, 2), (4, 4), (20, 30)]:
        losses = {"decode": Losses(count, 100.0)}
        assert decide([D], [lost], losses, 100 + pause - 0.1) == ["stop decode-0"]
        assert decide([D], [lost], losses, 100 + pause) == ["stop decode-0", "start decode-0"]


def test_a_lost_worker_is_replaced_under_its_name():
    lost = replace(ready("decode-1", "decode"), state=State.LOST)
    losses = {"decode": Losses(1, 0.0, places=("decode-1",))}
    assert decide([D], [lost], losses) == ["stop decode-1", "start decode-1"]
    assert decide([replace(D, replicas=2)], [], losses) == ["start decode-1", "start decode-0"]


def test_a_new_revision_is_ready_before_the_old_worker_goes():
    targets = [replace(P, revision="b"), D]
    members = [ready("prefill-0", "prefill"), ready("decode-0", "decode")]
    assert decide(targets, members) == ["start prefill-1"]
    fresh = Member("prefill-1", "prefill", "prefill", "b", State.STARTING)
    assert decide(targets, [*members, fresh]) == []
    fresh = replace(fresh, state=State.READY)
    assert decide(targets, [*members, fresh]) == ["drain prefill-0"]


def test_pools_roll_in_turn_one_worker_at_a_time():
    targets = [replace(P, revision="b", replicas=2), replace(D, revision="b", replicas=2)]
    members = [
        ready("prefill-0", "prefill", "b"),
        ready("prefill-1", "prefill"),
        ready("decode-0", "decode"),
        ready("decode-1", "decode"),
    ]
    assert decide(targets, members) == ["start decode-2"]
    fresh = Member("decode-2", "decode", "decode", "b", State.STARTING)
    assert decide(targets, [*members, fresh]) == [], "one more than wanted in the whole cluster"
    fresh = replace(fresh, state=State.READY)
    assert decide(targets, [*members, fresh]) == ["drain decode-0", "start decode-3"]


def test_the_last_worker_of_a_role_stays_until_another_pool_has_one():
    old, new = Target("p1", "prefill", 0, "a"), Target("p2", "prefill", 1, "a")
    members = [ready("p1-0", "p1", role="prefill"), ready("decode-0", "decode")]
    assert decide([old, new, D], members) == ["start p2-0"]
    members.append(ready("p2-0", "p2", role="prefill"))
    assert decide([old, new, D], members) == ["drain p1-0"]


def test_a_pool_that_left_the_spec_stays_until_the_new_roles_serve():
    both = Target("both", "colocated", 1, "a")
    members = [ready("prefill-0", "prefill"), ready("decode-0", "decode")]
    assert decide([both], members) == ["start both-0"]
    members.append(ready("both-0", "both", role="colocated"))
    assert decide([both], members) == ["drain prefill-0", "drain decode-0"]


DOOR = frozenset({"127.0.0.1:50051", "127.0.0.1:8000"})


def test_gateways_make_room_for_their_replacement():
    gateway = Target("gateway", "gateway", 1, "b", slots=(DOOR,))
    old = replace(ready("gateway-0", "gateway"), holds=DOOR)
    assert decide([gateway], [old]) == ["drain gateway-0"]
    leaving = replace(old, state=State.DRAINING, drain_deadline=60)
    assert decide([gateway], [leaving]) == []
    gone = replace(leaving, drained=True)
    assert decide([gateway], [gone]) == ["stop gateway-0", "start gateway-1"]


def test_a_gateway_on_other_ports_is_ready_before_the_old_one_goes():
    gateway = Target("gateway", "gateway", 1, "b", slots=(frozenset({"127.0.0.1:9000"}),))
    old = replace(ready("gateway-0", "gateway"), holds=DOOR)
    assert decide([gateway], [old]) == ["start gateway-1"]
    fresh = replace(ready("gateway-1", "gateway", "b"), holds=gateway.slots[0])
    assert decide([gateway], [old, replace(fresh, state=State.STARTING)]) == []
    assert decide([gateway], [old, fresh]) == ["drain gateway-0"]


@settings(deadline=None)
@given(st.integers(1, 4), *[st.integers(1, 6)] * 3, st.sampled_from(["g", "0.0.0.0"]))
def test_gateways_move_to_any_other_ports_one_at_a_time(count, grpc, old_http, new_http, host):
    """The ports that the first wants may be those of another that is still there."""
    assume(host == "g" or abs(grpc - new_http) >= count)

    def slots(grpc: int, http: int, host: str = "g") -> tuple[frozenset[str], ...]:
        return tuple(frozenset({f"{host}:{grpc + i}", f"h:{http + i}"}) for i in range(count))

    old = Target("gateway", "gateway", count, "a", slots(3, old_http))
    world = World([replace(old, revision="b", slots=slots(grpc, new_http, host))])
    for i, slot in enumerate(old.slots):
        world.members[f"gateway-{i}"] = replace(ready(f"gateway-{i}", "gateway"), holds=slot)
    for _ in range(12 * count):
        world.now += 1
        world.step()
        held = [address for m in world.members.values() for address in m.holds]
        assert not any(overlap(*two) for two in itertools.combinations(held, 2)), held
        ready_now = [m for m in world.members.values() if m.state is State.READY]
        if host == "g":  # else one new gateway may contend with two old ones, and each new one so
            assert len(ready_now) >= count - 1
        for name in sorted(world.members):
            world.progress(name)
    assert converged(world.targets, list(world.members.values()))


@dataclass
class World:
    """Carries actions out as a cluster would, at a pace that the test draws."""

    targets: list[Target]
    members: dict[str, Member] = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)
    now: float = 0.0

    def step(self) -> list[Action]:
        before = list(self.members.values())
        actions = reconcile(self.targets, before, self.losses, self.now)
        self.check(before, actions)
        for action in actions:
            self.act(action)
        return actions

    def act(self, action: Action) -> None:
        if action.do is Do.START:
            assert action.name not in self.members, "two members by one name"
            target = next(t for t in self.targets if t.pool == action.pool)
            fresh = Member(action.name, action.pool, target.role, action.revision, State.STARTING)
            if target.slots:
                fresh = replace(fresh, holds=target.slots[action.slot])
            self.members[action.name] = fresh
        elif action.do is Do.DRAIN:
            old = self.members[action.name]
            deadline = self.now + 60
            self.members[action.name] = replace(old, state=State.DRAINING, drain_deadline=deadline)
        elif action.do is Do.FLIP:
            assert action.becomes not in self.members, "two members by one name"
            target = next(t for t in self.targets if t.pool == action.pool)
            flipping = (action.becomes, action.pool, target.role, action.revision, State.FLIPPING)
            del self.members[action.name]
            self.members[action.becomes] = Member(*flipping)
        else:
            del self.members[action.name]

    def check(self, before: list[Member], actions: list[Action]) -> None:
        if any(target.slots for target in self.targets):
            return  # one of them may go before its replacement comes
        ready_before = Counter(m.role for m in before if m.state is State.READY)
        wanted: Counter[str] = Counter()
        for target in self.targets:
            wanted[target.role] += target.replicas
        by_name = {m.name: m for m in before}
        after = ready_before.copy()
        for action in actions:
            if action.do in (Do.DRAIN, Do.FLIP):
                assert by_name[action.name].state is State.READY
                after[by_name[action.name].role] -= 1
        for role in ready_before:
            assert after[role] >= min(ready_before[role], wanted[role]), (role, actions)
        if serves(ready_before):
            assert serves(after), actions
        leaving = {a.name for a in actions if a.do is not Do.START}
        new = {(t.pool, t.revision) for t in self.targets}
        staying = [m for m in before if m.live and m.name not in leaving]
        running = Counter(m.pool for m in staying if (m.pool, m.revision) in new)
        started = Counter(a.pool for a in actions if a.do in (Do.START, Do.FLIP))
        for target in self.targets:
            if started[target.pool]:
                total = running[target.pool] + started[target.pool]
                assert total <= target.replicas

    def lose(self, name: str) -> None:
        member = self.members[name]
        self.members[name] = replace(member, state=State.LOST)
        before = self.losses.get(member.pool, Losses())
        self.losses[member.pool] = Losses(before.count + 1, self.now, (*before.places, name))

    def progress(self, name: str) -> None:
        member = self.members[name]
        if member.state in (State.STARTING, State.FLIPPING):
            self.members[name] = replace(member, state=State.READY)
        elif member.state is State.DRAINING:
            self.members[name] = replace(member, drained=True)


def serves(ready_by_role: Counter[str]) -> bool:
    apart = ready_by_role["prefill"] > 0 and ready_by_role["decode"] > 0
    return apart or ready_by_role["colocated"] > 0


ROLES = st.sampled_from(["prefill", "decode", "colocated"])
POOLS = st.lists(
    st.builds(
        Target,
        st.sampled_from(["p", "q", "r"]),
        ROLES,
        st.integers(0, 3),
        st.sampled_from(["a", "b"]),
        kind=st.sampled_from(["", "k"]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda target: target.pool,
).filter(lambda pools: serves(Counter({t.role: t.replicas for t in pools if t.replicas})))


def as_one_revision(pools: list[Target]) -> list[Target]:
    """A role is part of a pool's revision, and colocated workers have no other."""
    return [
        replace(
            t,
            revision=f"{t.revision}-{t.role}",
            kind="" if t.role == "colocated" else t.kind and t.revision,
        )
        for t in pools
    ]


@examples(300)
@given(st.lists(POOLS, min_size=1, max_size=4), st.data())
def test_it_converges_and_never_takes_too_much_away(specs, data):
    world = World([])
    for pools in specs:
        world.targets = as_one_revision(pools)
        for _ in range(data.draw(st.integers(0, 6))):
            world.now += 1
            world.step()
            if world.members:
                name = data.draw(st.sampled_from(sorted(world.members)))
                disturb = data.draw(st.integers(0, 4)) == 0
                (world.lose if disturb else world.progress)(name)
    for _ in range(80):
        world.now += 31
        world.step()
        if converged(world.targets, list(world.members.values())):
            break
        for name in sorted(world.members):
            world.progress(name)
    else:
        raise AssertionError(f"does not converge: {world.targets} {world.members}")
    assert world.step() == []
