import json
import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.destinations import Admission
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.protocol.names_list import BLOCK, NamesList
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.condition import Condition
from services.gateway.registry.entry import Entry, Event, Origin
from services.gateway.registry.preservation import WINDOW_SECONDS
from services.gateway.registry.registry import MAX_CHANGE, RETURN_SECONDS, Keep, Registry, keep_nothing
from shared.bus.messages import MAX_MESSAGE, Health, RegistryChange, Troubled
from shared.client import Client, Source
from shared.settings.model import Collector

HERE, ELSEWHERE = Peer(1, "127.0.0.1", 4000), Peer(2, "192.0.2.7", 4001, Rights("siem", frozenset({"collect"})))


class Table(Registry):
    """A registry whose clock the test sets."""

    def __init__(
        self,
        max_clients: int = 1000,
        keep: Keep = keep_nothing,
        preserve_seconds: float = 0.0,
        max_clients_per_holder: float = math.inf,
    ) -> None:
        self.now = 0.0
        super().__init__(max_clients, lambda: self.now, 1, keep, preserve_seconds, max_clients_per_holder)

    def join(self, name: str, peer: Peer = HERE, origin: Origin = Origin.JSON, **terms: object) -> Entry:
        client = Client(name, 0, peer.address, peer.port)
        return self.grant(client, peer, origin, **terms)  # type: ignore[arg-type]

    @property
    def present(self) -> list[str]:
        return [entry.client.name for entry in self.entries()]


@pytest.fixture
def registry() -> Table:
    """An empty registry at time 0."""
    return Table()


def error_of(action: object, *arguments: object, **options: object) -> str:
    """The error word that an action is refused with."""
    with pytest.raises(RequestError) as caught:
        action(*arguments, **options)  # type: ignore[operator]
    return caught.value.error


def word(registry: Registry, entry: Entry) -> str:
    """The entry's word when it is looked at."""
    registry.refresh_condition(entry)
    return entry.condition.word


def test_generation_never_repeats(registry: Table) -> None:
    """Each entry has a generation of its own, also one that takes another's place."""
    generations = [registry.join(name).client.generation for name in ("a", "b", "a", "c")]
    assert sorted(set(generations)) == generations


def test_name_taken(registry: Table) -> None:
    """A name belongs to the connection that signed it up; from the same address it may be taken over."""
    registry.join("a")
    neighbour = Peer(3, HERE.address, 5000)
    assert error_of(registry.join, "a", neighbour) == "name_taken"
    assert error_of(registry.join, "a", ELSEWHERE, take_over=True) == "name_taken"
    registry.join("a", HERE)
    assert registry.join("a", neighbour, take_over=True).peer == neighbour


def test_entry_is_its_holders(registry: Table) -> None:
    """Who has the same holder renews, replaces and removes it, from anywhere; another at the same address does not."""
    entry = registry.join("a", ELSEWHERE, ttl=5)
    again = Peer(4, "192.0.2.8", 4002, ELSEWHERE.rights)
    other = Peer(5, ELSEWHERE.address, 4003, Rights("other", frozenset({"collect"})))
    for act in (registry.renew, registry.release):
        assert error_of(act, "a", entry.client.generation, other) == "not_permitted"
    assert error_of(registry.join, "a", other, take_over=True) == "name_taken"
    registry.renew("a", entry.client.generation, again)
    assert error_of(registry.join, "a", again) == "name_taken"
    taken = registry.join("a", again, take_over=True)
    registry.release("a", taken.client.generation, ELSEWHERE)
    registry.join("a", ELSEWHERE)
    boss = Peer(6, "192.0.2.9", 4004, Rights("boss", frozenset({"admin"})))
    registry.release("a", registry.join("a", boss, take_over=True).client.generation, boss)


def test_names_protocol_replaces_only_its_own(registry: Table) -> None:
    """On the names protocol a name replaces itself, by this host's and its holder's, never an entry made otherwise."""
    registry.join("a", HERE, Origin.NAMES)
    assert error_of(registry.join, "a", ELSEWHERE, Origin.NAMES) == "name_taken"
    registry.join("a", replace(HERE, id=3, address="127.0.0.2"), Origin.NAMES)
    assert json.loads(b"".join(registry.names.render()))["a"]["address"] == "127.0.0.2"
    registry.join("b", ELSEWHERE, Origin.NAMES)
    registry.join("b", replace(ELSEWHERE, id=4), Origin.NAMES)
    assert error_of(registry.join, "a", HERE, Origin.JSON) == "name_taken"
    registry.join("j", HERE, Origin.JSON)
    registry.join("s", HERE, Origin.SETTINGS)
    assert error_of(registry.join, "j", HERE, Origin.NAMES) == "name_taken"
    assert error_of(registry.join, "s", HERE, Origin.NAMES) == "name_taken"


def test_settings_are_not_changed_from_the_network(registry: Table) -> None:
    """A collector of the settings can't be taken over, renewed or taken away."""
    entry = registry.join("s", HERE, Origin.SETTINGS)
    generation = entry.client.generation
    assert error_of(registry.join, "s", HERE, take_over=True) == "not_permitted"
    assert error_of(registry.release, "s", generation, HERE) == "not_permitted"
    assert error_of(registry.renew, "s", generation, HERE) == "not_permitted"


def test_registry_full() -> None:
    """No more clients than allowed, but those that are in may change."""
    registry = Table(max_clients=2)
    registry.join("a")
    registry.join("b")
    assert error_of(registry.join, "c") == "registry_full"
    registry.join("a")


def test_one_holder_has_not_all_the_room() -> None:
    """Who signs up with a token fills its own share of the registry, not the others'; who is on this host has none."""
    registry = Table(max_clients_per_holder=2)
    for number in range(5):
        registry.join(f"here{number}")
    for name in ("a", "b", "a"):
        registry.join(name, ELSEWHERE, ttl=5)
    assert error_of(registry.join, "c", ELSEWHERE) == "registry_full"
    registry.join("c", Peer(3, ELSEWHERE.address, 1, Rights("other", frozenset({"collect"}))))
    registry.release("b", registry.join("b", HERE, take_over=True).client.generation, HERE)
    registry.join("b", ELSEWHERE)
    assert error_of(registry.join, "d", ELSEWHERE) == "registry_full"
    registry.now = 6.0
    registry.expire()
    registry.join("d", ELSEWHERE)


def test_release_wants_the_generation(registry: Table) -> None:
    """A late `leave` or `renew` can't touch a successor of the same name."""
    old = registry.join("a").client.generation
    new = registry.join("a").client.generation
    assert error_of(registry.release, "a", old, HERE) == error_of(registry.renew, "a", old, HERE) == "stale_generation"
    registry.release("a", new, HERE)
    assert error_of(registry.release, "a", new, HERE) == "stale_generation"
    assert registry.present == []


def test_lease_expires_unless_renewed(registry: Table) -> None:
    """An entry with a time to live is there so long after its last renewal; one without stays."""
    lasting, lease = registry.join("a"), registry.join("b", ttl=10)
    registry.now = 9
    assert registry.expires_in(lasting) is None
    assert registry.expires_in(lease) == 1
    registry.renew("b", lease.client.generation, HERE)
    registry.now = 18.9
    registry.expire()
    assert registry.present == ["a", "b"]
    registry.now = 19
    registry.expire()
    assert registry.present == ["a"]
    assert not registry.leased


def test_held_entries_go_with_their_connection(registry: Table) -> None:
    """What a connection holds goes with it, unless somebody else has it by then."""
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
    registry.release("a", a.generation, HERE)
    again = registry.join("a").client
    registry.release("b", b.generation, HERE)
    registry.commit()
    assert registry.pop_changes() == [RegistryChange(0, 2, [a, b], []), RegistryChange(2, 5, [again], ["b"])]
    assert registry.pop_changes() == []


def test_one_change_is_bounded(registry: Table) -> None:
    """However many change at once, no change grows beyond what a bus message holds."""
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
    everywhere = Admission(largest.streams, (), lambda _: False, lambda _: False)
    change = RegistryChange(1, 2, [everywhere.admit_configured(largest)] * MAX_CHANGE, [])
    assert len(msgspec.msgpack.encode(change)) <= MAX_MESSAGE


def test_every_change_is_an_event(registry: Table) -> None:
    """Joining, changing, leaving and expiring each have a revision of their own, in order."""
    a = registry.join("a", ttl=5)
    again = registry.join("a")
    registry.join("b", ttl=5)
    registry.release("a", again.client.generation, HERE)
    registry.now = 5
    registry.expire()
    told = [(event.kind, event.revision, event.entry.client.name) for event in registry.pop_events()]
    assert told == [("joined", 1, "a"), ("changed", 2, "a"), ("joined", 3, "b"), ("left", 4, "a"), ("expired", 5, "b")]
    assert a.client.generation < again.client.generation
    assert registry.pop_events() == []


def test_change_that_is_not_kept_is_not_made() -> None:
    """When a change can't be written it is refused, and everything is as before."""

    def fail(events: Sequence[Event], generation: int) -> None:
        if broken:
            raise RequestError("unavailable", "no space")

    registry, broken = Table(keep=fail), False
    entry = registry.join("a", ttl=1)
    broken = True
    assert error_of(registry.join, "b") == error_of(registry.join, "a") == "unavailable"
    assert error_of(registry.release, "a", entry.client.generation, HERE) == "unavailable"
    assert registry.present == ["a"]
    assert registry.commit() == 1
    broken = False
    assert registry.join("b").revision == 2


def test_settings_that_can_not_be_kept_change_nothing() -> None:
    """Where one of their collectors could not be written, none comes, goes or changes."""
    kept: list[list[str]] = []

    def keep(events: Sequence[Event], generation: int) -> None:
        kept.append([event.kind for event in events])
        if broken:
            raise RequestError("unavailable", "no space")

    registry, broken = Table(keep=keep), False
    a, b, c = (Client(name, 0, "10.0.0.1", 9, streams=("messages",)) for name in "abc")
    registry.configure([a, b])
    before, broken = registry.commit(), True
    with pytest.raises(RequestError):
        registry.configure([msgspec.structs.replace(a, port=10), c])
    assert (registry.present, registry.commit()) == (["a", "b"], before)
    assert kept == [["joined", "joined"], ["left", "changed", "joined"]]
    broken = False
    registry.configure([msgspec.structs.replace(a, port=10), c])
    assert registry.present == ["a", "c"]
    generations = [entry.client.generation for entry in registry.entries()]
    assert len(set(generations)) == 2
    assert min(generations) > 2


def test_expiry_that_is_not_kept_comes_later() -> None:
    """An entry whose time is up, or whose connection is gone, stays while that can't be written; then it goes."""

    def fail(events: Sequence[Event], generation: int) -> None:
        if broken:
            raise RequestError("unavailable", "no space")

    registry, broken = Table(keep=fail), False
    registry.join("a", ttl=1)
    registry.join("b", hold=True)
    broken, registry.now = True, 2
    registry.expire()
    registry.release_held(HERE)
    assert registry.present == ["a", "b"]
    broken, registry.now = False, 3
    registry.expire()
    assert registry.present == []


def lease(registry: Table, count: int, ttl: float = 10) -> list[Entry]:
    """So many entries with a lease."""
    return [registry.join(f"n{number}", ttl=ttl) for number in range(count)]


def test_many_missing_renewals_stop_expiry() -> None:
    """When over 15 % of the renewals due are missing nothing expires, until they come or the time for that is over."""
    registry = Table(preserve_seconds=100)
    entries = lease(registry, 20)
    registry.now = 9
    for entry in entries[:16]:
        registry.renew(entry.client.name, entry.client.generation, HERE)
    registry.now = 10
    registry.expire()
    assert (registry.preserving, len(registry)) == (True, 20)
    for entry in entries:
        registry.renew(entry.client.name, entry.client.generation, HERE)
    registry.now = 11
    registry.expire()
    assert (registry.preserving, len(registry)) == (False, 20)
    registry.now = 11 + WINDOW_SECONDS
    registry.expire()
    assert registry.preserving
    registry.now += 99
    registry.expire()
    assert registry.preserving
    registry.now += 1
    registry.expire()
    assert (registry.preserving, len(registry)) == (False, 0)


@pytest.mark.parametrize(("count", "renewing"), [(20, 17), (9, 0), (1, 0)])
def test_few_missing_renewals_expire(count: int, renewing: int) -> None:
    """Losing 15 % of the leases or less, or of only a few leases however many, is no reason to stop expiring."""
    registry = Table(preserve_seconds=100)
    entries = lease(registry, count)
    registry.now = 9
    for entry in entries[:renewing]:
        registry.renew(entry.client.name, entry.client.generation, HERE)
    registry.now = 10
    registry.expire()
    assert (registry.preserving, len(registry)) == (False, renewing)


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


def test_leases_begin_anew_after_a_restart(registry: Table) -> None:
    """What an earlier start kept has all of its time again, however little was left of it."""
    earlier = Peer(0, HERE.address, 4000)
    kept = Entry(Client("a", 1, HERE.address, 9), Origin.JSON, earlier, 5.0, math.inf, 0, False, 0.0)
    registry.now = 100.0
    registry.restore([kept], 7)
    registry.now = 104.9
    registry.expire()
    assert registry.present == ["a"]
    registry.now = 105.0
    registry.expire()
    assert registry.present == []


def test_held_entry_outlives_a_restart_for_a_while(registry: Table) -> None:
    """What a connection held may be signed up again from the same address after a restart, or it goes."""
    earlier = Peer(0, HERE.address, 4000)
    kept = [Entry(Client(name, 1, HERE.address, 9), Origin.JSON, earlier, 0.0, math.inf, 0, True, 0.0) for name in "ab"]
    registry.restore(kept, 7)
    assert error_of(registry.join, "a", ELSEWHERE) == "name_taken"
    assert error_of(registry.join, "a", HERE, Origin.NAMES) == "name_taken"
    assert registry.join("a", HERE, hold=True).revision == 8
    registry.now = RETURN_SECONDS
    registry.expire()
    assert registry.present == ["a"]


def collect(registry: Table, name: str, source: Source = "relay") -> Entry:
    """Enter a collector."""
    return registry.grant(Client(name, 0, "127.0.0.1", 9, streams=("messages",), source=source), HERE, Origin.JSON)


def test_health_follows_what_is_served(registry: Table) -> None:
    """A collector is fresh, then waiting when nobody answered, then ok; a name is always ok."""
    name, first = registry.join("n"), collect(registry, "c")
    serving = registry.serving["relay"]
    assert [word(registry, entry) for entry in (name, first)] == ["ok", "fresh"]
    revision = registry.commit()
    serving.note_unanswered(revision)
    assert word(registry, first) == "waiting"
    complete = [serving.complete]
    serving.note_served(revision)
    assert [*complete, serving.complete] == [False, True]
    second = collect(registry, "d")
    assert [word(registry, entry) for entry in (first, second)] == ["ok", "fresh"]
    serving.forget()
    assert word(registry, first) == "waiting"
    assert registry.collectors == 2


def test_health_is_that_of_the_entrys_source(registry: Table) -> None:
    """What is known of the copies of one source says nothing of the other's, and either shows in the version."""
    relay, original = collect(registry, "r"), collect(registry, "o", "original")
    versions = [registry.version()]
    registry.serving["original"].note_served(registry.commit())
    versions.append(registry.version())
    assert [word(registry, entry) for entry in (relay, original)] == ["fresh", "ok"]
    assert [serving.complete for serving in registry.serving.values()] == [False, True]
    registry.serving["relay"].note_unanswered(registry.commit())
    versions.append(registry.version())
    assert [word(registry, entry) for entry in (relay, original)] == ["waiting", "ok"]
    assert len(set(versions)) == 3


def report(number: int, *troubled: Troubled, piece: int = 0, pieces: int = 1) -> Health:
    """What who sends relay copies says."""
    return Health("relay", number, piece, pieces, list(troubled))


def test_trouble_shows_with_since_when_and_its_cost(registry: Table) -> None:
    """What is said of a collector's present generation is its condition, and the next list replaces all of it."""
    entry, other = collect(registry, "c"), collect(registry, "d")
    registry.serving["relay"].note_served(registry.commit())
    generation = entry.client.generation
    registry.now = 100.0
    before = registry.version()
    registry.note_health(1, report(1, Troubled("c", generation, "slow", 2500, 7), Troubled("d", 1 << 40, "slow", 0, 1)))
    assert registry.version() != before
    registry.refresh_conditions()
    assert (entry.condition, registry.lasted(entry.condition)) == (Condition("slow", 97.5, 7), 2.5)
    assert other.condition.word == "ok"
    registry.now = 101.0
    registry.note_health(1, report(2))
    registry.refresh_conditions()
    assert entry.condition == Condition("ok", 101.0)


def test_trouble_counts_only_while_copies_flow(registry: Table) -> None:
    """A collector that is not served waits, whatever was said of it; with its sender the word is forgotten."""
    entry = collect(registry, "c")
    serving = registry.serving["relay"]
    registry.note_health(1, report(1, Troubled("c", entry.client.generation, "refusing", 0, 1)))
    assert word(registry, entry) == "fresh"
    serving.note_served(registry.commit())
    assert word(registry, entry) == "refusing"
    serving.forget()
    assert word(registry, entry) == "waiting"
    serving.note_served(registry.commit())
    assert word(registry, entry) == "ok"


def test_only_whole_lists_count(registry: Table) -> None:
    """Of a list that lost a piece, or is mixed with another sender's, nothing is taken; the next one is."""
    entry = collect(registry, "c")
    registry.serving["relay"].note_served(registry.commit())
    sick = Troubled("c", entry.client.generation, "slow", 0, 1)
    registry.note_health(1, report(1, sick, pieces=2))
    registry.note_health(2, report(1, piece=1, pieces=2))
    registry.note_health(1, report(2, sick, piece=1, pieces=2))
    assert word(registry, entry) == "ok"
    registry.note_health(1, report(3, pieces=2))
    registry.note_health(1, report(3, sick, piece=1, pieces=2))
    assert word(registry, entry) == "slow"


def follow(changes: list[RegistryChange]) -> dict[str, Client]:
    """What a subscriber that applies every change ends up with."""
    clients: dict[str, Client] = {}
    for change in changes:
        for name in change.left:
            clients.pop(name, None)
        clients |= {client.name: client for client in change.joined}
    return clients


steps = st.tuples(st.sampled_from(["join", "release", "expire", "commit"]), st.integers(0, 6), st.integers(0, 3))


@given(st.lists(steps, max_size=60))
def test_changes_lead_to_the_registry(actions: list[tuple[str, int, int]]) -> None:
    """Whatever happens, all changes one after the other give exactly the registry, and so does the rendered list."""
    registry = Table()
    for action, number, ttl in actions:
        name = f"n{number}"
        present = {entry.client.name: entry.client for entry in registry.entries()}
        if action == "join":
            registry.join(name, ttl=ttl)
        elif action == "release" and name in present:
            registry.release(name, present[name].generation, HERE)
        elif action == "expire":
            registry.now += 1
            registry.expire()
        else:
            registry.commit()
    registry.commit()
    present = {entry.client.name: entry.client for entry in registry.entries()}
    assert follow(registry.pop_changes()) == present
    assert b"".join(registry.names.render()) == listed(present).encode()


def listed(clients: dict[str, Client]) -> str:
    """The list as the documented server prints it."""
    return json.dumps(
        {name: {"address": client.address, "port": client.port, "name": name} for name, client in clients.items()}
    )


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_list_is_what_json_dumps_prints(count: int) -> None:
    """The rendered list is `json.dumps` to the byte, in order of first registration, after changes and removals too."""
    names, clients = NamesList(), {}
    for number in range(count):
        name = f'n{number} "é\u2028'
        clients[name] = Client(name, 0, "127.0.0.1", number)
        names.put(clients[name])
        assert number % 50 or b"".join(names.render()) == listed(clients).encode()
    for name in list(clients)[: count // 2]:
        names.remove(name)
        del clients[name]
    for name in list(clients)[::3]:
        clients[name] = Client(name, 0, "::1", 1)
        names.put(clients[name])
    assert b"".join(names.render()) == listed(clients).encode()
