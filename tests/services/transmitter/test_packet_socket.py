"""Fate of copies that the kernel does not take, seen from both ends: the account and the collector's host."""

import errno
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import services.transmitter.packet_socket
import services.transmitter.sender
import shared.datagrams.mmsg
from services.transmitter.packet_socket import PATIENCE_SECONDS, PATIENCE_SHARE, PacketSockets
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import ALL_ROWS, Selection
from shared.fanout.sending.next_hops import Egress, EgressKind
from shared.fanout.sending.send_errors import MAX_SKIPS
from tests.builders import make_batch
from tests.capture import Collector, Datagram
from tests.network import End, Host, tunnel, veth
from tests.services.transmitter.site import (
    EXPORTERS,
    SIEM4,
    SIEM6,
    Copied,
    Site,
    ask_quickly,
    numbered,
    open_raw,
    payloads,
)

pytestmark = pytest.mark.usefixtures("lab")
ONE = EXPORTERS[:1]
SOURCES6 = ("2001:db8::1", "2001:db8::2")
NO_SEGMENTATION = (errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP)
ENOUGH = 10_000


class Kernel:
    """The kernel's sendmmsg(2); `says` is what it answers to the next calls: how many messages it takes, or -errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.says: deque[int] = deque()
        self.afterwards = ENOUGH
        self.calls = 0
        monkeypatch.setattr(services.transmitter.packet_socket, "send", self.send)
        monkeypatch.setattr(services.transmitter.sender, "frames_of", lambda *_, **__: None)  # few try once more

    def send(self, descriptor: int, messages: Any, start: int, stop: int) -> tuple[int, int]:
        """Do as told, then as `afterwards`."""
        self.calls += 1
        word = self.says.popleft() if self.says else self.afterwards
        return (
            shared.datagrams.mmsg.send(descriptor, messages, start, min(stop, start + word)) if word > 0 else (0, -word)
        )


@pytest.fixture
def site(opened: ExitStack) -> Site:
    """A site whose next hops are known for ever."""
    return known(Site(opened))


@pytest.fixture
def singles(opened: ExitStack) -> Site:
    """A site whose datagrams all leave one by one."""
    return known(Site(opened, segmentation=False))


def known(site: Site) -> Site:
    """Let the relay know its next hops, so that nothing waits for them."""
    for address in (SIEM4, SIEM6):
        site.relay.neighbour(address, site.eth.link_address, "up")
    site.turn()
    return site


@pytest.fixture
def copied(site: Site, opened: ExitStack) -> Copied:
    """Return the copies that come at the collector's host."""
    return opened.enter_context(Copied(site.siem, "eth"))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The kernel between the sender and the wire."""
    return Kernel(monkeypatch)


class Clock:
    """A clock on which only waiting takes time: a busy machine takes none."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that interfaces are waited for by."""
    clock = Clock()
    monkeypatch.setattr(services.transmitter.packet_socket, "time", clock)
    return clock


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOBUFS])
def test_what_is_full_for_a_moment_costs_nothing(site: Site, copied: Copied, kernel: Kernel, error: int) -> None:
    """A buffer or a queue that has room again within 20 ms loses nothing, wherever in a batch it was full."""
    kernel.says.extend([-error, -error, 1, -error, 1, -error])
    sent = [bytes([number]) * (100 + number) for number in range(10)]
    site.send(*sent, sources=ONE)
    assert payloads(copied.read(10)) == sent
    assert site.account["sent"] == 10


@pytest.mark.parametrize(("error", "cause"), [(errno.EAGAIN, "buffer_full"), (errno.ENOBUFS, "queue_full")])
def test_what_stays_full_is_waited_for_in_measure(
    site: Site, copied: Copied, kernel: Kernel, error: int, cause: str, clock: Clock
) -> None:
    """After 20 ms the rest is dropped, and what follows at once; some time later the interface is waited for again."""
    began = clock.now
    kernel.says.append(1)
    kernel.afterwards = -error
    site.send(b"taken", *numbered(0, 50), sources=ONE)
    assert PATIENCE_SECONDS * 0.9 <= clock.now - began < PATIENCE_SECONDS * 1.2
    assert (site.account["sent"], site.account[f"dropped_{cause}"]) == (1, 50)
    kernel.calls = 0
    for batches in range(1, 6):
        site.send(*numbered(0, 50), sources=ONE)
        assert kernel.calls <= batches + 1  # a tenth of the waiting is due again
        assert site.account[f"dropped_{cause}"] == 50 + 50 * batches
    kernel.afterwards = ENOUGH
    site.send(b"again", sources=ONE)
    clock.now += 0.05
    kernel.says.extend([-error, -error])
    site.send(b"waited for", sources=ONE)
    assert payloads(copied.read(3)) == [b"taken", b"again", b"waited for"]


def shaped(site: Site, shape: str, interface: str = "up") -> None:
    """Slow an interface of the relay down."""
    try:
        site.relay.run(*f"tc qdisc replace dev {interface} root {shape}".split())
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no traffic shaping here: {error}")


class Naps:
    """The clock, and how long all waits were together, in seconds."""

    def __init__(self) -> None:
        self.began, self.slept = time.monotonic(), 0.0
        self.monotonic = time.monotonic

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)
        self.slept += seconds

    @property
    def allowed(self) -> float:
        """The most that may have been waited until now."""
        return PATIENCE_SECONDS + (time.monotonic() - self.began) / PATIENCE_SHARE + 0.01


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Naps:
    """Waits of the sockets, added up."""
    naps = Naps()
    monkeypatch.setattr(services.transmitter.packet_socket, "time", naps)
    return naps


@pytest.mark.parametrize(("limit", "cause"), [(50_000_000, "dropped_buffer_full"), (20_000, "dropped_queue_full")])
def test_a_slow_interface_costs_only_those_behind_it(
    site: Site, copied: Copied, opened: ExitStack, naps: Naps, limit: int, cause: str
) -> None:
    """A real interface that is too slow: its copies are dropped and counted, another one's all arrive, and soon."""
    shaped(site, f"tbf rate 20mbit burst 5000 limit {limit}")
    other = opened.enter_context(Host())
    opened.enter_context(veth(End(site.relay, "other", "10.4.0.1/24"), End(other, "eth", "10.4.0.2/24")))
    fast = opened.enter_context(Copied(other, "eth"))
    site.relay.neighbour("10.4.0.2", End(other, "eth", "10.4.0.2/24").link_address, "other")
    site.turn()
    accounts = [site.account, Counter[str]()]
    slow = site.destination
    site.account = accounts[1]
    reached = [slow, site.reach("10.4.0.2")]
    sent = [bytes([number % 256]) * (1000 + number % 300) for number in range(200)]
    for _ in range(10):
        batch = Gathered([make_batch(sent, ONE)])
        site.sender.send(batch, [(copies, ALL_ROWS) for copies in reached])
    assert naps.slept < naps.allowed
    assert payloads(fast.read(2000)) == sent * 10
    assert accounts[1]["sent"] == 2000
    assert accounts[0][cause] > 0
    assert accounts[0]["sent"] + accounts[0][cause] == 2000
    arrived = copied.read(accounts[0]["sent"])
    assert len(arrived) == accounts[0]["sent"]
    assert accounts[0]["bytes"] == sum(map(len, payloads(arrived)))


def test_a_slow_interface_takes_a_tenth_of_the_time(site: Site, naps: Naps) -> None:
    """An interface that takes something now and then is waited for no longer than that, however many collectors."""
    shaped(site, "tbf rate 20mbit burst 5000 limit 20000")
    reached = [site.reach(port=9514 + number) for number in range(3)]
    batch = Gathered([make_batch([bytes(1000)] * 20, ONE)])
    while site.account["sent"] < 1000:
        site.sender.send(batch, [(copies, ALL_ROWS) for copies in reached])
    assert site.account["dropped_queue_full"] > 0
    assert naps.slept < naps.allowed


@pytest.mark.parametrize(("address", "sources"), [("10.5.0.2", ONE), ("fd00:5::2", SOURCES6[:1])])
def test_a_full_queue_is_seen_without_ethernet_too(
    site: Site, opened: ExitStack, address: str, sources: Sequence[str]
) -> None:
    """Copies that leave by raw IP and that a queue drops are not counted as delivered."""
    near, far = (End(host, "tun", f"10.5.0.{n}/24 fd00:5::{n}/64") for n, host in ((1, site.relay), (2, site.siem)))
    opened.enter_context(tunnel(near, far))
    shaped(site, "tbf rate 5mbit burst 5000 limit 20000", "tun")
    site.turn()
    site.destination = site.reach(address)
    collector = opened.enter_context(Collector(site.siem, address, 9514))
    for start in range(0, 2000, 200):
        site.send(*[payload * 100 for payload in numbered(start, 200)], sources=sources)
    assert site.account["dropped_queue_full"] > 0
    assert site.account["sent"] + site.account["dropped_queue_full"] == 2000
    assert len(collector.read(site.account["sent"])) == site.account["sent"]
    time.sleep(0.05)
    assert list(collector.take()) == []


@pytest.mark.parametrize("error", [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EPROTO])
def test_an_icmp_error_to_an_earlier_packet_costs_nothing(
    site: Site, opened: ExitStack, kernel: Kernel, error: int
) -> None:
    """An error that ends the next send of raw IP, once, says nothing of that send: all of it leaves."""
    site.destination = site.reach("10.2.0.1")
    collector = opened.enter_context(Collector(site.relay, "10.2.0.1", 9514))
    kernel.says.extend([3, -error])
    site.send(*numbered(0, 20), sources=ONE)
    assert payloads(collector.read(20)) == numbered(0, 20)
    assert site.account["sent"] == 20
    kernel.says.extend([3, -error, 1, -error, -error])
    with capture_logs() as logs:
        site.send(*numbered(0, 20), sources=ONE)
    assert site.account["sent"] < 40
    assert [(line["collector"], line["errno"]) for line in logs] == [("c", errno.errorcode[error])]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMSGSIZE, errno.EPERM])
def test_errors_of_earlier_packets_cost_nobody(site: Site, opened: ExitStack, kernel: Kernel, error: int) -> None:
    """Each packet that meets the error of an earlier one is tried again, for any number of errors; all leave."""
    site.destination = site.reach("10.2.0.1")
    collector = opened.enter_context(Collector(site.relay, "10.2.0.1", 9514))
    kernel.says.extend([3, -error, 2, -error, 1, -error])
    with capture_logs() as logs:
        site.send(*numbered(0, 20), sources=ONE)
    assert payloads(collector.read(20)) == numbered(0, 20)
    assert (site.account["sent"], logs) == (20, [])


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (errno.ENETDOWN, "dropped_interface_down"),
        (errno.ENXIO, "dropped_interface_down"),
        (errno.ENODEV, "dropped_interface_down"),
        (errno.ENETUNREACH, "dropped_no_route"),
        (errno.EHOSTUNREACH, "dropped_no_route"),
    ],
)
def test_error_that_would_meet_the_rest_drops_the_rest(
    singles: Site, opened: ExitStack, kernel: Kernel, error: int, cause: str
) -> None:
    """Copies that were taken are delivered, the rest is dropped at once, and the next batch is tried again."""
    copied = opened.enter_context(Copied(singles.siem, "eth"))
    kernel.says.extend([3, -error])
    singles.send(*numbered(0, 50), sources=ONE)
    assert kernel.calls == 2
    assert (singles.account["sent"], singles.account[cause], singles.account["bytes"]) == (3, 47, 18)
    singles.send(*numbered(50, 10), sources=ONE)
    assert payloads(copied.read(13)) == numbered(0, 3) + numbered(50, 10)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMSGSIZE, errno.EINVAL, errno.EIO])
def test_one_that_fails_costs_itself_alone(singles: Site, opened: ExitStack, kernel: Kernel, error: int) -> None:
    """An error that a datagram has to itself drops that one, under the error's name; those behind it leave."""
    copied = opened.enter_context(Copied(singles.siem, "eth"))
    kernel.says.extend([2, -error, 3, -error])
    singles.send(*numbered(0, 10), sources=ONE)
    assert payloads(copied.read(8)) == [*numbered(0, 2), *numbered(3, 3), *numbered(7, 3)]
    cause = f"dropped_{errno.errorcode[error].lower()}"
    assert (singles.account["sent"], singles.account[cause]) == (8, 2)


@pytest.mark.parametrize("address", [SIEM4, SIEM6])
@pytest.mark.parametrize("fragment", [0, 1, 5, 6])
def test_a_fragment_that_fails_costs_its_datagram(
    site: Site, copied: Copied, kernel: Kernel, fragment: int, address: str
) -> None:
    """Whichever fragment is refused: its datagram counts as dropped, once, and all others arrive."""
    site.destination = site.reach(address)
    sources = ONE if address == SIEM4 else SOURCES6[:1]
    kernel.says.append(1)
    kernel.says.extend([1] * fragment)
    kernel.says.append(-errno.EPERM)
    site.send(b"before", bytes(9000), b"behind", b"the end", sources=sources)
    copied.read(3)
    assert site.account["dropped_eperm"] == 1
    assert (site.account["sent"], site.account["bytes"]) == (3, len(b"before" + b"behind" + b"the end"))


def test_datagrams_that_all_fail_are_not_all_tried(singles: Site, kernel: Kernel) -> None:
    """After so many failures in a batch its rest is dropped with them."""
    kernel.afterwards = -errno.EPERM
    singles.send(*numbered(0, 500))
    assert kernel.calls == MAX_SKIPS + 1
    assert singles.account["dropped_eperm"] == 500


@pytest.mark.parametrize("error", NO_SEGMENTATION)
def test_where_runs_are_refused_nothing_is_lost(
    site: Site, copied: Copied, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A kernel before 6.2 takes single datagrams, one by one in order, from where it refused; runs are tried later."""
    sent = [b"alone", *numbered(0, 200), b"also alone"]
    kernel.says.extend([1, -error])
    site.send(*sent, sources=ONE)
    assert payloads(copied.read(202)) == sent
    assert site.account["sent"] == 202
    kernel.says.append(-error)
    before = site.account["sent"]
    site.send(*numbered(0, 20), sources=ONE)
    assert site.account["dropped_" + errno.errorcode[error].lower()] == 1, "runs were tried again, and so soon"
    assert site.account["sent"] == before + 19
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1)
    monkeypatch.setattr(services.transmitter.sender, "time", later)
    site.turn()
    kernel.calls = 0
    site.send(*numbered(0, 60), sources=ONE)
    assert kernel.calls == 1
    kernel.says.append(-error)
    site.send(*numbered(0, 60), sources=ONE)
    assert site.account["dropped_" + errno.errorcode[error].lower()] == 1, "runs were not tried again"


def test_where_runs_are_refused_to_one_all_get_theirs(site: Site, copied: Copied, kernel: Kernel) -> None:
    """Collectors that share what was planned each have all of it, in order, when runs are refused on the way."""
    accounts, reached = [Counter[str]() for _ in range(3)], []
    for number, site.account in enumerate(accounts):
        reached.append(site.reach(port=9600 + number))
    sent = numbered(0, 150)
    kernel.says.extend([ENOUGH, -errno.EINVAL, 1])
    site.sender.send(Gathered([make_batch(sent, ONE)]), [(copies, ALL_ROWS) for copies in reached])
    arrived = copied.read(450)
    for number, account in enumerate(accounts):
        assert payloads(datagram for datagram in arrived if datagram.port == 9600 + number) == sent
        assert account["sent"] == 150


@pytest.mark.parametrize("error", [errno.ENETDOWN, errno.EPERM])
def test_collectors_of_rows_of_their_own_fail_alone(site: Site, copied: Copied, kernel: Kernel, error: int) -> None:
    """Of collectors that each get other rows, sent by one call, an error costs the one that it is said of."""
    accounts, reached = [Counter[str]() for _ in range(3)], []
    for number, site.account in enumerate(accounts):
        reached.append(site.reach(port=9600 + number))
    sent = numbered(0, 90)
    kernel.says.extend([1, -error])
    shares = [Selection(np.arange(30 * number, 30 * number + 30), 60) for number in range(3)]
    site.sender.send(Gathered([make_batch(sent, ONE)]), list(zip(reached, shares, strict=True)))
    arrived = copied.read(60)
    for number in (0, 2):
        mine = payloads(datagram for datagram in arrived if datagram.port == 9600 + number)
        assert mine == sent[30 * number : 30 * number + 30]
    assert [account["sent"] for account in accounts] == [30, 0, 30]
    assert [account["bytes"] for account in accounts] == [180, 0, 180]
    assert accounts[1].total() == 30
    assert kernel.calls == 3


def of_source(found: Sequence[Datagram]) -> dict[str, list[bytes]]:
    """Return the datagrams of each source, in order."""
    came: dict[str, list[bytes]] = {}
    for datagram in found:
        came.setdefault(datagram.source, []).append(datagram.payload)
    return came


def is_part(some: list[bytes], whole: list[bytes]) -> bool:
    """Return whether these are among those, in the same order, each at most as often."""
    rest = iter(whole)
    return all(each in rest for each in some)


def test_whatever_the_kernel_says_the_account_tells_what_arrived(site: Site, copied: Copied, kernel: Kernel) -> None:
    """Any answers in any order: as many arrive as are counted, with their bytes, in each source's order, none twice."""
    words = st.one_of(
        st.integers(1, 5),
        st.sampled_from([-errno.EPERM, -errno.EINVAL, -errno.EMSGSIZE, -errno.ENETDOWN, -errno.ENOBUFS, -errno.EAGAIN]),
    )
    reached = {address: site.reach(address) for address in (SIEM4, SIEM6)}
    sizes = st.tuples(st.integers(0, 1), st.sampled_from([0, 1, 100, 1472, 1473, 4000]), st.integers(1, 5))

    @settings(max_examples=60)
    @given(st.lists(sizes, min_size=1, max_size=8), st.lists(words, max_size=12), st.sampled_from([SIEM4, SIEM6]))
    def holds(runs: list[tuple[int, int, int]], says: list[int], address: str) -> None:
        site.account.clear()
        site.destination = reached[address]
        sources = EXPORTERS if address == SIEM4 else SOURCES6
        wanted = [(sources[source], size) for source, size, count in runs for _ in range(count)]
        sent = [(source, np.random.default_rng(number).bytes(size)) for number, (source, size) in enumerate(wanted)]
        kernel.says = deque(says)
        site.send(*(payload for _, payload in sent), sources=[source for source, _ in sent])
        arrived = copied.read(site.account["sent"], 2)
        assert len(arrived) == site.account["sent"]
        assert sum(map(len, payloads(arrived))) == site.account["bytes"]
        for source, came in of_source(arrived).items():
            assert is_part(came, [payload for each, payload in sent if each == source])

    holds()
    assert list(copied.take()) == []


def test_whatever_the_kernel_says_each_collectors_account_tells_what_it_got(
    site: Site, copied: Copied, kernel: Kernel
) -> None:
    """Any answers while several collectors are sent rows of their own: each gets what its account says, in order."""
    accounts, reached = [Counter[str]() for _ in range(3)], []
    for number, site.account in enumerate(accounts):
        reached.append(site.reach(port=9600 + number))
    words = st.integers(1, 5) | st.sampled_from(
        [-errno.EPERM, -errno.EINVAL, -errno.EMSGSIZE, -errno.ENETDOWN, -errno.ENOBUFS, -errno.EAGAIN]
    )
    chosen = st.lists(st.integers(0, 29), unique=True).map(sorted)

    @settings(max_examples=60)
    @given(
        st.lists(st.sampled_from([0, 1, 100, 1472]), min_size=30, max_size=30),
        st.tuples(chosen, chosen, chosen),
        st.lists(words, max_size=12),
    )
    def holds(sizes: list[int], rows: tuple[list[int], ...], says: list[int]) -> None:
        for account in accounts:
            account.clear()
        sent = [np.random.default_rng(number).bytes(size) for number, size in enumerate(sizes)]
        shares = [Selection(np.array(each, np.int64), 30 - len(each)) for each in rows]
        kernel.says = deque(says)
        batch = Gathered([make_batch(sent, EXPORTERS)])
        site.sender.send(batch, list(zip(reached, shares, strict=True)))
        arrived = copied.read(sum(account["sent"] for account in accounts), 2)
        for number, (account, mine) in enumerate(zip(accounts, rows, strict=True)):
            came = [datagram for datagram in arrived if datagram.port == 9600 + number]
            assert len(came) == account["sent"]
            assert sum(map(len, payloads(came))) == account["bytes"]
            assert account.total() - account["bytes"] == len(mine)
            for source, found in of_source(came).items():
                first = EXPORTERS.index(source)
                assert is_part(found, [sent[row] for row in mine if row % 2 == first])

    holds()
    assert list(copied.take()) == []


def test_other_interfaces_need_no_patience(site: Site, opened: ExitStack, kernel: Kernel, clock: Clock) -> None:
    """An interface that is stuck makes nobody wait at another: each has a socket of its own."""
    other = opened.enter_context(Host())
    opened.enter_context(veth(End(site.relay, "other", "10.4.0.1/24"), End(other, "eth", "10.4.0.2/24")))
    ask_quickly(site.relay, "other")
    site.relay.neighbour("10.4.0.2", End(other, "eth", "10.4.0.2/24").link_address, "other")
    site.turn()
    kernel.afterwards = -errno.EAGAIN
    site.send(b"lost")
    kernel.calls = 0
    site.destination = site.reach("10.4.0.2")
    kernel.says.extend([-errno.EAGAIN, -errno.EAGAIN, 1])
    site.send(b"waited for")
    assert (site.account["sent"], site.account["dropped_buffer_full"]) == (1, 1)


def test_interfaces_share_a_socket_only_when_none_is_free(site: Site, opened: ExitStack) -> None:
    """As many interfaces as there are sockets have one each, and keep it, whatever their numbers; then they share."""
    raw = open_raw(opened, site.relay, 3)
    sockets = PacketSockets(raw.packet, raw.ip4, raw.ip6)
    link = site.sender.next_hops.link("up")
    assert link is not None
    for kind, version in ((EgressKind.FRAMES, 4), (EgressKind.PACKETS, 4), (EgressKind.PACKETS, 6)):
        egresses = [Egress(kind, link=replace(link, index=number)) for number in (2, 5, 8, 11, 14, 17, 20)]
        given = [sockets.for_egress(egress, version) for egress in egresses]
        assert len(set(given[:3])) == 3
        assert given[3:] == given[:3] + given[:1]
        assert [sockets.for_egress(egress, version) for egress in reversed(egresses)] == given[::-1]


def test_an_interface_made_anew_is_sent_by_with_the_same_sockets(site: Site, opened: ExitStack) -> None:
    """While its interface is deleted copies are dropped, by whatever cause; with one of that name they arrive again."""
    site.send(b"before", sources=ONE)
    site.relay.run("ip", "link", "del", "dev", "up")
    site.send_until(lambda: site.account["dropped_no_route"], "it is seen")
    opened.enter_context(veth(site.up, site.eth))
    copied = opened.enter_context(Copied(site.siem, "eth"))
    site.send_until(lambda: list(copied.take()), "copies arrive again")
