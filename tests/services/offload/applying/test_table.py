"""The kernel's word on the rules: every copy decoded and verified as it came, and every datagram that went up."""

import ipaddress
import itertools
import os
import random
import shutil
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing

import msgspec
import pytest

from services.offload.applying.nftables.connection import Nftables
from services.offload.applying.rules import Marks, Sources
from services.offload.applying.table import SETTLED_SECONDS, Table
from services.offload.kernel_plan import NO_COPIES, Listener
from shared.datagrams.routing import shares_of
from shared.datagrams.sampling import find_buckets, find_share
from shared.net.netlink import Netlink, stacked
from tests.builders import make_batch, make_client
from tests.capture import Capture, Collector
from tests.documents import block
from tests.network import End, Host
from tests.services.offload.site import (
    EXPORTERS,
    MASK,
    OUT,
    PORT,
    RELAY,
    SIEMS,
    SO_NO_CHECK,
    Listening,
    OffloadSite,
    exporters,
    packed,
    prefix,
)

pytestmark = pytest.mark.usefixtures("lab")
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="nft, of nftables, is not installed")
COUNT = 40
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
MARKED_BEFORE = """table netdev before {
    chain in {
        type filter hook ingress device in priority -1
        meta mark set 0xabc12345
    }
}
"""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("checksum_offload", [False, True])
def test_copies_are_made_by_their_terms_and_the_datagram_goes_up_as_it_came(
    version: int, checksum_offload: bool
) -> None:
    """All, of some sources, one in four, from the relay's address: each collector gets its own, and ingest gets all."""
    with OffloadSite(checksum_offload) as site, Capture(site.siem, "eth", partial=True) as wire:
        some = f"{EXPORTERS[version][0]}/{31 if version == 4 else 127}"
        relay = {"source": packed(OUT[version]), "source_port": 4000}
        copies = [
            site.copy(0, 9000, version),
            site.copy(1, 9001, version, prefixes=(prefix(some),), hop_limit=9, dscp=10),
            site.copy(2, 9002, version, sample=4),
            site.copy(3, 9003, version, **relay),
            site.copy(4, 9004, version, prefixes=(prefix(some),), sample=2, hop_limit=3, **relay),
        ]
        site.table.replace(site.plan(copies, 7, version))
        with Listening(site.relay, RELAY[version], PORT) as listener, exporters(site, version) as socks:
            sent = []
            for number in range(COUNT):
                payload = bytes([number]) * (number * 30 + 1)
                socks[number % 4].sendto(payload, (RELAY[version], PORT))
                sent.append((EXPORTERS[version][number % 4], 2000 + number % 4, payload))
            up = listener.read(COUNT)
            assert [(each.source, each.source_port, each.payload) for each in up] == sent
            assert {each.mark for each in up} == {7 << 20}
        few = [each for each in sent if each[1] < 2002]
        came = wire.read(COUNT + len(few) + COUNT // 4 + COUNT + len(few) // 2)
        wire.assert_quiet()
        by_port = {port: [each for each in came if each.port == port] for port in range(9000, 9005)}
        keys = {
            port: [(each.source, each.source_port, each.payload) for each in found] for port, found in by_port.items()
        }
        ours = [(OUT[version], 4000, payload) for *_, payload in sent]
        assert keys[9000] == sent
        assert keys[9001] == few
        assert keys[9002] in [sent[phase::4] for phase in range(4)]
        assert keys[9003] == ours
        assert keys[9004] in [[ours[sent.index(each)] for each in few[phase::2]] for phase in range(2)]
        assert {(each.header.hop_limit, each.header.traffic_class) for each in by_port[9001]} == {(9, 40)}
        assert {each.header.hop_limit for each in by_port[9004]} == {3}
        assert {each.header.hop_limit for each in by_port[9003]} == {64}
        for number in range(5):
            assert {each.header.destination for each in by_port[9000 + number]} == {SIEMS[version][number]}
        counted = {name: packets for name, (packets, _) in site.table.counters().items()}
        assert counted == {f"c{100 + number}": len(keys[9000 + number]) for number in range(5)} | {f"c{version}": COUNT}


@pytest.mark.parametrize("checksum_offload", [False, True])
def test_what_comes_by_a_vlan_is_copied_on_its_own_interface(checksum_offload: bool) -> None:
    """There it has no tag any more; rules of the cable leave alone what has one, and others' rules what has none."""
    with OffloadSite(checksum_offload) as site, Collector(site.siem, SIEMS[4][0], 9000) as siem:
        ends = End(site.exporter, "eth.7", "10.7.0.10/24"), End(site.relay, "in.7", "10.7.0.1/24")
        for end in ends:
            end.make("vlan", "id 7", over=end.name.partition(".")[0])
            end.bring_up(1500, checksum_offload)
        plan = site.plan([site.copy(0, 9000)])
        listeners = (Listener(packed("10.7.0.1"), PORT), Listener(packed(RELAY[4]), PORT))
        streams = (msgspec.structs.replace(plan.streams[0], listeners=listeners),)
        marks = []
        with site.exporter.socket(socket.AF_INET, socket.SOCK_DGRAM) as tagged, exporters(site) as socks:
            tagged.bind(("10.7.0.10", 2007))
            with Listening(site.relay, "0.0.0.0", PORT) as listener:
                for interfaces in (("in",), ("in.7",), ("in", "in.7")):
                    site.table.replace(msgspec.structs.replace(plan, interfaces=interfaces, streams=streams))
                    for sock, to in ((socks[0], RELAY[4]), (tagged, "10.7.0.1")):
                        sock.sendto(str(interfaces).encode(), (to, PORT))
                        marks.append(listener.read(1)[0].mark >> 20)
        assert marks == [7, 0, 0, 7, 7, 7]
        came = [(each.source, each.source_port, each.payload) for each in siem.read(4)]
        cable, vlan = (EXPORTERS[4][0], 2000), ("10.7.0.10", 2007)
        both = str(("in", "in.7")).encode()
        assert came == [(*cable, b"('in',)"), (*vlan, b"('in.7',)"), (*cable, both), (*vlan, both)]
        siem.assert_quiet()


@pytest.mark.parametrize("mode", ["private", "vepa", "bridge", "passthru", "source"])
def test_what_comes_by_a_macvlan_or_its_link_is_copied_once(mode: str) -> None:
    """Rules stand where `stacked` leaves them: at both, as frames go to one address or the other, unless that is one.

    With mode `source` the kernel gives a datagram to the listener twice; each of these is copied.
    """
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem:
        upper = End(site.relay, "upper", mac="02:00:00:00:00:07")
        upper.make("macvlan", f"mode {mode}", over="in")
        if mode == "source":
            site.relay.run(*f"ip link set dev upper type macvlan macaddr add {site.exporter_end.link_address}".split())
        site.relay.run("ip", "-batch", "-", text="link set dev upper up\naddress add 10.7.0.1/24 dev upper")
        site.exporter.run("ip", "address", "add", "10.7.0.10/24", "dev", "eth")
        mac = site.into.link_address if mode == "passthru" else upper.link_address
        for address, link_address in ((RELAY[4], site.into.link_address), ("10.7.0.1", mac)):
            site.exporter.neighbour(address, link_address, "eth")
        with site.relay.entered(), closing(Netlink()) as netlink:
            left_out = stacked(netlink.links(), ("in", "upper"))
        assert left_out == ({"in": "upper"} if mode == "passthru" else {})
        plan = site.plan([site.copy(0, 9000)])
        listeners = (Listener(packed("10.7.0.1"), PORT), Listener(packed(RELAY[4]), PORT))
        streams = (msgspec.structs.replace(plan.streams[0], listeners=listeners),)
        interfaces = tuple({"in", "upper"} - left_out.keys())
        site.table.replace(msgspec.structs.replace(plan, interfaces=interfaces, streams=streams))
        with exporters(site) as socks, Listening(site.relay, "0.0.0.0", PORT) as listener:
            for address in (RELAY[4], "10.7.0.1"):
                socks[0].sendto(address.encode(), (address, PORT))
            wanted = [RELAY[4]] * (1 + (mode == "source")) + ["10.7.0.1"]
            came = sorted((each.payload.decode(), each.mark >> 20) for each in listener.read(len(wanted)))
        assert came == [(address, 7) for address in wanted]
        assert sorted(each.payload.decode() for each in siem.read(len(wanted))) == wanted
        siem.assert_quiet()


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_are_copied_wherever_they_arrive(version: int) -> None:
    """Several interfaces share listeners, counters and a generation; copies may leave where the datagram came from."""
    family, network = (socket.AF_INET, "10.1.0.0/24") if version == 4 else (socket.AF_INET6, "fd01::/64")
    with OffloadSite() as site, Collector(site.siem, SIEMS[version][0], 9000) as siem:
        site.siem.route(network, OUT[version])
        plan = site.plan([site.copy(0, 9000, version, source=packed(OUT[version]), source_port=4000)], version=version)
        site.table.replace(msgspec.structs.replace(plan, interfaces=("in", "out")))
        with (
            Listening(site.relay, RELAY[version], PORT) as listener,
            exporters(site, version) as socks,
            site.siem.socket(family, socket.SOCK_DGRAM) as far,
        ):
            far.bind((SIEMS[version][1], 3000))
            for number in range(10):
                (socks[0] if number % 2 else far).sendto(bytes([number]), (RELAY[version], PORT))
            assert {each.mark >> 20 for each in listener.read(10)} == {7}
        assert sorted(each.payload[0] for each in siem.read(10)) == list(range(10))
        siem.assert_quiet()
        assert {packets for packets, _ in site.table.counters().values()} == {10}


@pytest.mark.parametrize("version", [4, 6])
def test_each_source_reaches_those_whose_prefixes_cover_it(version: int) -> None:
    """Each collector gets what its own prefixes ask for, though they overlap, and other rules were there before."""
    drawn, bits = random.Random(version), 32 if version == 4 else 128
    nets = [ipaddress.ip_network(f"{at}/{bits - cut}", strict=False) for at in EXPORTERS[version] for cut in range(4)]
    nets += [
        ipaddress.ip_network(f"{RELAY[version]}/{bits - 8}", strict=False),
        ipaddress.ip_network(f"{OUT[version]}"),
    ]
    with OffloadSite() as site, Capture(site.siem, "eth") as wire, exporters(site, version) as socks:
        for generation in range(1, 9):
            asked = [drawn.sample(nets, drawn.randrange(4)) for _ in range(20)]
            relayed = {"source": packed(OUT[version]), "source_port": 4000}
            copies = [
                site.copy(
                    place % 5, 9000 + place, version, counter=200 + place, prefixes=tuple(map(prefix, map(str, some)))
                )
                for place, some in enumerate(asked)
            ]
            copies = [msgspec.structs.replace(copy, **(relayed if drawn.randrange(2) else {})) for copy in copies]
            site.table.replace(site.plan(copies, generation, version))
            for number, sock in enumerate(socks):
                sock.sendto(b"%d" % number, (RELAY[version], PORT))
            wanted = sorted(
                (9000 + place, b"%d" % number)
                for place, some in enumerate(asked)
                for number, source in enumerate(EXPORTERS[version])
                if not some or any(ipaddress.ip_address(source) in net for net in some)
            )
            assert sorted((each.port, each.payload) for each in wire.read(len(wanted))) == wanted
        wire.assert_quiet()


@pytest.mark.parametrize("version", [4, 6])
def test_members_of_a_group_get_what_the_senders_would_give_them(version: int) -> None:
    """Of many sources each one's datagrams come to the member that has its bucket, under every plan in turn."""
    draw, there = random.Random(version), f"{EXPORTERS[version][0]}/{24 if version == 4 else 64}"
    addresses = [str(ipaddress.ip_network(there, strict=False)[number]) for number in draw.sample(range(20, 250), 60)]
    with (
        OffloadSite() as site,
        Capture(site.siem, "eth") as wire,
        Listening(site.relay, RELAY[version], PORT) as listener,
    ):
        for address in addresses:
            site.exporter_end.host.run("ip", "address", "add", address, "dev", "eth", "noprefixroute")
        buckets = find_buckets(make_batch([b""] * len(addresses), addresses))
        for names, served in (("abc", "abc"), ("abcd", "abcd"), ("abcd", "acd"), ("ad", "ad")):
            shares = shares_of([make_client(name, group="g") for name in names])
            some = (prefix(there),) if "d" in names else ()
            copies = [
                site.copy("abcd".index(name), 9000 + "abcd".index(name), version, share=shares[name], prefixes=some)
                for name in served
            ]
            site.table.replace(site.plan([*copies, site.copy(4, 9004, version)], 7, version))
            for address in addresses:
                with site.exporter.socket(FAMILY[version], socket.SOCK_DGRAM) as sock:
                    sock.bind((address, 2000))
                    sock.sendto(address.encode(), (RELAY[version], PORT))
            assert {each.mark >> 20 for each in listener.read(len(addresses))} == {7}
            wanted = {
                (9000 + "abcd".index(name), address)
                for name in served
                for address, mine in zip(addresses, find_share(shares[name], buckets), strict=True)
                if mine
            } | {(9004, address) for address in addresses}
            came = [(each.port, each.payload.decode()) for each in wire.read(len(wanted))]
            wire.assert_quiet()
            assert sorted(came) == sorted(wanted)


def test_what_the_kernel_is_not_to_copy_goes_up_unmarked() -> None:
    """Fragments, IP options, other ports and hosts, longer ones, refused sources: nobody gets them from the kernel."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem, exporters(site) as socks:
        site.exporter.run("ip", "addr", "add", "169.254.1.1/16", "dev", "eth")
        site.relay.run("ip", "addr", "add", "169.254.1.2/16", "dev", "in")
        site.table.replace(site.plan([site.copy(0, 9000)], longest=1200))
        local = site.exporter.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with (
            Listening(site.relay, RELAY[4], PORT) as listener,
            Listening(site.relay, RELAY[4], PORT + 1) as other,
            Listening(site.relay, OUT[4], PORT) as elsewhere,
            local,
        ):
            local.bind(("169.254.1.1", 0))
            site.exporter.route("10.2.0.0/24", via=RELAY[4])
            for payload in (b"whole", b"x" * 3000, b"x" * (1200 - 27), b"x" * (1200 - 28)):
                socks[0].sendto(payload, (RELAY[4], PORT))
            socks[1].setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x94\x04\0\0")  # router alert (RFC 2113)
            socks[1].sendto(b"options", (RELAY[4], PORT))
            local.sendto(b"local", (RELAY[4], PORT))
            socks[0].sendto(b"other", (RELAY[4], PORT + 1))
            socks[0].sendto(b"elsewhere", (OUT[4], PORT))
            marks = [(each.payload, each.mark >> 20) for each in listener.read(6)]
            assert {mark for _, mark in (*[(0, each.mark) for each in (*other.read(1), *elsewhere.read(1))],)} == {0}
        assert sorted(marks) == sorted([
            (b"whole", 7),
            (b"x" * 3000, 0),
            (b"x" * (1200 - 27), 0),
            (b"x" * (1200 - 28), 7),
            (b"options", 0),
            (b"local", 0),
        ])  # fmt: skip
        assert [each.payload for each in siem.read(2)] == [b"whole", b"x" * (1200 - 28)]
        siem.assert_quiet()


@needs_nft
def test_datagrams_without_checksum_and_marks_of_others_stay_as_they_are() -> None:
    """A copy of a datagram that has no checksum has none; bits of the mark that are not ours go up as they came."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem, exporters(site) as socks:
        relayed = site.copy(1, 9000, source=packed(OUT[4]), source_port=4000, address=packed(SIEMS[4][0]))
        site.table.replace(site.plan([site.copy(0, 9000), relayed]))
        site.relay.run("nft", "-f", "-", text=MARKED_BEFORE)
        with Listening(site.relay, RELAY[4], PORT) as listener:
            socks[0].setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
            socks[0].sendto(b"no checksum", (RELAY[4], PORT))
            assert [(each.payload, each.mark) for each in listener.read(1)] == [(b"no checksum", 7 << 20 | 0x12345)]
            socks[1].sendto(b"x" * 3000, (RELAY[4], PORT))
            assert [each.mark for each in listener.read(1)] == [0x12345]
        sources = [(each.source, each.source_port, each.payload) for each in siem.read(2)]
        assert sources == [(EXPORTERS[4][0], 2000, b"no checksum"), (OUT[4], 4000, b"no checksum")]


def test_trains_are_copied_whole_and_cut_where_they_leave() -> None:
    """A train that an exporter sends by UDP_SEGMENT is copied as one piece, and each collector gets every datagram."""
    with OffloadSite(checksum_offload=True) as site, Capture(site.siem, "eth", partial=True) as wire:
        site.relay.run("ip", "link", "set", "dev", "out", "gso_max_segs", "1")  # as of a card that can't cut them
        relayed = site.copy(1, 9001, source=packed(OUT[4]), source_port=4000)
        site.table.replace(site.plan([site.copy(0, 9000), relayed]))
        with exporters(site) as socks, Listening(site.relay, RELAY[4], PORT) as listener:
            socks[0].setsockopt(socket.IPPROTO_UDP, 103, 100)
            sent = [bytes([number]) * 100 for number in range(16)]
            socks[0].sendto(b"".join(sent), (RELAY[4], PORT))
            assert [each.payload for each in listener.read(16)] == sent
        came = wire.read(32)
        assert [each.payload for each in came if each.port == 9000] == sent
        assert [each.payload for each in came if each.port == 9001] == sent


@pytest.mark.parametrize("version", [4, 6])
def test_an_interface_that_puts_datagrams_together_loses_and_doubles_none(version: int) -> None:
    """The kernel cuts such lists anew where they leave; the first datagram of each alone has the copy's hop limit."""
    with OffloadSite(checksum_offload=True) as site, Capture(site.siem, "eth", partial=True) as wire:
        for host, features in (
            (site.relay, "in gro on rx-gro-list on"),
            (site.exporter, "eth tx-udp-segmentation off"),
        ):
            set_features(host, *features.split())
        set_features(site.relay, "out", "tx-udp-segmentation", "off", "tx-gso-list", "off")
        relayed = site.copy(1, 9001, version, source=packed(OUT[version]), source_port=4000)
        site.table.replace(site.plan([site.copy(0, 9000, version, hop_limit=9), relayed], version=version))
        with exporters(site, version) as socks, Listening(site.relay, RELAY[version], PORT) as listener:
            socks[0].setsockopt(socket.IPPROTO_UDP, 103, 100)  # UDP_SEGMENT: they come close together
            sent = [bytes([number]) * 100 for number in range(16)]
            socks[0].sendto(b"".join(sent), (RELAY[version], PORT))
            assert [(each.payload, each.mark >> 20) for each in listener.read(16)] == [(payload, 7) for payload in sent]
        came = wire.read(32)
        for port, source in ((9000, EXPORTERS[version][0]), (9001, OUT[version])):
            some = [each for each in came if each.port == port]
            assert [(each.source, each.payload) for each in some] == [(source, payload) for payload in sent]
        assert next(each for each in came if each.port == 9000).header.hop_limit == 9
        wire.assert_quiet()


def set_features(host: Host, *arguments: str) -> None:
    """Set features of an interface, as a card or its driver has them."""
    if shutil.which("ethtool", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip("ethtool is not installed")
    try:
        host.run("ethtool", "-K", *arguments)
    except AssertionError as error:
        pytest.skip(f"this kernel has no such feature: {error}")


def test_plans_replace_each_other_at_one_moment_and_counters_go_on() -> None:
    """Under traffic, each datagram is copied by the old rules or the new ones, never by both or none."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem, exporters(site) as socks:
        site.table.replace(site.plan([site.copy(0, 9000)], 1))
        with Listening(site.relay, RELAY[4], PORT) as listener:
            for number in range(100):
                socks[number % 4].sendto(str(number).encode(), (RELAY[4], PORT))
                if number % 5 == 0:
                    site.table.replace(site.plan([site.copy(0, 9000)], number // 5 + 1))
            up = listener.read(100)
            assert [each.payload for each in up] == [str(number).encode() for number in range(100)]
            assert [each.mark >> 20 for each in up] == [max(0, number - 1) // 5 + 1 for number in range(100)]
        assert [each.payload for each in siem.read(100)] == [str(number).encode() for number in range(100)]
        siem.assert_quiet()
        assert {packets for packets, _ in site.table.counters().values()} == {100}


def test_counters_go_on_where_the_table_is_made_anew() -> None:
    """Other interfaces, or none, make it anew: nothing that was counted before is lost, though nobody has read it."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem, exporters(site) as socks:
        plan = site.plan([site.copy(0, 9000)])
        for interfaces in (("in",), ("in", "out"), ("in",)):
            site.table.replace(msgspec.structs.replace(plan, interfaces=interfaces))
            for sock in socks:
                sock.sendto(b"copied", (RELAY[4], PORT))
            siem.read(len(socks))
            site.table.replace(NO_COPIES)
            site.table.replace(NO_COPIES)
        assert {packets for packets, _ in site.table.counters().values()} == {3 * len(socks)}
        site.table.replace(site.plan([site.copy(1, 9001)]))
        assert set(site.table.counters()) == {"c101", "c4"}


def test_counter_of_an_earlier_table_is_told_until_it_is_deleted() -> None:
    """A collector that leaves the rules for a while has its next copies counted from 0 again, and none twice."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem, exporters(site) as socks:
        both = site.plan([site.copy(0, 9000), site.copy(1, 9001)])
        for interfaces in (("in", "out"), ("in",)):
            site.table.replace(msgspec.structs.replace(both, interfaces=interfaces))
            for sock in socks:
                sock.sendto(b"copied", (RELAY[4], PORT))
            siem.read(len(socks))
        assert site.table.counters()["c100"][0] == 2 * len(socks)
        alone = site.plan([site.copy(1, 9001)])
        for _ in range(2):
            site.table.replace(alone)
            time.sleep(SETTLED_SECONDS)
        assert set(site.table.counters()) == {"c101", "c4"}
        site.table.replace(both)
        assert site.table.counters()["c100"][0] == 0


def test_map_leads_to_its_copies_from_the_first_moment_to_the_last() -> None:
    """While plans follow one another under traffic, whoever has prefixes gets what those without have got."""
    with OffloadSite() as site, exporters(site) as socks, ExitStack() as opened:
        every, some = (opened.enter_context(Collector(site.siem, SIEMS[4][place], 9000 + place)) for place in (0, 1))
        copies = [site.copy(0, 9000), site.copy(1, 9001, prefixes=(prefix(f"{EXPORTERS[4][0]}/32"),))]
        site.table.replace(site.plan(copies, 1))
        stopping = threading.Event()

        def export() -> None:
            for number in itertools.count(1):
                socks[0].sendto(b"", (RELAY[4], PORT))
                # A plain user's buffer holds some thousand: nobody reads for long while the machine is busy.
                while number > came["every"] + 1000 and not stopping.wait(0.001):
                    pass
                if stopping.is_set():
                    return

        came: Counter[str] = Counter()
        exporting = threading.Thread(target=export)
        exporting.start()
        opened.callback(exporting.join)
        opened.callback(stopping.set)
        for number in range(400):
            site.table.replace(site.plan(copies, number % 100 + 1))
            came.update(every=len(list(every.take())), some=len(list(some.take())))
        stopping.set()
        exporting.join()
        came.update(every=len(list(every.take())), some=len(list(some.take())))
        assert came["every"] == came["some"] > 400
        assert {packets for packets, _ in site.table.counters().values()} == {came["every"]}


@pytest.mark.parametrize("version", [4, 6])
def test_what_nobody_else_sees_ends_in_the_kernel(version: int) -> None:
    """A stream that is unseen goes up no more, but for what the kernel does not copy; its copies are as ever."""
    some = f"{EXPORTERS[version][0]}/{32 if version == 4 else 128}"
    relay = {"source": packed(OUT[version]), "source_port": 4000}
    with OffloadSite() as site, Capture(site.siem, "eth") as wire, exporters(site, version) as socks:
        few = [site.copy(0, 9020, version, counter=220, prefixes=(prefix(some),))]
        many = [site.copy(place % 5, 9000 + place, version, counter=200 + place) for place in range(10)]
        many += [site.copy(1, 9021, version, counter=221, sample=3), site.copy(2, 9022, version, counter=222, **relay)]
        for generation, copies in enumerate((few, few + many, many), 1):
            plan = site.plan(copies, generation, version)
            streams = tuple(msgspec.structs.replace(each, unseen=True) for each in plan.streams)
            site.table.replace(msgspec.structs.replace(plan, streams=streams))
            with Listening(site.relay, RELAY[version], PORT) as listener:
                for payload in (b"one", bytes(3000), b"two", b"of another"):
                    socks[payload == b"of another"].sendto(payload, (RELAY[version], PORT))
                ours = {each.port for each in copies if each.source}
                wanted = Counter(
                    (
                        OUT[version] if copy.port in ours else EXPORTERS[version][payload == b"of another"],
                        copy.port,
                        payload,
                    )
                    for copy in copies
                    if copy.sample == 1
                    for payload in (b"one", b"two", b"of another")
                    if not copy.prefixes or payload != b"of another"
                )
                came = wire.read(wanted.total() + sum(copy.sample > 1 for copy in copies))
                assert Counter((each.source, each.port, each.payload) for each in came if each.port != 9021) == wanted
                (up,) = listener.read(1)
                assert (len(up.payload), up.mark) == (3000, 0)
                listener.assert_quiet(0.1)
            counted = {name: packets for name, (packets, _) in site.table.counters().items()}
            assert counted[f"c{version}"] == 3 * generation
        wire.assert_quiet()


@needs_nft
def test_static_recipe_of_the_readme_copies() -> None:
    """The table that README shows makes a copy of each datagram, by the names and addresses of a site."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9995) as siem, exporters(site) as socks:
        names = {"02:00:00:00:02:01": site.out.link_address, "02:00:00:00:02:02": site.siem_end.link_address}
        recipe = block("services/offload/README.md", "static")
        for shown, here in {**names, "eth0": "in", "eth1": "out", "10.2.0.11": SIEMS[4][0], "2055": str(PORT)}.items():
            assert shown in recipe
            recipe = recipe.replace(shown, here)
        site.relay.run("nft", "-f", "-", text=recipe)
        for number in range(4):
            socks[number].sendto(b"static", (RELAY[4], PORT))
        assert [each.source for each in siem.read(4)] == EXPORTERS[4]


@needs_nft
def test_rules_go_with_their_connection_and_outlast_a_flush_of_others() -> None:
    """The table belongs to its connection: `nft flush ruleset` leaves it there, and the connection's end removes it."""
    with OffloadSite() as site, Collector(site.siem, SIEMS[4][0], 9000) as siem, exporters(site) as socks:
        site.table.replace(site.plan([site.copy(0, 9000)]))
        site.relay.run("nft", "flush", "ruleset")
        with Listening(site.relay, RELAY[4], PORT) as listener:
            socks[0].sendto(b"one", (RELAY[4], PORT))
            assert listener.read(1)[0].mark
            assert siem.read(1)
            assert "siem-0" in site.relay.run("nft", "list", "ruleset")
            site.connection.close()
            socks[0].sendto(b"two", (RELAY[4], PORT))
            assert listener.read(1)[0].mark == 0
            assert not site.relay.run("nft", "list", "ruleset")
        siem.assert_quiet()


def test_interface_that_goes_takes_its_chain_along_and_the_next_plan_works() -> None:
    """After an interface was removed and made again, the next plan makes the table anew."""
    with OffloadSite() as site, exporters(site) as socks, Collector(site.siem, SIEMS[4][0], 9000) as siem:
        plan = site.plan([site.copy(0, 9000)])
        site.table.replace(plan)
        site.relay.run("ip", "link", "add", "gone", "type", "veth", "peer", "name", "too")
        site.table.replace(msgspec.structs.replace(plan, interfaces=("in", "gone")))
        site.relay.run("ip", "link", "del", "gone")
        site.relay.run("ip", "link", "add", "gone", "type", "veth", "peer", "name", "too")
        site.table.replace(msgspec.structs.replace(plan, interfaces=("in", "gone")))
        with Listening(site.relay, RELAY[4], PORT) as listener:
            socks[0].sendto(b"one", (RELAY[4], PORT))
            assert listener.read(1)[0].mark >> 20 == 7
        assert siem.read(1)


def test_refused_change_is_named_and_leaves_the_rules_as_they_were() -> None:
    """OSError names the first change that the kernel refuses; the plan before goes on."""
    with OffloadSite() as site, exporters(site) as socks, Collector(site.siem, SIEMS[4][0], 9000) as siem:
        plan = site.plan([site.copy(0, 9000)])
        site.table.replace(plan)
        unfit = msgspec.structs.replace(plan, interfaces=("a-name-too-long-for-any",))
        with pytest.raises(OSError, match="interface a-name-too-long-for-any: "):
            site.table.replace(unfit)
        socks[0].sendto(b"one", (RELAY[4], PORT))
        assert siem.read(1)
        with site.relay.entered():
            second = Nftables()
        with pytest.raises(OSError, match="table: Operation not permitted"):
            Table(second, Marks(MASK, 20), Sources()).replace(plan)
        second.close()
