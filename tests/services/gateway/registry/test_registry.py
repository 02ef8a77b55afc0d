import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.registry.revisions import MAX_CHANGE
from shared.bus.messages import MAX_MESSAGE, RegistryChange
from shared.client import MAX_REASON, Client, Withheld
from shared.settings.entries import Collector
from shared.settings.own_listeners import OwnListeners
from tests.services.gateway.protocol.test_names_answer import listed
from tests.services.gateway.table import ELSEWHERE, HERE, Disk, Table


@pytest.fixture
def registry() -> Table:
    """An empty registry at time 0."""
    return Table()


def test_generation_never_repeats(registry: Table) -> None:
    """Each entry has a generation of its own, also one that takes another's place."""
    generations = [registry.join(name).client.generation for name in ("a", "b", "a", "c")]
    assert sorted(set(generations)) == generations


def test_held_entries_go_with_their_connection(registry: Table) -> None:
    """An entry that a connection holds goes with it, unless another client has it by then."""
    registry.join("a", hold=True)
    registry.join("b", hold=True)
    registry.join("c")
    assert registry.holds_any(HERE)
    registry.join("b", Peer(3, HERE.address, 1), take_over=True)
    registry.release_held(HERE)
    assert registry.present == ["b", "c"]
    assert not registry.holds_any(HERE)


def test_changes_are_numbered(registry: Table) -> None:
    """A commit puts all changes since the last one under the next revision; without changes there is none."""
    a, b = registry.join("a").client, registry.join("b").client
    assert registry.commit() == registry.commit() == 2
    registry.release_as("a", a.generation, HERE)
    again = registry.join("a").client
    registry.release_as("b", b.generation, HERE)
    registry.commit()
    assert registry.pop_changes() == [RegistryChange(0, 2, [a, b], []), RegistryChange(2, 5, [again], ["b"])]
    assert registry.pop_changes() == []


def test_one_change_is_bounded(registry: Table) -> None:
    """No change grows beyond what a bus message holds, however many entries change at once."""
    for number in range(300):
        registry.join(f"n{number}", ttl=1)
    registry.now = 2
    registry.expire()
    registry.commit()
    changes = registry.pop_changes()
    assert [change.after for change in changes[1:]] == [change.revision for change in changes[:-1]]
    assert (changes[0].after, changes[-1].revision) == (0, 600)
    assert max(len(change.joined) + len(change.left) for change in changes) == MAX_CHANGE
    assert follow(changes) == {}


def test_largest_change_fits_a_message() -> None:
    """A change of as many collectors as one may have, each as large as settings allow, is under the bus's limit."""
    largest = Collector(
        name="\U0001f4e6" * 63,
        streams=tuple(f"{number:064}" for number in range(64)),
        address="2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
        port=65_535,
        prefixes=tuple(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{number:x}/128" for number in range(0xF000, 0xF100)),
        group="g" * 64,
    )
    everywhere = Destinations(largest.streams, OwnListeners(()), lambda _: False, lambda _: False)
    order = Withheld("\U0001f4e6" * 255, 1.0, "\U0001f4e6" * MAX_REASON)
    client = msgspec.structs.replace(everywhere.resolve_configured(largest), withheld=order)
    change = RegistryChange(1, 2, [client] * MAX_CHANGE, [])
    assert len(msgspec.msgpack.encode(change)) <= MAX_MESSAGE


def test_every_change_is_an_event(registry: Table) -> None:
    """Joining, changing, leaving and expiring each have a revision of their own, in order."""
    a = registry.join("a", ttl=5)
    again = registry.join("a")
    registry.join("b", ttl=5)
    registry.release_as("a", again.client.generation, HERE)
    registry.now = 5
    registry.expire()
    told = [(event.kind, event.revision, event.entry.client.name) for event in registry.pop_events()]
    assert told == [("joined", 1, "a"), ("changed", 2, "a"), ("joined", 3, "b"), ("left", 4, "a"), ("expired", 5, "b")]
    assert a.client.generation < again.client.generation
    assert registry.pop_events() == []


def test_change_that_is_not_kept_is_not_made() -> None:
    """A change that can't be written is refused, and everything is as before."""
    disk = Disk()
    registry = Table(keep=disk.keep)
    entry = registry.join("a", ttl=1)
    disk.full = True
    for name in ("a", "b"):
        with pytest.raises(OSError, match="no space"):
            registry.join(name)
    with pytest.raises(OSError, match="no space"):
        registry.release(entry)
    assert registry.present == ["a"]
    assert registry.commit() == 1
    disk.full = False
    assert registry.join("b").revision == 2


def test_settings_that_can_not_be_kept_change_nothing() -> None:
    """No collector of the settings comes, goes or changes where one of them could not be written."""
    disk = Disk()
    registry = Table(keep=disk.keep)
    a, b, c = (Client(name, 0, "10.0.0.1", 9, streams=("messages",)) for name in "abc")
    registry.configure([a, b])
    before, disk.full = registry.commit(), True
    with pytest.raises(OSError, match="no space"):
        registry.configure([msgspec.structs.replace(a, port=10), c])
    assert (registry.present, registry.commit()) == (["a", "b"], before)
    assert disk.kept == [["joined", "joined"], ["left", "changed", "joined"]]
    disk.full = False
    registry.configure([msgspec.structs.replace(a, port=10), c])
    assert registry.present == ["a", "c"]
    generations = [entry.client.generation for entry in registry.entries()]
    assert len(set(generations)) == 2
    assert min(generations) > 2


def test_configured_collectors_are_those_of_the_settings(registry: Table) -> None:
    """New settings add, change and take away their own collectors; one that is the same is not touched."""
    registry.join("own")
    registry.join("b", ELSEWHERE)
    a, b, c = (Client(name, 0, "10.0.0.1", 9, streams=("messages",)) for name in "abc")
    registry.configure([a, b])
    assert [event.kind for event in registry.pop_events()] == ["joined", "joined", "joined", "changed"]
    revision = registry.commit()
    registry.configure([a, b])
    assert registry.commit() == revision
    registry.configure([msgspec.structs.replace(a, port=10), c])
    told = [(event.kind, event.entry.client.name) for event in registry.pop_events()]
    assert told == [("left", "b"), ("changed", "a"), ("joined", "c")]
    assert registry.present == ["own", "a", "c"]


def test_collector_of_the_settings_stays_withheld(registry: Table) -> None:
    """The same settings change nothing of it; new ones do not end the order, nor does its going and coming back."""
    client, order = Client("siem", 0, "10.0.0.1", 9, streams=("messages",)), Withheld("ops", 1.0)
    registry.configure([client])
    registry.withhold(next(iter(registry.entries())), order)
    revision = registry.commit()
    for configured, changed in (([client], False), ([msgspec.structs.replace(client, port=10)], True)):
        registry.configure(configured)
        assert [entry.client.withheld for entry in registry.entries()] == [order]
        assert (registry.commit() > revision) == changed
    registry.configure([])
    registry.configure([client])
    assert [entry.client.withheld for entry in registry.entries()] == [order]
    registry.end_withholding("siem")
    assert [entry.client.withheld for entry in registry.entries()] == [None]


def follow(changes: list[RegistryChange]) -> dict[str, Client]:
    """Return the registry of a subscriber that applies every change."""
    clients: dict[str, Client] = {}
    for change in changes:
        for name in change.left:
            clients.pop(name, None)
        clients |= {client.name: client for client in change.joined}
    return clients


steps = st.tuples(
    st.sampled_from(["join", "release", "expire", "withhold", "end_withholding", "commit"]),
    st.integers(0, 6),
    st.integers(0, 3),
)


@given(st.lists(steps, max_size=60))
def test_changes_lead_to_the_registry(actions: list[tuple[str, int, int]]) -> None:
    """All changes one after the other give exactly the registry, and so does the rendered list, whatever happens."""
    registry = Table()
    for action, number, ttl in actions:
        name = f"n{number}"
        present = {entry.client.name: entry.client for entry in registry.entries()}
        if action == "join":
            registry.join(name, ttl=ttl)
        elif action == "release" and name in present:
            registry.release_as(name, present[name].generation, HERE)
        elif action == "expire":
            registry.now += 1
            registry.expire()
        elif action == "withhold" and (entry := registry.find(name)):
            registry.withhold(entry, Withheld("ops", float(ttl)))
        elif action == "end_withholding":
            registry.end_withholding(name)
        else:
            registry.commit()
    registry.commit()
    present = {entry.client.name: entry.client for entry in registry.entries()}
    assert follow(registry.pop_changes()) == present
    assert b"".join(registry.names.render()) == listed(present).encode()
