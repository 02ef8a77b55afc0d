"""Changes of a relay's links, routes, neighbours and addresses under copies by the kernel: each datagram comes once."""

import signal
from contextlib import ExitStack, closing

import pytest

from shared.bus.bodies.offload_messages import PATHS_TOPIC
from tests.builders import BusEnds, accounts_when
from tests.network import veth
from tests.openly import OpenStack
from tests.services.offload.site import EXPORTERS, PORT, SIEMS, OffloadSite
from tests.services.offload.test_service import told_paths
from tests.stack import wait_until
from tests.system.offload_collectors import Connections, Entry, open_relay
from tests.system.offload_relay import Counted, Exporting

pytestmark = pytest.mark.usefixtures("lab")
FAR = {4: "10.9.0.1", 6: "fd09::1"}
"""Addresses behind the collectors' host."""
SETTINGS = f"""
[gateway]
destinations = ["10.2.0.0/24", "10.9.0.0/16", "fd02::/64", "fd09::/64"]
serve_seconds = 10
[[stream]]
name = "netflow"
listen = ["udp://0.0.0.0:{PORT}", "udp://[::]:{PORT}"]
[offload]
interfaces = ["in"]
"""
ENTRIES = (
    Entry("near", (SIEMS[4][0], 9000), "relay", {}),
    Entry("near6", (SIEMS[6][0], 9001), "original", {}),
    Entry("far", (FAR[4], 9002), "original", {}),
    Entry("far6", (FAR[6], 9003), "relay", {}),
)
MANY = 4000
"""Changes: their events are more than a socket holds."""
MOVED = "02:00:00:00:77:01"
STEADY = 40
"""Datagrams of each IP version that have to come to all, one after the other, for copies to go on."""


class Changing:
    """All services on a relay, exporters of both IP versions, and collectors near and behind a router."""

    def __init__(self, stack: OpenStack, site: OffloadSite, opened: ExitStack) -> None:
        self.stack, self.site, self.relay, self.opened = stack, site, site.relay, opened
        self._bus = opened.enter_context(BusEnds(stack.bus))
        for version, length in ((4, 32), (6, 128)):
            site.siem.add_address(f"{FAR[version]}/{length}", "lo")
        self.route()
        self._exporting = {version: Exporting(site, opened, version, version << 24) for version in (4, 6)}
        self._came: dict[str, Counted] = {}
        self._connections = Connections(site, opened)
        for entry in ENTRIES:
            came = self._came[entry.name] = opened.enter_context(closing(Counted(site, *entry.place)))
            came.start()
            self.register(entry)
        for exporting in self._exporting.values():
            exporting.start()
            opened.callback(exporting.stop)

    def register(self, entry: Entry) -> None:
        """Sign a collector up, anew if it is there."""
        self._connections.send(entry.registration())
        answer = self._connections.answer(entry.name)
        assert answer["ok"], answer

    def route(self) -> None:
        """Reach what is behind the collectors' host."""
        for network, gateway in (("10.9.0.0/16", SIEMS[4][0]), ("fd09::/64", SIEMS[6][0])):
            self.relay.run("ip", "route", "replace", network, "via", gateway)

    def copied(self) -> dict[str, int]:
        """Copies that the kernel has made, by collector."""
        accounts = accounts_when(self._bus, "offload.1", lambda _: True)
        return {entry.name: accounts.get(f"rules/{entry.name}", {}).get("copied", 0) for entry in ENTRIES}

    def settle(self) -> None:
        """Wait until all comes to all, and by the kernel; nothing has come twice."""
        wait_until(lambda: not self._missing(), lambda: f"all comes, but {self._missing()[:99]}")
        before = self.copied()
        wait_until(
            lambda: all(count > before[name] for name, count in self.copied().items()),
            lambda: f"the kernel copies for all: {before} {self.copied()} {self.stack['offload'].text[-2000:]}",
        )
        for name, came in self._came.items():
            twice = [number for number, count in came.came.copy().items() if count > 1]
            assert not twice, f"{len(twice)} came to {name} twice, from {twice[0]} on"

    def wait_for_reason(self, reason: str) -> None:
        """Wait until the kernel makes no copies, for a reason; an empty one: until it makes all."""
        paths = self._bus.subscriber(PATHS_TOPIC)
        wait_until(
            lambda: all(path.reason == reason for path in told_paths(paths)),
            lambda: f"the reason is told: {told_paths(paths)}",
        )
        paths.close()

    def _missing(self) -> list[tuple[str, int]]:
        """Return what has not come of what was sent a moment ago."""
        return [
            (entry.name, number)
            for version, exporting in self._exporting.items()
            for entry in ENTRIES
            for number in range(
                exporting.first + exporting.sent - 2 * STEADY, exporting.first + exporting.sent - STEADY
            )
            if entry.wants(EXPORTERS[version][0]) and not self._came[entry.name].came[number]
        ]


def overrun(site: Changing) -> None:
    """More changes than the planner's sockets hold while it stands still: the last of each is the one that counts."""
    process = site.stack["offload"].process
    process.send_signal(signal.SIGSTOP)
    lines = [f"route add 10.77.{number >> 8}.{number & 255}/32 dev out" for number in range(MANY)]
    lines += [f"neigh replace 10.2.0.99 lladdr {MOVED} dev out nud {state}" for state in ("stale", "failed") * MANY]
    lines += [f"link set dev in alias {number}" for number in range(MANY)]
    lines += [f"neigh replace {address[0]} lladdr {MOVED} dev out" for address in SIEMS.values()]
    site.site.siem.run("ip", "link", "set", "dev", "eth", "address", MOVED)
    site.relay.run("ip", "-batch", "-", text="\n".join(lines))
    process.send_signal(signal.SIGCONT)


def rename(site: Changing) -> None:
    """The interface where datagrams come has another name for a while, and the one where copies leave, for ever."""
    site.relay.run("ip", "link", "set", "dev", "in", "name", "inside")
    site.wait_for_reason("no interface of [offload] interfaces is there")
    site.relay.run("ip", "link", "set", "dev", "inside", "name", "in")
    site.relay.run("ip", "link", "set", "dev", "out", "name", "outside")
    site.settle()
    site.relay.run("ip", "link", "set", "dev", "outside", "name", "out")


def make_interface_anew(site: Changing) -> None:
    """The interface where datagrams come goes, and is there again at once with another number."""
    site.site.into.remove()
    site.opened.enter_context(veth(site.site.into, site.site.exporter_end))


def use_link_local_gateway(site: Changing) -> None:
    """The next hop has an address that is true on its link only, for IPv4 too."""
    site.site.siem.run("ip", "address", "add", "fe80::77/64", "dev", "eth", "nodad")
    for network, family in (("fd09::/64", ""), ("10.9.0.0/16", "inet6")):
        site.relay.run(*f"ip route replace {network} via {family} fe80::77 dev out".split())


def lose_next_hops(site: Changing) -> None:
    """They do not answer for a while."""
    site.route()
    site.site.siem.run("ip", "link", "set", "dev", "eth", "arp", "off")
    for addresses in SIEMS.values():
        site.relay.run("ip", "neigh", "del", addresses[0], "dev", "out")
    site.wait_for_reason("it is unreachable")
    site.site.siem.run("ip", "link", "set", "dev", "eth", "arp", "on")


def lose_address(site: Changing) -> None:
    """The forwarder's socket has an address that the relay has no more."""
    site.relay.run("ip", "address", "add", "10.2.0.9/24", "dev", "out")
    site.relay.run("ip", "route", "replace", "10.9.0.0/16", "via", SIEMS[4][0], "src", "10.2.0.9")
    place = FAR[4], 9004
    site.opened.enter_context(closing(Counted(site.site, *place)))  # else its host refuses what comes
    site.register(Entry("sourced", place, "relay", {}))
    site.wait_for_reason("")
    site.relay.run("ip", "address", "del", "10.2.0.9/24", "dev", "out")
    site.route()


def change_routes(site: Changing) -> None:
    """Routes with another metric, of a longer prefix, and by several gateways, come beside the first."""
    for more in (f"via {SIEMS[4][1]} metric 5", f"metric 4 nexthop via {SIEMS[4][0]} nexthop via {SIEMS[4][1]}"):
        site.relay.run(*f"ip route add 10.9.0.0/16 {more}".split())
    site.relay.run("ip", "route", "add", "10.9.0.0/17", "via", SIEMS[4][2])


CHANGES = (
    overrun,
    rename,
    make_interface_anew,
    use_link_local_gateway,
    lose_next_hops,
    lose_address,
    change_routes,
)


def test_changes_of_the_host_neither_double_nor_stop_copies(open_stack: OpenStack) -> None:
    """After each of them the kernel copies for all again, and no datagram comes twice, then or meanwhile."""
    open_stack.configure(SETTINGS)
    with open_relay(open_stack) as (site, opened):
        changing = Changing(open_stack, site, opened)
        changing.settle()
        for change in CHANGES:
            print(change.__doc__)
            change(changing)
            changing.settle()
        refused = open_stack["offload"].events("a plan of the kernel's rules was refused")
        # While senders are told of a plan the routes that it goes by may change: then the next one follows.
        assert all(each["reason"].endswith("do not go the way of the kernel's routes") for each in refused), refused
