"""The sender of copies, without a bus, on hosts and links in namespaces of the test's own."""

import ctypes
import errno
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

import services.transmitter.packet_socket
import shared.mmsg
from services.transmitter.copies import Copies
from services.transmitter.privileges import KINDS, RawSockets
from services.transmitter.sender import Sender
from shared.gathering import Gathered
from shared.ledger import EXPECTED, discrepancies
from shared.routing import ALL_ROWS
from shared.settings import Settings, Transmitter
from tests.builders import make_batch, make_client
from tests.capture import Arrival, Collector
from tests.network import End, Host, veth
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
EXPORTERS = ("192.0.2.1", "192.0.2.2")


class Site:
    """A relay with a sender, and a collector's host at the other end of a link."""

    def __init__(self, opened: ExitStack, **settings: Any) -> None:
        self._opened = opened
        self.relay, self.siem = opened.enter_context(Host()), opened.enter_context(Host())
        self.up, self.eth = End(self.relay, "up", "10.2.0.1/24"), End(self.siem, "eth", "10.2.0.2/24")
        opened.enter_context(veth(self.up, self.eth))
        kept = [[opened.enter_context(self.relay.socket(*KINDS[kind])) for _ in range(3)] for kind in KINDS]
        for sock in (sock for several in kept for sock in several):
            sock.setblocking(False)
        with self.relay.entered():
            raw = RawSockets(*(tuple(several) for several in kept))  # type: ignore[arg-type]
            self.sender = opened.enter_context(closing(Sender(Settings(transmitter=Transmitter(**settings)), raw)))
        self.account: Counter[str] = Counter()
        self.sent = 0
        self.copies: Copies = self.reach()

    def reach(self, address: str = "10.2.0.2", **fields: Any) -> Copies:
        """How a collector is reached."""
        return self.sender.reach(make_client("c", 9514, address=address, **fields), self.account)

    def send(self, *payloads: bytes, sources: tuple[str, ...] = EXPORTERS, port: int = 514) -> None:
        """Send copies of a batch; the account adds up afterwards."""
        batch = Gathered([make_batch(payloads, sources, port=port)])
        self.account["offered"] += len(payloads)
        self.sender.send(batch, [(self.copies, ALL_ROWS)])
        self.check()

    def check(self) -> None:
        """The account must add up at any time."""
        account = {**self.account, EXPECTED: self.account["offered"]}
        assert list(discrepancies({"collector/c": account})) == []

    def turn(self) -> None:
        """What the loop does all the time."""
        self.sender.work()
        self.check()

    def turn_until(self, counter: str, count: int) -> None:
        """Turn until so many are counted."""

        def counted() -> bool:
            self.turn()
            return self.account[counter] >= count

        wait_until(counted, f"{count} are {counter}: {dict(self.account)}")

    def until_delivered(self) -> None:
        """Send until the way is known and nothing waits."""
        self.send(b"first")
        self.turn_until("delivered", self.account["offered"])

    def send_until(self, condition: Callable[[], object], what: str) -> None:
        """Send a datagram at a time, and turn, until a condition is met."""

        def met() -> object:
            self.send(b"again")
            self.turn()
            return condition()

        wait_until(met, what)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closed at the end of the test."""
    with ExitStack() as stack:
        yield stack


def payloads(arrivals: list[Arrival]) -> list[bytes]:
    """What arrived."""
    return [arrival.payload for arrival in arrivals]


def numbered(start: int, count: int) -> list[bytes]:
    """Payloads that can be told apart."""
    return [b"%06d" % number for number in range(start, start + count)]


def test_datagrams_wait_for_the_next_hop_and_arrive_in_order(opened: ExitStack) -> None:
    """What comes while the link address is asked for is held, and leaves in order once it is known."""
    site = Site(opened)
    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.siem.run("ip", "link", "set", "dev", "eth", "arp", "off")
        for start in range(0, 300, 30):
            site.send(*numbered(start, 30), sources=EXPORTERS[:1])
            site.turn()
        assert site.account["held"] == 300
        site.siem.run("ip", "link", "set", "dev", "eth", "arp", "on")
        site.relay.neighbour("10.2.0.2", site.eth.link_address, "up")
        hop = site.copies.way.hop
        assert hop is not None
        while not hop.usable:
            site.sender.neighbourhood.follow()
        site.send(*numbered(300, 30), sources=EXPORTERS[:1])
        assert payloads(collector.read(330)) == numbered(0, 330)
    assert (site.account["delivered"], site.account["held"]) == (330, 0)


def test_what_waits_too_long_is_dropped_and_counted(opened: ExitStack) -> None:
    """A next hop that never answers costs what was sent to it, after a second, and bounds hold before that."""
    site = Site(opened)
    site.copies = site.reach("10.2.0.77")
    site.send(*numbered(0, 100))
    assert site.account["held"] == 100
    site.turn_until("dropped_no_neighbour", 100)
    for _ in range(30):
        site.send(*numbered(0, 256))
    assert site.account["held"] <= 4096


def test_a_new_link_address_is_followed(opened: ExitStack) -> None:
    """A collector's host that was replaced, with another link address, gets copies again within seconds."""
    site = Site(opened)
    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        collector.read(1)
        site.siem.run("ip", "link", "set", "dev", "eth", "address", "02:00:00:00:77:77")
        site.relay.run("ip", "neigh", "change", "10.2.0.2", "nud", "stale", "dev", "up")
        site.send_until(lambda: list(collector.take()), "copies reach the new address")


def test_link_that_is_down_is_counted_and_comes_back(opened: ExitStack) -> None:
    """While the link has no carrier its copies are dropped as `interface_down`; then they flow again."""
    site = Site(opened)
    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        site.siem.run("ip", "link", "set", "dev", "eth", "down")
        site.send_until(lambda: site.account["dropped_interface_down"], "it is seen")
        site.siem.run("ip", "link", "set", "dev", "eth", "up")
        list(collector.take())
        site.send_until(lambda: list(collector.take()), "copies flow again")


def test_route_that_goes_and_a_smaller_mtu_are_followed(opened: ExitStack) -> None:
    """Without a route copies are dropped as `no_route`; a smaller MTU makes fragments, and all arrive whole."""
    site = Site(opened)
    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        for end, host in ((site.up, site.relay), (site.eth, site.siem)):
            host.run("ip", "link", "set", "dev", end.name, "mtu", "600")
        site.send_until(lambda: site.copies.way.mtu == 600, "the MTU is known")
        before = site.account["delivered"]
        site.send(*(bytes([number]) * 1400 for number in range(20)))
        found = payloads(collector.read(before + 20))
        assert sorted(found[before:]) == [bytes([number]) * 1400 for number in range(20)]
        site.relay.run("ip", "route", "del", "10.2.0.0/24", "dev", "up")
        site.send_until(lambda: site.account["dropped_no_route"], "it is seen")


def test_runs_that_a_kernel_refuses_leave_one_by_one(opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel refuses segmentation, every datagram still arrives in order, and it is tried again later."""
    site = Site(opened)
    refused = 0

    def without_segmentation(descriptor: int, messages: Any, start: int, stop: int) -> tuple[int, int]:
        nonlocal refused
        if segmented(int(messages["iov"][start])):
            refused += 1
            return 0, errno.EINVAL
        return shared.mmsg.send(descriptor, messages, start, start + 1)

    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        collector.read(1)
        monkeypatch.setattr(services.transmitter.packet_socket, "send", without_segmentation)
        site.send(b"odd one", *numbered(0, 100), sources=EXPORTERS[:1])
        assert payloads(collector.read(101)) == [b"odd one", *numbered(0, 100)]
        site.send(*numbered(100, 50), sources=EXPORTERS[:1])
        assert refused == 1, "it was tried again at once"
        monkeypatch.undo()
        time.sleep(1.1)
        site.turn()
        site.send(*numbered(150, 50), sources=EXPORTERS[:1])
        assert payloads(collector.read(100)) == numbered(100, 100)


def segmented(iovecs: int) -> bool:
    """Whether a message's first piece, which begins with virtio_net_hdr, has a type of segmentation."""
    base = ctypes.c_uint64.from_address(iovecs).value
    return bool(ctypes.string_at(base, 2)[1])


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errno.EAGAIN, "dropped_buffer_full"),
        (errno.ENOBUFS, "dropped_queue_full"),
        (errno.ENETDOWN, "dropped_interface_down"),
        (errno.ENXIO, "dropped_interface_down"),
        (errno.EHOSTUNREACH, "dropped_no_route"),
    ],
)
def test_error_that_would_meet_the_rest_drops_the_rest(
    opened: ExitStack, monkeypatch: pytest.MonkeyPatch, error: int, cause: str
) -> None:
    """What the interface can't take, even after a moment, is dropped under its cause, and the next batch goes on."""
    site = Site(opened)
    site.until_delivered()
    monkeypatch.setattr(services.transmitter.packet_socket, "send", lambda *_: (0, error))
    site.send(*numbered(0, 50))
    assert site.account[cause] == 50
    monkeypatch.undo()
    site.send(*numbered(0, 50))
    assert site.account["delivered"] == 51


def test_one_that_fails_costs_itself_alone(opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A datagram whose fragment is refused is dropped whole; those before and behind it arrive."""
    site = Site(opened)
    calls = 0

    def second_fragment_fails(descriptor: int, messages: Any, start: int, stop: int) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            return shared.mmsg.send(descriptor, messages, start, start + 2)  # the small one, and a first fragment
        return (0, errno.EPERM) if calls == 2 else shared.mmsg.send(descriptor, messages, start, stop)

    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        monkeypatch.setattr(services.transmitter.packet_socket, "send", second_fragment_fails)
        site.send(b"before", bytes(4000), b"behind", sources=EXPORTERS[:1])
        assert payloads(collector.read(3)) == [b"first", b"before", b"behind"]
    assert (site.account["delivered"], site.account["dropped_eperm"]) == (3, 1)


def test_policy_is_kept_whoever_is_in_the_registry(opened: ExitStack) -> None:
    """Outside the allowed destinations, from refused sources, and to our own listener nothing goes; each is counted."""
    site = Site(opened, destinations=("10.2.0.2/32", "127.0.0.0/8"), sources=("192.0.2.0/24",))
    site.until_delivered()
    site.send(b"x", sources=("198.51.100.1",))
    site.send(b"x", sources=("2001:db8::1",))
    assert (site.account["dropped_source_refused"], site.account["dropped_other_family"]) == (1, 1)
    site.copies = site.reach("10.2.0.3")
    site.send(b"x")
    assert site.account["dropped_destination_refused"] == 1
    site.copies = site.sender.reach(make_client("loop", 6667, address="127.0.0.1"), site.account)
    site.send(b"x")
    assert site.account["dropped_destination_refused"] == 2
    assert site.account["delivered"] == 1


def test_frames_per_second_holds(opened: ExitStack) -> None:
    """No more than a tenth of a second's allowance leaves at once; the rest is counted."""
    site = Site(opened, frames_per_second=1000)
    site.until_delivered()
    time.sleep(0.15)
    site.send(*numbered(0, 250))
    assert site.account["dropped_rate_limited"] >= 140


def test_a_message_of_another_process_is_not_taken_for_the_kernels(opened: ExitStack) -> None:
    """What somebody else sends to the netlink socket changes nothing and breaks nothing."""
    site = Site(opened)
    site.until_delivered()
    netlink = site.sender.neighbourhood._netlink
    with closing(site.relay.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)) as stranger:
        for sock in (netlink._events, netlink._questions):
            for message in (b"", bytes(16), b"\xff" * 64):
                try:
                    stranger.sendto(message, (sock.getsockname()[0], 0))
                except OSError:  # the kernel may refuse it for us
                    break
    version = site.sender.neighbourhood.version
    site.turn()
    assert site.sender.neighbourhood.version == version
    assert site.sender.neighbourhood.way("10.2.0.2").link is not None
