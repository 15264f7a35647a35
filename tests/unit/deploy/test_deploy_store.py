"""What a cluster's store keeps, for whom, and which of two copies is believed."""

from __future__ import annotations

import os
import stat

import pytest

from crossdock.deploy.store import KEY_BYTES, ClusterStore
from crossdock.proto.errors import ConfigError, Unavailable


class Elsewhere:
    """A mirror that every node reaches."""

    def __init__(self) -> None:
        self.document = b""
        self.reached = True

    def load(self) -> bytes:
        return self.document

    def save(self, document: bytes) -> None:
        if not self.reached:
            raise Unavailable("the mirror does not answer")
        self.document = document

    def end(self) -> None:
        if not self.reached:
            raise Unavailable("the mirror does not answer")
        self.document = b""


@pytest.fixture
def mirror():
    return Elsewhere()


def on_node(tmp_path, name: str, mirror: Elsewhere) -> ClusterStore:
    """A controller's store on a node with a disk of its own."""
    return ClusterStore("test", tmp_path / name, mirror)


def test_everything_is_the_owners_alone(store):
    store.save_good("a spec")
    store.save_secrets({"ca.key": b"secret"})
    with store.locked():
        everything = [store.folder.parent, *store.folder.parent.rglob("*")]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in everything}
    assert modes == {"clusters": 0o700, "test": 0o700, "state.json": 0o600, "test.lock": 0o600}


def test_a_folder_that_others_could_read_is_closed(tmp_path):
    (tmp_path / "clusters" / "test").mkdir(parents=True)
    (tmp_path / "clusters" / "test").chmod(0o777)
    store = ClusterStore("test", tmp_path)
    store.begin("a spec", "life")
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_a_link_in_the_folders_place_is_not_followed(tmp_path):
    """Where another user may write to CROSSDOCK_HOME: what it led to would be closed to others."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (tmp_path / "clusters").symlink_to(elsewhere)
    with pytest.raises(Unavailable, match="not a folder of this user"):
        ClusterStore("test", tmp_path).begin("a spec", "life")
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755 and not list(elsewhere.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives folders away")
def test_a_folder_of_another_user_is_not_used(tmp_path):
    (tmp_path / "clusters").mkdir()
    os.chown(tmp_path / "clusters", 65534, 65534)
    with (
        pytest.raises(Unavailable, match="not a folder of this user"),
        ClusterStore("test", tmp_path).locked(),
    ):
        pass


def test_a_life_begins_once_and_another_with_another_key(store):
    key = store.key()
    assert len(key) == KEY_BYTES
    store.save_spec("changed since", 2)
    store.save_secrets({"ca.key": b"secret"})
    store.begin("as first applied", "life")
    assert store.key() == key and store.spec() == "changed since"
    store.begin("as first applied", "next life")
    assert store.key() != key and store.spec() == "as first applied"
    assert store.secret("ca.key") == b""


def test_secrets_given_at_the_start_are_there_and_can_be_replaced(tmp_path):
    store = ClusterStore("test", tmp_path)
    store.begin("a spec", "life", {"ca.key": b"one", "ca.crt": b"two"})
    store.save_secrets({"ca.crt": bytes(range(256))})
    again = ClusterStore("test", tmp_path)
    again.begin("a spec", "life", {"ca.key": b"another"})
    assert again.secret("ca.key") == b"one" and again.secret("ca.crt") == bytes(range(256))
    assert again.key() == store.key()


def test_another_node_goes_on_with_key_spec_generation_and_secrets(tmp_path, mirror):
    first = on_node(tmp_path, "a", mirror)
    first.begin("one", "life")
    first.save_spec("two", 2)
    first.save_good("two")
    first.save_secrets({"ca.key": b"secret"})
    second = on_node(tmp_path, "b", mirror)
    second.begin("one", "life")
    assert (second.spec(), second.good_spec(), second.generation()) == ("two", "two", 2)
    assert second.key() == first.key() and second.secret("ca.key") == b"secret"


def test_a_node_with_an_old_copy_follows_the_newer_one(tmp_path, mirror):
    first, second = on_node(tmp_path, "a", mirror), on_node(tmp_path, "b", mirror)
    first.begin("one", "life")
    second.begin("one", "life")
    second.save_spec("two", 2)
    back = on_node(tmp_path, "a", mirror)
    back.begin("one", "life")
    assert back.spec() == "two" and back.generation() == 2
    assert ClusterStore("test", tmp_path / "a").spec() == "two", "its disk has it as well"


def test_a_mirror_that_lost_everything_gets_it_back(tmp_path, mirror):
    store = on_node(tmp_path, "a", mirror)
    store.begin("one", "life")
    store.save_spec("two", 2)
    mirror.document = b""
    on_node(tmp_path, "a", mirror).begin("one", "life")
    elsewhere = on_node(tmp_path, "b", mirror)
    elsewhere.begin("one", "life")
    assert elsewhere.spec() == "two" and elsewhere.key() == store.key()


def test_a_longer_life_of_before_does_not_count(tmp_path, mirror):
    before = on_node(tmp_path, "a", mirror)
    before.begin("old", "life")
    for generation in range(2, 6):
        before.save_spec("older", generation)
    now = on_node(tmp_path, "b", mirror)
    now.begin("new", "next life")
    back = on_node(tmp_path, "a", mirror)
    back.begin("new", "next life")
    assert back.spec() == "new" and back.generation() == 1 and back.key() == now.key()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"life": "life", "secrets": {}, "x": 1}'])
def test_a_damaged_copy_is_no_copy(tmp_path, mirror, damage):
    store = on_node(tmp_path, "a", mirror)
    store.begin("one", "life")
    store.save_spec("two", 2)
    (store.folder / "state.json").write_bytes(damage)
    again = on_node(tmp_path, "a", mirror)
    again.begin("one", "life")
    assert again.spec() == "two"


def test_what_the_mirror_does_not_take_was_not_changed(tmp_path, mirror):
    store = on_node(tmp_path, "a", mirror)
    store.begin("one", "life")
    mirror.reached = False
    with pytest.raises(Unavailable, match="does not answer"):
        store.save_spec("two", 2)
    assert store.spec() == "one" and store.generation() == 1
    assert ClusterStore("test", tmp_path / "a").spec() == "one"
    mirror.reached = True
    store.save_spec("two", 2)
    assert store.spec() == "two"


def test_the_end_is_the_end_of_both_copies(tmp_path, mirror):
    store = on_node(tmp_path, "a", mirror)
    store.begin("one", "life")
    store.end()
    assert not store.folder.exists() and not mirror.document
    store.begin("one", "life")
    mirror.reached = False
    store.end()
    assert not store.folder.exists(), "also where the mirror went before"


def test_one_name_one_cluster(store):
    other = ClusterStore("test", store.folder.parent.parent)
    with store.locked(), pytest.raises(ConfigError, match="served by another"), other.locked():
        pass
    with other.locked():
        pass
    assert not list(store.folder.parent.glob("*.lock"))
