import errno
import random
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from structlog.testing import capture_logs

import services.forwarder.destination
import services.forwarder.service
import shared.datagrams.mmsg
from services.forwarder.destination import ANSWER_SECONDS, Destination
from services.forwarder.few_rows import Few
from services.forwarder.plan import SendPlan
from shared.datagrams.gathered import Gathered
from shared.fanout.sending.backlog import BacklogMemory
from shared.fanout.sending.send_errors import MAX_SKIPS
from shared.net.queues import Queues
from shared.net.route_changes import RouteChanges
from shared.net.sockets import enlarge_receive_buffer
from shared.settings.tables import Forwarder
from tests.builders import SOURCES, make_batch, make_client
from tests.services.forwarder.sent import Sent, receive_all
from tests.stack import wait_until

IP_RECVTTL = 12
"""linux/in.h; the stdlib has no name for it."""
SIZES = [0, 1, 1464, 9000, 32_767, 65_507]
Headers = npt.NDArray[np.void]


@pytest.fixture
def opened(lab: None) -> Iterator[ExitStack]:
    """Closes what a test enters into it."""
    with ExitStack() as stack:
        yield stack


def listen(opened: ExitStack, host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A collector's socket, with room for everything."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    enlarge_receive_buffer(sock, 16 << 20)
    sock.bind((host, port))
    sock.settimeout(60)
    return sock


def closed_port(opened: ExitStack) -> int:
    """A port of loopback that nobody listens on."""
    with listen(opened) as sock:
        port = sock.getsockname()[1]
    return int(port)


class Kernel:
    """The kernel's sendmmsg, made to answer some calls with an error of the test's choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[int] = []
        self.segmented_errors: list[int] = []
        self.late_error = 0
        self.most = 1 << 30
        self.calls = 0
        monkeypatch.setattr(services.forwarder.destination, "send", self.send)
        for few in ("few_of", "mixed_of"):  # which go by other calls
            monkeypatch.setattr(services.forwarder.service, few, lambda *_: None)

    def send(self, descriptor: int, headers: Headers, start: int, stop: int) -> tuple[int, int]:
        """Fail as told, else take what may be taken. `segmented_errors`: of segmented sends, in turn."""
        self.calls += 1
        if self.errors:
            return 0, self.errors.pop(0)
        if start and self.late_error:
            return 0, self.late_error
        if self.segmented_errors:
            segmented = np.flatnonzero(headers["controllen"][start:stop])
            if len(segmented) and segmented[0] == 0:
                if error := self.segmented_errors.pop(0):
                    return 0, error
                stop = start + 1
            elif len(segmented):
                stop = start + int(segmented[0])
        return shared.datagrams.mmsg.send(descriptor, headers, start, min(stop, start + self.most))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The kernel between destinations and the wire."""
    return Kernel(monkeypatch)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_copies_have_the_hop_limit_and_dscp_asked_for(lab: None, address: str) -> None:
    """Each copy carries the collector's hop limit and DSCP, over IPv4 and IPv6."""
    with ExitStack() as opened:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sink = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sink.settimeout(60)
        sink.bind((address, 0))
        if family == socket.AF_INET6:
            sink.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
            sink.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        else:
            sink.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
            sink.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        client = make_client("c", sink.getsockname()[1], address=address, hop_limit=17, dscp=46)
        Sent(opened, client).send(make_batch([b"one"]))
        _, controls, _, _ = sink.recvmsg(100, 200)
        assert sorted(data[0] for _, _, data in controls) == [17, 46 << 2]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_collector_that_wants_another_dscp_goes_on_getting_copies(opened: ExitStack, host: str) -> None:
    """With a new DSCP the kernel forgets the route of the socket, which must not pass for a route that is gone."""
    sink = listen(opened, host)
    client = make_client("c", sink.getsockname()[1], address=host)
    sent = Sent(opened, client)
    sent.send(make_batch([b"before"]))
    sent.collectors.replace([msgspec.structs.replace(client, generation=2, dscp=8)])
    assert sent.trouble() == ""
    assert sent.send(make_batch([b"after"]))["collector/c"]["sent"] == 2
    assert receive_all(sink, 2) == [b"before", b"after"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("segmentation", [True, False])
@pytest.mark.parametrize(
    "lengths", [SIZES, [1464] * 200, [1464] * 63 + [7], [65_507] * 8, [0] * 5, [40, 30, 20, 10, 0, 10], [32_500] * 9]
)
def test_every_size_arrives_as_it_was(opened: ExitStack, host: str, segmentation: bool, lengths: list[int]) -> None:
    """Datagrams of 0 to 65,507 bytes, in runs and alone, by UDP_SEGMENT or not, arrive in order byte for byte."""
    collector = listen(opened, host)
    client = make_client("a", collector.getsockname()[1], address=host)
    sent = Sent(opened, client, segmentation=segmentation)
    payloads = [bytes([number]) * length for number, length in enumerate(lengths)]
    account = sent.send(make_batch(payloads))["collector/a"]
    assert receive_all(collector, len(payloads)) == payloads
    assert account["sent"] == account["offered"] == len(payloads)
    assert account["bytes"] == sum(lengths)


def test_each_collector_gets_its_own_rows(opened: ExitStack) -> None:
    """Several collectors of one batch get all of it, its half, or what their prefix says, each at its own socket."""
    sockets = {name: listen(opened) for name in "abc"}
    fields: dict[str, dict[str, Any]] = {"a": {}, "b": {"sample": 2}, "c": {"prefixes": ("2001:db8::/32",)}}
    sent = Sent(opened, *(make_client(name, sockets[name].getsockname()[1], **fields[name]) for name in "abc"))
    payloads = [b"%d" % number for number in range(8)]
    accounts = sent.send(make_batch(payloads, ["192.0.2.1", "2001:db8::1"]))
    assert receive_all(sockets["a"], 8) == payloads
    assert receive_all(sockets["b"], 4) == payloads[::2]
    assert receive_all(sockets["c"], 4) == payloads[1::2]
    assert accounts["collector/b"]["sampled_out"] == accounts["collector/c"]["filtered"] == 4


def test_closed_port_is_refused_and_accounted_for(opened: ExitStack) -> None:
    """Refusals of a closed port are seen and counted; every datagram is delivered or dropped; the living get theirs."""
    live = listen(opened)
    sent = Sent(opened, make_client("dead", closed_port(opened)), make_client("live", live.getsockname()[1]))
    for _ in range(20):
        accounts = sent.send(make_batch([b"one", b"three", b"seven"]))
    assert receive_all(live, 60) == [b"one", b"three", b"seven"] * 20
    dead = accounts["collector/dead"]
    assert dead["refusals"] > 0
    assert dead["sent"] + dead.get("dropped_refused", 0) == dead["offered"] == 60
    assert "refusals" not in accounts["collector/live"]


def test_closed_port_costs_two_sends_a_batch(opened: ExitStack) -> None:
    """The kernel tells of a closed port by taking fewer messages, without an error: the rest is dropped."""
    payloads = [b"x" * (number + 1) for number in range(100)]  # ascending, so that no two go together
    for segmentation in (True, False):
        sent = Sent(opened, make_client("dead", closed_port(opened)), segmentation=segmentation)
        dead = sent.send(make_batch(payloads))["collector/dead"]
        assert dead["dropped_refused"] >= 97
        assert dead["sent"] + dead["dropped_refused"] == 100
        assert dead["refusals"] >= 1


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMSGSIZE, errno.EPROTO, errno.EPERM, errno.EHOSTUNREACH])
def test_an_earlier_datagrams_error_costs_the_next_one_nothing(opened: ExitStack, kernel: Kernel, error: int) -> None:
    """An error that a datagram meets once, whatever it is, belongs to an earlier one: it is tried again and leaves."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), segmentation=False)
    for number in range(20):
        kernel.errors = [error]
        account = sent.send(make_batch([b"%d" % number]))["collector/a"]
    assert receive_all(collector, 20) == [b"%d" % number for number in range(20)]
    assert account["sent"] == 20


def test_one_refusal_is_forgiven_and_a_second_drops_the_rest(opened: ExitStack, kernel: Kernel) -> None:
    """One refusal may be of an earlier batch; a second one in the same batch drops what is left of it."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), segmentation=False)
    kernel.errors = [errno.ECONNREFUSED]
    account = sent.send(make_batch([b"x"] * 3))["collector/a"]
    assert (account["sent"], account["refusals"]) == (3, 1)
    kernel.errors = [errno.ECONNREFUSED] * 2
    account = sent.send(make_batch([b"x"] * 3))["collector/a"]
    assert (account["sent"], account["refusals"], account["dropped_refused"]) == (3, 3, 3)


def test_collector_that_comes_back_gets_its_next_batch_whole(opened: ExitStack) -> None:
    """The answer to a datagram sent while the port was closed does not cost one that is sent after it opened."""
    port = closed_port(opened)
    sent = Sent(opened, make_client("a", port))
    for _ in range(3):
        sent.send(make_batch([b"to nobody"]))
    collector = listen(opened, port=port)
    sent.send(make_batch([b"back"]))
    assert receive_all(collector, 1) == [b"back"]


def test_refusal_is_heard_of_without_another_datagram(opened: ExitStack) -> None:
    """The answer to the last datagram is counted at the next refresh, and costs the next datagram nothing."""
    sent = Sent(opened, make_client("a", closed_port(opened)))
    sent.send(make_batch([b"one"]))
    sent.collectors.refresh()
    assert sent.collectors.accounts()["collector/a"]["refusals"] == 1
    assert sent.send(make_batch([b"two"]))["collector/a"] == {
        "sent": 2,
        "bytes": 6,
        "refusals": 1,
        "offered": 2,
        "expected": 2,
    }


@pytest.mark.parametrize("segmentation", [True, False])
@pytest.mark.parametrize("size", [0, 1, 20_000])
def test_who_refuses_gets_a_datagram_a_second(
    opened: ExitStack, monkeypatch: pytest.MonkeyPatch, segmentation: bool, size: int
) -> None:
    """With `withhold` one datagram goes at a time, the rest is withheld; when it was not refused all go again."""
    now = 1000.0
    monkeypatch.setattr(services.forwarder.destination, "time", SimpleNamespace(monotonic=lambda: now))
    port = closed_port(opened)
    sent = Sent(opened, make_client("a", port), segmentation=segmentation, withhold=True)
    payloads = [b"%d" % number + bytes(size) for number in range(9)]
    sent.send(make_batch(payloads[:1]))
    sent.collectors.refresh()
    for second in range(1, 4):
        now += 1.0
        for _ in range(3):
            account = sent.send(make_batch(payloads))["collector/a"]
        assert (account["sent"], account["withheld"]) == (1 + second, 26 * second)
        sent.collectors.refresh()
        assert account["offered"] == 1 + 27 * second
    collector = listen(opened, port=port)
    now += 1.0
    sent.send(make_batch(payloads))
    now += 0.1  # too soon for an answer to have come
    sent.collectors.refresh()
    sent.send(make_batch(payloads))
    now += ANSWER_SECONDS
    sent.collectors.refresh()
    account = sent.send(make_batch(payloads))["collector/a"]
    assert receive_all(collector, 10) == [payloads[0], *payloads]
    assert "dropped_refused" not in account


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP])
@pytest.mark.parametrize("sample", [1, 2])
def test_refused_segmentation_sends_the_rest_one_by_one(
    opened: ExitStack, kernel: Kernel, error: int, sample: int
) -> None:
    """The rest goes one by one when segments are refused: in order, nothing doubled, and nothing counted as dropped."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1], sample=sample))
    payloads = [b"alone", *[bytes([number]) * (500 + number // 70) for number in range(200)], b"end"]
    kernel.segmented_errors = [0, error]
    account = sent.send(make_batch(payloads))["collector/a"]
    expected = payloads[::sample]
    assert receive_all(collector, len(expected)) == expected
    assert account["sent"] == len(expected)
    assert kernel.segmented_errors == []
    account = sent.send(make_batch([b"same"] * 4))["collector/a"]
    assert receive_all(collector, 4 // sample) == [b"same"] * (4 // sample)


def test_segmentation_is_tried_again_after_refresh(opened: ExitStack, kernel: Kernel) -> None:
    """A path that refused segments once, as after its MTU shrank, is given another chance with the next refresh."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]))
    kernel.segmented_errors = [errno.EMSGSIZE] * 2  # the first might have been of an earlier datagram
    sent.send(make_batch([b"same"] * 4))
    kernel.segmented_errors = [errno.EMSGSIZE]
    sent.send(make_batch([b"same"] * 4))
    assert kernel.segmented_errors == [errno.EMSGSIZE]
    sent.collectors.refresh()
    sent.send(make_batch([b"same"] * 4))
    assert kernel.segmented_errors == []
    assert receive_all(collector, 12) == [b"same"] * 12


def test_refused_segments_cost_only_the_collector_concerned(opened: ExitStack, kernel: Kernel) -> None:
    """Of two collectors that share a plan, one whose segments are refused gets its rest, the other all at once."""
    sockets = [listen(opened) for _ in range(2)]
    sent = Sent(opened, *(make_client(f"c{n}", sock.getsockname()[1]) for n, sock in enumerate(sockets)))
    payloads = [bytes([number]) * 300 for number in range(150)]
    kernel.segmented_errors = [errno.EIO]
    sent.send(make_batch(payloads))
    for sock in sockets:
        assert receive_all(sock, 150) == payloads


def test_refused_segments_cost_nobody_else_in_another_thread(opened: ExitStack, kernel: Kernel) -> None:
    """Of eight collectors served side by side each gets all rows once, each exporter's in order, when some refuse."""
    sockets = [listen(opened) for _ in range(8)]
    sent = Sent(opened, *(make_client(f"c{n}", sock.getsockname()[1]) for n, sock in enumerate(sockets)))
    draw = random.Random(2)
    exporters = [draw.randrange(len(SOURCES)) for _ in range(900)]
    payloads = [b"%02d.%d" % (each, n) + b"." * draw.randrange(100) for n, each in enumerate(exporters)]
    kernel.segmented_errors = [errno.EIO, 0, errno.EIO, 0, 0, errno.EMSGSIZE]
    accounts = sent.send(make_batch(payloads, [SOURCES[each] for each in exporters]))
    for number, sock in enumerate(sockets):
        assert sorted(receive_all(sock, 900), key=lambda each: each[:2]) == sorted(payloads, key=lambda each: each[:2])
        assert accounts[f"collector/c{number}"]["sent"] == 900
        assert accounts[f"collector/c{number}"]["bytes"] == sum(map(len, payloads))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errno.EHOSTUNREACH, "dropped_not_connected"),
        (errno.ENETUNREACH, "dropped_not_connected"),
        (errno.ENETDOWN, "dropped_not_connected"),
    ],
)
def test_error_that_would_meet_the_rest_drops_the_rest(
    opened: ExitStack, kernel: Kernel, error: int, cause: str
) -> None:
    """A datagram that the kernel took is delivered; an error that comes twice drops the rest under its cause."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), segmentation=False)
    kernel.most, kernel.late_error = 3, error
    account = sent.send(make_batch([b"%d" % number for number in range(10)]))["collector/a"]
    assert receive_all(collector, 3) == [b"0", b"1", b"2"]
    assert (account["sent"], account[cause], account["unreachables"]) == (3, 7, 2)
    assert kernel.calls == 3


def test_an_error_that_comes_twice_costs_its_batch_alone(opened: ExitStack, kernel: Kernel) -> None:
    """A router's word, twice, that a host is unreachable costs that batch; the next leaves by the same socket."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]))
    kernel.errors = [errno.EHOSTUNREACH] * 2
    assert sent.send(make_batch([b"lost"] * 3))["collector/a"]["dropped_not_connected"] == 3
    sent.send(make_batch([b"back"] * 2))
    sent.send(make_batch([b"again"]))
    found = [collector.recvfrom(100) for _ in range(3)]
    assert [payload for payload, _ in found] == [b"back", b"back", b"again"]
    assert len({source for _, source in found}) == 1


def test_collector_without_a_route_is_dropped_and_counted(opened: ExitStack) -> None:
    """A collector that there is no way to costs its own copies, not those of the others, nor an error."""
    live = listen(opened)
    lost = [make_client(address, address=address) for address in ("192.0.2.1", "2001:db8::1")]
    sent = Sent(opened, make_client("live", live.getsockname()[1]), *lost)
    accounts = sent.send(make_batch([b"x", b"y"]))
    sent.collectors.refresh()
    assert receive_all(live, 2) == [b"x", b"y"]
    for address in ("192.0.2.1", "2001:db8::1"):
        assert accounts[f"collector/{address}"]["dropped_not_connected"] == 2


def test_datagrams_that_fail_one_by_one_are_skipped(opened: ExitStack, kernel: Kernel) -> None:
    """An error that belongs to one datagram costs that one, under its own name; the ones behind it are sent."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), segmentation=False)
    kernel.errors = [errno.EPERM] * 4
    account = sent.send(make_batch([b"0", b"1", b"2"]))["collector/a"]
    assert receive_all(collector, 1) == [b"2"]
    assert account["dropped_eperm"] == 2


def test_datagrams_that_all_fail_are_not_all_tried(opened: ExitStack, kernel: Kernel) -> None:
    """After so many failures of one batch its rest is dropped with them, and all of it is accounted for."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), segmentation=False)
    kernel.errors = [errno.EPERM] * 1000
    account = sent.send(make_batch([b"x"] * 200))["collector/a"]
    assert account["dropped_eperm"] == 200
    assert kernel.calls == 2 * (MAX_SKIPS + 1)


def test_full_buffer_drops_and_does_not_wait(opened: ExitStack) -> None:
    """With the smallest send buffer and a collector that reads nothing, sending never waits, and all is counted."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), send_buffer=4096)
    for _ in range(20):
        account = sent.send(make_batch([bytes(65_507)] * 8))["collector/a"]
    assert account["sent"] + account.get("held", 0) + account.get("dropped_buffer_full", 0) == 160


def test_changed_collector_begins_a_new_account(opened: ExitStack) -> None:
    """One that did not change keeps its account; a new one expects only what is published from then on."""
    first, second = listen(opened), listen(opened)
    stays = make_client("stays", first.getsockname()[1])
    sent = Sent(opened, stays, make_client("moves", second.getsockname()[1]))
    sent.send(make_batch([b"x"] * 3))
    sent.collectors.replace([stays, make_client("moves", first.getsockname()[1])])
    accounts = sent.send(make_batch([b"y"]))
    assert accounts["collector/stays"]["expected"] == 4
    assert accounts["collector/moves"]["expected"] == 1


def test_destination_that_is_closed_counts_what_it_is_given(opened: ExitStack) -> None:
    """Between close and refresh every row is dropped as not connected."""
    account: Counter[str] = Counter()
    client = make_client("a", listen(opened).getsockname()[1])
    changes, queues = opened.enter_context(closing(RouteChanges())), opened.enter_context(closing(Queues()))
    destination = Destination(client, Forwarder(), account, BacklogMemory(1), changes, queues)
    destination.close()
    plan = SendPlan()
    plan.build(Gathered([make_batch([b"x"] * 5)]), None, destination.largest_segment)
    assert destination.send(plan) == 5
    assert account == {"dropped_not_connected": 5}


def numbered(start: int, count: int) -> list[bytes]:
    """Payloads that can be told apart."""
    return [b"%06d" % number for number in range(start, start + count)]


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOBUFS])
@pytest.mark.parametrize("segmentation", [True, False])
def test_what_finds_no_room_waits(opened: ExitStack, kernel: Kernel, error: int, segmentation: bool) -> None:
    """Datagrams that the kernel has no room for wait, and leave in order when there is; no newer one overtakes them."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), segmentation=segmentation)
    kernel.most, kernel.late_error = 1, error
    before = sent.send(make_batch(numbered(0, 100)))["collector/a"]
    assert 0 < before["sent"] < 100
    assert before["held"] == 100 - before["sent"]
    kernel.errors = [error] * 1_000_000  # tried as often as a busy machine leaves time for
    assert sent.send(make_batch(numbered(100, 50)))["collector/a"]["held"] == before["held"] + 50
    assert sent.work()["collector/a"]["held"] == before["held"] + 50
    kernel.errors, kernel.most, kernel.late_error = [], 1 << 30, 0
    account = sent.work()["collector/a"]
    assert (account["sent"], account["held"]) == (150, 0)
    sent.send(make_batch(numbered(150, 10)))
    assert receive_all(collector, 160) == numbered(0, 160)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOBUFS])
def test_no_room_is_not_logged_as_a_fault_of_the_collector(
    opened: ExitStack, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A few datagrams that the kernel has no room for wait, and the log has nothing to check at the collector."""
    sent = Sent(opened, make_client("a", listen(opened).getsockname()[1]))
    monkeypatch.setattr(Few, "send", lambda *_: (0, error))
    monkeypatch.setattr(services.forwarder.destination, "send", lambda *_: (0, error))
    with capture_logs() as said:
        assert sent.send(make_batch([b"x"]))["collector/a"]["held"] == 1
    assert said == []


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_nothing_waits_for_ever(opened: ExitStack, kernel: Kernel, seconds: float) -> None:
    """A datagram that has waited `queue_seconds` is dropped as `buffer_full`; with 0 seconds it is dropped at once."""
    sent = Sent(opened, make_client("a", listen(opened).getsockname()[1]), queue_seconds=seconds)
    kernel.errors = [errno.EAGAIN] * 1_000_000
    account = sent.send(make_batch(numbered(0, 10)))["collector/a"]
    assert account["held"] == (10 if seconds else 0)
    wait_until(lambda: sent.work()["collector/a"].get("dropped_buffer_full") == 10, "all is dropped")
    assert sent.accounts()["collector/a"]["held"] == 0


def nothing_waits(sent: Sent) -> bool:
    """Let all try that wait; whether nobody waits any longer."""
    return not any(account["held"] for account in sent.work().values())


def test_too_many_bytes_push_out_the_oldest(opened: ExitStack, kernel: Kernel) -> None:
    """Beyond `queue_bytes` a collector's oldest are dropped, and beyond `held_memory` of all, each its own."""
    collectors = [listen(opened) for _ in range(2)]
    clients = [make_client(f"c{n}", each.getsockname()[1]) for n, each in enumerate(collectors)]
    for settings, kept in (({"queue_bytes": 8192}, 8), ({"held_memory": 4096}, 4)):
        sent = Sent(opened, *clients, queue_seconds=60, **settings)
        kernel.errors = [errno.EAGAIN] * 100_000
        for number in range(20):
            accounts = sent.send(make_batch([bytes([number]) * 1024]))
        for name in ("collector/c0", "collector/c1"):
            assert (accounts[name]["held"], accounts[name]["dropped_buffer_full"]) == (kept, 20 - kept)
        kernel.errors = []
        wait_until(partial(nothing_waits, sent), "all has left")
        for each in collectors:
            assert [payload[0] for payload in receive_all(each, kept)] == list(range(20 - kept, 20))


def test_collector_that_leaves_takes_what_waits_along(opened: ExitStack, kernel: Kernel) -> None:
    """Datagrams that wait for a collector that has left are not sent; they are dropped in time, and counted."""
    collector = listen(opened)
    sent = Sent(opened, make_client("a", collector.getsockname()[1]), queue_seconds=0.1)
    kernel.errors = [errno.EAGAIN]
    sent.send(make_batch(numbered(0, 10)))
    sent.collectors.replace([])
    wait_until(lambda: (sent.work(), sent.memory_used == 0)[1], "their memory is given back")
    sent.collectors.departed.close_all()
    assert sent.collectors.departed.lost == 10
    assert receive_all(collector, 0) == []
