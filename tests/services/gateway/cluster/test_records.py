"""Records of the bucket: each comes back as it was written; whatever else stands there is refused without a crash."""

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.cluster.keys import parse_name, unparse_name
from services.gateway.cluster.records import (
    Entered,
    Gone,
    Identity,
    Left,
    ListIdentity,
    Ordered,
    Record,
    Session,
    decode,
    encode,
    entry_of,
    key_of,
    record_of,
)
from services.gateway.cluster.replica import Replica
from services.gateway.cluster.sessions import Sessions
from services.gateway.registry.changes import never_keep
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.reached_places import Past
from services.gateway.registry.registry import Registry
from services.gateway.registry.revisions import largest_number
from services.gateway.registry.store import Store
from services.gateway.render import event_line
from shared.bus.bodies.packing import pack, unpack
from shared.bus.messages import RegistryChange
from shared.client import Client, Withheld
from tests.services.gateway.cluster.test_replica import STORED_AT, NoCache

STORE = Store(None, lambda: 0.0)
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=60)
BY = Identity("berlin-1", 7, 3)
CLIENT = Client("siem", 12, "192.0.2.1", 9514, streams=("messages",), group="g")
ENTRY = Entry(CLIENT, Origin.JSON, Peer(4, "192.0.2.7", 5, Rights("flows")), 30.0, 0.0, 0, True, 0.0, True)
ENTRY.home, ENTRY.node, ENTRY.boot = "berlin-1", "berlin-2", 9
RECORDS: list[Record] = [
    record_of(ENTRY, BY, 5),
    Gone(by=BY, revision=6, name="siem", generation=12, expired=True),
    Ordered(by=BY, revision=6, name="siem", order=Withheld("admin", 1.0, "noise")),
    Left(name="siem", past=Past("flows", 12, 5, ("messages",))),
    Session(node="berlin-1", boot=7, count=1),
    ListIdentity(epoch="e", group_secret=b"x" * 32),
]


@given(NAMES)
def test_names_come_back(name: str) -> None:
    """A name becomes one token of a key that NATS allows, and comes back from it."""
    token = unparse_name(name)
    assert not {*token} & {*".*> "}
    assert parse_name(token) == name


@given(st.text(max_size=40))
def test_keys_are_names_or_refused(token: str) -> None:
    """A token is the only one of its name, or is refused with ValueError."""
    try:
        name = parse_name(token)
    except ValueError:
        return
    assert unparse_name(name) == token


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back(record: Record) -> None:
    """Each kind of record comes back from its key and its bytes."""
    assert decode(key_of(record), encode(record), STORED_AT) == record


def test_an_entry_comes_back_without_its_connection() -> None:
    """An entry comes back with all that other nodes need; its connection is elsewhere."""
    (entered, *_) = RECORDS
    assert isinstance(entered, Entered)
    entry = entry_of(entered, 1.0)
    assert (entry.client, entry.origin, entry.ttl, entry.held) == (CLIENT, Origin.JSON, 30.0, True)
    assert (entry.home, entry.node, entry.boot) == ("berlin-1", "berlin-2", 9)
    assert (entry.peer.id, entry.peer.address, entry.peer.rights.holder) == (-1, "192.0.2.7", "flows")


def test_refusals_say_why() -> None:
    """A record is refused with a reason that the log can show."""
    nowhere = record_of(replace(ENTRY, client=Client("siem", 12, "nowhere", 0)), BY, 5)
    gone = RECORDS[1]
    for key, data, said in (
        (key_of(gone), encode(RECORDS[0]) + b" " * 65_536, "bytes: too long for a record"),
        (key_of(nowhere), encode(nowhere), "'nowhere' does not appear to be an IPv4 or IPv6 address"),
        ("list.client.other", encode(gone), "it stands under the key of another one"),
        (
            "list.client.a=0A",
            encode(Gone(by=BY, revision=1, name="a\n", generation=1)),
            "a name that no client may have",
        ),
        (
            "meta",
            encode(ListIdentity(epoch="e", group_secret=b"x" * 32, version=2)),
            "of version 2; this release knows 1",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            decode(key, data, STORED_AT)
    far = largest_number(STORED_AT) + 1
    for record in (
        record_of(replace(ENTRY, client=msgspec.structs.replace(CLIENT, generation=far)), BY, 5),
        record_of(ENTRY, BY, far),
        Gone(by=BY, revision=far, name="siem", generation=1),
        Gone(by=BY, revision=1, name="siem", generation=far),
        Ordered(by=BY, revision=far, name="siem"),
        Session(node="berlin-1", boot=7, count=1, revision=far),
        Session(node="berlin-1", boot=7, count=1, generation=far),
    ):
        with pytest.raises(ValueError, match="a revision or generation that can't have been given yet"):
            decode(key_of(record), encode(record), STORED_AT)
        assert decode(key_of(record), encode(record), STORED_AT + 1) == record
    assert far < 1 << 53, "clients may take a generation for a floating-point number"
    for token, said in (("a.b", "not the key of a name"), ("=41", "not the only key of a name")):
        with pytest.raises(ValueError, match=said):
            parse_name(token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a key and a value: a record of ours with a field that is something else or missing, or any bytes."""
    record = draw(st.sampled_from(RECORDS))
    key = draw(st.sampled_from([key_of(each) for each in RECORDS]) | st.text(max_size=20))
    if draw(st.booleans()):
        return key, draw(st.binary(max_size=200))
    fields: dict[str, Any] = json.loads(encode(record))
    inner = draw(st.sampled_from([fields, *(each for each in fields.values() if isinstance(each, dict))]))
    name = draw(st.sampled_from(sorted(inner)))
    inner.pop(name)
    if draw(st.booleans()):
        inner[name] = draw(JSON | st.sampled_from([1 << 53, 1 << 62, (1 << 62) - 1, 1 << 63, 1 << 64, 1e9, 1e300]))
    return draw(st.sampled_from([key, key_of(record)])), json.dumps(fields).encode()


@given(damaged())
def test_damaged_records_are_refused(found: tuple[str, bytes]) -> None:
    """A value under a key is a record that comes back as it is, or is refused with ValueError."""
    key, data = found
    try:
        record = decode(key, data, STORED_AT)
    except ValueError:
        return
    assert decode(key_of(record), encode(record), STORED_AT) == record
    assert key_of(record) == key


@given(st.lists(damaged() | st.sampled_from([(key_of(each), encode(each)) for each in RECORDS]), max_size=12))
def test_a_log_of_anything_is_applied(log: list[tuple[str, bytes]]) -> None:
    """A replica that gets any records, damaged or not, counts what it sets aside, and its registry stays whole.

    All that it has taken in can be shown, stored, and put on the bus, and the list goes on behind it.
    """
    now = 0.0
    registry = Registry(lambda: now, 1, never_keep)
    registry.node, registry.boot = "berlin-3", 1
    replica = Replica(registry, Sessions("berlin-3", 1), NoCache(), lambda: now, lambda: None)
    replica.begin(anew=True)
    refused = 0
    for position, (key, data) in enumerate(log, 1):
        try:
            decode(key, data, STORED_AT)
        except ValueError:
            refused += 1
        replica.receive(position, key, data, STORED_AT)
    replica.caught_up()
    assert replica.damaged == refused
    assert replica.position == len(log)
    assert len(registry) == len([*registry.entries()])
    registry.commit()
    events = registry.pop_events()
    assert {event.entry.client.name for event in events if event.kind == "joined"} >= {
        entry.client.name for entry in registry.entries()
    }
    for event in events:
        assert json.loads(event_line(registry, event))["revision"] == event.revision
    assert json.loads(b"".join(registry.names.render())).keys() == {entry.client.name for entry in registry.entries()}
    for change in registry.pop_changes():
        assert unpack(pack(change), RegistryChange) == change
    STORE.keep(events, registry.generation, registry.withheld)
    own = Client("own", 0, "192.0.2.1", 9, streams=("messages",))
    _, changes = registry.plan(lambda: registry.grant(own, Peer(1, "192.0.2.1", 9), Origin.JSON))
    for written in replica.propose(changes, lambda: None):
        assert decode(key_of(written), encode(written), STORED_AT) == written
