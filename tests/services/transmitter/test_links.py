"""The kernel's word on what is sent: copies of any kind, by any kind of interface, taken by ordinary sockets there."""

import fcntl
import os
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.transmitter.sender import Sender
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import ALL_ROWS
from shared.fanout.sending.backlog import BacklogMemory
from shared.net.addresses import pack_address
from shared.settings.model import Settings
from tests.builders import make_client
from tests.capture import Collector, assert_complete, ones_sum
from tests.network import End, Host, tunnel, veth
from tests.services.transmitter.site import open_raw
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
NEAR, FAR = {4: "10.7.0.1", 6: "fd00:7::1"}, {4: "10.7.0.2", 6: "fd00:7::2"}
PORT = 9514
TUNSETIFF, IFF_TUN, IFF_TAP, IFF_NO_PI = 0x400454CA, 1, 2, 0x1000  # linux/if_tun.h
SOURCES = {4: ("192.0.2.1", "198.51.100.2"), 6: ("2001:db8::1", "2001:db8::2")}
ERRORS = (
    *("IpInHdrErrors", "IpExtInTruncatedPkts", "IpReasmFails", "UdpInErrors", "UdpInCsumErrors"),
    *("Ip6InHdrErrors", "Ip6InTruncatedPkts", "Ip6ReasmFails", "Udp6InErrors", "Udp6InCsumErrors"),
)
Datagram = tuple[str, int, bytes]


class Ends:
    """A relay with a sender of copies, and a collector's host; `near` and `far` are to be joined by some link."""

    def __init__(self, opened: ExitStack) -> None:
        self.opened = opened
        self.relay, self.siem = opened.enter_context(Host()), opened.enter_context(Host())
        self.near, self.far = (
            End(host, "copies", f"{at[4]}/24 {at[6]}/64") for host, at in ((self.relay, NEAR), (self.siem, FAR))
        )

    def cable(self) -> tuple[End, End]:
        """A cable without addresses, for other interfaces to lie over."""
        near, far = (End(host, "cable", mac=f"02:00:00:00:09:0{n}") for n, host in enumerate((self.relay, self.siem)))
        self.opened.enter_context(veth(near, far))
        return near, far

    def raise_ends(self) -> None:
        """Set both ends up, with their addresses."""
        for end in (self.near, self.far):
            end.host.run("ip", "link", "set", "dev", end.name, "up")
            for address in end.addresses.split():
                end.host.add_address(address, end.name)
            end.host.assert_no_default_route()

    def begin(self) -> None:
        """Start a sender on the relay, once links are as they should be."""
        raw = open_raw(self.opened, self.relay)
        with self.relay.entered():
            self.sender = self.opened.enter_context(closing(Sender(Settings(), raw, BacklogMemory(1 << 20))))

    def deliver(self, collector: Collector, datagrams: Sequence[Datagram], address: str) -> None:
        """Send copies, and check that the kernel of the collector's host takes every one, and complains of none."""
        account = Counter[str]()
        destination = self.sender.reach(make_client("c", PORT, address=address), account)
        addresses, payloads = [pack_address(source) for source, *_ in datagrams], [payload for *_, payload in datagrams]
        rows = make_rows([len(payload) for payload in payloads], addresses, [port for _, port, _ in datagrams])
        batch = Gathered([DatagramBatch("messages", 0, rows, b"".join(payloads))])
        self.sender.send(batch, [(destination, ALL_ROWS)])
        wait_until(lambda: self.sender.work() and not destination.held, "the next hop is known")
        sent: dict[tuple[str, int], list[bytes]] = {}
        for source, port, payload in datagrams:
            sent.setdefault((source, port), []).append(payload)
        assert_complete(collector.read(len(datagrams)), sent)
        assert account["sent"] == len(datagrams)


def errors(host: Host) -> dict[str, int]:
    """Return the errors that a host's kernel counts for what it received."""
    counters = host.counters()
    return {name: counters[name] for name in ERRORS}


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Closed at the end of the test."""
    with ExitStack() as opened:
        yield Ends(opened)


def bridge(ends: Ends) -> None:
    """The relay's address is on a bridge, as on a host of containers."""
    _, far = ends.cable()
    ends.far = End(far.host, far.name, ends.far.addresses)
    ends.near.make("bridge")
    ends.relay.run("ip", "link", "set", "dev", "cable", "master", "copies")


def bond(ends: Ends) -> None:
    """The relay's address is on a bond."""
    _, far = ends.cable()
    ends.far = End(far.host, far.name, ends.far.addresses)
    ends.near.make("bond", "mode active-backup")
    ends.relay.run("ip", "link", "set", "dev", "cable", "down")
    ends.relay.run("ip", "link", "set", "dev", "cable", "master", "copies")


def macvlan(ends: Ends) -> None:
    """Both addresses are on interfaces of their own over a cable, as in a container."""
    ends.cable()
    for end in (ends.near, ends.far):
        end.make("macvlan", "mode bridge", over="cable")


def vlan(ends: Ends) -> None:
    """Both ends are in a VLAN."""
    ends.cable()
    for end in (ends.near, ends.far):
        end.make("vlan", "id 7", over="cable")


def vxlan(ends: Ends) -> None:
    """Ethernet over UDP, whose MTU is smaller than the cable's."""
    ends.cable()
    addresses = ("192.0.2.129", "192.0.2.130")
    for end, address, other in zip((ends.near, ends.far), addresses, reversed(addresses), strict=True):
        end.host.run("ip", "address", "add", f"{address}/30", "dev", "cable")
        end.make("vxlan", f"id 5 dstport 4789 local {address} remote {other} dev cable")


def tun(ends: Ends) -> None:
    """A program's link without Ethernet, such as a VPN's."""
    join_by_program(ends, IFF_TUN)


def tap(ends: Ends) -> None:
    """A program's Ethernet, such as a virtual machine's."""
    join_by_program(ends, IFF_TAP)


def join_by_program(ends: Ends, kind: int) -> None:
    """Join both ends by a thread that carries what comes to either to the other."""
    files = []
    for end in (ends.near, ends.far):
        try:
            with end.host.entered():
                file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            pytest.skip(f"/dev/net/tun: {error.strerror}")
        ends.opened.callback(os.close, file)
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH14x", end.name.encode(), kind | IFF_NO_PI))
        files.append(file)
    ends.opened.enter_context(carrying(files))


@contextmanager
def carrying(files: Sequence[int]) -> Iterator[None]:
    """Carry between two tun or tap devices meanwhile."""
    ended = threading.Event()

    def carry() -> None:
        while not ended.is_set():
            for ready in select.select(files, [], [], 0.1)[0]:
                other = files[1 - files.index(ready)]
                try:
                    os.write(other, os.read(ready, 65_536))
                except OSError:  # not up yet
                    continue

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("join", [bridge, bond, macvlan, vlan, vxlan, tun, tap], ids=lambda join: join.__name__)
def test_copies_arrive_by_every_kind_of_interface(ends: Ends, join: Callable[[Ends], None]) -> None:
    """Runs, single datagrams and fragments of either family leave by it, and the far end's kernel takes all of them."""
    join(ends)
    ends.raise_ends()
    ends.begin()
    sizes = (*[200] * 20, 0, 1, *range(1350, 1480, 13), 4000, 30_000)
    for version, address in FAR.items():
        with Collector(ends.siem, address, PORT) as collector:
            before = errors(ends.siem)
            one, two = SOURCES[version]
            datagrams = [(one if number % 3 else two, 514, bytes([number]) * size) for number, size in enumerate(sizes)]
            ends.deliver(collector, datagrams, address)
            assert errors(ends.siem) == before


def zero_sum(payload: bytes, source: str, port: int, address: str) -> bytes:
    """The payload with two bytes in front by which its UDP checksum comes out as zero."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    payload = bytes(2) + payload
    length = len(payload) + 8
    pseudo = socket.inet_pton(family, source) + socket.inet_pton(family, address)
    words = pseudo + struct.pack("!6H", 17, length, port, PORT, length, 0) + payload + bytes(len(payload) % 2)
    return (0xFFFF - ones_sum(words)).to_bytes(2) + payload[2:]


@pytest.fixture
def joined(lab: None) -> Iterator[Ends]:
    """A link with Ethernet and one without, for all examples."""
    with ExitStack() as opened:
        ends = Ends(opened)
        opened.enter_context(veth(ends.near, ends.far))
        relay, siem = (
            End(host, "tun", f"10.8.0.{n}/24 fd00:8::{n}/64") for n, host in ((1, ends.relay), (2, ends.siem))
        )
        opened.enter_context(tunnel(relay, siem))
        ends.begin()
        yield ends


unicast = {
    4: st.ip_addresses(v=4).filter(lambda at: 0 < int(at) >> 24 < 224 and int(at) >> 24 not in (10, 127)),
    6: st.ip_addresses(v=6, network="2000::/3"),
}
sizes = st.sampled_from([0, 1, 2, 99, 100, 100, 100, 1280, 1371, 1372, 1373, 1472, 1473, 2000, 9001])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([4, 6]), st.sampled_from(["frames", "packets", "here"]), st.data())
def test_the_kernel_takes_whatever_is_sent(joined: Ends, version: int, way: str, data: st.DataObject) -> None:
    """Of any sources, sizes and bytes, checksums that come out as zero among them: no header is ever found wrong."""
    addresses = {"frames": FAR, "packets": {4: "10.8.0.2", 6: "fd00:8::2"}, "here": NEAR}
    address, host = addresses[way][version], joined.relay if way == "here" else joined.siem
    sources = data.draw(st.lists(unicast[version].map(str), min_size=1, max_size=4))
    row = st.tuples(st.sampled_from(sources), st.integers(0, 65_535), sizes, st.booleans())
    datagrams = []
    for source, port, size, zero in data.draw(st.lists(row, min_size=1, max_size=20)):
        payload = data.draw(st.binary(min_size=min(size, 20), max_size=min(size, 20))) + bytes(max(0, size - 20))
        datagrams.append((source, port, zero_sum(payload, source, port, address) if zero else payload))
    with Collector(host, address, PORT) as collector:
        before = errors(host)
        joined.deliver(collector, datagrams, address)
        assert errors(host) == before
