"""Relayed copies on their way: links of other MTUs, sources that change, firewalls and routes that refuse."""

import errno
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.forwarder.socket_options import path_mtu
from shared.net.sockets import enlarge_receive_buffer
from tests.builders import make_batch, make_client
from tests.deploy.confined import SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, Filter
from tests.network import End, Host, veth
from tests.services.forwarder.sent import Sent, receive_all
from tests.stack import wait_until

PORT = 9514
COLLECTOR = {4: "10.3.0.1", 6: "fd00:3::1"}
SMALL_MTU = 1300
BOTH = pytest.mark.parametrize("version", [4, 6])


@dataclass
class Site:
    """A relay, a router, and behind a link of a small MTU a collector."""

    opened: ExitStack
    relay: Host
    router: Host
    siem: Host

    def listen(self, version: int) -> socket.socket:
        """The collector's socket."""
        sock = self.siem.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        self.opened.callback(sock.close)
        enlarge_receive_buffer(sock, 16 << 20)
        sock.bind((COLLECTOR[version], PORT))
        sock.settimeout(60)
        return sock

    def send(self, version: int) -> Sent:
        """The forwarder with that collector."""
        return Sent(self.opened, make_client("siem", PORT, address=COLLECTOR[version]))

    def filter_icmp(self) -> None:
        """The router's own packets, ICMP errors that is, leave no more."""
        for family in ("-4", "-6"):
            self.router.run("ip", family, "rule", "add", "iif", "lo", "blackhole")

    def refuse(self, version: int, kind: str) -> None:
        """The router answers copies as a firewall does (prohibit), or one without a route (unreachable)."""
        self.router.run("ip", f"-{version}", "route", "add", kind, COLLECTOR[version])


@pytest.fixture
def site(lab: None) -> Iterator[Site]:
    """Relay, router and collector, who know the ways to each other."""
    with ExitStack() as opened:
        relay, router, siem = [opened.enter_context(Host()) for _ in range(3)]
        near = End(relay, "up", "10.2.0.1/24 fd00:2::1/64"), End(router, "down", "10.2.0.2/24 fd00:2::2/64")
        far = End(router, "out", "10.3.0.2/24 fd00:3::2/64"), End(siem, "eth", "10.3.0.1/24 fd00:3::1/64")
        opened.enter_context(veth(*near))
        opened.enter_context(veth(*far, mtu=SMALL_MTU))
        router.forward()
        for name in ("net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"):
            router.sysctl(name, 0)
        relay.route("10.3.0.0/24", "10.2.0.2")
        relay.run(*["ip", "-6", "route", "add", "fd00:3::/64", "via", "fd00:2::2", "dev", "up", "onlink"])
        siem.route("10.2.0.0/24", "10.3.0.2")
        siem.route("fd00:2::/64", "fd00:3::2")
        opened.enter_context(relay.entered())
        yield Site(opened, relay, router, siem)


SINGLES = [[bytes([number]) * 1400] for number in range(40)]
MIXED = [[bytes([number]) * size for size in (100, 1400, 3000, 700, 1273, 60_000)] for number in range(8)]
RUNS = [[bytes([number]) * 1400 for number in range(40)], [bytes([number]) * 1280 for number in range(64)] + [b"end"]]


@pytest.mark.parametrize("batches", [SINGLES, MIXED, RUNS], ids=["singles", "mixed", "runs"])
@pytest.mark.parametrize("filtered", [True, False])
def test_copies_pass_a_smaller_mtu(site: Site, filtered: bool, batches: Sequence[Sequence[bytes]]) -> None:
    """Copies longer than the MTU of a link on the way arrive, all and as they were, whether ICMP passes or not."""
    if filtered:
        site.filter_icmp()
    collector, sent = site.listen(4), site.send(4)
    for batch in batches:
        account = sent.send(make_batch(batch))["collector/siem"]
        sent.refresh()
    expected = [payload for batch in batches for payload in batch]
    assert sorted(receive_all(collector, len(expected))) == sorted(expected)
    assert account["sent"] == account["offered"] == len(expected)


def mtus_of_path() -> Iterator[int]:
    """Yield the MTUs that this process's sockets to the collector know of the way, and that one opened now knows."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as fresh:
        fresh.connect((COLLECTOR[6], PORT))
        for link in list(Path("/proc/self/fd").iterdir()):
            with suppress(OSError):  # gone, or connected to nobody
                if os.readlink(link).startswith("socket:"):  # noqa: PTH115 - it is no path
                    with socket.socket(fileno=os.dup(int(link.name))) as sock:
                        if sock.family == socket.AF_INET6 and sock.getpeername()[:2] == (COLLECTOR[6], PORT):
                            yield path_mtu(sock)


def wait_for_mtu() -> None:
    """Wait until all know the MTU. The kernel tells new sockets a moment before those that are connected."""
    wait_until(lambda: set(mtus_of_path()) == {SMALL_MTU}, lambda: f"the MTU is known: {list(mtus_of_path())}")


@pytest.mark.parametrize("route", ["", "mtu 1300"])
@pytest.mark.parametrize("batches", [SINGLES, MIXED, RUNS], ids=["singles", "mixed", "runs"])
def test_a_smaller_mtu_that_is_known_costs_ipv6_nothing(
    site: Site, route: str, batches: Sequence[Sequence[bytes]]
) -> None:
    """Over IPv6 what told of the MTU is lost, and nothing else; nothing at all where the route has the MTU."""
    if route:
        site.filter_icmp()
        site.relay.run(*f"ip -6 route change fd00:3::/64 via fd00:2::2 dev up onlink {route}".split())
    collector, sent = site.listen(6), site.send(6)
    told = [bytes(1400)]
    sent.send(make_batch(told))
    if route:
        assert receive_all(collector, 1) == told
    else:
        wait_for_mtu()
        sent.refresh()
    for batch in batches:
        account = sent.send(make_batch(batch))["collector/siem"]
        sent.refresh()
    expected = [payload for batch in batches for payload in batch]
    assert sorted(receive_all(collector, len(expected))) == sorted(expected)
    assert account["sent"] == account["offered"]


@pytest.mark.parametrize("batch", [[bytes(1400)], [bytes(1400)] * 3, [bytes(1400), bytes(60_000)]])
def test_the_answer_that_tells_of_a_smaller_mtu_costs_no_datagram(site: Site, batch: list[bytes]) -> None:
    """The ICMPv6 error that tells of the MTU does not cost the datagrams behind the one that it answers."""
    collector, sent = site.listen(6), site.send(6)
    sent.send(make_batch(batch[:1]))
    wait_for_mtu()
    for _ in range(3):
        account = sent.send(make_batch(batch))["collector/siem"]
    assert sorted(receive_all(collector, 3 * len(batch))) == sorted(3 * batch)
    assert account["sent"] == account["offered"] == 3 * len(batch) + 1


def replace_prefix(site: Site) -> str:
    """The relay's IPv6 prefix is replaced."""
    site.relay.add_address("fd00:22::1/64", "up")
    site.relay.run(*["ip", "addr", "del", "fd00:2::1/64", "dev", "up"])
    return "fd00:22::1"


def deprecate_address(site: Site) -> str:
    """The relay's temporary address ends, and another one begins."""
    site.relay.add_address("fd00:2::77/64", "up")
    site.relay.run(*["ip", "addr", "change", "fd00:2::1/64", "dev", "up", "preferred_lft", "0"])
    return "fd00:2::77"


def better_route(version: int) -> Callable[[Site], str]:
    """A better route by another interface appears."""

    def add(site: Site) -> str:
        addresses = {4: ("10.4.0.1", "10.4.0.2"), 6: ("fd00:4::1", "fd00:4::2")}[version]
        bits = {4: 24, 6: 64}[version]
        ends = (End(site.relay, "other", f"{addresses[0]}/{bits}"), End(site.router, "side", f"{addresses[1]}/{bits}"))
        site.opened.enter_context(veth(*ends))
        site.relay.route(f"{COLLECTOR[version]}/{32 if version == 4 else 128}", addresses[1])
        return addresses[0]

    return add


def replace_address(site: Site) -> str:
    """The relay's IPv4 address is removed, with its routes, and another one added."""
    lines = ["addr add 10.2.0.9/24 dev up", "addr del 10.2.0.1/24 dev up", "addr add 10.2.0.9/24 dev up"]
    site.relay.run("ip", "-force", "-batch", "-", text="\n".join(lines[:1]))
    site.relay.sysctl("net.ipv4.conf.up.promote_secondaries", 1)
    site.relay.run("ip", "-batch", "-", text=lines[1])
    site.relay.run(*["ip", "route", "replace", "10.3.0.0/24", "via", "10.2.0.2"])
    return "10.2.0.9"


def prefer_source(site: Site) -> str:
    """A route is given another source."""
    site.relay.run(*["ip", "addr", "add", "10.2.0.8/32", "dev", "up"])
    site.relay.run(*["ip", "route", "change", "10.3.0.0/24", "via", "10.2.0.2", "src", "10.2.0.8"])
    return "10.2.0.8"


@pytest.mark.parametrize(
    ("version", "change"),
    [
        (6, replace_prefix),
        (6, deprecate_address),
        (6, better_route(6)),
        (4, better_route(4)),
        (4, replace_address),
        (4, prefer_source),
    ],
)
def test_copies_come_from_the_address_of_now(site: Site, version: int, change: Callable[[Site], str]) -> None:
    """Copies change their source at the next look when a new socket would: in order, none of them lost."""
    collector, sent = site.listen(version), site.send(version)
    numbers = iter(range(1000))

    def send(count: int) -> None:
        for _ in range(count):
            sent.send(make_batch([b"%06d" % next(numbers)]))

    send(10)
    arrived = [collector.recvfrom(100) for _ in range(10)]  # what waits for a neighbour may be overtaken
    address = change(site)
    send(10)
    sent.refresh()
    send(10)
    arrived += [collector.recvfrom(100) for _ in range(20)]
    assert [payload for payload, _ in arrived] == [b"%06d" % number for number in range(30)]
    assert {source[0] for _, source in arrived[20:]} == {address}
    assert sent.accounts()["collector/siem"]["sent"] == 30


def until_well(sent: Sent) -> None:
    """Send until nothing troubles the collector."""

    def is_well() -> bool:
        sent.send(make_batch([b"again"]))
        return not sent.trouble()

    wait_until(is_well, "it is well again")


@BOTH
@pytest.mark.parametrize("kind", ["prohibit", "unreachable"])
def test_what_a_router_or_firewall_refuses_is_unreachable(site: Site, version: int, kind: str) -> None:
    """A collector is unreachable while copies are rejected on the way; each error is logged once.

    The answer to one copy costs none of the next.
    """
    collector = site.listen(version)
    sent = site.send(version)
    sent.send(make_batch([b"first"]))
    assert (receive_all(collector, 1), sent.trouble()) == ([b"first"], "")
    site.refuse(version, kind)
    with capture_logs() as logs:
        for _ in range(110):
            account = sent.send(make_batch([b"x"]))["collector/siem"]
        wait_until(lambda: sent.trouble() == "unreachable", "it is unreachable")
    assert account["sent"] == 111
    assert account["unreachables"] > 0
    assert account["prohibited"] == (account["unreachables"] if (version, kind) == (6, "prohibit") else 0)
    assert len({line["errno"] for line in logs}) == len(logs) == 1
    site.router.run("ip", f"-{version}", "route", "del", kind, COLLECTOR[version])
    if kind == "prohibit":  # each takes its seconds
        until_well(sent)


def test_copies_keep_their_source_until_the_new_one_is_usable(site: Site) -> None:
    """While other hosts are asked whether they have the new address (DAD) copies go on as before; none is lost."""
    collector, sent = site.listen(6), site.send(6)
    sent.send(make_batch([b"first"]))
    site.relay.sysctl("net.ipv6.conf.up.accept_dad", 1)
    site.relay.run(*["ip", "addr", "add", "fd00:22::1/64", "dev", "up"])
    site.relay.run(*["ip", "addr", "del", "fd00:2::1/64", "dev", "up"])
    assert collector.recvfrom(100)[1][0] == "fd00:2::1"
    sources = []

    def moved() -> bool:
        sent.refresh()
        sent.send(make_batch([b"x"]))
        sources.append(collector.recvfrom(100)[1][0])
        return bool(sources[-1] != "fd00:2::1")

    wait_until(moved, "the new address is used")
    assert set(sources) == {"fd00:2::1", "fd00:22::1"}


@BOTH
@pytest.mark.parametrize("route", ["", "prohibit", "unreachable", "blackhole"])
def test_without_a_route_nothing_is_connected_and_with_one_again(site: Site, version: int, route: str) -> None:
    """A collector is unreachable while this host has no route to it, or one that refuses."""
    collector, sent = site.listen(version), site.send(version)
    sent.send(make_batch([b"before"]))
    back = {4: "10.3.0.0/24 via 10.2.0.2", 6: "fd00:3::/64 via fd00:2::2 dev up onlink"}[version].split()
    if route:
        site.relay.run("ip", f"-{version}", "route", "add", route, COLLECTOR[version])
    else:
        site.relay.run("ip", f"-{version}", "route", "del", *back)
    for _ in range(3):
        account = sent.send(make_batch([b"lost"] * 5))["collector/siem"]
    assert account["sent"] == 1
    assert sent.trouble() == "unreachable"
    assert sent.trouble() == "unreachable"
    if route:
        site.relay.run("ip", f"-{version}", "route", "del", route, COLLECTOR[version])
    else:
        site.relay.run("ip", f"-{version}", "route", "add", *back)
    sent.refresh()
    account = sent.send(make_batch([b"back"]))["collector/siem"]
    assert account["sent"] == 2
    assert receive_all(collector, 2) == [b"before", b"back"]


def in_thread(work: Callable[[], None]) -> None:
    """Do something in a thread of its own, which ends with it."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("error", [errno.EPERM, errno.EIO, errno.ENOMEM])
def test_what_this_host_does_not_let_out_is_unreachable(site: Site, error: int) -> None:
    """A collector is unreachable where every copy fails, for any reason, and the reason is logged once."""
    collector, sent = site.listen(4), site.send(4)
    sent.send(make_batch([b"first"]))
    assert sent.trouble() == ""

    def send_in_vain() -> None:
        refusing = Filter(SCMP_ACT_ALLOW)
        refusing.add(SCMP_ACT_ERRNO | error, "sendmmsg")
        refusing.add(SCMP_ACT_ERRNO | error, "sendmsg")
        refusing.load()
        for _ in range(60):
            sent.send(make_batch([b"x"]))

    with capture_logs() as logs:
        in_thread(send_in_vain)
    assert sent.accounts()["collector/siem"][f"dropped_{errno.errorcode[error].lower()}"] == 60
    assert sent.trouble() == "unreachable"
    assert [line["errno"] for line in logs] == [errno.errorcode[error]]
    sent.send(make_batch([b"well"]))
    wait_until(lambda: not sent.trouble(), "it is well again")
    assert receive_all(collector, 2) == [b"first", b"well"]


@BOTH
@pytest.mark.parametrize(
    ("where", "chain", "verdict"),
    [
        ("siem", "input", "reject with icmpx admin-prohibited"),
        ("siem", "input", "reject with icmpx host-unreachable"),
        ("relay", "output", "drop"),
    ],
)
def test_what_a_firewall_refuses_is_unreachable(site: Site, version: int, where: str, chain: str, verdict: str) -> None:
    """A firewall on the collector's host or on ours that refuses all copies makes the collector unreachable."""
    if shutil.which("nft") is None:
        pytest.skip("nft, of nftables, is not installed")
    collector, sent = site.listen(version), site.send(version)
    sent.send(make_batch([b"first"]))
    assert (receive_all(collector, 1), sent.trouble()) == ([b"first"], "")
    host: Host = getattr(site, where)
    rules = f"add table inet x; add chain inet x c {{ type filter hook {chain} priority 0; }}; "
    host.run("nft", f"{rules} add rule inet x c udp dport {PORT} {verdict}")
    for _ in range(60):
        account = sent.send(make_batch([b"x"]))["collector/siem"]
    wait_until(lambda: sent.trouble() == "unreachable", "it is unreachable")
    assert account["sent"] == (1 if where == "relay" else 61)
    host.run("nft", "flush chain inet x c")
    if where == "relay":
        until_well(sent)
