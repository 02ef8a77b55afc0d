"""Collectors that are away on some streams and not on others, and what they are owed then: a forwarder, played to."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from services.forwarder.destination import Destination
from services.forwarder.service import ForwarderService
from services.journal.readers import join
from shared.bus import zmq_sockets
from shared.bus.bodies.journal_messages import JOURNAL_TOPIC, Behind, JournalPortion, Replayed, WorkerPosition
from shared.bus.continuity import Position
from shared.bus.messages import Body, Datagrams, Message, RegistrySnapshot, Status, datagrams_topic
from shared.client import Client, Place, Resume, Withheld
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import MAX_GATHERED, Gathered
from shared.fanout.catch_up import catch_up, past_sender
from shared.fanout.catch_up.journal_questions import SILENT_SECONDS, JournalQuestions, Pursued
from shared.fanout.catch_up.past_routes import PastRoutes
from shared.fanout.catch_up.past_sender import STEP_ROWS
from shared.fanout.catch_up.pursuit import PursuitState
from shared.fanout.catch_up.rings import Rings
from shared.fanout.catch_up.window import SECONDS, Numbered
from shared.fanout.sending.backlog import Backlog
from shared.fanout.templates import TemplateDelivery
from shared.journal.records import Identity
from shared.ledger.counters import PERHAPS_TWICE
from shared.ledger.equations import discrepancies
from shared.process import memory
from shared.process.memory import Memory
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Bus, Journal
from tests.builders import make_batch, make_client, make_envelope
from tests.stack import wait_until
from tests.traffic import open_receiver

A, B = "a", "b"
STREAMS = tuple(Stream(name=name, listen=("udp://127.0.0.1:6667",), journal=True) for name in (A, B))


class Sender:
    """A forwarder with two journaled streams; the bus and the journal are played, and datagrams have numbers."""

    def __init__(self, directory: Path, streams: Sequence[Stream] = STREAMS) -> None:
        settings = Settings(bus=Bus(directory=str(directory)), streams=tuple(streams))
        self.service = ForwarderService("forwarder.1", settings)
        self.published: Counter[str] = Counter()
        self.journal: dict[str, list[tuple[int, DatagramBatch]]] = {A: [], B: []}
        self.revision = 0

    def __enter__(self) -> "Sender":
        self.service.__enter__()
        publisher, wanted = self.service._publisher, self.service._publisher.wanted
        publisher.wanted = lambda topic: topic == JOURNAL_TOPIC or wanted(topic)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.service.__exit__(None, None, None)
        del self.service  # and what it has open of /proc

    def serve(self, *clients: Any) -> None:
        """Serve these collectors."""
        self.revision += 1
        self.take("else/", RegistrySnapshot(self.revision, 0, 1, list(clients)), "gateway.1")
        while self.service._serving != self.service._replica.version:
            self.service._keep_up()
        for stream in (A, B):
            self.publish(stream, 0)

    def take(self, topic: str, body: Body, sender: str, total: int = 0, batch: Any = None) -> None:
        """Let a message come."""
        sequence = total + (batch is not None and len(batch) > 0)  # behind a mark
        self.service._take(Message(topic, make_envelope(sequence, total, sender=sender), body, batch))

    def publish(self, stream: str, rows: int, sources: Sequence[str] = ("192.0.2.1",)) -> None:
        """Let a batch come live, and to the journal; 0 rows: a mark."""
        total = self.published[stream]
        self.published[stream] += rows
        batch = make_batch([b"%s%06d" % (stream.encode(), total + n) for n in range(rows)], sources, stream)
        if rows:
            self.journal[stream].append((total, batch))
        self.take(datagrams_topic(stream), Datagrams(stream, 1), "ingest.1", total, batch)

    def turn(self) -> None:
        """Let it do what is due, and let the journal answer."""
        catch_up = self.service._catch_up
        catch_up.due_at = 0.0
        self.service._turn()
        self.service._keep_up()
        for (_, stream), pursued in list(catch_up._pursued.items()):
            if pursued.question:
                self._answer(stream, pursued.question.id, pursued.pursuit.positions())

    def _answer(self, stream: str, number: int, positions: list[WorkerPosition]) -> None:
        at = positions[0].total if positions else 0
        kept = [(total, batch) for total, batch in self.journal[stream] if total + len(batch) > at]
        due = [*join((Identity("ingest.1", 1, total, total), batch) for total, batch in kept)]
        for identity, batch in due:
            self.take("else/", Replayed(number, stream, identity.total + 2, *identity), "journal.1", 0, batch)
        end = self.published[stream]
        reached = [WorkerPosition("ingest.1", 1, end, end, end)]
        self.take("else/", JournalPortion(number, len(due), reached, None, at_end=True), "journal.1")

    @property
    def pursued(self) -> set[tuple[str, str]]:
        """The collectors that catch up, each with its stream."""
        return set(self.service._catch_up._pursued)

    def account(self, name: str) -> Counter[str]:
        """Return a collector's account."""
        return self.service._collectors[name].account


@pytest.fixture
def sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    """A forwarder that serves nobody yet."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)  # there is no broker to wait for
    with Sender(tmp_path) as here:
        yield here


def read_all(sock: Any) -> list[bytes]:
    """Return what has arrived."""
    found = []
    while True:
        try:
            found.append(sock.recv(100))
        except BlockingIOError:
            return found


def until(sender: Sender, done: Callable[[], object]) -> None:
    """Let turns pass until something is true."""

    def turned() -> bool:
        if not done():
            sender.turn()
        return bool(done())

    wait_until(turned, lambda: f"{sender.pursued}")


def test_only_those_that_await_templates_wait_for_them(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates go before the past of their collector; others get theirs, however many ask for templates meanwhile."""
    one, two = (open_receiver("127.0.0.1", 0)[0] for _ in range(2))
    with closing(one), closing(two):
        ports = [sock.getsockname()[1] for sock in (one, two)]
        some = [
            make_client(name, port, streams=(A,), generation=5, resume=Resume(1, streams=(A,)))
            for name, port in zip(("one", "two"), ports, strict=True)
        ]
        sender.serve(*some)
        sender.publish(A, 3)
        with monkeypatch.context() as patch:
            patch.setattr(TemplateDelivery, "__bool__", lambda _: True)
            patch.setattr(TemplateDelivery, "awaits", lambda _, name, stream: (name, stream) == ("two", A))
            until(sender, lambda: ("one", A) not in sender.pursued)
            assert sender.pursued == {("two", A)}
        until(sender, lambda: not sender.pursued)


def test_one_that_goes_away_while_another_catches_up_costs_nobody_anything(sender: Sender) -> None:
    """It is found to be away within the handling of a message, on a stream on which nobody has caught up so far."""
    sock, _ = open_receiver("127.0.0.1", 0)
    gone, _ = open_receiver("127.0.0.1", 0)
    with closing(sock), closing(gone):
        sock.setblocking(False)
        one = make_client("one", sock.getsockname()[1], streams=(A,), generation=5, resume=Resume(1, streams=(A,)))
        two = make_client("two", gone.getsockname()[1], streams=(B,), generation=6, catch_up=True)
        sender.serve(one, two)
        assert sender.pursued == {("one", A)}
        gone.close()
        for _ in range(MAX_GATHERED // 50):  # more than wait together: some are sent while a message is handled
            sender.publish(B, 100)
        assert ("two", B) in sender.pursued
        sender.publish(A, 3)
        until(sender, lambda: ("one", A) not in sender.pursued)
        assert read_all(sock) == [b"a%06d" % number for number in range(3)]


def test_the_past_is_shared_as_it_was_live(sender: Sender) -> None:
    """Members that come and go while another one catches up change its share of what comes then, not of the past."""
    one, _ = open_receiver("127.0.0.1", 0)
    two, _ = open_receiver("127.0.0.1", 0)
    with closing(one), closing(two):
        one.setblocking(False)
        two.setblocking(False)
        late = make_client("one", one.getsockname()[1], streams=(A,), resume=Resume(1, streams=(A,)), group="g")
        other = make_client("two", two.getsockname()[1], streams=(A,), group="g")
        for members in ([late], [late, other], [late]):
            sender.serve(*members)
            sender.publish(A, 64, [f"192.0.2.{number}" for number in range(64)])
            sender.service._send_all()
        assert sender.pursued == {("one", A)}
        until(sender, lambda: not sender.pursued)
        copies, others = read_all(one), read_all(two)
        assert copies == sorted(copies)
        assert sorted(copies + others) == [b"a%06d" % number for number in range(3 * 64)]
        assert {*others} < {b"a%06d" % number for number in range(64, 128)}
        assert sender.account("one")["shared_out"] == len(others) > 0


def test_the_past_that_is_asked_for_comes_however_often_the_registry_has_changed(sender: Sender) -> None:
    """A collector signs up anew, with `since`, at a host that is no node: nobody else can have sent it anything."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        siem, past = (
            make_client("siem", sock.getsockname()[1], streams=(A,)),
            [b"a%06d" % number for number in range(3)],
        )
        for _ in range(4):
            sender.serve(siem)
        sender.publish(A, 3)
        sender.service._send_all()
        assert read_all(sock) == past
        sender.serve(msgspec.structs.replace(siem, generation=2, resume=Resume(1)))
        until(sender, lambda: not sender.pursued)
        assert read_all(sock) == past
        assert sender.account("siem")[PERHAPS_TWICE] == 0


def test_one_that_is_level_is_told_of_though_the_registry_changes_first(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway hears that one which was away is level, also if another one signs up before the next report."""
    sock, _ = open_receiver("127.0.0.1", 0)
    port = sock.getsockname()[1]
    siem = make_client("siem", port, streams=(A,), generation=5, catch_up=True)
    sender.serve(siem)
    sock.close()
    catch_up, told = sender.service._catch_up, list[Behind]()
    while not sender.pursued:  # the answer to a copy is read when the next one leaves
        sender.publish(A, 1)
        sender.turn()
    with closing(open_receiver("127.0.0.1", port)[0]):
        with monkeypatch.context() as patch:
            patch.setattr(catch_up, "report", lambda: None)  # a second has not passed
            until(sender, lambda: not sender.pursued)
            sender.serve(siem, make_client("other", 9, generation=6))
        monkeypatch.setattr(catch_up._progress, "_publish", told.extend)
        catch_up.report()
        catch_up.report()
    assert [(each.name, each.generation, each.state) for each in told] == [("siem", 5, "level")]


def test_a_collector_is_away_on_all_its_streams(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host stops answering: what waited of one stream is let go with that of another, and all of it comes later."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        past = Resume(1, streams=(A, B))
        siem = make_client("siem", sock.getsockname()[1], streams=(A, B), generation=5, catch_up=True, resume=past)
        sender.serve(siem)
        for stream in (A, B):
            sender.publish(stream, 3 * STEP_ROWS)
        pursuits = sender.service._catch_up._pursued.values()
        waiting, drop = list[bool](), Backlog.drop

        def let_go(backlog: Backlog, cause: str = "") -> None:
            waiting.clear()
            drop(backlog, cause)

        with monkeypatch.context() as patch:
            patch.setattr(past_sender, "ANSWER_SECONDS", 60.0)
            patch.setattr(catch_up, "TURN_SECONDS", 60.0)  # each stream makes a step a turn, however slow it is
            until(sender, lambda: all(each.last for each in pursuits))
            read_all(sock)  # that of the first steps waits, as it were
            waiting.append(True)
            patch.setattr(Backlog, "__bool__", lambda _: bool(waiting))
            patch.setattr(Destination, "unreachable", property(lambda _: bool(waiting)))
            patch.setattr(Backlog, "drop", let_go)
            until(sender, lambda: not waiting)
        assert all(each.away for each in pursuits)
        until(sender, lambda: not sender.pursued)
        came = read_all(sock)
        for stream in (A, B):
            of = [each for each in came if each.startswith(stream.encode())]
            last = b"%s%06d" % (stream.encode(), 3 * STEP_ROWS - 1)
            assert of == sorted(set(of)), stream
            assert (of[0], of[-1]) == (b"%s%06d" % (stream.encode(), 0), last)


@pytest.mark.parametrize("removed", ["stream", "journal"])
def test_what_was_owed_of_a_stream_is_counted_when_that_or_its_journal_is_removed(sender: Sender, removed: str) -> None:
    """The entry of one that catches up keeps its generation and lacks the stream, or the stream has no journal now.

    What waited of the stream is left behind, or comes as far as it is here.
    """
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        siem = make_client("siem", sock.getsockname()[1], streams=(A, B), generation=5, resume=Resume(1))
        sender.serve(siem)
        for stream in (A, B):
            sender.publish(stream, 10)
        sender.turn()
        assert sender.service._catch_up.owed.deferred("siem") == 20
        if removed == "stream":
            sender.serve(msgspec.structs.replace(siem, streams=(A,)))
        else:
            kept_no_more = msgspec.structs.replace(STREAMS[1], journal=False)
            sender.service.apply_settings(Settings(streams=(STREAMS[0], kept_no_more)))
            sender.serve(siem)
        until(sender, lambda: not sender.pursued)
        accounts = sender.service._accounts()
        account = Counter(accounts["collector/siem"])
        assert (account["sent"], account["left_behind"]) == ((10, 10) if removed == "stream" else (20, 0))
        assert not [*discrepancies(accounts)]


def test_what_was_owed_of_a_stream_that_is_removed_is_counted_for_one_that_wants_all(sender: Sender) -> None:
    """The entry of one with `*` stays as it is: what waited of a stream that there is no more is left behind."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        siem = make_client("siem", sock.getsockname()[1], generation=5, resume=Resume(1))
        sender.serve(siem)
        for stream in (A, B):
            sender.publish(stream, 10)
        sender.turn()
        assert sender.service._catch_up.owed.deferred("siem") == 20
        sender.service.apply_settings(Settings(streams=STREAMS[:1]))
        until(sender, lambda: not sender.pursued)
        accounts = sender.service._accounts()
        account = Counter(accounts["collector/siem"])
        assert (account["sent"], account["left_behind"]) == (10, 10)
        assert not [*discrepancies(accounts)]


def test_what_was_owed_is_counted_when_sender_and_collector_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector signs up anew, and not for the past, while the sender is restarted: that has its account still."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, resume=Resume(1))
        with Sender(tmp_path) as sender:
            sender.serve(siem)
            sender.publish(A, 10)
            sender.turn()
        with Sender(tmp_path) as successor:
            successor.published = sender.published
            successor.serve(msgspec.structs.replace(siem, generation=6, resume=None))
            accounts = successor.service._accounts()
            account = Counter(accounts["collector/siem"])
            assert (account["offered"], account["sent"], account["left_behind"]) == (10, 0, 10)
            assert not [*discrepancies(accounts)]


@pytest.mark.parametrize("terms", [{"withheld": Withheld("", 1.0)}, {"prefixes": ("198.51.100.0/24",)}])
def test_a_sender_that_is_killed_as_a_collector_gets_nothing_of_its_past_counts_that_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any]
) -> None:
    """The place that it has reached is kept before that is counted: its successor goes on from there."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    file, left, route_past = tmp_path / "accounts.forwarder", list[bytes](), PastRoutes.route_past

    def route_and_look(*what: Any) -> Any:
        found = route_past(*what)
        left.append(file.read_bytes())
        return found

    monkeypatch.setattr(PastRoutes, "route_past", route_and_look)
    siem = make_client("siem", 9, streams=(A,), generation=5, resume=Resume(1), **terms)
    with Sender(tmp_path) as sender:
        sender.serve(siem)
        sender.publish(A, 10)
        until(sender, lambda: left)
    file.write_bytes(left[0])
    with Sender(tmp_path) as successor:
        successor.published, successor.journal = sender.published, sender.journal
        successor.serve(siem)
        until(successor, lambda: not successor.pursued)
        accounts = successor.service._accounts()
        assert accounts["collector/siem"]["expected"] == 10
        assert not [*discrepancies(accounts)]


@pytest.mark.parametrize("told_by", ["batch", "status"])
def test_what_the_bus_has_lost_of_one_that_is_away_is_owed_to_it_once(sender: Sender, told_by: str) -> None:
    """Copies wait that show it to be away as they are sent, and behind them a loss is found: the journal has that."""
    sock, _ = open_receiver("127.0.0.1", 0)
    siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, catch_up=True)
    sender.serve(siem)
    sock.close()
    sender.publish(A, 1)
    sender.turn()
    sender.publish(A, 5)
    total, sender.published[A] = sender.published[A], sender.published[A] + 3
    sender.journal[A].append((total, make_batch([b"a%06d" % (total + n) for n in range(3)], stream=A)))
    if told_by == "batch":
        sender.publish(A, 1)
    else:
        account = {"published": sender.published[A]}
        sender.take("status/", Status("ingest.1", 1, 1, 1, 0, 1, {f"stream/{A}": account}), "ingest.1")
    sender.turn()
    assert sender.pursued == {("siem", A)}
    back, _ = open_receiver("127.0.0.1", siem.port)
    with closing(back):
        back.setblocking(False)
        until(sender, lambda: not sender.pursued)
        count = sender.published[A]
        assert read_all(back) == [b"a%06d" % number for number in range(count)]
        assert sender.account("siem")["missed"] == 0
        assert not [*discrepancies(sender.service._accounts())]


@pytest.mark.parametrize("waiting", ["is full", "is for others"])
def test_a_batch_that_has_to_be_sent_apart_is_owed_to_one_that_is_found_away_by_those_before(
    sender: Sender, monkeypatch: pytest.MonkeyPatch, waiting: str
) -> None:
    """It is not among what was refused: it waits in the journal."""
    sock, _ = open_receiver("127.0.0.1", 0)
    siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, catch_up=True)
    sender.serve(siem)
    sock.close()
    sender.publish(A, MAX_GATHERED - 1)
    if waiting == "is for others":
        monkeypatch.setattr(TemplateDelivery, "before_batch", lambda *_: frozenset({"other"}))
    sender.publish(A, 2)
    assert sender.pursued == {("siem", A)}
    sender.service._send_all()
    assert sender.service._catch_up.owed.deferred("siem") == 2
    assert not [*discrepancies(sender.service._accounts())]


def test_live_copies_that_wait_are_owed_when_the_past_is_refused(sender: Sender) -> None:
    """One that is found to be away by what it gets of the past is so on the streams that were live until then, too."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        siem = make_client(
            "siem", sock.getsockname()[1], streams=(A, B), generation=5, catch_up=True, resume=Resume(1, streams=(A,))
        )
        sender.serve(siem)
        sender.publish(A, 2 * STEP_ROWS)
        assert sender.pursued == {("siem", A)}
        until(sender, lambda: any(each.last for each in sender.service._catch_up._pursued.values()))
        sender.account("siem")["refusals"] += 1
        until(sender, lambda: ("siem", B) in sender.pursued)
        sender.publish(B, 7)
        until(sender, lambda: not sender.pursued)
        assert [each for each in read_all(sock) if each.startswith(b"b")] == [b"b%06d" % number for number in range(7)]


def test_steps_with_a_gap_between_them_are_not_sent_together(sender: Sender) -> None:
    """Datagrams that are missing before a step are counted once, also when the steps before it are taken back."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        past = Resume(1, streams=(A,))
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, catch_up=True, resume=past)
        sender.serve(siem)
        for rows in (5, 6, 7):
            sender.publish(A, rows)
        del sender.journal[A][1]
        pursued = sender.service._catch_up._pursued["siem", A]
        window = sender.service._catch_up.rings[A]
        window.forget, window.find = lambda _: None, lambda *_: None  # type: ignore[method-assign, assignment]
        steps = sender.service._catch_up._past._next_steps(pursued, window, sender.service._streams.positions(A), 100)
        until(sender, lambda: pursued.pursuit.queued)
        taken = []
        for step in steps:
            pursued.pursuit.advance(step)
            taken.append(step)
        assert [(each.stop, each.missing) for each in taken] == [(5, 0)]


def test_of_too_many_places_those_of_living_workers_are_kept(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest was restarted often: a collector that leaves goes on exactly where it was with those that run now."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        siem = make_client("siem", sock.getsockname()[1], streams=(A, B), generation=5)
        sender.serve(siem)
        streams = sender.service._streams
        living = ("ingest.1", 1)
        positions = {("ingest.1", boot): Position(0, 0, boot) for boot in range(1, 100)}
        told: list[Sequence[Place]] = []
        catch_up = sender.service._catch_up
        monkeypatch.setattr(catch_up._progress, "note_left", lambda *told_of: told.append(told_of[2]))
        monkeypatch.setattr(streams, "positions", lambda _: positions)
        sender.take("status/", Status("ingest.1", 1, 1, 1, 0, 1, {}), "ingest.1")
        catch_up.note_leaving({})
        assert {(each.stream, each.worker, each.boot) for each in told[0][-2:]} == {(A, *living), (B, *living)}


def test_those_that_are_away_cost_others_nothing(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is away has no share of the pace, and asks the journal for no more than it is tried with."""
    catch_up, here = sender.service._catch_up, open_receiver("127.0.0.1", 0)[0]
    closed = [open_receiver("127.0.0.1", 0)[0] for _ in range(9)]
    ports = [sock.getsockname()[1] for sock in closed]
    for sock in closed:
        sock.close()
    away = [
        make_client(f"away{n}", port, streams=(A,), generation=5 + n, catch_up=True) for n, port in enumerate(ports)
    ]
    with closing(here):
        siem = make_client("siem", here.getsockname()[1], streams=(B,), generation=99, resume=Resume(1, streams=(B,)))
        sender.serve(*away)
        while len(sender.pursued) < len(away):
            sender.publish(A, 1)
            sender.turn()
        pursuits = list(catch_up._pursued.values())
        until(sender, lambda: all(each.away and each.pursuit.queued for each in pursuits))
        shares, asked, ask, allow = set[float](), set[str](), JournalQuestions.ask, catch_up._past.allow

        def note_question(self: JournalQuestions, pursued: Pursued, now: float, of: int = 1) -> None:
            ask(self, pursued, now, of)
            asked.update([pursued.name] if pursued.question else [])

        def note_share(pursued: Iterable[Pursued], share: float, now: float) -> None:
            shares.add(share)
            allow(pursued, share, now)

        monkeypatch.setattr(JournalQuestions, "ask", note_question)
        monkeypatch.setattr(catch_up._past, "allow", note_share)
        monkeypatch.setattr(past_sender, "AGAIN_SECONDS", 60.0)
        for each in pursuits:
            each.try_at = math.inf  # however slow all this is
        sender.serve(*away, siem)
        for _ in range(20):
            sender.turn()
        assert shares == {Journal().catch_up_per_second}
        assert asked == {"siem"}
        monkeypatch.setattr(catch_up._past, "send_due", None)  # nobody is even looked at before it is to be tried
        sender.turn()


def test_a_journal_that_does_not_keep_the_stream_is_not_waited_for(sender: Sender) -> None:
    """The journal could not follow a reload that names a stream: collectors get live copies all the same."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, resume=Resume(1, streams=(A,)))

        def refuse(_stream: str, number: int, _positions: object) -> None:
            answer = JournalPortion(number, 0, [], None, at_end=False, error="unknown_stream", message="not kept")
            sender.take("else/", answer, "journal.1")

        sender._answer = refuse  # type: ignore[method-assign, assignment]
        sender.serve(siem)
        sender.publish(A, 3)
        until(sender, lambda: not sender.pursued)
        sender.publish(A, 1)
        sender.turn()
        assert read_all(sock) == [b"a%06d" % number for number in range(4)]


@pytest.mark.parametrize("refuses", [True, False])
def test_a_journal_that_gives_nothing_is_not_waited_for_without_end(
    sender: Sender, clock_at: SimpleNamespace, capsys: pytest.CaptureFixture[str], refuses: bool
) -> None:
    """It refuses each question, or hangs: in the end collectors get live copies, and what they lack has a cause."""
    catch_up, asked = sender.service._catch_up, list[float]()

    def answer(_stream: str, number: int, _positions: object) -> None:
        asked.append(clock_at.now)
        if refuses:
            portion = JournalPortion(number, 0, [], None, at_end=False, error="unavailable", message="it can't be read")
            sender.take("else/", portion, "journal.1")

    sender._answer = answer  # type: ignore[method-assign, assignment]
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        sender.publish(A, 0)
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5)
        sender.serve(siem)
        sender.publish(A, 3)
        sender.turn()
        sender.serve()
        sender.publish(A, 4)
        sender.serve(make_client("siem", siem.port, streams=(A,), generation=6, resume=Resume(1, 5, streams=(A,))))
        catch_up._clock = catch_up._questions._clock = lambda: clock_at.now
        catch_up._questions.begin()
        pursued = catch_up._pursued["siem", A]
        pursued.pursuit._clock = lambda: clock_at.now
        pursued.ask_at = 0.0
        while sender.pursued:
            sender.turn()
            clock_at.now += 0.5
            assert clock_at.now < 60
        sender.publish(A, 1)
        sender.turn()
        assert read_all(sock) == [b"a%06d" % number for number in (0, 1, 2, 7)]
        assert sender.account("siem")["dropped_not_journaled"] == 4
        assert asked[0] < 1.0 <= SILENT_SECONDS <= asked[-1] + 6
    said = capsys.readouterr().out
    assert "the journal gives nothing: a collector goes on without what it may have" in said
    assert 'cure="look at the journal\'s log, and at its disk"' in said


def test_a_journal_that_is_back_is_asked_by_one_that_did_not_wait_for_it_before(
    sender: Sender, clock_at: SimpleNamespace
) -> None:
    """It hung for half a minute; what a collector has to read in it again afterwards is waited for once more."""
    catch_up, answer = sender.service._catch_up, sender._answer
    sender._answer = lambda *_: None  # type: ignore[method-assign]
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        sock.setblocking(False)
        sender.publish(A, 0)
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, resume=Resume(1, streams=(A,)))
        sender.serve(siem)
        sender.publish(A, 1)
        catch_up._clock = catch_up._questions._clock = lambda: clock_at.now
        catch_up._questions.begin()
        catch_up._past._allowed_at = 0.0
        pursued, window = catch_up._pursued["siem", A], catch_up.rings[A]
        pursued.pursuit._clock = lambda: clock_at.now
        pursued.ask_at = 0.0
        while pursued.pursuit.state is PursuitState.READING:
            sender.turn()
            clock_at.now += 0.5
            assert clock_at.now < 60
        sender.publish(A, 3)
        window.trim(0)  # as memory is short
        sender._answer = answer  # type: ignore[method-assign]
        while sender.pursued:
            sender.turn()
            clock_at.now += 0.5
            assert clock_at.now < 90
        assert read_all(sock) == [b"a%06d" % number for number in range(4)]
        assert not sender.account("siem")["dropped_not_journaled"]


def test_a_worker_that_is_started_anew_is_owed_whole_whatever_its_clock_says(sender: Sender) -> None:
    """The clock was set back while a collector was away: by time its datagrams would be older than what it has had."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5)
        sender.serve(siem)
        sender.publish(A, 4)
        sender.serve()
        told = Status("ingest.1", 1, 99, 1, 0, 1, {})
        sender.service._take(Message("status/ingest.1/", make_envelope(boot=2, sender="ingest.1"), told, None))
        sender.serve(make_client("siem", sock.getsockname()[1], streams=(A,), generation=6, resume=Resume(1, 5)))
        positions = sender.service._catch_up._pursued["siem", A].pursuit.positions()
        assert [(each.boot, each.total) for each in positions] == [(1, 4), (2, 0)]
        assert positions[1].received_ns == 99


def test_in_a_cluster_workers_that_have_ended_are_forgotten(sender: Sender) -> None:
    """Nobody catches up for a long time, and the rings are kept: what is known of their workers does not grow."""
    sender.serve(make_client("siem", 9, streams=(A,), generation=5))
    catch_up = sender.service._catch_up
    catch_up.rings.keep([A])
    told = [{f"origin/ingest.2/{boot:x}/{A}": Counter(reached=5)} for boot in range(5)]
    for accounts in told:
        catch_up.rings.confirm(make_envelope(sender="journal.1"), Status("journal.1", 1, 1, 1, 0, 1, {**accounts}))
    assert len(catch_up.rings[A]._opening) == 5
    catch_up.report()
    assert not catch_up.rings[A]._opening


def test_short_memory_costs_kept_batches_before_copies_that_wait(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live batches that are kept go first, since the journal has them; then what waits for collectors."""
    halved = list[str]()
    service, helps = sender.service, [True, True, False]
    monkeypatch.setattr(service.memory, "measure", lambda: True)
    monkeypatch.setattr(service._catch_up.rings, "halve", lambda _: halved.append("rings") or helps[len(halved) - 1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(service.held, "halve", lambda _: halved.append("held"))
    for _ in range(3):
        service._keep_up()
    assert halved == ["rings", "rings", "rings", "held"]


@pytest.mark.skipif(memory._trim is None, reason="this C library returns freed memory by itself")
@pytest.mark.parametrize("waiting", [False, True])
def test_memory_that_was_let_go_is_seen_to_be_free(sender: Sender, waiting: bool) -> None:
    """Half of kept batches, or of copies that wait, is enough: no more goes before that is measured."""
    service, rings = sender.service, sender.service._catch_up.rings
    backlog, total = Backlog(Counter(), "dropped_x", 60.0, 1 << 30, 1 << 30, service.held), 0
    service.held.limit = 1 << 30
    rings.keep([A])
    while max(rings.size, service.held.used) < 64 << 20:
        batch = make_batch([bytes(1000)] * 64, ["192.0.2.1"], A)
        if waiting:
            backlog.hold(Gathered([batch]), None)
        else:
            rings[A].add(Numbered(("ingest.1", 1), total, total, batch))
        total += 64
    measured = Memory()
    measured.account()
    service.memory = Memory(measured.used - (16 << 20), "[forwarder] memory", reserve=1 << 30)
    for _ in range(10):
        service.memory._look_at = 0.0  # as 10 ms later
        service._keep_up()
    assert 30 << 20 < max(rings.size, service.held.used) < 34 << 20


def test_a_reload_begins_to_keep_a_stream(sender: Sender) -> None:
    """From then on a collector that goes away is owed what it misses of the stream, whoever signs up meanwhile."""
    gone, _ = open_receiver("127.0.0.1", 0)
    siem = make_client("siem", gone.getsockname()[1], streams=(A,), generation=5, catch_up=True)
    sender.service.apply_settings(Settings(streams=STREAMS[1:]))
    sender.serve(siem)
    sender.service.apply_settings(Settings(streams=STREAMS))
    sender.publish(A, 1)
    sender.turn()
    gone.close()
    for _ in range(3):
        sender.publish(A, 1)
        sender.turn()
    assert sender.pursued == {("siem", A)}


@pytest.mark.parametrize(("others", "rest"), [([make_client("live", 9, streams=(B,), generation=6)], 0.25), ([], 0.0)])
def test_the_past_takes_half_of_the_time_at_most(
    sender: Sender, clock_at: SimpleNamespace, others: list[Client], rest: float
) -> None:
    """A step of the past that took long is followed by as much time for live copies alone, if anybody gets these."""
    catch_up = sender.service._catch_up
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        siem = make_client("siem", sock.getsockname()[1], streams=(A,), generation=5, resume=Resume(1))
        sender.serve(siem, *others)
        for _ in range(4):
            sender.publish(A, STEP_ROWS)
        until(sender, lambda: catch_up._pursued["siem", A].pursuit.queued)
        send, catch_up._clock = sender.service.send, lambda: clock_at.now
        clock_at.now = time.monotonic() + 1.0

        def send_slowly(*what: Any) -> None:
            clock_at.now += 0.25
            send(*what)

        sender.service.send = send_slowly  # type: ignore[assignment, method-assign]
        began = clock_at.now
        catch_up.step()
        assert (clock_at.now, max(clock_at.now, catch_up.due_at)) == (began + 0.25, began + 0.25 + rest)


@pytest.mark.parametrize("lost", [f"journal/{A} dropped_disk_full", f"origin/ingest.1/1/{A} missed"])
def test_what_the_journal_has_lost_stays(clock_at: SimpleNamespace, lost: str) -> None:
    """The disk is full, or the queue of the bus: what the journal has passed over stays, as after its restart."""
    rings = Rings(lambda: clock_at.now)
    rings.open(A)
    name, counter = lost.split()

    def tell(reached: int, count: int) -> None:
        accounts = {f"journal/{A}": Counter[str](), f"origin/ingest.1/1/{A}": Counter(reached=reached)}
        accounts[name][counter] = count
        rings.confirm(make_envelope(sender="journal.1"), Status("journal.1", 1, 1, 1, 0, 1, {**accounts}))

    def come(total: int, rows: int) -> None:
        rings.add(make_envelope(total, total), Datagrams(A, 1), make_batch([b"x"] * rows, stream=A))

    for total, count in ((0, 0), (5, 0), (10, 0), (15, 5), (20, 5)):
        come(total, 5)
        tell(total + 5, count)
    clock_at.now += 2 * SECONDS
    come(25, 5)
    tell(30, 5)
    assert rings[A].find(("ingest.1", 1), 15).total == 15  # type: ignore[union-attr]
    before = rings[A].size
    rings[A].forget({})
    assert rings[A].size < before


@pytest.fixture
def clock_at() -> SimpleNamespace:
    """A clock that stands."""
    return SimpleNamespace(now=0.0)
