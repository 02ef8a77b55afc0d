"""The lab of the network tests does what the tests rely on: links, checksums, fragments, capabilities, and no rest."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from select import select
from typing import Any

import pytest

from tests.capabilities import NET_RAW, ambient, with_net_raw
from tests.capture import (
    Arrival,
    Capture,
    Collector,
    Header,
    Packet,
    assert_complete,
    parse_ipv4,
    parse_udp,
    reassemble,
)
from tests.forging import forging
from tests.network import ETHTOOL_GTXCSUM, HERE, End, Host, run_privileged, sink, tunnel, veth
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")

UDP_SEGMENT = 103
NEAR, FAR = {4: "10.1.0.1", 6: "fd01::1"}, {4: "10.1.0.2", 6: "fd01::2"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
Link = Callable[..., AbstractContextManager[None]]
both_versions = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def relay() -> Iterator[Host]:
    """The host at the near end of links."""
    with Host() as host:
        yield host


@pytest.fixture
def siem() -> Iterator[Host]:
    """The host at the far end of links."""
    with Host() as host:
        yield host


def near(host: Host) -> End:
    """The end with the address `NEAR`."""
    return End(host, "up", "10.1.0.1/24 fd01::1/64")


def far(host: Host) -> End:
    """The end with the address `FAR`."""
    return End(host, "far", "10.1.0.2/24 fd01::2/64")


def send(host: Host, address: str, port: int, *payloads: bytes, segment: int = 0) -> int:
    """Send from a new socket of a host, cut by GSO if asked to; return its port."""
    with host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if segment:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
        for payload in payloads:
            sock.sendto(payload, (address, port))
        return int(sock.getsockname()[1])


@both_versions
@pytest.mark.parametrize("link", [veth, tunnel])
def test_datagrams_cross_a_link_both_ways(siem: Host, link: Link, version: int) -> None:
    """Datagrams go over a link as soon as it is made, there and back, also from the run's own namespace."""
    with link(near(HERE), far(siem)), Collector(HERE, NEAR[version]) as here, Collector(siem, FAR[version]) as there:
        port = send(HERE, FAR[version], there.port, b"one", b"", b"two")
        assert_complete(there.read(3), {(NEAR[version], port): [b"one", b"", b"two"]})
        assert_complete(here.read(0), {})
        port = send(siem, NEAR[version], here.port, b"back")
        assert_complete(here.read(1), {(FAR[version], port): [b"back"]})
        there.assert_quiet(0.01)


@both_versions
def test_addresses_take_datagrams_in_at_once(siem: Host, version: int) -> None:
    """A datagram to an address that a host has just got arrives, however late the kernel makes the route to it."""
    with veth(near(HERE), far(siem)):
        for number in range(10, 30):
            address = f"10.1.0.{number}" if version == 4 else f"fd01::{number}"
            siem.add_address(f"{address}/{24 if version == 4 else 64}", "far")
            with Collector(siem, address) as collector:
                send(siem, address, collector.port, b"at once")
                collector.read(1)


@both_versions
def test_checksums_are_computed_without_offload(relay: Host, siem: Host, version: int) -> None:
    """By default the sender's kernel computes checksums and cuts GSO sends, so that frames are those of a real wire."""
    a, b = near(relay), far(siem)
    with veth(a, b), Capture(siem, "far") as capture:
        send(relay, FAR[version], 9, b"whole")
        assert not a.ethtool(ETHTOOL_GTXCSUM)
        port = send(relay, FAR[version], 9, b"a" * 200 + b"b" * 200 + b"c" * 50, segment=200)
        whole, *cut = capture.read(4)
        assert [datagram.payload for datagram in cut] == [b"a" * 200, b"b" * 200, b"c" * 50]
        assert {(datagram.source, datagram.source_port) for datagram in cut} == {(NEAR[version], port)}
        assert (whole.payload, whole.port, whole.fragments, whole.partial) == (b"whole", 9, 1, False)
        assert whole.macs == (a.link_address, b.link_address)
        assert (whole.header.destination, whole.header.hop_limit) == (FAR[version], 64)
        capture.assert_quiet(0.01)


@both_versions
def test_capture_tells_what_offload_left_undone(relay: Host, siem: Host, version: int) -> None:
    """With offload a checksum arrives partial and a GSO send arrives uncut: the capture refuses both by name."""
    a = near(relay)
    link = veth(a, far(siem), checksum_offload=True)
    with link, Capture(siem, "far") as capture, Capture(siem, "far", partial=True) as lenient:
        assert a.ethtool(ETHTOOL_GTXCSUM)
        send(relay, FAR[version], 9, b"x")
        with pytest.raises(AssertionError, match="nobody has computed"):
            capture.read(1)
        assert [datagram.partial for datagram in lenient.read(1)] == [True]
        for length in (400, 10_000):
            send(relay, FAR[version], 9, b"x" * length, segment=200)
            with pytest.raises(AssertionError, match="GSO came uncut"):
                lenient.read(1)


@both_versions
@pytest.mark.parametrize("mtu", [1280, 1500])
def test_fragments_are_put_together(relay: Host, siem: Host, version: int, mtu: int) -> None:
    """A datagram longer than the MTU is captured whole, with the number of its fragments and their identification."""
    payloads = [os.urandom(4000), os.urandom(65_507 if version == 4 else 65_487), b"short"]
    with veth(near(relay), far(siem), mtu=mtu), Capture(siem, "far") as capture:
        send(relay, FAR[version], 9, *payloads)
        datagrams = capture.read(3)
        assert [datagram.payload for datagram in datagrams] == payloads
        room = (mtu - {4: 20, 6: 48}[version]) // 8 * 8
        assert [datagram.fragments for datagram in datagrams] == [-(-(len(each) + 8) // room) for each in payloads]
        assert datagrams[0].header.identification != datagrams[1].header.identification
        capture.assert_quiet(0.01)


@both_versions
def test_routers_route(relay: Host, siem: Host, version: int) -> None:
    """A datagram crosses a router: its hop limit is one less, its MAC addresses are the last link's."""
    with ExitStack() as stack:
        router = stack.enter_context(Host())
        router.forward()
        first = End(relay, "relay0", "10.2.0.1/24 fd02::1/64"), End(router, "down0", "10.2.0.2/24 fd02::2/64")
        second = End(router, "up0", "10.3.0.1/24 fd03::1/64"), End(siem, "siem0", "10.3.0.2/24 fd03::2/64")
        for ends in (first, second):
            stack.enter_context(veth(*ends))
        relay.route("10.3.0.0/24" if version == 4 else "fd03::/64", via="10.2.0.2" if version == 4 else "fd02::2")
        capture = stack.enter_context(Capture(siem, "siem0"))
        send(relay, "10.3.0.2" if version == 4 else "fd03::2", 9, b"far away")
        (datagram,) = capture.read(1)
        assert (datagram.payload, datagram.header.hop_limit) == (b"far away", 63)
        assert datagram.macs == (second[0].link_address, second[1].link_address)


@both_versions
@pytest.mark.parametrize("link", [veth, tunnel])
def test_foreign_sources_arrive_and_wrong_checksums_do_not(relay: Host, siem: Host, link: Link, version: int) -> None:
    """A collector takes datagrams from an address that is nobody's here, and its kernel checks their checksum."""
    with (
        link(near(relay), far(siem)),
        Collector(siem, FAR[version]) as collector,
        Capture(siem, "far") as capture,
        forging(relay) as forger,
    ):
        foreign, there = ("192.168.7.7" if version == 4 else "fd77::7", 514), (FAR[version], collector.port)
        forger.send(foreign, there, b"right")
        assert_complete(collector.read(1), {foreign: [b"right"]})
        assert_complete(capture.read(1), {foreign: [b"right"]})
        forger.send(foreign, there, b"wrong", wrong=0x0100)
        with pytest.raises(AssertionError, match="wrong UDP checksum"):
            capture.read(1)
        with pytest.raises(AssertionError, match="dropped by the kernel"):
            collector.assert_quiet(0.01)


def test_tunnel_has_no_ethernet(relay: Host, siem: Host) -> None:
    """Frames in a tunnel have no Ethernet header, its MTU is the one asked for, and it fragments like any link."""
    with tunnel(near(relay), far(siem), mtu=1300), Capture(siem, "far") as capture:
        assert (relay.link("up")["link_type"], relay.link("up")["mtu"]) == ("none", 1300)
        for version in (4, 6):
            send(relay, FAR[version], 9, b"x" * 3000)
            (datagram,) = capture.read(1)
            assert (datagram.payload, datagram.fragments, datagram.macs) == (b"x" * 3000, 3, ("", ""))


def test_capture_refuses_what_is_wrong(relay: Host, siem: Host) -> None:
    """Wrong header checksums, lengths behind the end, fragments twice or missing: each is an error with its name."""
    with veth(near(relay), far(siem)), Capture(siem, "far") as capture:
        send(relay, FAR[4], 9, b"x" * 2000)
        wait_until(lambda: capture.sock in select([capture.sock], [], [], 0)[0], "a frame")
        first, last = [data for protocol, data, *_ in capture.frames() if protocol == 0x0800]
    with pytest.raises(AssertionError, match="header checksum"):
        parse_ipv4(first[:8] + b"\x01" + first[9:])
    with pytest.raises(AssertionError, match="bytes behind"):
        parse_ipv4(first + b"\0")
    pending: dict[Header, list[Packet]] = {}
    assert reassemble(parse_ipv4(last), pending) is None
    with pytest.raises(AssertionError, match="overlap"):
        reassemble(parse_ipv4(last), pending)
    pending = {}
    assert reassemble(parse_ipv4(last), pending) is None
    assert pending
    whole = reassemble(parse_ipv4(first), pending)
    assert whole is not None
    assert not pending
    assert parse_udp(*whole, ("", ""), False).payload == b"x" * 2000
    with pytest.raises(AssertionError, match="UDP length"):
        parse_udp(whole[0]._replace(body=whole[0].body + b"x"), 2, ("", ""), False)


def test_collector_tells_what_is_missing() -> None:
    """A datagram that is missing, changed, out of order or nobody's is an error that names its source."""
    source = ("10.0.0.1", 514)
    arrivals = [Arrival(*source, b"one"), Arrival(*source, b"two")]
    assert_complete(arrivals, {source: [b"one", b"two"]})
    with pytest.raises(AssertionError, match="2 of 3"):
        assert_complete(arrivals, {source: [b"one", b"two", b"three"]})
    with pytest.raises(AssertionError, match="number 0"):
        assert_complete(arrivals, {source: [b"two", b"one"]})
    with pytest.raises(AssertionError, match="of 0 datagrams"):
        assert_complete(arrivals, {})


def test_unanswered_neighbours_delay_nobody(relay: Host, siem: Host) -> None:
    """An address of the link that no host has never resolves; one that is told resolves at once."""
    with veth(near(relay), far(siem)), Capture(siem, "far") as capture:
        send(relay, "10.1.0.99", 9, b"lost")
        relay.neighbour("10.1.0.98", "02:00:00:00:00:98", "up")
        send(relay, "10.1.0.98", 9, b"told")
        (datagram,) = capture.read(1)
        assert (datagram.payload, datagram.macs[1]) == (b"told", "02:00:00:00:00:98")
        assert "INCOMPLETE" in relay.run("ip", "neigh", "show", "10.1.0.99")


def test_sink_swallows_everything() -> None:
    """Datagrams to a sink's neighbours are counted by its device and go no further."""
    with sink(End(HERE, "sink", "10.4.0.1/24 fd04::1/64"), "10.4.0.2", "fd04::2"):
        for address in ("10.4.0.2", "fd04::2"):
            send(HERE, address, 9, *[b"x"] * 100)
        assert HERE.link("sink")["stats64"]["rx"]["packets"] >= 200


def namespace() -> str:
    """The calling thread's network namespace."""
    return str(Path("/proc/thread-self/ns/net").readlink())


def capabilities(**arguments: Any) -> int:
    """The effective capabilities of a program started now."""
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True, **arguments)
    return int(status.stdout.partition("CapEff:")[2].split()[0], 16)


def test_programs_get_the_capabilities_named() -> None:
    """A program gets all capabilities or CAP_NET_RAW alone, whoever runs the tests; afterwards all is as before."""
    before = capabilities()
    with ambient():
        assert capabilities() & NET_RAW
    with ambient(NET_RAW):
        assert capabilities() == NET_RAW
        run_privileged(["ip", "link", "set", "lo", "up"])
        assert capabilities() == NET_RAW
    assert capabilities(preexec_fn=with_net_raw) == NET_RAW
    assert capabilities() == before
    with pytest.raises(AssertionError, match="no-such-device"):
        run_privileged(["ip", "link", "show", "no-such-device"])


def test_hosts_are_entered_and_left(relay: Host) -> None:
    """Sockets and programs made inside a host belong to it, and a thread comes back also from an error."""
    own = namespace()

    def fail_inside() -> None:
        with relay.entered():
            assert namespace() != own
            assert len(socket.if_nameindex()) == 1
            inside = subprocess.run(["readlink", "/proc/self/ns/net"], capture_output=True, text=True, check=True)
            assert inside.stdout.strip() == namespace()
            with HERE.entered():
                assert namespace() == own
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert namespace() == own


def test_no_way_out_is_made(relay: Host, siem: Host) -> None:
    """A default route is refused when it is made, and when a host ends with one."""
    with veth(near(relay), far(siem)):
        with pytest.raises(AssertionError, match="way out"):
            relay.route("default", via=FAR[4])
        relay.run("ip", "route", "del", "default")
        with pytest.raises(AssertionError, match="way out"), Host() as host:
            host.run("ip", "route", "add", "default", "dev", "lo")


def test_nothing_remains() -> None:
    """A host that is left is gone with all its devices: the other end of a cable to it is gone too."""
    with Host() as host:
        target = f"/proc/{os.getpid()}/fd/{host.descriptor}"
        HERE.run(*f"ip link add name kept type veth peer name lost netns {target}".split())
        assert "kept" in dict(socket.if_nameindex()).values()
    wait_until(lambda: "kept" not in dict(socket.if_nameindex()).values(), "the namespace is gone")
