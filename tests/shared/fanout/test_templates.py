import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from shared.bus.bodies.template_messages import Renewals, TemplateDatagram, Templates
from shared.bus.messages import Message
from shared.bus.zmq_sockets import Subscriber
from shared.client import Client, Withheld
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.collectors import Collectors
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.sending.backlog import Backlog, BacklogMemory
from shared.fanout.streams import FollowedStreams
from shared.fanout.templates import BURST, BURSTS, PATIENCE_SECONDS, PAUSE_SECONDS, TemplateDelivery
from shared.ledger.counters import BYTES, SENT
from shared.ledger.equations import discrepancies
from shared.net.addresses import pack_address
from shared.settings.entries import Stream
from tests.builders import make_batch, make_client, make_envelope

STREAM = Stream(name="netflow", listen=("udp://127.0.0.1:2055",), protocol="netflow")
WORKERS = [("ingest.1", 7), ("ingest.2", 8)]
UPLINK = ("uplink.1", 9)
OURS, THEIRS = "192.0.2.1", "198.51.100.1"


class Reached:
    """A destination that takes everything, and remembers it."""

    unreachable = False

    def __init__(self, client: Client, account: Counter[str]) -> None:
        self.client, self.account = client, account
        self.held = Backlog(account, "dropped_x", 3.0, 1 << 16, 1 << 30, BacklogMemory(1 << 30))
        self.got: list[bytes] = []

    def adopt(self, client: Client) -> None:
        """Serve another entry."""
        self.client = client

    def refresh(self) -> None:
        """Find nothing changed."""

    def close(self) -> None:
        """Hold nothing."""


class Sender:
    """A sender of copies without sockets: its subscriptions, its clock, and the payloads that its collectors get."""

    def __init__(self) -> None:
        self.now, self.revision = 10.0, 0
        self.subscriptions: Counter[str] = Counter()
        self.asked: list[str] = []
        self.published: Counter[str] = Counter()
        self.reached: dict[str, Reached] = {}
        self.total: dict[str, int] = {}
        """By name: the number of datagrams that a collector has got."""
        self.collectors = Collectors[Any](["netflow"], self.published, self._reach, KernelRules("relay"))
        self.templates = TemplateDelivery[Any](
            cast(Subscriber, self), self.collectors, self._send, lambda: None, lambda: self.now
        )
        self.templates.set_streams([STREAM])

    def subscribe(self, prefix: str) -> None:
        """Note it."""
        self.subscriptions[prefix] += 1
        self.asked.append(prefix)

    def unsubscribe(self, prefix: str) -> None:
        """Note that it ends."""
        self.subscriptions[prefix] -= 1

    def _reach(self, client: Client, account: Counter[str]) -> Reached:
        return self.reached.setdefault(client.name, Reached(client, account))

    def _send(self, batch: Gathered, routed: list[tuple[Reached, Selection]]) -> None:
        for destination, selection in routed:
            rows = np.arange(len(batch)) if selection.indices is None else selection.indices
            payloads = list(batch.payloads(rows))
            destination.got += payloads
            account = destination.held.account_of(templates=batch.templates)
            account[SENT] += len(payloads)
            account[BYTES] += sum(map(len, payloads))

    def serve(self, *clients: Client) -> None:
        """Apply a registry with these collectors."""
        self.revision += 1
        self.collectors.replace(clients)
        self.templates.follow_collectors(self.revision)

    def hear(self, worker: tuple[str, int], body: Templates | Renewals) -> None:
        """Let a message come."""
        self.templates.take(Message("", make_envelope(sender=worker[0], boot=worker[1]), body))

    def answer(self, worker: tuple[str, int], *datagrams: TemplateDatagram, piece: int = 0, pieces: int = 1) -> None:
        """Let a worker's answer come, or a piece of it."""
        self.hear(worker, Templates("netflow", piece, pieces, list(datagrams)))

    def live(self, worker: tuple[str, int], *payloads: bytes, sources: Sequence[str] = (OURS,)) -> None:
        """Let a batch of a worker come."""
        batch = Gathered([make_batch(payloads, sources, "netflow")])
        joining = self.templates.before_batch("netflow", worker)
        self.published["netflow"] += len(batch)
        self._send(batch, self.collectors.route(batch, joining))

    def pass_time(self, seconds: float = PAUSE_SECONDS[1]) -> None:
        """Let what is due be done, then time pass, and what is due then be done."""
        streams = cast(FollowedStreams, SimpleNamespace(workers={*WORKERS, UPLINK}))
        self.templates.settle(streams)
        self.now += seconds
        self.templates.settle(streams)

    def got(self, name: str) -> list[bytes]:
        """Return what a collector got since the last call; its account adds up, and tells copies from templates."""
        accounts = self.collectors.accounts()
        assert list(discrepancies(accounts)) == []
        account, reached = accounts.get(f"collector/{name}"), self.reached[name]
        if account is not None:
            total = self.total[name] = self.total.get(name, 0) + len(reached.got)
            assert account.get("sent", 0) + account.get("templates_sent", 0) == total
            assert account.get("templates", 0) == account.get("templates_sent", 0)
        got, reached.got = reached.got, []
        return got


def told(text: str, source: str = OURS, aside: int = 77) -> TemplateDatagram:
    """A datagram of NetFlow v9 that ends in this text."""
    return TemplateDatagram(pack_address(source), 514, b"\0\x09" + bytes(10) + b"real" + text.encode(), aside)


def texts(payloads: Sequence[bytes]) -> list[str]:
    """Return the texts of datagrams, in their order; live ones are nothing else."""
    return [payload[16:].decode() if payload[:2] == b"\0\x09" else payload.decode() for payload in payloads]


ONE, TWO = WORKERS


def test_who_joins_gets_templates_of_each_worker_before_its_copies() -> None:
    """Until a worker has answered, its datagrams came before the collector joined; the other's go on."""
    sender = Sender()
    sender.serve(make_client("a"))
    assert sender.templates
    sender.live(ONE, b"early")
    sender.answer(TWO, told("two"))
    sender.live(TWO, b"second")
    sender.live(ONE, b"early")
    sender.answer(ONE, told("one"), piece=0, pieces=2)
    sender.live(ONE, b"early")
    sender.answer(ONE, told("more"), piece=1, pieces=2)
    sender.live(ONE, b"first")
    assert texts(sender.got("a")) == ["two", "second", "one", "more", "first"]
    assert sender.templates
    sender.pass_time(0)
    assert not sender.templates
    assert +sender.subscriptions == Counter()
    assert sender.collectors.accounts()["collector/a"]["expected"] == 2


def test_one_that_catches_up_gets_what_just_came_once_it_is_level() -> None:
    """A template that changes meanwhile is not for the past: a collector with a share asks for all when it is level."""
    sender = Sender()
    sender.serve(make_client("a", sample=2), make_client("b", 10, sample=2))
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time()
    sender.collectors.past.set_behind("a", "netflow")
    sender.hear(ONE, Renewals("netflow", [told("new")]))
    sender.live(ONE, b"1", b"2")
    assert [texts(sender.reached[name].got) for name in "ab"] == [[], ["new", "1"]]
    sender.collectors.past.end_behind("a", "netflow")
    for _ in range(2):
        sender.templates.end_past("a", "netflow")
        sender.pass_time()
    sender.answer(ONE, told("new"))
    assert [texts(sender.reached[name].got) for name in "ab"] == [["new"], ["new", "1"]]
    sender.templates.end_past("a", "netflow")
    assert sender.asked.count("templates/netflow/") == 2


def test_an_answer_of_which_the_beginning_was_for_others_is_none() -> None:
    """Only what a worker says from its first piece on counts: pieces may be on the way as a collector joins."""
    sender = Sender()
    sender.serve(make_client("a"))
    sender.answer(ONE, told("rest"), piece=1, pieces=2)
    sender.live(ONE, b"early")
    assert sender.got("a") == []
    sender.answer(ONE, told("one"))
    sender.live(ONE, b"first")
    assert texts(sender.got("a")) == ["one", "first"]


def test_who_awaits_templates_is_known() -> None:
    """From the time at which they are to be asked for until all workers have answered, or were given time."""
    sender = Sender()
    sender.serve(make_client("a"))
    sender.serve(make_client("a"), make_client("b", 10))
    sender.templates.ask("c", "netflow")
    sender.templates.ask("c", "other")
    awaits = sender.templates.awaits
    assert [awaits(name, "netflow") for name in "abc"] == [True] * 3
    assert not awaits("c", "other")
    for expected in ([False, True, True], [False] * 3):
        for worker in WORKERS:
            sender.answer(worker)
        sender.pass_time()
        assert [awaits(name, "netflow") for name in "abc"] == expected


def test_an_answer_that_lacks_a_piece_is_asked_for_again() -> None:
    """A piece that the bus has dropped makes the answer none: all of it comes again, and only then copies begin."""
    sender = Sender()
    sender.serve(make_client("a"))
    sender.answer(TWO)
    for piece in (0, 2, 3):
        sender.answer(ONE, told(str(piece)), piece=piece, pieces=4)
    sender.live(ONE, b"early")
    assert texts(sender.got("a")) == ["0"]
    assert sender.asked == ["templates/netflow/"] * 2
    for piece in range(4):
        sender.answer(ONE, told(str(piece)), piece=piece, pieces=4)
    sender.live(ONE, b"first")
    assert texts(sender.got("a")) == ["0", "1", "2", "3", "first"]
    sender.pass_time(0)
    assert +sender.subscriptions == Counter()


def test_others_lose_nothing_while_one_joins_or_signs_up_anew() -> None:
    """A collector that is served gets all copies; signed up anew it gets the templates beside them, at most once."""
    sender = Sender()
    first, again = make_client("a"), make_client("a", generation=2)
    sender.serve(first)
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time()
    sender.serve(again, make_client("b", 10))
    sender.live(ONE, b"1")
    sender.answer(ONE, told("one"))
    sender.answer(ONE, told("one"))
    sender.live(ONE, b"2")
    assert texts(sender.got("a")) == ["1", "one", "2"]
    assert texts(sender.got("b")) == ["one", "2"]
    sender.serve(again, make_client("b", 10))
    assert sender.asked.count("templates/netflow/") == 2


def test_who_joins_during_a_round_waits_for_the_next() -> None:
    """Workers are not asked for each collector, but again once they have answered and a moment has passed."""
    sender = Sender()
    sender.serve(make_client("a"))
    sender.answer(ONE, told("one"))
    sender.serve(make_client("a"), make_client("b", 10), make_client("c", 11))
    sender.live(ONE, b"1")
    sender.answer(TWO)
    sender.pass_time(0)
    assert sender.asked.count("templates/netflow/") == 1
    sender.pass_time()
    assert sender.asked.count("templates/netflow/") == 2
    sender.answer(ONE, told("one"))
    sender.live(ONE, b"2")
    assert [texts(sender.got(name)) for name in "abc"] == [["one", "1", "2"], ["one", "2"], ["one", "2"]]


def test_nobody_waits_for_those_who_join_later_or_are_served() -> None:
    """The revisions before that of the first collector that still joins are served, whoever asks for templates."""
    sender = Sender()
    sender.serve(make_client("a"))
    since = [sender.templates.joining_since]
    sender.serve(make_client("a"), make_client("b", 10))
    since.append(sender.templates.joining_since)
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time()
    since.append(sender.templates.joining_since)
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time()
    sender.serve(make_client("a", generation=2), make_client("b", 10))
    assert [*since, sender.templates.joining_since] == [1, 1, 2, math.inf]
    assert sender.templates


def test_a_worker_that_does_not_answer_is_not_waited_for() -> None:
    """After some time copies flow without templates, as one line of the log says."""
    sender = Sender()
    sender.serve(make_client("a"))
    sender.answer(ONE, told("one"))
    with capture_logs() as logs:
        sender.pass_time(PATIENCE_SECONDS)
    (line,) = [each for each in logs if each["event"] == "no templates of flow exporters came from some workers"]
    assert line["workers"] == ["ingest.2"]
    sender.live(TWO, b"1")
    assert texts(sender.got("a")) == ["one", "1"]


def test_nobody_waits_for_uplink() -> None:
    """Datagrams of other sites go to a collector at once, since nobody keeps their templates."""
    sender = Sender()
    sender.serve(make_client("a"))
    sender.live(UPLINK, b"1")
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time(0)
    assert not sender.templates
    assert texts(sender.got("a")) == ["1"]


def test_filters_and_orders_hold_for_templates() -> None:
    """A collector gets templates of the exporters that it gets copies of, one that is withheld none."""
    sender = Sender()
    withheld = make_client("b", 10, withheld=Withheld("ops", 1.0))
    sender.serve(make_client("a", prefixes=(f"{OURS}/32",)), withheld, make_client("c", 11, streams=("other",)))
    sender.answer(ONE, told("ours"), told("theirs", THEIRS))
    sender.answer(TWO)
    sender.live(ONE, b"1", b"2", sources=(OURS, THEIRS))
    sender.pass_time()
    assert [texts(sender.got(name)) for name in "abc"] == [["ours", "1"], [], []]
    sender.serve(msgspec.structs.replace(withheld, withheld=None))
    sender.live(ONE, b"1")
    sender.answer(ONE, told("ours"))
    sender.live(ONE, b"2")
    assert texts(sender.got("b")) == ["ours", "2"]


def test_shares_and_samples_get_what_comes_besides() -> None:
    """A renewal goes to all of a group but the owner, under the other number, and to who samples, before copies."""
    sender = Sender()
    members = [make_client(name, 10 + number, group="g") for number, name in enumerate("abc")]
    sender.serve(*members, make_client("s", 20, sample=1000), make_client("all", 21))
    sender.live(ONE)
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time(0)
    assert +sender.subscriptions == Counter(["renewals/netflow/"])
    sender.hear(ONE, Renewals("netflow", [told("new")]))
    assert not any(sender.got(name) for name in (*"abcs", "all"))
    sender.live(ONE, told("new").payload)
    got = {name: sender.got(name) for name in (*"abcs", "all")}
    owned = [name for name in "abc" if got[name] == [told("new").payload]]
    assert len(owned) == 1
    for name in {*"abc"} - {*owned}:
        assert got[name] == [b"\0\x09" + bytes(10) + (77).to_bytes(4) + b"new"]
    assert got["s"] == 2 * [told("new").payload]  # the first of its thousand
    assert got["all"] == [told("new").payload]
    sender.serve(make_client("all", 21))
    sender.pass_time(0)
    assert +sender.subscriptions == Counter()


def settled(*clients: Client) -> Sender:
    """Return a sender of which these have got the templates of all workers."""
    sender = Sender()
    sender.serve(*clients)
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time()
    return sender


def shared_by(sender: Sender, worker: tuple[str, int], names: str) -> dict[str, list[str]]:
    """Let a batch of 64 exporters come, and return which of them each member of a group has got."""
    sources = [f"192.0.2.{number}" for number in range(64)]
    sender.live(worker, *[each.encode() for each in sources], sources=sources)
    return {name: texts(sender.got(name)) for name in names}


def test_the_share_of_a_member_stays_with_the_others_until_it_has_templates() -> None:
    """Of each worker that has not answered the others get all, and only then lose what is the new member's."""
    members = [make_client(name, 10 + number, group="g") for number, name in enumerate("abcd")]
    sender = settled(*members[:2])
    before = shared_by(sender, ONE, "ab")
    sender.serve(*members[:3])
    sender.serve(*members)
    assert shared_by(sender, ONE, "abcd") == before | {"c": [], "d": []}
    sender.answer(ONE)
    of_three = shared_by(sender, ONE, "abcd")
    assert of_three["c"]
    assert not of_three["d"]
    assert all({*of_three[name]} == {*before[name]} - {*of_three["c"]} for name in "ab")
    assert shared_by(sender, TWO, "abcd") == before | {"c": [], "d": []}
    sender.answer(TWO)
    sender.pass_time()
    assert shared_by(sender, TWO, "abcd") == of_three
    for worker in WORKERS:
        sender.answer(worker)
    of_four = shared_by(sender, TWO, "abcd")
    assert all({*of_four[name]} == {*of_three[name]} - {*of_four["d"]} for name in "abc")
    assert sum(map(len, of_four.values())) == 64


def test_a_member_without_others_gets_nothing_before_its_templates() -> None:
    """Rows that no other member wants came before it joined: its account has none of these, and all of later ones."""
    sender = Sender()
    sender.serve(make_client("a", group="g"), make_client("b", 10, group="g", prefixes=(f"{THEIRS}/32",)))
    assert shared_by(sender, ONE, "ab") == {"a": [], "b": []}
    sender.answer(ONE)
    assert len(shared_by(sender, ONE, "ab")["a"]) == 64
    account = sender.collectors.accounts()["collector/a"]
    assert account["expected"] == account["offered"] == 64


def test_a_member_that_catches_up_keeps_its_share() -> None:
    """It gets that from the journal, also what comes before it has templates, so nobody else does."""
    members = [make_client(name, 10 + number, group="g") for number, name in enumerate("abc")]
    sender = settled(*members)
    of_three = shared_by(sender, ONE, "abc")
    sender.serve(*members[:2])
    sender.serve(*members)
    sender.collectors.past.set_behind("c", "netflow")
    sender.collectors.defer_by({"a": 0, "b": 0, "c": 64}.__getitem__)
    assert shared_by(sender, ONE, "abc") == of_three | {"c": []}


def test_templates_go_with_the_shares_of_the_moment() -> None:
    """A member gets renewals as copies while it has their exporter, and templates as its own once it has."""
    members = [make_client(name, 10 + number, group="g") for number, name in enumerate("abc")]
    sender = settled(*members[:1])
    sender.serve(*members)
    sources = [f"192.0.2.{number}" for number in range(64)]
    renewals = [told(source, source) for source in sources]
    sender.hear(ONE, Renewals("netflow", renewals))
    sender.live(ONE, *[each.payload for each in renewals], sources=sources)
    assert sender.got("a") == [each.payload for each in renewals]
    sender.answer(ONE, *renewals)
    own = {name: texts([each for each in sender.got(name) if each[12:16] == b"real"]) for name in "abc"}
    assert own == shared_by(sender, ONE, "abc") | {"a": []}


def test_renewals_begin_anew_where_exporters_change_hands() -> None:
    """So it is when a group changes, and with each question for a member, whose share is its own with the answers."""
    sender = Sender()
    members = [make_client(name, 10 + number, group="g") for number, name in enumerate("ab")]
    renewals, question = "renewals/netflow/", "templates/netflow/"
    sender.serve(*members[:1])
    assert sender.asked == [renewals, renewals, question]
    sender.serve(*members)
    sender.serve(*members)
    assert sender.asked[3:] == [renewals]
    for worker in WORKERS:
        sender.answer(worker)
    sender.pass_time()
    assert sender.asked[4:] == [renewals, question]
    sender.answer(ONE, piece=0, pieces=3)
    sender.answer(ONE, piece=2, pieces=3)
    assert sender.asked[6:] == [renewals, question]
    assert +sender.subscriptions == Counter([renewals, question])


@pytest.mark.parametrize("count", [BURST, 3 * BURST, 100 * BURST])
def test_templates_leave_at_a_pace(count: int) -> None:
    """Few templates leave at once, many in bursts, and never in more than some; copies wait behind."""
    sender = Sender()
    sender.serve(make_client("a"))
    sent: list[int] = []
    send = sender._send

    def note(batch: Gathered, routed: list[tuple[Reached, Selection]]) -> None:
        sent.append(len(batch))
        assert sender.reached["a"].held.paced_until == 0.0 or len(sent) > 1
        send(batch, routed)

    sender.templates._send = note
    sender.answer(ONE, *[told(str(number)) for number in range(count)])
    assert texts(sender.got("a")) == [str(number) for number in range(count)]
    assert len(sent) == min(BURSTS, count // BURST)
    assert (sender.reached["a"].held.paced_until > 0) == (len(sent) > 1)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("live"), st.integers(0, 1)),
        st.tuples(st.just("answer"), st.integers(0, 1)),
        st.tuples(st.just("change"), st.integers(0, 1)),
        st.tuples(st.just("join"), st.integers(0, 3)),
        st.tuples(st.just("leave"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.just(0)),
    ),
    max_size=60,
)


@given(EVENTS)
@settings(max_examples=60, deadline=None)
def test_no_copy_comes_before_its_template(events: list[tuple[str, int]]) -> None:
    """Each copy finds the last template of its exporter there, in any order of answers, changes and joins."""
    sender = Sender()
    here: dict[str, Client] = {}
    version, generation, asked = [0, 0], 0, [0, 0]
    sources = (OURS, THEIRS)
    for event, number in events:
        if event == "join":
            generation += 1
            here[f"c{number}"] = make_client(f"c{number}", 10 + number, generation=generation)
            sender.serve(*here.values())
        elif event == "leave":
            here.pop(f"c{number}", None)
            sender.serve(*here.values())
        elif event == "answer" and asked[number] < sender.asked.count("templates/netflow/"):
            asked[number] += 1
            sender.answer(WORKERS[number], told(f"template {number} {version[number]}", sources[number]))
        elif event == "change":
            version[number] += 1
            sender.live(WORKERS[number], f"template {number} {version[number]}".encode(), sources=[sources[number]])
        elif event == "live":
            sender.live(WORKERS[number], f"flow {number} {version[number]}".encode(), sources=[sources[number]])
        elif event == "time":
            sender.pass_time()
    for name in here:
        known: dict[str, str] = {}
        for text in texts(sender.got(name)):
            kind, exporter, told_version = text.split()
            if kind == "template":
                known[exporter] = told_version
            else:
                assert known.get(exporter) == told_version
