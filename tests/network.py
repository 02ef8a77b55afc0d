"""Other hosts for the tests: network namespaces with links between them, none of them with a way out.

A host is held by a descriptor alone, so nothing of it outlives its `with` block or this process. A program that is to
run in it is started while it is entered, since a child inherits the network namespace of the thread that starts it:

    with Host() as relay, Host() as siem, veth(End(relay, "up", "10.1.0.1/24"), End(siem, "eth", "10.1.0.2/24")):
        relay.route("10.9.0.0/16", via="10.1.0.2")
        with relay.entered(), ambient(NET_RAW):
            stack.start("transmitter")
"""

import ctypes
import fcntl
import ipaddress
import json
import os
import shutil
import socket
import struct
import subprocess
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from zlib import crc32

import pytest

from tests.capabilities import ambient, check
from tests.lab import CLONE_NEWNET, assert_entered, assert_no_way_out, bring_loopback_up, enter_network
from tests.stack import wait_until

SIOCETHTOOL, ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM = 0x8946, 0x16, 0x17
RTM_NEWLINK, RTM_GETLINK, NLM_F_REQUEST, IFLA_IFNAME, IFLA_OPERSTATE, IF_OPER_UP = 16, 18, 1, 3, 16, 6
AF_NETLINK, NLMSG_DONE, RTM_NEWROUTE, RTM_GETROUTE, NLM_F_REQUEST_DUMP, RTN_UNICAST = 16, 3, 24, 26, 0x301, 1
RTF_LOCAL: Final = 1 << 31  # linux/ipv6_route.h
IFREQ: Final = struct.Struct("16sQ16x")
OUTER, OUTER_HEADERS = ("192.0.2.1", "192.0.2.2"), 36  # of a tunnel: IPv4, UDP, VXLAN

_libc = ctypes.CDLL(None, use_errno=True)


def run_privileged(command: list[str], text: str = "") -> str:
    """Run a command that has this process's capabilities; return its output, or raise with its stderr."""
    found = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}  # where tc and nft are, for plain users too
    with ambient():
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=found)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


@contextmanager
def _coming_back() -> Iterator[None]:
    """Bring this thread back to the network namespace where it began, whatever happens inside."""
    before = _own_namespace()
    try:
        yield
    finally:
        try:
            enter_network(before)
        finally:
            os.close(before)


class Host:
    """Another host: a network namespace of its own, with loopback up, no reverse-path filter and no way out."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = descriptor

    def __enter__(self) -> Self:
        assert_entered()
        if shutil.which("nstat") is None:
            pytest.skip("ip and nstat, of iproute2, are not installed")
        with _coming_back():
            check(_libc.unshare(CLONE_NEWNET))
            self.descriptor = _own_namespace()
            bring_loopback_up()
            assert_no_way_out()
        for name in ("all", "default"):
            self.sysctl(f"net.ipv4.conf.{name}.rp_filter", 0)  # the larger of `all` and the interface's counts
        return self

    def __exit__(self, *_: object) -> None:
        assert self.descriptor is not None
        try:
            self.assert_no_default_route()
        finally:
            os.close(self.descriptor)
            self.descriptor = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread open and start things on this host meanwhile."""
        assert_entered()
        assert self.descriptor is not None, "this host is gone, or was never entered by `with`"
        with _coming_back():
            enter_network(self.descriptor)
            yield

    def run(self, *command: str, text: str = "") -> str:
        """Run a command in this host, with capabilities, and return its output."""
        with self.entered():
            return run_privileged(list(command), text)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this host, usable from anywhere."""
        with self.entered():
            return socket.socket(family, kind, protocol)

    def link(self, interface: str) -> dict[str, Any]:
        """Return the report of `ip -json` on an interface: mtu, address, link_type, stats64 and more."""
        answer: list[dict[str, Any]] = json.loads(self.run("ip", "-json", "-stats", "link", "show", "dev", interface))
        return answer[0]

    def counters(self) -> dict[str, int]:
        """The kernel's counters for this host, such as UdpInErrors, Udp6InErrors, IpInHdrErrors."""
        answer: dict[str, dict[str, int]] = json.loads(self.run("nstat", "-asjz"))
        return answer["kernel"]

    def udp_errors(self) -> int:
        """Return the UDP datagrams that this host has dropped, for a full buffer or a wrong checksum."""
        counters = self.counters()
        return counters["UdpInErrors"] + counters["Udp6InErrors"]

    def sysctl(self, name: str, value: int) -> None:
        """Set one such as net.ipv4.ip_forward; a dot in an interface's name is written as `/`, as with sysctl."""
        with self.entered():
            Path("/proc/sys", name.translate(str.maketrans("./", "/."))).write_text(str(value))

    def forward(self) -> None:
        """Be a router."""
        self.sysctl("net.ipv4.ip_forward", 1)
        self.sysctl("net.ipv6.conf.all.forwarding", 1)

    def route(self, network: str, via: str) -> None:
        """Reach a network by a router."""
        self.run("ip", "route", "add", network, "via", via)
        self.assert_no_default_route()

    def add_address(self, address: str, interface: str) -> None:
        """Add an address, with its prefix length; it is usable when this returns."""
        self.run("ip", "address", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        self.wait_for_own(address)

    def wait_for_own(self, address: str) -> None:
        """Wait until what comes to an address is taken in.

        The kernel makes the local route of an IPv6 address later, in a work queue, while sockets can be bound to the
        address at once: a busy machine loses what comes in between.
        """
        route = ipaddress.ip_interface(address).ip.packed.hex() + " 80 "  # with its prefix length, 128
        flags = 8  # of the fields in /proc/net/ipv6_route

        def is_local() -> bool:
            lines = Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()
            return any(line.startswith(route) and int(line.split()[flags], 16) & RTF_LOCAL for line in lines)

        if ":" in address:
            with self.entered():
                wait_until(is_local, f"{address} has a local route")

    def neighbour(self, address: str, mac: str, interface: str) -> None:
        """Know a neighbour's MAC address for ever, whether it is there or not."""
        self.run("ip", "neigh", "replace", address, "lladdr", mac, "dev", interface, "nud", "permanent")

    def assert_no_default_route(self) -> None:
        """No route of any table may lead everywhere; the kernel's own for IPv6, which rejects, leads nowhere."""
        with self.socket(AF_NETLINK, socket.SOCK_RAW, 0) as routing:
            for family in (socket.AF_INET, socket.AF_INET6):
                routing.send(struct.pack("=IHHII B11x", 28, RTM_GETROUTE, NLM_F_REQUEST_DUMP, 1, 0, family))
                assert not any(_lead_everywhere(routing)), "a way out of the lab: a default route"


def _lead_everywhere(routing: socket.socket) -> Iterator[bool]:
    """Yield for each route of a dump whether it takes any destination somewhere (rtnetlink(7), RTM_GETROUTE)."""
    while True:
        answer = routing.recv(1 << 16)
        while answer:
            length, kind = struct.unpack_from("=IH", answer)
            if kind == NLMSG_DONE:
                return
            assert kind == RTM_NEWROUTE, f"netlink answers with a message of type {kind}"
            yield answer[17] == 0 and answer[23] == RTN_UNICAST  # rtmsg: rtm_dst_len, rtm_type
            answer = answer[(length + 3) & ~3 :]


HERE: Final = Host(_own_namespace())
"""The run's own namespace, which is there already: not for `with`, and what is set in it stays for later tests."""


@dataclass(frozen=True)
class End:
    """One end of a link; addresses with their prefix lengths, parted by spaces; the MAC address follows from both."""

    host: Host
    name: str
    addresses: str = ""
    mac: str = ""

    @property
    def link_address(self) -> str:
        """A locally administered MAC address, the same in every run."""
        return self.mac or "02:00:" + crc32(f"{self.name} {self.addresses}".encode()).to_bytes(4).hex(":")

    def ethtool(self, command: int, value: int = 0) -> int:
        """Do one of linux/ethtool.h's commands that get or set one value, and return the value."""
        request = array("I", [command, value])
        with self.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCETHTOOL, IFREQ.pack(self.name.encode(), request.buffer_info()[0]))
        return request[1]

    def works(self) -> bool:
        """Return whether it and its other end are up: asked of the kernel, since this is asked very often."""
        name = self.name.encode().ljust(16, b"\0")
        request = struct.pack("=IHHII 16x HH", 52, RTM_GETLINK, NLM_F_REQUEST, 1, 0, 20, IFLA_IFNAME) + name
        with self.host.socket(AF_NETLINK, socket.SOCK_RAW, 0) as routing:
            routing.send(request)
            answer = routing.recv(1 << 16)
        kind, at = struct.unpack_from("=4xH", answer)[0], 32
        assert kind == RTM_NEWLINK, f"netlink answers with a message of type {kind}"
        while at < len(answer):
            length, attribute = struct.unpack_from("=HH", answer, at)
            if attribute == IFLA_OPERSTATE:
                return answer[at + 4] == IF_OPER_UP
            at += (length + 3) & ~3
        return False

    def make(self, kind: str, more: str = "", over: str = "") -> None:
        """Make the interface, `over` another; skip the test if this kernel has none of the kind, else fail it."""
        lower = f"link {over} " if over else ""
        try:
            self.host.run(
                *f"ip link add {lower}name {self.name} address {self.link_address} type {kind} {more}".split()
            )
        except AssertionError as error:
            if "Unknown device type" in str(error) or "Operation not supported" in str(error):
                pytest.skip(f"this kernel has no {kind} interfaces")
            raise

    def remove(self) -> None:
        """Take the interface away, if it is still there."""
        with self.host.entered():
            present = self.name in dict(socket.if_nameindex()).values()
        if present:
            self.host.run("ip", "link", "del", "dev", self.name)

    def bring_up(self, mtu: int, checksum_offload: bool, *more: str, flags: str = "") -> None:
        """Up, with its addresses usable at once; without offload the kernel computes checksums and cuts GSO itself."""
        self.ethtool(ETHTOOL_STXCSUM, checksum_offload)
        self.host.sysctl(f"net.ipv6.conf.{self.name.replace('.', '/')}.accept_dad", 0)
        lines = [f"link set dev {self.name} mtu {mtu} up"]
        for address in self.addresses.split():
            lines += [f"addr add {address} dev {self.name} {flags} {'nodad' if ':' in address else ''}"]
        self.host.run("ip", "-batch", "-", text="\n".join([*lines, *more]))
        for address in self.addresses.split():
            self.host.wait_for_own(address)
        self.host.assert_no_default_route()


@contextmanager
def veth(a: End, b: End, mtu: int = 1500, checksum_offload: bool = False) -> Iterator[None]:
    """A cable between two hosts, working when this returns; without checksum offload unless the test is about it."""
    assert a.link_address != b.link_address, "two ends with one MAC address"
    target = f"/proc/{os.getpid()}/fd/{b.host.descriptor}"
    a.make("veth", f"peer name {b.name} address {b.link_address} netns {target}")
    try:
        for end in (a, b):
            end.bring_up(mtu, checksum_offload)
        for end in (a, b):
            wait_until(end.works, f"{end.name} is up")
        yield
    finally:
        a.remove()


@contextmanager
def tunnel(a: End, b: End, mtu: int = 1400) -> Iterator[None]:
    """A link without Ethernet (its type is ARPHRD_NONE), for IPv4 and IPv6; at most one to a host.

    It is VXLAN with bare packets (GPE) over a veth of its own, which a plain user may make too: /dev/net/tun often is
    root's alone. Only what the kernel routes gets through: what a packet socket sends to it is lost and not counted.
    """
    below = [End(end.host, f"{end.name}-below", f"{outer}/30") for end, outer in zip((a, b), OUTER, strict=True)]
    with veth(below[0], below[1], mtu=mtu + OUTER_HEADERS):
        try:
            for end, far, lower, peer in zip((a, b), reversed(OUTER), below, reversed(below), strict=True):
                # Nobody has to be asked: a busy machine answers late, and too much would wait for that.
                end.host.neighbour(far, peer.link_address, lower.name)
                end.make("vxlan", "gpe external dstport 4790")
                networks = [ipaddress.ip_interface(address).network for address in end.addresses.split()]
                routes = [f"route add {network} encap ip id 1 dst {far} dev {end.name}" for network in networks]
                end.bring_up(mtu, False, *routes, flags="noprefixroute")
            yield
        finally:
            for end in (a, b):
                end.remove()


@contextmanager
def sink(end: End, *neighbours: str) -> Iterator[None]:
    """An interface that swallows every frame at once, for figures of a sender alone, and neighbours to send them to."""
    end.make("ifb")
    try:
        end.bring_up(1500, True, f"link set dev {end.name} arp off")
        for address in neighbours:
            end.host.neighbour(address, "02:00:00:00:00:02", end.name)
        yield
    finally:
        end.remove()
