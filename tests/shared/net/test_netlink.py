"""Answers and events of a real kernel; a played one only where the real one does not err."""

import errno
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shared.net.netlink
from shared.net.netlink import (
    KERNEL,
    NUD_USABLE,
    RTN_LOCAL,
    RTN_UNICAST,
    Event,
    EventsLost,
    Link,
    LinkGone,
    Neighbour,
    Netlink,
    Route,
    RoutesChanged,
)
from tests.network import End, Host, tunnel, veth
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
RTN_BROADCAST, RTN_MULTICAST = 3, 5
NUD_PERMANENT, NUD_NOARP, NUD_FAILED, NUD_REACHABLE = 0x80, 0x40, 0x20, 0x02
MAC = "02:00:00:00:77:77"


def attribute(kind: int, content: bytes) -> bytes:
    """A struct rtattr and its content."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def message(kind: int, body: bytes, *attributes: bytes) -> bytes:
    """A netlink message, answering the first question."""
    content = body + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(content), kind, 0, 1, 0) + content


UP, ADDRESS, TWO = b"up\0", bytes([10, 2, 0, 2]), bytes([2, 0, 0, 0])
GENUINE = (
    message(16, bytes(4) + TWO + bytes(8), attribute(3, UP), attribute(1, bytes(6))),
    message(28, TWO + TWO + bytes([2, 0, 0, 1]), attribute(1, ADDRESS), attribute(2, bytes(6))),
    message(24, bytes([2, 32]) + bytes(10), attribute(4, TWO), attribute(8, attribute(2, bytes(4)))),
    message(2, struct.pack("=i", -101) + bytes(16)),
    message(3, bytes(4)),
)
"""A link, a neighbour, a route, an error, the end."""


class Wire:
    """A host whose netlink is asked, with interface `up`, and the host at the other end, with interface `eth`."""

    def __init__(self, host: Host, far: Host) -> None:
        self.host, self.far = host, far
        self.up = End(host, "up", "10.2.0.1/24 fd00:2::1/64")
        self.eth = End(far, "eth", "10.2.0.2/24 fd00:2::2/64")

    def open(self) -> Netlink:
        """A netlink of this host."""
        with self.host.entered():
            return Netlink()

    @property
    def index(self) -> int:
        """The number of interface `up`."""
        return int(self.host.link("up")["ifindex"])

    def ip(self, *commands: str) -> None:
        """Run these `ip` commands, all at once."""
        self.host.run("ip", "-batch", "-", text="\n".join(commands))


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Two hosts with a link."""
    with Host() as host, Host() as far:
        made = Wire(host, far)
        with veth(made.up, made.eth):
            yield made


@pytest.fixture
def netlink(wire: Wire) -> Iterator[Netlink]:
    """The netlink of the first host; what has happened before is forgotten."""
    with closing(wire.open()) as opened:
        yield opened


def told(netlink: Netlink, expected: Callable[[Event], object]) -> list[Event]:
    """The events up to the first one that is expected, waited for."""
    found: list[Event] = []

    def came() -> bool:
        select.select([netlink], [], [], 0.1)
        found.extend(netlink.events())
        return any(map(expected, found))

    wait_until(came, lambda: f"the event is among {found}")
    return found


def forget(netlink: Netlink) -> None:
    """Let events pass that nobody asked about."""
    while select.select([netlink], [], [], 0.05)[0]:
        list(netlink.events())


def test_routes_are_as_the_kernel_chooses_them(wire: Wire, netlink: Netlink) -> None:
    """Link, next hop and MTU of each kind of route: on the link, behind a gateway of either family, on this host."""
    wire.ip(
        "route add 10.3.0.0/24 via 10.2.0.2",
        "route add 10.4.0.0/24 via inet6 fe80::2 dev up",
        "route add 10.5.0.0/24 via 10.2.0.2 mtu 1000",
        "route add 10.6.0.0/24 via 10.2.0.3",
        "route add 10.6.0.7/32 via 10.2.0.4",
        "route add fd00:3::/64 via fd00:2::2",
        "route add fd00:4::/64 via fe80::2 dev up mtu 1300",
    )
    up = wire.index
    expected = {
        "10.2.0.2": Route(RTN_UNICAST, up, "10.2.0.2", 0),
        "10.3.0.1": Route(RTN_UNICAST, up, "10.2.0.2", 0),
        "10.4.0.1": Route(RTN_UNICAST, up, "fe80::2", 0),
        "10.5.0.1": Route(RTN_UNICAST, up, "10.2.0.2", 1000),
        "10.6.0.1": Route(RTN_UNICAST, up, "10.2.0.3", 0),
        "10.6.0.7": Route(RTN_UNICAST, up, "10.2.0.4", 0),
        "fd00:2::2": Route(RTN_UNICAST, up, "fd00:2::2", 0),
        "fd00:3::1": Route(RTN_UNICAST, up, "fd00:2::2", 0),
        "fd00:4::1": Route(RTN_UNICAST, up, "fe80::2", 1300),
        "10.2.0.1": Route(RTN_LOCAL, 1, "10.2.0.1", 0),
        "127.0.0.1": Route(RTN_LOCAL, 1, "127.0.0.1", 0),
        "fd00:2::1": Route(RTN_LOCAL, 1, "fd00:2::1", 0),
        "::1": Route(RTN_LOCAL, 1, "::1", 0),
    }
    assert {address: netlink.route(address) for address in expected} == expected


def test_there_is_no_route_where_the_kernel_has_none(wire: Wire, netlink: Netlink) -> None:
    """An address that is blackholed, unreachable, prohibited, thrown back, or in no table, has no route."""
    for family, network in (("", "10.{}.0.0/24"), ("-6 ", "fd00:{}::/64")):
        kinds = enumerate(("blackhole", "unreachable", "prohibit", "throw"), 3)
        for number, kind in kinds:
            wire.host.run(*f"ip {family}route add {kind} {network.format(number)}".split())
    for number in range(3, 8):
        assert netlink.route(f"10.{number}.0.1") is None
        assert netlink.route(f"fd00:{number}::1") is None


def test_broadcast_and_multicast_are_no_unicast(wire: Wire, netlink: Netlink) -> None:
    """A route to everybody on a link, or to a group, says so by its kind."""
    wire.ip("route add multicast 239.0.0.0/8 dev up")
    kinds = {"10.2.0.255": RTN_BROADCAST, "239.1.1.1": RTN_MULTICAST, "ff02::1": RTN_MULTICAST}
    for address, kind in kinds.items():
        route = netlink.route(address)
        assert route is None or route.kind == kind, address


def test_neighbours_are_as_the_kernel_knows_them(wire: Wire, netlink: Netlink) -> None:
    """State and link address of neighbours: entered by hand, found by asking, never asked for, of both families."""
    wire.host.neighbour("10.2.0.7", MAC, "up")
    wire.host.neighbour("fd00:2::7", MAC, "up")
    wire.ip("neigh add 10.2.0.8 dev up nud failed")
    for family, address in ((socket.AF_INET, "10.2.0.2"), (socket.AF_INET6, "fd00:2::2")):
        with closing(wire.host.socket(family, socket.SOCK_DGRAM)) as sock:
            sock.sendto(b"", (address, 9))
        wait_until(
            lambda address=address: netlink.neighbour(wire.index, address).state & NUD_USABLE,  # type: ignore[misc]
            "it has answered",
        )
        found = netlink.neighbour(wire.index, address)
        assert (found.link_index, found.address) == (wire.index, address)
        assert found.link_address.hex(":") == wire.eth.link_address
    for address in ("10.2.0.7", "fd00:2::7"):
        permanent = Neighbour(wire.index, address, NUD_PERMANENT, bytes.fromhex(MAC.replace(":", "")))
        assert netlink.neighbour(wire.index, address) == permanent
    assert netlink.neighbour(wire.index, "10.2.0.8").state == NUD_FAILED
    for address in ("10.2.0.99", "fd00:2::99"):
        assert netlink.neighbour(wire.index, address) == Neighbour(wire.index, address, 0, b"")


def test_links_are_as_they_are(wire: Wire, netlink: Netlink) -> None:
    """Name, MTU, address, whether it is Ethernet and whether it is up with carrier, of every link."""
    with Host() as over, tunnel(End(wire.host, "tun", "10.5.0.1/24"), End(over, "tun", "10.5.0.2/24")):
        End(wire.host, "idle").make("ifb")
        wire.ip("link set dev idle mtu 9000")
        wire.far.run("ip", "link", "set", "dev", "eth", "down")
        wait_until(lambda: wire.host.link("up")["operstate"] != "UP", "the carrier is gone")
        links = {link.name: link for link in netlink.links()}
        assert {name: (link.ethernet, link.mtu, link.up) for name, link in links.items()} == {
            "lo": (False, 65_536, True),
            "up": (True, 1500, False),
            "tun": (False, 1400, True),
            "tun-below": (True, 1436, True),
            "idle": (True, 9000, False),
        }
        assert links["up"].address.hex(":") == wire.up.link_address
        assert links["up"].index == wire.index


def test_each_change_of_a_link_is_told(wire: Wire, netlink: Netlink) -> None:
    """MTU, address, down, carrier, gone, and there anew under the same name."""
    index = wire.index
    steps: list[tuple[str, Callable[[Link], object]]] = [
        ("link set dev up mtu 1300", lambda link: link.mtu == 1300),
        (f"link set dev up address {MAC}", lambda link: link.address.hex(":") == MAC),
        ("link set dev up down", lambda link: not link.up),
        ("link set dev up up", lambda link: link.up),
    ]
    for command, expected in steps:
        wire.ip(command)
        told(netlink, lambda event: isinstance(event, Link) and event.index == index and expected(event))  # noqa: B023
    wire.far.run("ip", "link", "set", "dev", "eth", "down")
    told(netlink, lambda event: isinstance(event, Link) and event.index == index and not event.up)
    wire.ip("link del dev up")
    assert LinkGone(index) in told(netlink, lambda event: event == LinkGone(index))
    with veth(wire.up, wire.eth):
        told(netlink, lambda event: isinstance(event, Link) and event.name == "up" and event.up)


def test_each_change_of_a_neighbour_is_told(wire: Wire, netlink: Netlink) -> None:
    """Found, changed and taken away, IPv4 and IPv6."""
    for address in ("10.2.0.7", "fd00:2::7"):
        for mac in (MAC, "02:00:00:00:88:88"):
            wire.host.neighbour(address, mac, "up")
            known = Neighbour(wire.index, address, NUD_PERMANENT, bytes.fromhex(mac.replace(":", "")))
            told(netlink, lambda event: event == known)  # noqa: B023
        wire.ip(f"neigh del {address} dev up")
        gone = told(
            netlink,
            lambda event: isinstance(event, Neighbour) and event.address == address and not event.state,  # noqa: B023
        )
        assert gone[-1] == Neighbour(wire.index, address, 0, b"")


@pytest.mark.parametrize(
    "command",
    [
        "route add 10.9.0.0/24 via 10.2.0.2",
        "route add fd00:9::/64 via fd00:2::2",
        "route change 10.2.0.0/24 dev up src 10.2.0.1 mtu 1000",
        "address add 10.9.0.1/24 dev up",
        "address add fd00:9::1/64 dev up nodad",
        "address del 10.2.0.1/24 dev up",
        "rule add from 10.9.0.0/16 table 99",
        "-6 rule add from fd00:9::/64 table 99",
    ],
)
def test_each_change_that_may_lead_elsewhere_is_told(wire: Wire, netlink: Netlink, command: str) -> None:
    """Routes, addresses and rules: that they changed is told, not how."""
    forget(netlink)
    wire.host.run("ip", *command.split())
    told(netlink, lambda event: event == RoutesChanged())


def test_a_port_that_leaves_a_bridge_is_not_gone(wire: Wire, netlink: Netlink) -> None:
    """A bridge's reports on its ports and its table are not taken for links that go, or for neighbours."""
    End(wire.host, "bridge").make("bridge")
    forget(netlink)
    for command in ("master bridge", "nomaster"):
        wire.host.run(*f"ip link set dev up {command}".split())
        wire.host.run("ip", "link", "set", "dev", "up", "mtu", str(1400 + len(command)))
        found = told(netlink, lambda event: isinstance(event, Link) and event.mtu == 1400 + len(command))  # noqa: B023
        assert not [event for event in found if isinstance(event, LinkGone)]
        assert not [event for event in found if isinstance(event, Neighbour) and not event.address]


def test_lost_events_are_told_and_later_ones_come(wire: Wire, netlink: Netlink) -> None:
    """More events than the socket holds end in the word that some are lost; what happens then is told again."""
    hosts = range(1, 4000)
    wire.ip(*(f"neigh replace 10.2.{n >> 8}.{n & 255} lladdr {MAC} dev up nud permanent" for n in hosts))
    told(netlink, lambda event: event == EventsLost())
    forget(netlink)
    wire.host.neighbour("10.2.0.7", "02:00:00:00:88:88", "up")
    told(netlink, lambda event: isinstance(event, Neighbour) and event.address == "10.2.0.7")


def test_an_answer_to_another_question_is_passed_over(wire: Wire, netlink: Netlink) -> None:
    """An answer that came too late, to a question that was given up, is not taken for that to the next one."""
    wire.ip("route add 10.3.0.0/24 via 10.2.0.7")
    asked = netlink._questions
    with mock.patch.object(netlink, "_questions", mock.Mock(wraps=asked)) as silent:
        silent.recvfrom.side_effect = TimeoutError
        assert netlink.route("10.3.0.1") is None
        assert netlink.links() == []
    route = netlink.route("10.2.0.2")
    assert route == Route(RTN_UNICAST, wire.index, "10.2.0.2", 0)
    assert [link.name for link in netlink.links()] == ["lo", "up"]


def test_a_question_that_cannot_be_put_has_no_answer(wire: Wire, netlink: Netlink) -> None:
    """There is no answer when the kernel does not even take the question; the next question is answered."""
    with mock.patch.object(netlink, "_questions", mock.Mock(wraps=netlink._questions)) as full:
        full.sendto.side_effect = OSError(errno.ENOBUFS, "played")
        assert netlink.route("10.2.0.2") is None
        assert netlink.links() == []
    assert netlink.route("10.2.0.2") == Route(RTN_UNICAST, wire.index, "10.2.0.2", 0)


def test_what_another_process_sends_is_not_heard(wire: Wire, netlink: Netlink) -> None:
    """A message that does not come from the kernel, though it reads like one of its own, is no event and no answer."""
    forget(netlink)
    forged = message(28, TWO + struct.pack("=I", wire.index) + bytes([2, 0, 0, 1]), attribute(1, ADDRESS))
    with closing(wire.host.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)) as stranger:
        for sock in (netlink._events, netlink._questions):
            stranger.sendto(forged, (sock.getsockname()[0], 0))
    assert select.select([netlink], [], [], 1)[0]
    assert list(netlink.events()) == []
    assert netlink.neighbour(wire.index, "10.2.0.2").state == 0


class PlayedKernel:
    """Both netlink sockets, with answers and events of the test's choice."""

    def __init__(self) -> None:
        self.says: deque[bytes] = deque()

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        """Return its next message."""
        if not self.says:
            raise BlockingIOError(errno.EAGAIN, "nothing more")
        return self.says.popleft(), (KERNEL, 0)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@st.composite
def nearly_genuine(draw: st.DrawFn) -> bytes:
    """A kernel's message with some bytes changed, or cut off."""
    data = bytearray(draw(st.sampled_from(GENUINE)))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.fixture
def played() -> Iterator[PlayedKernel]:
    """A kernel that says what the test has it say, to each `Netlink` that is made."""
    kernel = PlayedKernel()
    with mock.patch.object(shared.net.netlink, "_open", return_value=kernel):
        yield kernel


def test_one_link_that_nobody_can_read_does_not_hide_the_others(played: PlayedKernel) -> None:
    """Of a dump in which one link has an unknown format the others are known all the same."""
    link, *_, end = GENUINE
    unknown = message(16, bytes(4) + TWO + bytes(8), attribute(3, UP), attribute(1, b""))
    played.says.extend([link + unknown, link, end])
    assert [each.name for each in Netlink().links()] == ["up", "up"]


def test_an_event_that_nobody_can_read_counts_as_lost(played: PlayedKernel) -> None:
    """After an event in an unknown format nothing that was remembered is relied on, and later events are told."""
    link, neighbour, *_ = GENUINE
    played.says.extend([struct.pack("=I", 20) + link[4:20], b"", neighbour])
    assert list(Netlink().events()) == [EventsLost(), EventsLost(), Neighbour(2, "10.2.0.2", 2, bytes(6))]


@settings(max_examples=150)
@given(st.one_of(nearly_genuine(), st.binary(max_size=100)))
def test_what_nobody_can_read_ends_nothing(said: bytes) -> None:
    """An answer is an answer or none, and an event an event, whatever bytes come."""
    kernel = PlayedKernel()
    with mock.patch.object(shared.net.netlink, "_open", return_value=kernel):
        asks: list[Callable[[Netlink], object]] = [
            Netlink.links,
            lambda netlink: netlink.route("10.2.0.2"),
            lambda netlink: netlink.neighbour(2, "10.2.0.2"),
            lambda netlink: list(netlink.events()),
        ]
        for ask in asks:
            kernel.says = deque([said])
            ask(Netlink())
