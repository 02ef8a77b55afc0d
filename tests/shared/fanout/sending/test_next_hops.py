"""Ways to collectors as the network changes, and the question that makes the kernel find a next hop."""

import gc
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from select import select
from weakref import ref

import pytest

import shared.fanout.sending.next_hops
from shared.fanout.sending.next_hops import (
    ASK_AGAIN_SECONDS,
    DISCARD_PORT,
    EgressKind,
    Hop,
    NextHops,
)
from shared.fanout.sending.route_scope import RouteScope
from shared.ledger.counters import INTERFACE_DOWN, NO_ROUTE
from shared.net.netlink import EventsLost
from tests.capture import Capture, Datagram
from tests.network import End, Host, tunnel, veth
from tests.services.transmitter.site import SIEM4, SIEM6, ask_quickly
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
NEW_MAC = "02:00:00:00:77:77"
BEYOND4, BEYOND6 = "10.3.0.9", "fd00:3::9"


class Area:
    """A relay and its next_hops; at the other end of its interface `up` a host that is a gateway to others."""

    def __init__(self, opened: ExitStack) -> None:
        self.opened = opened
        self.relay, self.near = opened.enter_context(Host()), opened.enter_context(Host())
        self.up = End(self.relay, "up", "10.2.0.1/24 fd00:2::1/64")
        self.eth = End(self.near, "eth", f"{SIEM4}/24 {SIEM6}/64")
        opened.enter_context(veth(self.up, self.eth))
        ask_quickly(self.relay, "up")
        self.relay.route("10.3.0.0/24", via=SIEM4)
        self.relay.route("fd00:3::/64", via=SIEM6)
        with self.relay.entered():
            self.next_hops = opened.enter_context(closing(NextHops()))

    def ip(self, command: str) -> None:
        """Change something on the relay."""
        self.relay.run("ip", *command.split())

    def hop(self, address: str) -> Hop:
        """The next hop on the way to an address."""
        hop = self.next_hops.egress_to(address).hop
        assert hop is not None
        return hop

    def follow_until(self, condition: Callable[[], object], what: str, *, refresh: bool = False) -> None:
        """Take in what has changed until a condition is met; with `refresh`, seconds pass for next hops in use."""

        def met() -> object:
            self.next_hops.apply_events()
            if refresh:
                self.next_hops.refresh()
            return condition()

        wait_until(met, what)

    def follow_to(self, address: str, condition: Callable[[], object], what: str) -> None:
        """Take in what has changed, the way to an address being in use, until a condition is met."""

        def met() -> object:
            self.hop(address).used = True
            return condition()

        self.follow_until(met, what, refresh=True)

    def find(self, address: str) -> Hop:
        """Get a next hop's link address found; return it, usable."""
        hop = self.hop(address)
        self.next_hops.resolve(hop)
        self.follow_until(lambda: hop.usable, "the next hop has answered")
        return hop

    def probes(self, capture: Capture) -> list[Datagram]:
        """The datagrams to the discard port that have come."""
        return [datagram for datagram in capture.take() if datagram.port == DISCARD_PORT]


@pytest.fixture
def area() -> Iterator[Area]:
    """Closed at the end of the test."""
    with ExitStack() as opened:
        yield Area(opened)


def test_a_way_has_its_kind_link_next_hop_and_mtu(area: Area) -> None:
    """On the link, behind a gateway, on a link without Ethernet, on this host, nowhere: each as it is reached."""
    area.ip("route add 10.4.0.0/24 via 10.2.0.2 mtu 1000")
    area.ip("route add 10.6.0.0/24 via 10.2.0.2 mtu 9000")
    over = area.opened.enter_context(Host())
    area.opened.enter_context(tunnel(End(area.relay, "tun", "10.5.0.1/24"), End(over, "tun", "10.5.0.2/24")))
    area.follow_until(lambda: area.next_hops.link("tun"), "the tunnel is known")
    frames = {SIEM4: (SIEM4, 1500), SIEM6: (SIEM6, 1500), BEYOND4: (SIEM4, 1500), BEYOND6: (SIEM6, 1500)}
    for address, expected in (frames | {"10.4.0.1": (SIEM4, 1000), "10.6.0.1": (SIEM4, 1500)}).items():
        egress = area.next_hops.egress_to(address)
        assert egress.link is not None
        assert egress.hop is not None
        assert (egress.kind, egress.link.name, egress.cause, egress.local) == (EgressKind.FRAMES, "up", "", False)
        assert (egress.hop.address, egress.mtu) == expected
        assert egress.scope is (RouteScope.LINK if address == expected[0] else RouteScope.ROUTED)
    packets = {
        "10.5.0.2": (False, 1400),
        "10.2.0.1": (True, 65_536),
        "127.0.0.1": (True, 65_536),
        "::1": (True, 65_536),
    }
    assert area.next_hops.egress_to("10.5.0.2").scope is RouteScope.LINK
    for address, (local, mtu) in packets.items():
        egress = area.next_hops.egress_to(address)
        assert (egress.kind, egress.hop, egress.cause, egress.local, egress.mtu) == (
            EgressKind.PACKETS,
            None,
            "",
            local,
            mtu,
        )
    for address in ("10.9.0.1", "fd00:9::1", "10.2.0.255", "224.0.0.1", "ff02::1", "255.255.255.255"):
        egress = area.next_hops.egress_to(address)
        assert (egress.kind, egress.cause) == (EgressKind.NONE, NO_ROUTE), address


def test_collectors_behind_one_gateway_share_its_next_hop(area: Area) -> None:
    """A fact about a gateway is true for all that is behind it."""
    assert area.hop("10.3.0.1") is area.hop("10.3.0.2") is area.hop(SIEM4)


@pytest.mark.parametrize("address", [SIEM4, SIEM6, BEYOND4, BEYOND6])
def test_the_probe_goes_to_the_next_hop_once_a_second(area: Area, address: str) -> None:
    """An empty datagram, hop limit 1, to the next hop's discard port: however often it is asked for, one a second."""
    with Capture(area.near, "eth") as capture:
        hop = area.find(address)
        assert hop.link_address.hex(":") == area.eth.link_address
        for _ in range(100):
            area.next_hops.resolve(hop)
        (probe,) = capture.read(1)
        expected = SIEM6 if ":" in address else SIEM4
        assert (probe.payload, probe.port, probe.header.hop_limit) == (b"", DISCARD_PORT, 1)
        assert probe.header.destination == hop.address == expected
        capture.assert_quiet(0.1)
        for _ in range(3):
            hop.used = True
            area.next_hops.refresh()
            for _ in range(100):
                area.next_hops.resolve(hop)
        assert len(capture.read(3)) == 3
        capture.assert_quiet(0.1)


def test_next_hops_that_do_not_answer_delay_others_only(area: Area) -> None:
    """A next hop that could not be asked for, since too many others wait for their answer, is asked for after them."""
    probe = area.next_hops._probes[socket.AF_INET]
    assert probe is not None
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    dead = [area.hop(f"10.2.0.{number}") for number in range(100, 200)]
    for hop in dead:
        area.next_hops.resolve(hop)
    live = area.hop(SIEM4)
    area.next_hops.resolve(live)
    assert not live.probed

    def found() -> bool:
        area.next_hops.resolve(live)
        return live.usable

    area.follow_until(found, "it is asked for, and answers")


def test_a_gateway_with_a_link_local_address_is_found(area: Area) -> None:
    """Of IPv6 gateways most have such addresses, and an IPv4 network may be behind one too."""
    (gateway,) = (
        each["local"]
        for each in json.loads(area.near.run("ip", "-json", "-6", "address", "show", "dev", "eth"))[0]["addr_info"]
        if each["scope"] == "link"
    )
    area.ip(f"route add fd00:7::/64 via {gateway} dev up")
    area.ip(f"route add 10.7.0.0/24 via inet6 {gateway} dev up")
    hop = area.find("fd00:7::1")
    assert (hop.address, hop.link_address.hex(":")) == (gateway, area.eth.link_address)
    assert area.hop("10.7.0.1") is hop


def test_a_next_hop_that_is_known_and_idle_is_not_asked(area: Area) -> None:
    """Neither a permanent or confirmed one in use, nor a stale one that nothing is sent to, is probed."""
    with Capture(area.near, "eth") as capture:
        area.relay.neighbour(SIEM4, area.eth.link_address, "up")
        used, _idle = area.hop(SIEM4), area.find(SIEM6)
        area.ip(f"neigh replace {SIEM6} lladdr {area.eth.link_address} dev up nud stale")
        capture.read(1)
        for _ in range(10):
            used.used = True
            area.next_hops.apply_events()
            area.next_hops.refresh()
        assert used.usable
        capture.assert_quiet(0.1)


def test_a_stale_next_hop_in_use_is_confirmed(area: Area) -> None:
    """The kernel is made to ask again where it is no longer sure, as it does for what it sends itself."""
    hop = area.find(SIEM4)
    reachable = hop.state
    area.ip(f"neigh replace {SIEM4} lladdr {area.eth.link_address} dev up nud stale")
    area.follow_until(lambda: hop.state != reachable, "it is stale")
    assert hop.usable
    area.follow_to(SIEM4, lambda: hop.state == reachable, "it is confirmed")


@pytest.mark.parametrize("gateway", ["10.4.0.2", "10.2.0.3"])
def test_the_probe_leaves_by_the_link_of_the_way(area: Area, gateway: str) -> None:
    """A gateway that only its route says is on the link (`onlink`) is asked there, wherever else its address leads."""
    elsewhere = area.opened.enter_context(Host())
    other = End(area.relay, "other", "10.4.0.1/24 fd00:4::1/64")
    area.opened.enter_context(veth(other, End(elsewhere, "eth", "10.4.0.2/24 fd00:4::2/64")))
    area.near.run("ip", "address", "add", "10.98.0.1/32", "dev", "eth")
    area.ip(f"route add 10.0.0.0/8 via {gateway}")
    area.ip("route add 10.7.0.0/24 via 10.98.0.1 dev up onlink")
    area.follow_until(lambda: area.next_hops.link("other"), "the other link is known")
    with Capture(elsewhere, "eth") as capture:
        assert area.hop("10.7.0.1").address == "10.98.0.1"
        area.find("10.7.0.1")
        assert area.probes(capture) == []


def test_a_link_that_does_not_ask_for_neighbours_needs_no_answer(area: Area) -> None:
    """A link without ARP has a usable next hop as soon as there is something to send."""
    area.ip("link set dev up arp off")
    area.ip("neigh flush dev up")
    area.follow_until(lambda: True, "it is known")
    for address in (SIEM4, SIEM6):
        area.find(address)


@pytest.mark.parametrize("address", [SIEM4, BEYOND4])
def test_a_next_hop_with_another_link_address_is_found_again(area: Area, address: str) -> None:
    """A collector or a gateway that was replaced: the stale entry is probed, and the new link address is used."""
    hop = area.find(address)
    area.near.run("ip", "link", "set", "dev", "eth", "address", NEW_MAC)
    area.ip(f"neigh replace {SIEM4} lladdr {area.eth.link_address} dev up nud stale")
    area.follow_to(address, lambda: hop.link_address.hex(":") == NEW_MAC and hop.usable, "the new one is known")


def test_a_next_hop_that_is_gone_is_asked_for_until_it_answers(area: Area) -> None:
    """A silent next hop is not usable; it is asked each second as long as it is in use, and used when it is back."""
    hop = area.find(SIEM4)
    area.near.run("ip", "link", "set", "dev", "eth", "arp", "off")
    area.ip(f"neigh replace {SIEM4} lladdr {area.eth.link_address} dev up nud stale")
    area.follow_to(SIEM4, lambda: not hop.usable, "it is known to be gone")
    area.near.run("ip", "link", "set", "dev", "eth", "arp", "on")
    area.follow_to(SIEM4, lambda: hop.usable, "it is back")


def test_a_next_hop_is_followed_as_long_as_a_way_leads_by_it(area: Area) -> None:
    """One that no way holds is forgotten, whoever has used it; none of that makes anybody look for ways again."""
    kept, gone = area.find(SIEM4), ref(area.find(SIEM6))
    version = area.next_hops.version
    for _ in range(100):
        area.next_hops.refresh()
    gc.collect()
    assert gone() is None
    assert area.hop(SIEM4) is kept
    assert area.next_hops.version == version


def changed(area: Area, address: str, condition: Callable[[], object], what: str) -> None:
    """Follow until the version grows and a condition is met: only then is anybody to look for the way again."""
    version = area.next_hops.version
    area.follow_until(lambda: area.next_hops.version > version and condition(), f"{what}, to {address}")


@pytest.mark.parametrize("address", [SIEM4, SIEM6, BEYOND4, BEYOND6])
def test_a_link_without_carrier_is_no_way(area: Area, address: str) -> None:
    """Without carrier there is no way, since what the kernel would take then is lost without a word; with it, again."""
    egress = area.next_hops.egress_to
    area.near.run("ip", "link", "set", "dev", "eth", "down")
    changed(area, address, lambda: egress(address).cause == INTERFACE_DOWN, "the carrier is gone")
    assert egress(address).kind is EgressKind.NONE
    area.near.run("ip", "link", "set", "dev", "eth", "up")
    changed(area, address, lambda: egress(address).kind is EgressKind.FRAMES, "the carrier is back")


def test_a_link_that_is_down_is_no_way(area: Area) -> None:
    """The kernel takes a link's routes away when it is taken down: whichever is seen first, there is no way."""
    egress = area.next_hops.egress_to
    area.ip("link set dev up down")
    changed(area, SIEM4, lambda: egress(SIEM4).cause in (NO_ROUTE, INTERFACE_DOWN), "it is down")
    area.ip("link set dev up up")
    changed(area, SIEM4, lambda: egress(SIEM4).kind is EgressKind.FRAMES, "it is up")


def test_changes_of_routes_and_mtu_are_followed(area: Area) -> None:
    """A route that goes, comes back, gets an MTU, or leads elsewhere; an MTU of the link; an address that is ours."""
    egress = area.next_hops.egress_to
    elsewhere = area.opened.enter_context(Host())
    other = End(area.relay, "other", "10.4.0.1/24")
    area.opened.enter_context(veth(other, End(elsewhere, "eth", "10.4.0.2/24")))
    area.follow_until(lambda: area.next_hops.link("other"), "the other link is known")
    steps: list[tuple[str, Callable[[], object]]] = [
        ("route del 10.3.0.0/24", lambda: egress(BEYOND4).cause == NO_ROUTE),
        ("route add 10.3.0.0/24 via 10.2.0.2 mtu 1000", lambda: egress(BEYOND4).mtu == 1000),
        ("link set dev up mtu 900", lambda: egress(BEYOND4).mtu == 900),
        ("route replace 10.3.0.0/24 via 10.4.0.2", lambda: area.hop(BEYOND4).address == "10.4.0.2"),
        ("route replace blackhole 10.3.0.9/32", lambda: egress(BEYOND4).cause == NO_ROUTE),
        ("route del blackhole 10.3.0.9/32", lambda: egress(BEYOND4).link == area.next_hops.link("other")),
        (f"address add {BEYOND4}/32 dev up", lambda: egress(BEYOND4).local),
        (f"address del {BEYOND4}/32 dev up", lambda: not egress(BEYOND4).local),
        (f"link set dev other address {NEW_MAC}", lambda: egress(BEYOND4).link.address.hex(":") == NEW_MAC),  # type: ignore[union-attr]
    ]
    for command, expected in steps:
        area.ip(command)
        changed(area, BEYOND4, expected, command)


def test_an_interface_that_was_deleted_and_made_anew_is_used(area: Area) -> None:
    """Deleted there is no way; under the same name, with another number, it is the way again."""
    egress = area.next_hops.egress_to
    before = egress(SIEM4).link
    area.ip("link del dev up")
    changed(area, SIEM4, lambda: egress(SIEM4).kind is EgressKind.NONE, "it is gone")
    assert area.next_hops.link("up") is None
    area.opened.enter_context(veth(area.up, area.eth))
    changed(area, SIEM4, lambda: egress(SIEM4).kind is EgressKind.FRAMES, "it is there again")
    after = egress(SIEM4).link
    assert before is not None
    assert after is not None
    assert (after.name, after.index > before.index) == ("up", True)
    area.find(SIEM4)


def test_after_lost_events_everything_is_looked_at_again(area: Area) -> None:
    """More events than can be kept: what changed meanwhile, of links and of next hops, is known all the same."""
    hop = area.find(SIEM4)
    hosts = range(256, 4000)
    lines = [f"neigh replace 10.2.{n >> 8}.{n & 255} lladdr {NEW_MAC} dev up nud permanent" for n in hosts]
    lines += ["link set dev up mtu 1234", f"neigh replace {SIEM4} lladdr {NEW_MAC} dev up nud permanent"]
    area.relay.run("ip", "-batch", "-", text="\n".join(lines))
    changed(area, SIEM4, lambda: area.next_hops.egress_to(SIEM4).mtu == 1234, "the MTU is known")
    assert hop.link_address.hex(":") == NEW_MAC
    assert area.hop(SIEM4) is hop


def test_events_older_than_the_lost_ones_undo_nothing(area: Area) -> None:
    """Of more changes of a link than can be kept the last one holds, not one that was still queued."""
    area.relay.run("ip", "-batch", "-", text="\n".join(f"link set dev up mtu {600 + n % 800}" for n in range(4000)))
    area.ip("link set dev up mtu 1333")
    area.follow_until(lambda: not select([area.next_hops], [], [], 0.2)[0], "nothing is queued")
    area.follow_until(lambda: not area.next_hops.stale, "all is known")
    link = area.next_hops.link("up")
    assert link is not None
    assert link.mtu == area.relay.link("up")["mtu"] == 1333


class Clock:
    """The clock of a next_hops: it stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


ROUTES = [f"route replace 10.3.0.0/24 via 10.2.0.{number + 2}" for number in range(100)]
MTUS = [f"link set dev up mtu {1300 + number}" for number in range(100)]


@pytest.mark.parametrize("commands", [ROUTES, MTUS])
def test_busy_changes_cost_a_part_of_the_time(area: Area, monkeypatch: pytest.MonkeyPatch, commands: list[str]) -> None:
    """Ways are asked for at most ten times a second, however often routes or links change; the last change counts."""
    clock = Clock()
    monkeypatch.setattr(shared.fanout.sending.next_hops, "time", clock)
    area.next_hops.apply_events()
    clock.now += 1
    area.next_hops.apply_events()
    start = area.next_hops.version
    for command in commands:
        area.ip(command)
        area.next_hops.apply_events()
        clock.now += ASK_AGAIN_SECONDS / 25
    assert 3 <= area.next_hops.version - start <= 5
    clock.now += ASK_AGAIN_SECONDS
    version = area.next_hops.version
    assert area.next_hops.stale
    area.next_hops.apply_events()
    assert area.next_hops.version == version + 1
    assert (area.hop(BEYOND4).address, area.next_hops.egress_to(SIEM4).mtu) in (("10.2.0.101", 1500), (SIEM4, 1399))


def test_lost_events_cost_a_part_of_the_time(area: Area, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for everything at most ten times a second, however often events are lost."""
    clock = Clock()
    monkeypatch.setattr(shared.fanout.sending.next_hops, "time", clock)
    monkeypatch.setattr(area.next_hops._netlink, "events", lambda: iter([EventsLost()]))
    area.next_hops.apply_events()
    start = area.next_hops.version
    for _ in range(100):
        clock.now += ASK_AGAIN_SECONDS / 25
        area.next_hops.apply_events()
    assert 3 <= area.next_hops.version - start <= 5


def test_links_that_no_way_leads_by_may_change(area: Area) -> None:
    """A link that comes, another's name or alias, next hops that nobody uses: nothing that makes anybody look again."""
    area.follow_until(lambda: not select([area.next_hops], [], [], 0.2)[0], "nothing is queued")
    area.follow_until(lambda: not area.next_hops.stale, "all is known")
    version = area.next_hops.version
    End(area.relay, "idle").make("ifb")
    for command in ("link set dev idle alias unused", "link set dev idle name other"):
        area.ip(command)
    area.relay.neighbour("10.2.0.7", NEW_MAC, "up")
    area.follow_until(lambda: area.next_hops.link("other"), "the new name is known")
    assert (area.next_hops.version, area.next_hops.stale) == (version, False)
