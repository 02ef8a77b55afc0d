"""The sender of copies, without a bus, on hosts and links in namespaces of the test's own."""

import ctypes
import errno
import itertools
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest

import services.transmitter.packet_socket
import shared.datagrams.mmsg
from services.transmitter.policy import Policy
from services.transmitter.sender import Sender
from shared.datagrams.gathered import Gathered
from shared.datagrams.mmsg import MMSGHDR
from shared.datagrams.routing import ALL_ROWS, Router
from shared.fanout.sending.backlog import BacklogMemory
from shared.fanout.sending.route_scope import RouteScope
from shared.ledger.counters import EXPECTED, OFFERED
from shared.ledger.equations import discrepancies
from shared.settings.model import Settings
from shared.settings.tables import Transmitter
from tests.builders import make_batch, make_client
from tests.capture import Collector
from tests.services.transmitter.site import EXPORTERS, SIEM4, SIEM6, Copied, Site, numbered, open_raw, payloads

pytestmark = pytest.mark.usefixtures("lab")


def test_datagrams_wait_for_the_next_hop_and_arrive_in_order(opened: ExitStack) -> None:
    """Copies are held while the link address is asked for, and leave in order once it is known."""
    site = Site(opened)
    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.siem.run("ip", "link", "set", "dev", "eth", "arp", "off")
        for start in range(0, 300, 30):
            site.send(*numbered(start, 30), sources=EXPORTERS[:1])
            site.turn()
        assert site.account["held"] == 300
        site.siem.run("ip", "link", "set", "dev", "eth", "arp", "on")
        site.relay.neighbour("10.2.0.2", site.eth.link_address, "up")
        hop = site.destination.egress.hop
        assert hop is not None
        while not hop.usable:
            site.sender.next_hops.apply_events()
        site.send(*numbered(300, 30), sources=EXPORTERS[:1])
        assert payloads(collector.read(330)) == numbered(0, 330)
    assert (site.account["sent"], site.account["held"]) == (330, 0)


def test_what_waits_too_long_is_dropped_and_counted(opened: ExitStack) -> None:
    """A next hop that never answers costs what was sent to it, after a second, and bounds hold before that."""
    site = Site(opened)
    site.destination = site.reach("10.2.0.77")
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
        site.send_until(lambda: site.destination.egress.mtu == 600, "the MTU is known")
        before = site.account["sent"]
        site.send(*(bytes([number]) * 1400 for number in range(20)))
        found = payloads(collector.read(before + 20))
        assert sorted(found[before:]) == [bytes([number]) * 1400 for number in range(20)]
        site.relay.run("ip", "route", "del", "10.2.0.0/24", "dev", "up")
        site.send_until(lambda: site.account["dropped_no_route"], "it is seen")


def test_runs_that_a_kernel_refuses_leave_one_by_one(opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every datagram arrives in order where a kernel refuses segmentation, and it is tried again later."""
    site = Site(opened)
    refused = 0

    def without_segmentation(descriptor: int, messages: Any, start: int, stop: int) -> tuple[int, int]:
        nonlocal refused
        vector = messages if isinstance(messages, int) else messages.ctypes.data
        if segmented(vector + start * MMSGHDR.itemsize):
            refused += 1
            return 0, errno.EINVAL
        return shared.datagrams.mmsg.send(descriptor, messages, start, start + 1)

    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        collector.read(1)
        monkeypatch.setattr(services.transmitter.packet_socket, "send", without_segmentation)
        site.send(b"odd one", *numbered(0, 100), sources=EXPORTERS[:1])
        assert payloads(collector.read(101)) == [b"odd one", *numbered(0, 100)]
        assert (tried := refused)
        site.send(*numbered(100, 50), sources=EXPORTERS[:1])
        assert refused == tried, "it was tried again at once"
        monkeypatch.undo()
        time.sleep(1.1)
        site.turn()
        site.send(*numbered(150, 50), sources=EXPORTERS[:1])
        assert payloads(collector.read(100)) == numbered(100, 100)


def segmented(message: int) -> bool:
    """Return whether the first piece of the message at an address has a type of segmentation in its virtio_net_hdr."""
    assert MMSGHDR.fields is not None
    iovecs = ctypes.c_uint64.from_address(message + MMSGHDR.fields["iov"][1]).value
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
    """Copies that the interface can't take, even after a moment, are dropped under their cause; the next go on."""
    site = Site(opened)
    site.until_delivered()
    monkeypatch.setattr(services.transmitter.packet_socket, "send", lambda *_: (0, error))
    site.send(*numbered(0, 50))
    assert site.account[cause] == 50
    monkeypatch.undo()
    site.send(*numbered(0, 50))
    assert site.account["sent"] == 51


def test_one_that_fails_costs_itself_alone(opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A datagram whose fragment is refused is dropped whole; those before and behind it arrive."""
    site = Site(opened)
    calls = 0

    def second_fragment_fails(descriptor: int, messages: Any, start: int, stop: int) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            return shared.datagrams.mmsg.send(
                descriptor, messages, start, start + 2
            )  # the small one, and a first fragment
        return (0, errno.EPERM) if calls == 2 else shared.datagrams.mmsg.send(descriptor, messages, start, stop)

    with Collector(site.siem, "10.2.0.2", 9514) as collector:
        site.until_delivered()
        monkeypatch.setattr(services.transmitter.packet_socket, "send", second_fragment_fails)
        site.send(b"before", bytes(4000), b"behind", sources=EXPORTERS[:1])
        assert payloads(collector.read(3)) == [b"first", b"before", b"behind"]
    assert (site.account["sent"], site.account["dropped_eperm"]) == (3, 1)


def test_a_host_without_sockets_for_ipv6_counts_what_it_cannot_send(opened: ExitStack) -> None:
    """Packets are dropped as `no_route` where no raw IP socket of IPv6 could be had, and all else goes on."""
    site = Site(opened)
    raw = replace(open_raw(opened, site.relay), ip6=())
    with site.relay.entered():
        site.sender = opened.enter_context(closing(Sender(Settings(), raw, BacklogMemory(1 << 20))))
    site.destination = site.reach("fd00:2::1")
    site.send(b"x", sources=("2001:db8::1",))
    assert site.account["dropped_no_route"] == 1
    site.destination = site.reach()
    site.send(b"x")
    site.turn_until("sent", 1)


@pytest.mark.parametrize(
    ("near", "beyond", "sources"),
    [
        (SIEM4, "10.3.0.1", ("169.254.3.4", "192.0.2.1", "169.254.255.254")),
        (SIEM6, "fd00:3::1", ("fe80::9", "2001:db8::1", "febf::9")),
    ],
)
def test_link_local_sources_stay_on_their_link(
    opened: ExitStack, near: str, beyond: str, sources: Sequence[str]
) -> None:
    """Copies of link-local sources reach a collector on a link of ours; behind a router they are refused and counted.

    A route that becomes one by a router, or no longer is, changes that.
    """
    site, bits = Site(opened), "128" if ":" in near else "32"
    site.siem.add_address(f"{beyond}/{bits}", "eth")
    for address in (near, beyond):
        site.relay.run("ip", "route", "replace", f"{address}/{bits}", "dev", "up")
    near_collector, far_collector = (opened.enter_context(Collector(site.siem, each, 9514)) for each in (near, beyond))

    def arrived(collector: Collector, address: str, expected: Sequence[str]) -> None:
        before = site.account["dropped_source_refused"]
        site.destination = site.reach(address)
        site.send(b"0", b"1", b"2", sources=sources)
        while site.account["held"]:
            site.turn()
        assert [datagram.source for datagram in collector.read(len(expected))] == list(expected)
        assert site.account["dropped_source_refused"] - before == len(sources) - len(expected)

    arrived(near_collector, near, sources)
    arrived(far_collector, beyond, sources)
    site.relay.run("ip", "route", "replace", f"{beyond}/{bits}", "via", near, "dev", "up")
    while site.destination.egress.scope is not RouteScope.ROUTED:
        site.turn()
    arrived(far_collector, beyond, sources[1:2])
    arrived(near_collector, near, sources)


def test_policy_is_kept_whoever_is_in_the_registry(opened: ExitStack) -> None:
    """Outside the allowed destinations, from refused sources, and to our own listener nothing goes; each is counted."""
    site = Site(opened, destinations=("10.2.0.2/32", "127.0.0.0/8"), sources=("192.0.2.0/24",))
    site.until_delivered()
    site.send(b"x", sources=("198.51.100.1",))
    site.send(b"x", sources=("2001:db8::1",))
    assert (site.account["dropped_source_refused"], site.account["dropped_other_family"]) == (1, 1)
    site.destination = site.reach("10.2.0.3")
    site.send(b"x")
    assert site.account["dropped_destination_refused"] == 1
    site.destination = site.sender.reach(make_client("loop", 6667, address="127.0.0.1"), site.account)
    site.send(b"x")
    assert site.account["dropped_destination_refused"] == 2
    assert site.account["sent"] == 1


def test_frames_per_second_holds(opened: ExitStack) -> None:
    """No more than a tenth of a second's allowance leaves at once; the rest is counted."""
    site = Site(opened, frames_per_second=1000)
    site.until_delivered()
    time.sleep(0.15)
    site.send(*numbered(0, 250))
    assert site.account["dropped_rate_limited"] >= 140


def test_collectors_share_the_frames_per_second(opened: ExitStack) -> None:
    """Each collector gets its part of the frames in the long run, however few may leave."""
    site = Site(opened)
    site.until_delivered()
    now = 1000.0
    site.sender.policy = Policy(Transmitter(frames_per_second=100), lambda: now)
    accounts = [Counter[str]() for _ in range(3)]
    reached = [site.sender.reach(make_client("c", 9600 + n, address="10.2.0.2"), a) for n, a in enumerate(accounts)]
    batch = Gathered([make_batch(numbered(0, 10), EXPORTERS[:1])])
    for _ in range(300):
        site.sender.send(batch, [(copies, ALL_ROWS) for copies in reached])
        now += 0.11
    assert sum(account["sent"] for account in accounts) == 3000
    assert all(account["sent"] > 500 for account in accounts)


def test_collectors_get_their_own_datagrams_under_a_limit_of_frames(opened: ExitStack) -> None:
    """With `frames_per_second` exceeded, each collector gets datagrams of its prefixes alone, as many as are counted.

    Rows that the limit cuts short are arrays of a moment, whose place in memory the next collector's may have.
    """
    site = Site(opened)
    site.until_delivered()
    ticks = itertools.count(1000.0, 0.03)
    site.sender.policy = Policy(Transmitter(frames_per_second=100), lambda: next(ticks))
    prefixes = [f"198.51.100.{n}/32" for n in range(4)]
    clients = [make_client(f"c{n}", 9600 + n, address=SIEM4, prefixes=(each,)) for n, each in enumerate(prefixes)]
    collectors = [opened.enter_context(Collector(site.siem, SIEM4, client.port)) for client in clients]
    accounts = {client.name: Counter[str]() for client in clients}
    reached = {client.name: site.sender.reach(client, accounts[client.name]) for client in clients}
    router = Router()
    router.replace(clients)
    sources = [each.removesuffix("/32") for each in prefixes]
    for _ in range(20):
        batch = Gathered([make_batch([source.encode() for source in sources] * 8, sources)])
        site.sender.send(batch, [(reached[client.name], selection) for client, selection in router.route(batch)])
    for client, collector, source in zip(clients, collectors, sources, strict=True):
        account = accounts[client.name]
        arrived = payloads(collector.read(account["sent"]))
        assert (set(arrived), collector.read(0)) == ({source.encode()}, [])
        assert list(discrepancies({f"collector/{client.name}": {**account, OFFERED: 160, EXPECTED: 160}})) == []
        assert account["dropped_rate_limited"] > 0


@pytest.mark.parametrize(("address", "source"), [("10.2.0.2", "192.0.2.1"), ("fd00:2::2", "2001:db8::1")])
def test_fragments_to_one_address_are_numbered_for_all_its_collectors(
    opened: ExitStack, address: str, source: str
) -> None:
    """Collectors on one host get fragments that can't be mixed up there, also when one signs up again."""
    site = Site(opened)
    copied = opened.enter_context(Copied(site.siem, "eth"))
    site.relay.neighbour(address, site.eth.link_address, "up")
    reached = [site.reach(address, port=9600 + number) for number in range(3)]
    reached[0] = site.reach(address, port=9600)
    batch = Gathered([make_batch([bytes(2000)] * 30, (source,))])
    site.sender.send(batch, [(copies, ALL_ROWS) for copies in reached])
    assert len({datagram.header.identification for datagram in copied.read(90)}) == 90


def test_a_message_of_another_process_is_not_taken_for_the_kernels(opened: ExitStack) -> None:
    """Messages of other processes to the netlink socket change nothing and break nothing."""
    site = Site(opened)
    site.until_delivered()
    netlink = site.sender.next_hops._netlink
    assert netlink is not None
    with closing(site.relay.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)) as stranger:
        for sock in (netlink._events, netlink._questions):
            for message in (b"", bytes(16), b"\xff" * 64):
                try:
                    stranger.sendto(message, (sock.getsockname()[0], 0))
                except OSError:  # the kernel may refuse it for us
                    break
    version = site.sender.next_hops.version
    site.turn()
    assert site.sender.next_hops.version == version
    assert site.sender.next_hops.egress_to("10.2.0.2").link is not None
