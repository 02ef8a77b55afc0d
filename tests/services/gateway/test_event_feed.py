import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.gateway import event_feed as feed_module
from services.gateway.admission.peer import Peer
from services.gateway.event_feed import EventFeed
from services.gateway.registry.changes import Change
from services.gateway.registry.entry import NO_ORDERS, Event, Origin
from services.gateway.registry.reached_places import NO_PASTS
from services.gateway.registry.registry import Registry
from services.gateway.render import event_line, health_line
from shared.client import Client

HERE = Peer(1, "127.0.0.1", 4000)


class Reader:
    """Somebody who watches."""

    def __init__(self) -> None:
        self.received = b""

    def push(self, lines: bytes) -> None:
        self.received += lines

    @property
    def events(self) -> list[tuple[str, int]]:
        """Kind and revision of each event so far."""
        return [(event["event"], event["revision"]) for event in map(json.loads, self.received.splitlines())]


def make() -> tuple[Registry, EventFeed]:
    """A registry and its feed."""
    registry = Registry(lambda: 0.0, 1)
    return registry, EventFeed(registry, partial(event_line, registry), partial(health_line, registry))


def join(registry: Registry, name: str) -> None:
    """Enter a client."""
    registry.grant(Client(name, 0, "127.0.0.1", 9), HERE, Origin.JSON)


def test_watcher_gets_what_happens_from_then_on() -> None:
    """Events begin after what was there at `watch`, and end with `leave`."""
    registry, feed = make()
    reader, other = Reader(), Reader()
    join(registry, "before")
    feed.add_watcher(1, reader.push)
    feed.add_watcher(2, other.push)
    join(registry, "a")
    registry.release_held(HERE)
    feed.push_events()
    assert reader.events == other.events == [("joined", 2)]
    assert (len(feed), feed.has_watcher(1)) == (2, True)
    feed.remove_watcher(1)
    join(registry, "b")
    feed.push_events()
    assert (reader.events, other.events) == ([("joined", 2)], [("joined", 2), ("joined", 3)])
    assert (len(feed), feed.has_watcher(1)) == (1, False)


def test_log_tells_changes_alone() -> None:
    """A collector that is `ok` as before, once its sender has been asked about its new entry, has no line."""
    registry, feed = make()
    with capture_logs() as log:
        for _ in range(2):
            registry.grant(Client("siem", 0, "127.0.0.1", 9, streams=("a",)), HERE, Origin.JSON)
            feed.push_health()
            registry.serving["relay"].note_served(registry.commit())
            feed.push_health()
            registry.serving["relay"].forget()
            feed.push_health()
            registry.serving["relay"].note_served(registry.commit())
            feed.push_health()
    assert [(each["before"], each["health"]) for each in log] == [("ok", "waiting"), ("waiting", "ok")] * 2


@given(st.lists(st.sampled_from(["join", "flush"]), max_size=30), st.integers(0, 30))
def test_resuming_leaves_no_gap(actions: list[str], at: int) -> None:
    """A watcher that was there until some revision gets every event after it, once, whenever it comes back."""
    registry, feed = make()
    for number, action in enumerate(actions):
        if action == "join":
            join(registry, f"n{number}")
        else:
            feed.push_events()
    last = registry.commit()
    missed = feed.lines_since(at)
    if at > last:
        assert missed is None
    else:
        assert missed is not None
        reader = Reader()
        reader.push(missed)
        assert reader.events == [("joined", revision) for revision in range(at + 1, last + 1)]


def test_an_event_of_a_revision_that_was_shown_is_left_out_for_nobody() -> None:
    """A watcher that has the revision of an event already, and may lack it, gets the whole list when it comes back.

    So it is in a cluster, where a node finds what has gone without a record of that.
    """
    registry, feed = make()
    join(registry, "a")
    join(registry, "b")
    feed.push_events()
    (gone, _) = registry.entries()
    registry.apply(Change([Event("left", registry.revision, gone)], NO_ORDERS, NO_PASTS, 0))
    assert [feed.lines_since(revision) for revision in range(3)] == [None, None, None]
    join(registry, "c")
    assert feed.lines_since(2) is None
    join(registry, "d")
    reader = Reader()
    reader.push(feed.lines_since(3) or b"")
    assert reader.events == [("joined", 4)]


def test_an_event_that_can_not_be_shown_costs_itself() -> None:
    """An event at which a fault of ours comes to light is logged; watchers get all others, and later the whole list."""

    def fail(event: Event) -> bytes:
        if event.entry.client.name == "odd":
            raise KeyError("odd")
        return event_line(registry, event)

    registry = Registry(lambda: 0.0, 1)
    feed, reader = EventFeed(registry, fail, partial(health_line, registry)), Reader()
    feed.add_watcher(1, reader.push)
    with capture_logs() as logs:
        for name in ("a", "odd", "b"):
            join(registry, name)
        feed.push_events()
    assert reader.events == [("joined", 1), ("joined", 3)]
    assert [each["event"] for each in logs] == ["error while an event was rendered"]
    assert [feed.lines_since(revision) is None for revision in range(4)] == [True, True, True, False]


def words(reader: Reader) -> list[str]:
    """Each event with its word, or its kind where it has none."""
    events = [json.loads(line) for line in reader.received.splitlines()]
    return [f"{event['name']} {event['health']}" if event["event"] == "health" else event["event"] for event in events]


def test_a_word_that_changes_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of a word is one event, behind the one by which the collector joined, so many at a time."""
    monkeypatch.setattr(feed_module, "TOLD_AT_ONCE", 2)
    registry, feed = make()
    reader = Reader()
    feed.add_watcher(1, reader.push)
    for name in "abc":
        registry.grant(Client(name, 0, "127.0.0.1", 9, streams=("messages",)), HERE, Origin.JSON)
    join(registry, "name")
    registry.serving["relay"].note_unanswered(registry.commit())
    feed.push_health()
    feed.push_health()
    assert words(reader) == ["joined"] * 4
    registry.serving["relay"].note_served(registry.commit())
    feed.push_health()
    assert words(reader)[4:] == ["a ok", "b ok"]
    registry.release_held(HERE)
    feed.push_health()
    feed.push_health()
    assert words(reader)[6:] == ["c ok"]
    assert reader.events[4][1] == registry.commit()
    assert feed.health_lines() == b""


def test_past_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision of long ago is not known any more, and the answer says so rather than leave events out."""
    monkeypatch.setattr(feed_module, "KEPT_BYTES", 1000)
    registry, feed = make()
    for number in range(100):
        join(registry, f"n{number}")
    missed = [feed.lines_since(revision) for revision in range(101)]
    first = next(revision for revision, lines in enumerate(missed) if lines is not None)
    assert 90 < first < 99
    assert missed[100] == b""
    assert all(lines is None for lines in missed[:first])
