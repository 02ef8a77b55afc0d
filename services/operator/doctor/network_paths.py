"""The way to each collector, and whether copies should go there at all. No I/O."""

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from shlex import quote
from typing import Final

from shared.client import ALL_STREAMS
from shared.monitoring.finding import Finding, error, ok, some, warning
from shared.net.queues import LARGEST_RUN, Queue
from shared.process.registry_client import Entry
from shared.settings.own_listeners import OwnListeners

ETHERNET_MTU: Final = 1500
IPV4_AND_UDP: Final = 28
IPV6_AND_UDP: Final = 48
IPV6_MINIMUM_MTU: Final = 1280
"""RFC 8200, 5: every link of IPv6 takes as much."""
NUD_INCOMPLETE: Final = 0x01
NUD_FAILED: Final = 0x20
"""linux/neighbour.h"""
CLOUDS: Final = {
    "Amazon EC2": "`aws ec2 modify-instance-attribute --instance-id ID --no-source-dest-check`",
    "Google": "`gcloud compute instances export NAME --destination FILE`, set canIpForward: true in it, "
    "`gcloud compute instances update-from-file NAME --source FILE`",
    "Microsoft": "`az network nic update --resource-group GROUP --name NIC --ip-forwarding true`",
    "OpenStack": "`openstack port set --allowed-address ip-address=EXPORTERS/LENGTH PORT`",
}
"""By /sys/class/dmi/id/sys_vendor: the command that lets a machine send from addresses that are not its own."""

Judge = Callable[[Entry], Finding | None]
"""Returns the finding about a collector, if there is one."""


@dataclass(frozen=True)
class NetworkPath:
    """The way of packets to an address; `neighbour` is the next hop's NUD_ state, 0 where the kernel has none."""

    local: bool
    interface: str
    up: bool = True
    mtu: int = ETHERNET_MTU
    link_mtu: int = ETHERNET_MTU
    next_hop: str = ""
    neighbour: int = 0
    mtu_known: bool = False
    """True if `mtu` is of the whole way: set for the route, or learnt from a router."""
    queues: Sequence[Queue] = ()


@dataclass(frozen=True)
class NetworkFacts:
    """Facts of the network. `paths` is by address; None: there is no route."""

    paths: Mapping[str, NetworkPath | None] = field(default_factory=dict)
    longest_mtu: int = ETHERNET_MTU
    """The longest MTU of the interfaces that are up: exporters' datagrams may be as long."""
    listeners: Sequence[tuple[str, int]] = ()
    vendor: str = ""


def check_network_paths(
    facts: NetworkFacts, collectors: Sequence[Entry], destinations: Iterable[str]
) -> Iterator[Finding]:
    """Yield every finding about the way of copies; `destinations` is what the transmitter's policy allows."""
    count = f"{len(collectors)} collectors" if len(collectors) != 1 else f"the collector {collectors[0].name}"
    own, allowed = OwnListeners(facts.listeners), [ipaddress.ip_network(prefix) for prefix in destinations]
    originals = [each for each in collectors if each.source == "original"]

    def each(name: str, whom: Sequence[Entry], judge: Judge, fine: str) -> Iterator[Finding]:
        found = [finding for collector in whom if (finding := judge(collector))]
        yield from found or [ok(name, fine if whom else "no collector needs it")]

    def way(collector: Entry) -> NetworkPath | None:
        return facts.paths.get(collector.address)

    def loop(collector: Entry) -> Finding | None:
        def is_local(address: str) -> bool:
            way = facts.paths.get(address)
            return way is not None and way.local

        if not own.receive(collector.address, collector.port, is_local):
            return None
        why = f"{_at(collector)} is one of fanwire's own listeners: each copy would come back and be copied again"
        return error("loops", why, f"{_leave(collector)}, and receive on another port", collector.name)

    def destination(collector: Entry) -> Finding | None:
        address = ipaddress.ip_address(collector.address)
        if any(address in prefix for prefix in allowed):
            return None
        why = f"[transmitter] destinations does not cover {address}: it gets no copies, though it is registered"
        return error("destinations", why, f'add "{address}/{address.max_prefixlen}" to it', collector.name)

    def route(collector: Entry) -> Finding | None:
        if way(collector) is not None:
            return None
        cure = f"see `ip route get {collector.address}`; add one by `ip route add`"
        return error("route", f"there is no route to {collector.address}", cure, collector.name)

    def interface(collector: Entry) -> Finding | None:
        found = way(collector)
        if found is None or found.up:
            return None
        why = f"{found.interface}, by which {collector.address} is reached, is down or has no carrier"
        return error("interface", why, f"`ip link set {found.interface} up`; look at the cable", collector.name)

    def next_hop(collector: Entry) -> Finding | None:
        found = way(collector)
        if found is None or found.local or not found.neighbour & (NUD_INCOMPLETE | NUD_FAILED):
            return None
        why = f"{found.next_hop} on {found.interface} does not tell its link address (ARP, neighbour discovery)"
        cure = f"is it up, and on this network? `ip neigh show {found.next_hop} dev {found.interface}`"
        return error("next_hop", why, cure, collector.name)

    def mtu(collector: Entry) -> Finding | None:
        found = way(collector)
        return None if found is None or found.local else _mtu(collector, found, facts.longest_mtu)

    def queue(collector: Entry) -> Finding | None:
        found = way(collector)
        return None if found is None or found.local else _queue(collector, found)

    yield from each("loops", collectors, loop, "no collector is one of fanwire's own listeners")
    yield from _doubles(collectors)
    yield from each(
        "destinations", originals, destination, "[transmitter] destinations covers every collector that needs it"
    )
    yield from each("route", collectors, route, f"there is a route to {count}")
    yield from each("interface", collectors, interface, "the interfaces that copies leave by are up")
    yield from each("next_hop", collectors, next_hop, "no next hop is known to be silent")
    fine = f"packets of {facts.longest_mtu} bytes pass uncut, as far as known here; further on routers may cut IPv4"
    yield from each("mtu", collectors, mtu, fine)
    yield from each("egress_queue", collectors, queue, "the queues that copies leave by have dropped nothing")
    abroad = [each.name for each in originals if not ((found := way(each)) and found.local)]
    yield _reverse_path_there(abroad)
    yield _cloud(facts.vendor, abroad)


def _leave(collector: Entry) -> str:
    return f"`fanwire leave {quote(collector.name)}`"


def _at(collector: Entry) -> str:
    return f"{collector.address} port {collector.port}"


def _doubles(collectors: Sequence[Entry]) -> Iterator[Finding]:
    """Yield a finding for collectors that get the same datagrams as another one at the same place."""
    clean, known = True, dict[tuple[str, int], list[Entry]]()
    for collector in collectors:
        others = known.setdefault((collector.address, collector.port), [])
        if other := next((other for other in others if _get_the_same(collector, other)), None):
            clean = False
            why = f"{other.name} is at {_at(collector)} too: datagrams arrive there twice"
            yield warning("doubles", why, f"{_leave(collector)}, or give both one group", collector.name)
        others.append(collector)
    if clean:
        yield ok("doubles", "no two collectors are at one address and port for the same datagrams")


def _get_the_same(one: Entry, other: Entry) -> bool:
    if one.group and one.group == other.group:
        return False
    streams = {*one.streams} & {*other.streams} or ALL_STREAMS in (*one.streams, *other.streams)
    prefixes = [[ipaddress.ip_network(prefix) for prefix in each.prefixes] for each in (one, other)]
    apart = all(prefixes) and not any(
        mine.version == theirs.version and mine.overlaps(theirs) for mine, theirs in product(*prefixes)
    )
    return bool(streams) and not apart


def _mtu(collector: Entry, way: NetworkPath, longest: int) -> Finding | None:
    six = ":" in collector.address
    room = way.mtu - (IPV6_AND_UDP if six else IPV4_AND_UDP)
    behind_router = way.next_hop not in ("", collector.address)
    if six and behind_router and not way.mtu_known and way.mtu > IPV6_MINIMUM_MTU:
        least = IPV6_MINIMUM_MTU
        why = f"the MTU of the way behind {way.next_hop} is not known: no router cuts IPv6, so copies that are longer "
        why += "than a link there takes are lost, and where ICMPv6 is filtered nobody hears of it"
        at = f"{collector.address}/128 via {way.next_hop} dev {way.interface}"
        cure = f"let ICMPv6 pass, or set the MTU: `ip -6 route replace {at} mtu {least}`; see "
        return warning("mtu", why, f"{cure}`tracepath -6 {collector.address}`", collector.name)
    cure = f"raise the MTU on the way, or keep datagrams under {room} bytes; see `ip route get {collector.address}`"
    if way.mtu < way.link_mtu:
        late = "; routers don't cut IPv6: longer packets are lost where that MTU is not known" if six else ""
        why = f"behind {way.interface} (MTU {way.link_mtu}) the way takes {way.mtu} bytes: longer ones are cut{late}"
        return warning("mtu", why, cure, collector.name)
    if way.mtu < longest:
        why = f"{way.interface} takes {way.mtu} bytes, exporters' packets may have {longest}: those leave in fragments"
        return warning("mtu", why, cure, collector.name)
    return None


def _queue(collector: Entry, way: NetworkPath) -> Finding | None:
    for queue in way.queues:
        at = f"the queue of {way.interface} ({queue.kind})"
        if queue.dropped:
            why = f"{at} has dropped {queue.dropped} packets: copies that it had taken before count as delivered"
            cure = f"raise its limit, or send less by {way.interface}; see `tc -s qdisc show dev {way.interface}`"
            return warning("egress_queue", why, cure, collector.name)
        if not queue.takes_runs:
            why = f"{at} takes no runs of datagrams: copies leave one by one, at more CPU"
            cure = (
                f"give it a burst and a limit of {LARGEST_RUN} bytes or more; see `tc qdisc show dev {way.interface}`"
            )
            return warning("egress_queue", why, cure, collector.name)
    return None


def _reverse_path_there(abroad: list[str]) -> Finding:
    """Return the finding that the filters of hosts that get copies with others' addresses can't be seen from here."""
    name = "reverse_path_there"
    if not abroad:
        return ok(name, "no collector on another host asks for the exporter's address")
    why = "their hosts may drop packets with the exporters' addresses, and that can't be seen from here"
    cure = (
        "on their hosts the larger of `sysctl net.ipv4.conf.all.rp_filter net.ipv4.conf.IFACE.rp_filter` must be 0, or"
        " 2 with a route to the exporters; `nstat -az TcpExtIPReversePathFilter` counts drops; on switches: no uRPF"
    )
    return warning(name, why, cure, some(abroad))


def _cloud(vendor: str, abroad: list[str]) -> Finding:
    cloud = next((known for known in CLOUDS if vendor.startswith(known)), "")
    if not cloud:
        return ok("cloud", f"no cloud is known here that checks source and destination; vendor: {vendor or 'unknown'}")
    if not abroad:
        return ok("cloud", f"{cloud}: its source/destination check does not matter to relayed copies")
    why = f"{cloud} drops packets with addresses that are not this machine's, unless told not to"
    return warning("cloud", why, CLOUDS[cloud], some(abroad))
