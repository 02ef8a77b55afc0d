"""Replicas of one log: they agree, whatever came between, and whichever of them has written it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.gateway.admission.peer import Peer
from services.gateway.cluster.records import Entered, ListIdentity, Session, decode, encode, key_of
from services.gateway.cluster.replica import Replica
from services.gateway.cluster.sessions import SESSION_SECONDS, Sessions
from services.gateway.registry.changes import never_keep
from services.gateway.registry.entry import Event, Orders, Origin
from services.gateway.registry.reached_places import PastByName
from services.gateway.registry.registry import RETURN_SECONDS, Registry
from shared.client import Client, Withheld

STORED_AT: Final = 1_800_000_000.0
"""The Unix time at which every record is stored."""


class NoCache:
    """A cache that keeps nothing."""

    def keep(self, events: Sequence[Event], generation: int, withheld: Orders, pasts: PastByName) -> None:
        """Keep nothing."""

    def keep_identity(self, epoch: str, group_secret: bytes) -> None:
        """Keep nothing."""


class Log:
    """A log in memory, with one value a key, as a bucket with history 1 has it."""

    def __init__(self) -> None:
        self.last = 0
        self.kept: dict[str, tuple[int, bytes]] = {}

    def write(self, key: str, data: bytes) -> None:
        """Write a record."""
        self.last += 1
        self.kept[key] = self.last, data

    def since(self, position: int) -> list[tuple[int, str, bytes, float]]:
        """Return what there is behind a position, in order."""
        return sorted((at, key, data, STORED_AT) for key, (at, data) in self.kept.items() if at > position)


class Member:
    """A node's registry and its replica."""

    def __init__(self, log: Log, node: str, boot: int = 1) -> None:
        self.now = 0.0
        self.log = log
        self.sessions = Sessions(node, boot)
        self.registry = Registry(lambda: self.now, 1, never_keep)
        self.registry.node, self.registry.boot = node, boot
        self.replica = Replica(self.registry, self.sessions, NoCache(), lambda: self.now, lambda: None)
        self.replica.begin(anew=True)
        self.landed = 0

    def follow(self) -> None:
        """Apply all that there is, and note that it was all."""
        for record in self.log.since(self.replica.position):
            self.replica.receive(*record)
        self.replica.caught_up()

    def live(self, *, live: bool = True) -> None:
        """Write the session."""
        last = {"revision": self.registry.revision, "generation": self.registry.generation}
        record = Session(node=self.sessions.own, boot=self.sessions.boot, count=1, live=live, **last)
        self.log.write(key_of(record), encode(record))

    def end(self, other: "Member") -> None:
        """End the session of another node."""
        record = Session(node=other.sessions.own, boot=other.sessions.boot, count=1, live=False)
        self.log.write(key_of(record), encode(record))

    def change(self, act: str, name: str, **more: object) -> None:
        """Decide and write a change by a method of the registry, if there is anything to change."""
        registry, entry = self.registry, self.registry.find(name)

        def grant() -> object:
            client = Client(name, 0, "192.0.2.1", 9, streams=("messages",))
            return registry.grant(client, Peer(5, "192.0.2.1", 9), Origin.JSON, **more)  # type: ignore[arg-type]

        def withhold() -> None:
            if entry is not None:
                registry.withhold(entry, Withheld("admin", 1.0))

        acts = {
            "grant": grant,
            "release": lambda: registry.release(entry) if entry else None,
            "move": lambda: registry.move(entry) if entry else None,
            "withhold": withhold,
            "end": lambda: registry.end_withholding(name) if name in registry.withheld else None,
        }
        _, changes = registry.plan(acts[act])
        for record in self.replica.propose(changes, self._note_landed) if changes else ():
            self.log.write(key_of(record), encode(record))

    def _note_landed(self) -> None:
        self.landed += 1

    @property
    def content(self) -> object:
        """The list, as all nodes should have it."""
        entries = {entry.client.name: (entry.client, entry.home) for entry in self.registry.entries()}
        return entries, self.registry.revision, dict(self.registry.withheld)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grant", "grant", "release", "move", "withhold", "end", "follow"]),
            st.sampled_from(["one", "two", "three"]),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_replicas_agree(steps: list[tuple[str, str, bool]]) -> None:
    """Two nodes that change what they know, one that reads now and then, and one that comes late have the same list."""
    log = Log()
    a, b, seldom = (Member(log, node) for node in ("a", "b", "seldom"))
    for act, name, by_a in steps:
        if act == "follow":
            seldom.follow()
            continue
        writer = a if by_a else b
        writer.follow()  # or its record would be refused
        writer.change(act, name)
    late = Member(log, "late")
    for member in (a, b, seldom, late):
        member.follow()
    assert a.content == b.content == seldom.content
    assert late.content == a.content or _skipped(late, a)


def _skipped(late: Member, other: Member) -> bool:
    """Return whether the lists are the same but for the revision: records of what is gone may be gone too."""
    late.registry.revision = other.registry.revision
    return bool(late.content == other.content)


def test_numbers_are_given_once() -> None:
    """An entry that came and went before a node read of it has had its generation and revisions, also for that node."""
    log = Log()
    a, b, late = (Member(log, node) for node in ("a", "b", "late"))
    a.change("grant", "one")
    a.follow()
    a.change("release", "one")
    for member in (a, b):
        member.follow()
    assert (b.registry.revision, b.registry.generation) == (2, a.registry.generation)
    b.change("grant", "one")
    b.follow()
    assert _one(b).client.generation > a.registry.generation
    b.change("release", "one")
    b.follow()
    b.live()
    log.kept = {key: kept for key, kept in log.kept.items() if key.startswith("session.")}  # a day later
    late.follow()
    assert (late.registry.revision, late.registry.generation) == (b.registry.revision, b.registry.generation)


def test_a_revision_is_of_one_content() -> None:
    """Each event has the next revision at every node, however many were written together."""
    log = Log()
    a, b = Member(log, "a"), Member(log, "b")
    for name in ("one", "two", "three"):
        a.follow()
        a.change("grant", name)
    for member in (a, b):
        member.follow()
        assert [event.revision for event in member.registry.pop_events()] == [1, 2, 3]
    assert a.landed == 3


def test_the_home_measures_a_lease() -> None:
    """A lease is measured at its home alone; when that has gone, at the first live node, with its whole time."""
    log = Log()
    a, b, c = (Member(log, node) for node in "abc")
    for member in (a, b, c):
        member.live()
    b.follow()
    b.change("grant", "one", ttl=10.0)
    for member in (a, b, c):
        member.follow()
    shown = [member.registry.leases.active for member in (a, b, c)]
    assert shown == [False, True, False]
    assert [member.registry.leases.expires_in(_one(member)) for member in (a, b, c)] == [10.0, 10.0, 10.0]
    a.now = 8.0
    a.end(b)
    for member in (a, b, c):
        member.follow()
    assert [member.registry.leases.active for member in (a, b, c)] == [True, True, False]
    assert _one(a).expires_at == 18.0
    assert _one(b).expires_at == float("inf"), "a node whose session has ended measures nothing"
    a.change("move", "one")
    for member in (a, b, c):
        member.follow()
        assert _one(member).home == "a"


def _one(member: Member):  # type: ignore[no-untyped-def]
    found = member.registry.find("one")
    assert found is not None
    return found


def test_what_a_gone_gateway_held_is_nobodys() -> None:
    """An entry that a connection holds becomes one of an earlier start when its gateway has another boot."""
    log = Log()
    a, b = Member(log, "a"), Member(log, "b", boot=1)
    a.live()
    b.live()
    b.follow()
    b.change("grant", "one", hold=True)
    for member in (a, b):
        member.follow()
    assert (_one(a).peer.id, _one(b).peer.id) == (-1, 5)
    again = Member(log, "b", boot=2)
    again.live()
    for member in (a, again):
        member.follow()
        assert (_one(member).peer.id, _one(member).ttl) == (0, RETURN_SECONDS)
    assert _one(again).expires_at < float("inf")


def test_a_start_with_what_was_known_last() -> None:
    """A gateway that begins with the list of an earlier start has the same of it as one that begins with nothing."""
    log = Log()
    a, b = Member(log, "a"), Member(log, "b", boot=1)
    a.live()
    b.live()
    for member, name in ((a, "one"), (b, "two"), (a, "gone")):
        member.follow()
        member.change("grant", name, hold=True)
    b.follow()
    known = [replace(entry, peer=replace(entry.peer, id=0)) for entry in b.registry.entries()]
    a.follow()
    a.change("release", "gone")
    again, fresh = Member(log, "b", boot=2), Member(log, "b", boot=2)
    again.registry.restore(known, b.registry.revision)
    assert len(again.registry) == 3
    again.live()
    for member in (again, fresh):
        member.follow()
        peers = {entry.client.name: (entry.peer.id, entry.ttl) for entry in member.registry.entries()}
        assert peers == {"one": (-1, 0), "two": (0, RETURN_SECONDS)}
    again.end(a)
    again.follow()
    assert _one(again).peer.id == 0
    assert _one(again).expires_at < float("inf"), "nobody else measures it"


def test_a_log_that_is_read_anew_tells_who_holds_an_entry() -> None:
    """A start knows from the sessions behind the entries which connections hold these still, and which do not."""
    log = Log()
    a, b, gone = (Member(log, node) for node in ("a", "b", "gone"))
    for member, name in ((b, "one"), (gone, "two")):
        member.live()
        member.follow()
        member.change("grant", name, hold=True)
    b.live()  # as each second
    b.end(gone)
    a.live()
    a.follow()
    peers = {entry.client.name: (entry.peer.id, entry.ttl) for entry in a.registry.entries()}
    assert peers == {"one": (-1, 0), "two": (0, RETURN_SECONDS)}
    assert [entry.expires_at < float("inf") for entry in a.registry.entries()] == [False, True]


@pytest.mark.parametrize("later", [False, True])
def test_what_is_overwritten_stays(*, later: bool) -> None:
    """A record that somebody overwrites stays at nodes that know it, and they are to write it anew; a start has it not.

    While a later release may have written it, nothing is due.
    """
    log = Log()
    a, b = Member(log, "a"), Member(log, "b")
    told: list[None] = []
    for member in (a, b):
        member.replica.overwritten = lambda: told.append(None)
    identity = ListIdentity(epoch="e", group_secret=b"x" * 32)
    log.write("meta", encode(identity))
    for act in ("grant", "withhold"):
        a.follow()
        a.change(act, "one")
    for member in (a, b):
        member.follow()
    before = a.content
    log.write("meta", encode(msgspec.structs.replace(identity, version=2)) if later else b"")
    log.write("list.client.one", b"")
    log.write("list.withheld.one", b"x")
    log.write("list.client.nobody", b"x")
    for member in (a, b):
        member.follow()
        assert (member.content, member.replica.damaged) == (before, 4)
        assert member.replica.identity_due == (None if later else 4)
    assert len(told) == (0 if later else 4)
    fresh = Member(log, "fresh")
    fresh.follow()
    assert len(fresh.registry) == 0
    if not later:
        while (changes := b.registry.plan(b.replica.restore)[1]) and (
            records := b.replica.propose(changes[:1], lambda: None)
        ):
            for record in records:
                log.write(key_of(record), encode(record))
            b.follow()
        for member in (a, fresh):
            member.follow()
        assert a.registry.plan(a.replica.restore)[1] == []
        assert a.content == b.content == fresh.content
        assert _one(fresh).client == _one(a).client


def test_a_fault_of_ours_costs_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record at which a fault of ours comes to light is logged and counted; those behind it are applied."""
    log = Log()
    a, b = Member(log, "a"), Member(log, "b")
    for name in ("one", "two"):
        a.follow()
        a.change("grant", name)
    enter = b.replica._enter

    def fail(record: Entered, revision: int) -> None:
        if record.client.name == "one":
            raise KeyError("one")
        enter(record, revision)

    monkeypatch.setattr(b.replica, "_enter", fail)
    with capture_logs() as logs:
        b.follow()
    assert [entry.client.name for entry in b.registry.entries()] == ["two"]
    assert b.replica.damaged == 1
    assert [each["event"] for each in logs] == ["error while a record of the cluster's registry was applied"]


def test_who_held_what_has_gone_meanwhile_is_told() -> None:
    """A connection that held an entry which is not among all records any more is told, as if it had expired."""
    log = Log()
    a = Member(log, "a")
    a.live()
    a.follow()
    a.change("grant", "one", hold=True)
    a.follow()
    lost: list[str] = []
    a.replica.lost = lambda entry, _: lost.append(entry.client.name)
    del log.kept["list.client.one"]
    a.replica.begin(anew=True)
    a.follow()
    assert (lost, len(a.registry)) == (["one"], 0)


def test_a_silent_session_is_overdue() -> None:
    """A session is overdue once it was not written for long; after a time without the log all begin anew."""
    sessions = Sessions("a", 1)
    for node, now in (("a", 0.0), ("b", 0.0), ("c", 10.0)):
        sessions.note(Session(node=node, boot=1, count=1), 1, now)
    assert [known.record.node for known in sessions.overdue(SESSION_SECONDS)] == ["b"]
    sessions.hear_anew(SESSION_SECONDS)
    assert sessions.overdue(SESSION_SECONDS + 1) == []
    sessions.note(Session(node="b", boot=1, count=1, live=False), 2, SESSION_SECONDS)
    assert sessions.live() == ["a", "c"]
    assert sessions.overdue(1000.0)[0].record.node == "c"


def test_records_of_an_own_change_are_applied_with_its_connection() -> None:
    """A change that comes back at its own node keeps the connection of its client; at another node it has none."""
    log = Log()
    a, b = Member(log, "a"), Member(log, "b")
    a.live()
    a.follow()
    a.change("grant", "one", hold=True)
    ((_, key, data, stored_at),) = log.since(1)
    assert key_of(decode(key, data, stored_at)) == key
    for member in (a, b):
        member.follow()
    assert (_one(a).peer.id, _one(b).peer.id) == (5, -1)
