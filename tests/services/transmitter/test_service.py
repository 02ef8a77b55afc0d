"""The transmitter as a process on the bus, its raw sockets real, between a played gateway and a played worker."""

import ctypes.util
import errno
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest

from shared.bus.messages import (
    REGISTRY_TOPIC,
    TRANSMIT_TOPIC,
    VERSION,
    Part,
    TransmitReply,
    TransmitRequest,
    datagrams_topic,
    serve_topic,
)
from shared.client import Client
from shared.datagrams.limits import MAX_DATAGRAM
from shared.fanout.sending.next_hops import DISCARD_PORT
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from tests.builders import (
    BusEnds,
    PlayedGateway,
    PlayedWorker,
    accounts_when,
    flow,
    freeze,
    make_client,
    take,
    wait_unwanted,
    wait_wanted,
)
from tests.capture import ETH_P_IP, ETH_P_IPV6, Arrival, Capture, Collector, Datagram, assert_complete, parse_ipv4
from tests.deploy import confined
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.services.transmitter import sealed
from tests.services.transmitter.site import SIEM4, SIEM6, Copied, ask_quickly, numbered, payloads
from tests.services.transmitter.test_opener import BROUGHT_ALONG, STDLIB, THIRD_PARTY
from tests.stack import CHECKOUT, DRAIN_SECONDS, Running, wait_until

TOPIC = datagrams_topic("messages")
STREAM = '[[stream]]\nname = "messages"\nlisten = ["udp://[::]:6667"]\n'
ONE, TWO = "192.0.2.1", "198.51.100.1"
ONE6, TWO6 = "2001:db8::1", "2001:db8::2"
REFUSED = "refused by the policy"
ETH_P_ARP = 0x0806


class Bus:
    """A relay with broker and transmitter, the test's own ends of their bus, and a collectors' host."""

    def __init__(self, open_stack: OpenStack, opened: ExitStack, settings: str = "") -> None:
        self.stack = open_stack
        self.relay, self.siem = opened.enter_context(Host()), opened.enter_context(Host())
        self.up = End(self.relay, "up", "10.2.0.1/24 fd00:2::1/64")
        self.eth = End(self.siem, "eth", f"{SIEM4}/24 {SIEM6}/64")
        opened.enter_context(veth(self.up, self.eth))
        ask_quickly(self.relay, "up")
        open_stack.configure(STREAM + settings)
        with self.relay.entered():
            open_stack.start("broker")
            self.transmitter: Running = open_stack.start("transmitter")
        self.ends = opened.enter_context(BusEnds(open_stack.bus))
        self.gateway, self.worker = PlayedGateway(self.ends, "original"), PlayedWorker(self.ends)
        self.wire = opened.enter_context(Copied(self.siem, "eth"))
        self._revision = 0

    def serve(self, *clients: Client) -> None:
        """Announce a registry, and wait until copies flow."""
        self._revision += 1
        flow(self.gateway, self.worker, self._revision, *clients)

    def change(self, joined: Sequence[Client] = (), left: Sequence[str] = ()) -> None:
        """Announce a change, and wait until it is served."""
        self._revision += 1
        self.gateway.change(self._revision, joined, left)
        self.gateway.wait_served(self._revision, self.worker.report)

    def accounts_when(self, condition: Callable[[Accounts], object]) -> Accounts:
        """The transmitter's accounts, as soon as they meet a condition; they must add up."""
        return accounts_when(self.ends, "transmitter.1", condition)

    def account_when(self, name: str, **counters: int) -> dict[str, int]:
        """A collector's account, as soon as it has these counters."""
        name = f"collector/{name}"
        found = self.accounts_when(lambda accounts: accounts.get(name, {}).items() >= counters.items())
        return found[name]

    def until_known(self, *addresses: str) -> None:
        """Let the transmitter know next hops for ever."""
        for address in addresses:
            self.relay.neighbour(address, self.eth.link_address, "up")


def original(name: str, address: str = SIEM4, port: int = 9514, **fields: Any) -> Client:
    """A collector of copies with the exporter's address."""
    return make_client(name, port, address=address, source="original", **fields)


Start = Callable[..., Bus]


@pytest.fixture
def start(open_stack: OpenStack, opened: ExitStack) -> Start:
    """Starts a transmitter with these settings on a bus; closed at the end of the test."""
    return lambda settings="": Bus(open_stack, opened, settings)


def of_port(found: Sequence[Datagram], port: int) -> list[Datagram]:
    """Those to a collector's port."""
    return [datagram for datagram in found if datagram.port == port]


REFUSING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.refusing import refuse
refuse(sys.argv[2])
os.execv(sys.executable, [sys.executable, "-m", "services.transmitter"])
"""
"""Starts the transmitter where the kernel refuses a call."""


@pytest.mark.parametrize("error", ["EAFNOSUPPORT", "EACCES", "EPERM"])
def test_without_netlink_copies_leave_by_raw_ip(open_stack: OpenStack, opened: ExitStack, error: str) -> None:
    """The transmitter says once that netlink sockets are refused, stays up, and copies leave, cut by the MTU."""
    bus = Bus(open_stack, opened, '[transmitter]\ninterfaces = ["up"]\n')
    bus.transmitter.stop()
    with bus.relay.entered(), open_stack.opening():
        command = [*open_stack.interpreter, "-c", REFUSING, str(CHECKOUT), f"socket:0:16={error}"]
        bus.transmitter = open_stack.spawn("transmitter", command)
    wait_until(lambda: bus.transmitter.events("ready"), lambda: bus.transmitter.text)
    bus.serve(original("four"), original("six", SIEM6), original("nowhere", "192.168.77.1"))
    sent = [b"short", b"s" * 1400, b"l" * 3000]
    bus.worker.publish(sent, (ONE,))
    bus.worker.publish(sent, (ONE6,))
    found = bus.wire.read(6)
    assert sorted((each.source, each.payload) for each in found) == sorted(
        (of, each) for of in (ONE, ONE6) for each in sent
    )
    bus.account_when("nowhere", dropped_no_route=6)
    bus.account_when("four", sent=3, dropped_other_family=3)
    (said,) = [each for each in bus.transmitter.log if "routes and next hops can't be asked for" in each["event"]]
    assert said["reason"] == os.strerror(getattr(errno, error))
    assert bus.transmitter.process.poll() is None
    asker, replies = bus.ends.publisher("fanwire.1"), bus.ends.subscriber("reply/fanwire.1/")
    wait_wanted(asker, TRANSMIT_TOPIC)
    wait_wanted(asker, "reply/fanwire.1/")
    asker.publish(TRANSMIT_TOPIC, TransmitRequest(7, "reply/fanwire.1/", "up", bytes(60)))
    refused = take(replies).body
    assert isinstance(refused, TransmitReply)
    assert (refused.error, "AF_NETLINK is refused" in refused.message) == ("unavailable", True)


def test_each_collector_gets_its_rows_from_their_sources(start: Start) -> None:
    """Everything, one network, one in three, IPv4 and IPv6: each gets exactly its rows, as if from the exporters."""
    bus = start()
    bus.serve(
        original("all", port=9600),
        original("all6", SIEM6, port=9601),
        original("some", port=9602, prefixes=("198.51.100.0/24",)),
        original("third", port=9603, sample=3),
        make_client("relayed", port=9604, address=SIEM4),
        original("other", port=9605, streams=("traps",)),
    )
    sources, names = (ONE, TWO, ONE6, TWO6), {9600: "all", 9601: "all6", 9602: "some"}
    sent: dict[int, dict[tuple[str, int], list[bytes]]] = {port: {} for port in names}
    for number in range(20):
        batch = [b"%d.%d" % (number, row) * (1 + row % 7) for row in range(number * 5)]
        bus.worker.publish(batch, sources)
        for row, payload in enumerate(batch):
            source = sources[row % 4]
            for port in (9601,) if ":" in source else (9600, 9602) if source == TWO else (9600,):
                sent[port].setdefault((source, 514), []).append(payload)
    counts = {port: sum(map(len, by_source.values())) for port, by_source in sent.items()}
    accounts = bus.accounts_when(lambda found: found.get("collector/third", {}).get("offered") == 950)
    third = accounts["collector/third"]
    found = bus.wire.read(sum(counts.values()) + third["sent"])
    for port, name in names.items():
        arrived = [Arrival(each.source, each.source_port, each.payload) for each in of_port(found, port)]
        assert_complete(arrived, sent[port])
        assert accounts[f"collector/{name}"]["sent"] == counts[port]
    assert accounts["collector/all"]["dropped_other_family"] == counts[9601]
    assert accounts["collector/some"]["filtered"] == 950 - counts[9602]
    assert third["sent"] == len(of_port(found, 9603)) > 100
    assert third["sent"] + third["dropped_other_family"] == 950 - third["sampled_out"]
    assert "collector/relayed" not in accounts
    assert {each.port for each in found} == {9600, 9601, 9602, 9603}


def test_copies_are_marked_as_the_collector_asked(start: Start) -> None:
    """Hop limit and DSCP are the collector's; a flow has one IPv6 label, never 0, and flows have different ones."""
    bus = start()
    bus.serve(
        original("four", port=9600, hop_limit=17, dscp=46),
        original("six", SIEM6, port=9601, hop_limit=3, dscp=8),
        original("more", SIEM6, port=9602),
    )
    for _ in range(3):
        bus.worker.publish([bytes([size % 251]) * size for size in (1, 50, 50, 1600, 7)], (ONE,))
        bus.worker.publish([b"x", b"x", bytes(1600), b"y", bytes(9000)], (ONE6, TWO6))
    found = bus.wire.read(15 + 30)
    by_port = {port: of_port(found, port) for port in (9600, 9601, 9602)}
    assert {(each.header.hop_limit, each.header.traffic_class) for each in by_port[9600]} == {(17, 46 << 2)}
    assert {(each.header.hop_limit, each.header.traffic_class) for each in by_port[9601]} == {(3, 8 << 2)}
    assert {(each.header.hop_limit, each.header.traffic_class) for each in by_port[9602]} == {(64, 0)}
    labels = {(each.source, each.port, each.header.flow_label) for each in found if each.source in (ONE6, TWO6)}
    assert len(labels) == 4, "a flow has one label"
    assert len({label for *_, label in labels}) == 4
    assert all(label for *_, label in labels)


def test_fragmented_datagrams_of_a_source_never_share_a_number(start: Start) -> None:
    """Among thousands of datagrams each that is cut has an identification of its own, to each collector."""
    bus = start()
    bus.until_known(SIEM4, SIEM6)
    bus.serve(original("four"), original("six", SIEM6), original("four too", port=9600))
    count = 0
    for _ in range(30):
        bus.worker.publish([bytes(1500), b"small", bytes(2000)] * 6, (ONE, ONE6))
        count += 18
        time.sleep(0.002)
    found = bus.wire.read(count * 3 // 2)
    for port in (9514, 9600):
        for source in (ONE, ONE6):
            cut = [each for each in of_port(found, port) if each.fragments > 1 and each.source == source]
            assert len({each.header.identification for each in cut}) == len(cut)
            assert len(cut) == 180 if (port, source) != (9600, ONE6) else not cut


def test_nothing_leaves_to_a_destination_that_is_not_allowed(start: Start) -> None:
    """Nothing goes outside `destinations`, whatever the registry says; all of it is counted, and one line tells."""
    bus = start('[transmitter]\ndestinations = ["10.2.0.2/32"]\n')
    bus.serve(
        original("allowed"), original("outside", "10.2.0.3"), original("six", SIEM6), original("far", "192.0.2.9")
    )
    for _ in range(10):
        bus.worker.publish(numbered(0, 10), (ONE,))
    assert {each.header.destination for each in bus.wire.read(100)} == {SIEM4}
    bus.wire.assert_quiet()
    accounts = bus.accounts_when(lambda found: found["collector/far"].get("dropped_destination_refused") == 100)
    for name in ("outside", "six", "far"):
        assert accounts[f"collector/{name}"]["dropped_destination_refused"] == 100
        assert "sent" not in accounts[f"collector/{name}"]
    assert accounts["collector/allowed"]["sent"] == 100
    assert accounts["transmitter"]["dropped_destination_refused"] == 300
    (told,) = bus.transmitter.events(REFUSED)
    assert (told["cause"], told["level"]) == ("dropped_destination_refused", "warning")
    assert told["collector"] in ("outside", "six", "far")


def test_many_are_never_sent_to_at_once(start: Start) -> None:
    """Groups, broadcasts and nobody's addresses get nothing, though the settings allow all there are; it is told."""
    bus = start('[transmitter]\ndestinations = ["0.0.0.0/0", "::/0"]\n')
    bus.until_known(SIEM4, SIEM6)
    many = ("224.0.0.1", "239.1.2.3", "255.255.255.255", "0.0.0.0", "0.1.2.3", "240.0.0.1", "ff02::1", "ff0e::7", "::")
    nobodys = [original(f"nobody {address}", address) for address in many]
    bus.serve(original("one"), original("one6", SIEM6), original("directed", "10.2.0.255"), *nobodys)
    bus.worker.publish(numbered(0, 20), (ONE, ONE6))
    assert {each.header.destination for each in bus.wire.read(20)} == {SIEM4, SIEM6}
    bus.wire.assert_quiet()
    accounts = bus.accounts_when(lambda found: found["collector/nobody ::"].get("offered") == 20)
    for client in nobodys:
        assert accounts[f"collector/{client.name}"]["dropped_destination_refused"] == 20
    assert accounts["collector/directed"]["dropped_no_route"] == 20
    (told,) = bus.transmitter.events(REFUSED)
    assert told["cause"] == "dropped_destination_refused"


def test_own_address_is_an_exporters_like_any(start: Start) -> None:
    """Datagrams of this host's own programs are copied from their address, unless `sources` leaves that out."""
    bus = start()
    bus.until_known(SIEM4)
    bus.serve(original("c"))
    bus.worker.publish([b"of our own"], ("10.2.0.1",))
    (copy,) = bus.wire.read(1)
    assert (copy.source, copy.source_port, copy.payload) == ("10.2.0.1", 514, b"of our own")


def test_nothing_leaves_from_a_source_that_is_not_allowed(start: Start) -> None:
    """Sources outside `sources`, loopback ones to another host, groups, another family: counted, each by its cause."""
    bus = start('[transmitter]\nsources = ["192.0.2.0/24", "127.0.0.0/8", "224.0.0.0/4", "2001:db8::/32"]\n')
    bus.serve(original("four"), original("six", SIEM6), original("here", "10.2.0.1", port=9700))
    sources = (ONE, TWO, "127.0.0.1", "224.0.0.1", ONE6, "fd00::1")
    bus.worker.publish([source.encode() for source in sources] * 10, sources)
    assert sorted({each.payload for each in bus.wire.read(20)}) == sorted([ONE.encode(), ONE6.encode()])
    bus.wire.assert_quiet()
    four = bus.account_when("four", sent=10)
    six = bus.account_when("six", sent=10)
    here = bus.account_when("here", sent=20)  # on this host loopback is true
    assert (four["dropped_source_refused"], four["dropped_other_family"]) == (30, 20)
    assert (six["dropped_source_refused"], six["dropped_other_family"]) == (10, 40)
    assert (here["dropped_source_refused"], here["dropped_other_family"]) == (20, 20)
    assert len(bus.transmitter.events(REFUSED)) == 1


def test_no_copy_comes_back_to_our_own_listener(start: Start) -> None:
    """A registry that names our own listener, by any of this host's addresses, is not obeyed; a port beside it is."""
    bus = start()
    ours = ("10.2.0.1", "fd00:2::1", "127.0.0.1", "127.9.9.9", "::1")
    loops = [original(f"loop {address}", address, 6667) for address in (*ours, "::ffff:10.2.0.1")]
    others = [original(f"other {address}", address, 6668) for address in ours]
    bus.serve(*loops, *others)
    bus.worker.publish([b"round and round"], (ONE,))
    bus.worker.publish([b"and again"], (ONE6,))
    accounts = bus.accounts_when(lambda found: found["collector/other ::1"].get("offered") == 2)
    for address in ours:
        assert accounts[f"collector/other {address}"]["sent"] == 1
        assert accounts[f"collector/loop {address}"]["dropped_destination_refused"] == 2
    assert "sent" not in accounts["collector/loop ::ffff:10.2.0.1"]
    (told,) = bus.transmitter.events(REFUSED)
    assert (told["collector"], told["port"]) == ("loop 10.2.0.1", 6667)


def test_what_waited_on_the_bus_leaves_in_order(start: Start) -> None:
    """Copies that gathered while the transmitter stood still, more than a turn's worth, leave whole and in order."""
    bus = start()
    bus.until_known(SIEM4)
    bus.serve(original("c"))
    freeze(bus.transmitter)
    sent: list[bytes] = []
    for number in range(60):
        batch = numbered(number * 100, 100) if number % 6 else [bytes([number]) * MAX_DATAGRAM] * 2
        bus.worker.publish(batch, (ONE,))
        sent += batch
    bus.transmitter.process.send_signal(signal.SIGCONT)
    assert payloads(bus.wire.read(len(sent))) == sent
    assert bus.account_when("c", offered=len(sent))["sent"] == len(sent)


def test_no_more_leaves_than_frames_per_second(start: Start) -> None:
    """No more leave in a second than the limit and its burst, however much comes, and the rest is counted."""
    bus = start("[transmitter]\nframes_per_second = 500\n")
    bus.until_known(SIEM4)
    bus.serve(original("c"))
    began = time.monotonic()
    for _ in range(20):
        bus.worker.publish(numbered(0, 200), (ONE,))
        time.sleep(0.04)
    account = bus.accounts_when(lambda found: found["collector/c"].get("offered") == 4000)["collector/c"]
    most = 50 + 500 * (time.monotonic() - began)
    assert 300 <= account["sent"] <= most
    assert account["sent"] + account["dropped_rate_limited"] == 4000
    assert len(bus.wire.read(account["sent"])) == account["sent"]
    bus.wire.assert_quiet()
    (told,) = bus.transmitter.events(REFUSED)
    assert told["cause"] == "dropped_rate_limited"


def test_who_leaves_gets_nothing_more(start: Start) -> None:
    """Once a change is served, a collector that left gets no copy, not even a held one; one that stays gets all."""
    bus = start()
    bus.siem.run("ip", "neigh", "flush", "dev", "eth")
    bus.serve(original("stays", port=9600), original("leaves", port=9601), original("held", "10.2.0.9"))
    bus.worker.publish(numbered(0, 10), (ONE,))
    assert len(bus.wire.read(20)) == 20
    bus.change(left=["leaves", "held"])
    bus.until_known("10.2.0.9")
    bus.worker.publish(numbered(10, 10), (ONE,))
    assert {each.port for each in bus.wire.read(10)} == {9600}
    bus.wire.assert_quiet()
    accounts = bus.accounts_when(lambda found: found["collector/stays"].get("sent") == 20)
    assert not {"collector/leaves", "collector/held"} & accounts.keys()


def test_who_changes_gets_copies_as_it_is_now(start: Start) -> None:
    """A collector with another port, address, hop limit or DSCP gets every copy so from then on, none as before."""
    bus = start()
    steps: list[tuple[dict[str, Any], tuple[str, int, int, int]]] = [
        ({}, (SIEM4, 9514, 64, 0)),
        ({"hop_limit": 9}, (SIEM4, 9514, 9, 0)),
        ({"hop_limit": 9, "dscp": 10}, (SIEM4, 9514, 9, 40)),
        ({"port": 9515}, (SIEM4, 9515, 64, 0)),
        ({"address": "10.2.0.7"}, ("10.2.0.7", 9514, 64, 0)),
    ]
    bus.until_known(SIEM4, "10.2.0.7")
    bus.serve(original("c"))
    for generation, (fields, expected) in enumerate(steps):
        if generation:
            bus.change([original("c", **fields, generation=generation + 1)])
        bus.worker.publish(numbered(0, 10), (ONE,))
        found = bus.wire.read(10)
        marks = {
            (each.header.destination, each.port, each.header.hop_limit, each.header.traffic_class) for each in found
        }
        assert marks == {expected}
    bus.wire.assert_quiet()
    assert bus.account_when("c", sent=10)["expected"] == 10, "what changed has an account of its own"


def test_what_waits_shows_in_the_account(start: Start) -> None:
    """While the next hop is asked for, its rows are `held`; then they are dropped; the accounts add up throughout."""
    bus = start()
    bus.serve(original("nobody", "10.2.0.77"))
    bus.worker.publish(numbered(0, 10), (ONE,))
    bus.account_when("nobody", held=10)
    assert bus.account_when("nobody", dropped_no_neighbour=10)["held"] == 0


def envelope(kind: str, **fields: Any) -> list[Any]:
    """An envelope as msgpack has it."""
    values = {"version": VERSION, "kind": kind, "sender": "ingest.1", "boot": 1, "sequence": 0, "total": 0} | fields
    return list(values.values())


def packed(topic: str, header: list[Any], body: Any, *parts: bytes) -> list[bytes]:
    """A message as somebody might send it."""
    return [topic.encode(), msgpack.packb(header), msgpack.packb(body), *parts]


ROW = (4).to_bytes(2, "little") + (514).to_bytes(2, "little") + bytes(10) + b"\xff\xff\xc0\x00\x02\x01"
DATAGRAMS, TRANSMIT, CHANGE, SERVE = (
    envelope(kind) for kind in ("datagrams", "transmit.request", "registry.change", "serve.request")
)
BAD_CLIENT = {"name": "bad", "generation": 1, "port": 9, "streams": ["*"], "source": "original"}
GARBAGE: list[Sequence[Part]] = [
    packed(TOPIC, envelope("datagrams", version=2), ["messages", 0], ROW, b"four"),
    packed(TOPIC, envelope("telegrams"), ["messages", 0], ROW, b"four"),
    packed(TOPIC, envelope("datagrams", sender="../ingest"), ["messages", 0], ROW, b"four"),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW, b"three"),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW, b"abc"),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW[:-1], b"four"),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW * 2, b"four"),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW * 1025, b"four" * 1025),
    packed(TOPIC, DATAGRAMS, ["messages", 0], (65_535).to_bytes(2, "little") + ROW[2:], bytes(65_535)),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW),
    packed(TOPIC, DATAGRAMS, ["messages", 0], ROW, b"four", b"five"),
    packed(TOPIC, DATAGRAMS, ["traps", 0], ROW, b"four"),
    packed(TOPIC, DATAGRAMS, ["messages", "now"], ROW, b"four"),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "reply/x/", "up", "frame"]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "everybody/", "up", bytes(60)]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "reply/x/", "up", bytes(60), 0]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "reply/x/", "up", bytes(60), 1, -1.0]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "reply/x/", "up", bytes(60), 1, float("nan")]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "reply/x/", "an interface's name", bytes(60)]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1, "reply/x/", "up", bytes(70_000)]),
    packed(TRANSMIT_TOPIC, TRANSMIT, [1]),
    packed(REGISTRY_TOPIC, CHANGE, [2, [BAD_CLIENT | {"address": "siem.example"}], []]),
    packed(REGISTRY_TOPIC, CHANGE, [2, [BAD_CLIENT | {"address": SIEM4, "hop_limit": 300}], []]),
    packed(REGISTRY_TOPIC, CHANGE, [2, [BAD_CLIENT | {"address": SIEM4, "source": "forged"}], []]),
    packed(REGISTRY_TOPIC, CHANGE, [2, "everybody", []]),
    packed(serve_topic("original"), SERVE, ["one", "reply/x/", 1]),
    packed(serve_topic("original"), SERVE, [1, "", 1]),
    [TOPIC.encode()],
    [TOPIC.encode(), b"\xff" * 100, b"", ROW, b"four"],
    [REGISTRY_TOPIC.encode(), b"", b""],
    [TRANSMIT_TOPIC.encode() + b"x" * 1000, msgpack.packb(TRANSMIT), b""],
]


def strangers(capture: Capture) -> list[tuple[int, bytes]]:
    """Frames that are neither datagrams to the one collector, or asking for its link address, nor the kernel's own."""
    found = []
    for protocol, data, *_ in capture.frames():
        if protocol == ETH_P_IP:
            packet = parse_ipv4(data)
            port = int.from_bytes(packet.body[2:4])
            known = (packet.header.destination, packet.header.protocol) == (SIEM4, socket.IPPROTO_UDP)
            known &= port in (9514, DISCARD_PORT)
        else:
            known = protocol == ETH_P_ARP or (protocol == ETH_P_IPV6 and data[6] in (0, socket.IPPROTO_ICMPV6))
        found += [] if known else [(protocol, data)]
    return found


def test_garbage_is_counted_and_nothing_of_it_is_sent(start: Start, opened: ExitStack) -> None:
    """Wrong versions, types, lengths and random bytes on every topic: each is counted, and all goes on as before.

    Nothing ever leaves but UDP to the collector that the registry names.
    """
    bus = start('[transmitter]\ninterfaces = ["up"]\nethertypes = [0]\n')
    everything = opened.enter_context(Capture(bus.siem, "eth"))
    bus.until_known(SIEM4)
    bus.serve(original("c"))
    draw = random.Random(5)
    topics = (TOPIC, REGISTRY_TOPIC, TRANSMIT_TOPIC, serve_topic("original"))
    noise: list[Sequence[Part]] = [
        [topic.encode(), *(draw.randbytes(draw.randint(0, 60)) for _ in range(draw.randint(1, 5)))]
        for topic in topics * 25
    ]
    for parts in GARBAGE + noise:
        bus.worker.publisher.socket.send_multipart(parts)
    accounts = bus.accounts_when(lambda found: found["transmitter"]["bus_rejected"] >= len(GARBAGE + noise))
    assert accounts["transmitter"]["bus_rejected"] == len(GARBAGE + noise)
    assert accounts["transmitter"]["revision"] == 1
    assert not accounts["transmitter"].get("frames_sent")
    bus.wire.assert_quiet()
    bus.worker.publish(numbered(0, 5), (ONE,))
    assert payloads(bus.wire.read(5)) == numbered(0, 5)
    assert strangers(everything) == []
    assert "Traceback" not in bus.transmitter.text
    assert len(bus.transmitter.text.splitlines()) < 30, "more than a line a second"


def test_a_frame_is_sent_beside_copies(start: Start) -> None:
    """A request on the bus is answered on its own topic, while copies flow; what is counted says so."""
    bus = start('[transmitter]\ninterfaces = ["up"]\nethertypes = [0x0801]\n')
    bus.until_known(SIEM4)
    bus.serve(original("c"))
    asker, replies = bus.ends.publisher("fanwire.1"), bus.ends.subscriber("reply/fanwire.1/")
    wait_wanted(asker, TRANSMIT_TOPIC)
    wait_wanted(asker, "reply/fanwire.1/")
    frame = bytes.fromhex("020000000001 020000000002 0801") + b"payload"
    asker.publish(TRANSMIT_TOPIC, TransmitRequest(7, "reply/fanwire.1/", "up", frame, 3))
    bus.worker.publish(numbered(0, 5), (ONE,))
    assert take(replies).body == TransmitReply(7, 3)
    assert payloads(bus.wire.read(5)) == numbered(0, 5)
    asker.publish(TRANSMIT_TOPIC, TransmitRequest(8, "reply/fanwire.1/", "lo", frame))
    refused = take(replies).body
    assert isinstance(refused, TransmitReply)
    assert (refused.id, refused.sent, refused.error) == (8, 0, "not_permitted")
    service = bus.accounts_when(lambda found: found["transmitter"].get("frames_refused") == 1)["transmitter"]
    assert service["frames_sent"] == 3


def test_who_waits_for_frames_at_the_end_is_told(start: Start) -> None:
    """SIGTERM in the middle of a paced request: it is answered with how many have left."""
    bus = start('[transmitter]\ninterfaces = ["up"]\nethertypes = [0x0801]\n')
    asker, replies = bus.ends.publisher("fanwire.1"), bus.ends.subscriber("reply/fanwire.1/")
    wait_wanted(asker, TRANSMIT_TOPIC)
    wait_wanted(asker, "reply/fanwire.1/")
    frame = bytes.fromhex("020000000001 020000000002 0801")
    asker.publish(TRANSMIT_TOPIC, TransmitRequest(7, "reply/fanwire.1/", "up", frame, 1000, 0.5))
    bus.accounts_when(lambda found: found["transmitter"].get("frames_sent") == 1)
    assert bus.transmitter.stop(signal.SIGTERM) == 0
    reply = take(replies).body
    assert isinstance(reply, TransmitReply)
    assert (reply.id, reply.sent, reply.error) == (7, 1, "unavailable")


def test_a_link_that_goes_costs_its_copies_and_nothing_else(start: Start) -> None:
    """Taken down, deleted and made anew: meanwhile copies are dropped and counted, nothing spins, and then they flow.

    The sockets are those from the start: the process has no privilege to open others.
    """
    bus = start()
    bus.serve(original("c"))
    account: dict[str, int] = {}

    def dropped() -> int:
        bus.worker.publish([b"x"], (ONE,))
        account.update(bus.accounts_when(lambda _: True)["collector/c"])
        return account.get("dropped_interface_down", 0) + account.get("dropped_no_route", 0)

    def arrives() -> bool:
        bus.worker.publish([b"x"], (ONE,))
        time.sleep(0.02)
        return bool(payloads(wire.take()))

    with Copied(bus.siem, "eth") as wire:
        wait_until(arrives, "copies flow")
        bus.relay.run("ip", "link", "set", "dev", "up", "down")
        wait_until(dropped, "they are dropped")
        before = dropped()
        began, worked = time.monotonic(), bus.transmitter.cpu_seconds()
        for _ in range(40):
            bus.worker.publish([b"x"], (ONE,))
            time.sleep(0.02)
        assert bus.transmitter.cpu_seconds() - worked < (time.monotonic() - began) / 2
        assert dropped() >= before + 40
        bus.relay.run("ip", "link", "set", "dev", "up", "up")
        wait_until(arrives, "copies flow again")
    before = dropped()
    bus.relay.run("ip", "link", "del", "dev", "up")
    wait_until(lambda: dropped() > before + 5, "they are dropped again")
    with veth(bus.up, bus.eth), Copied(bus.siem, "eth") as wire:
        wait_until(arrives, "copies flow by the new one")
    assert bus.transmitter.process.poll() is None


OPENER = """
import sys
from pathlib import Path
from services.transmitter import opener
opener.PROGRAM = Path(sys.argv.pop(1))
sys.exit(opener.open_and_exec(sys.argv[1:]))
"""


def start_sealed(bus: Bus) -> Running:
    """Start a transmitter, in place of the one that runs, that may open nothing more once it is ready."""
    if ctypes.util.find_library("seccomp") is None:
        pytest.skip("libseccomp is not here")
    assert bus.transmitter.stop() == 0
    copies = bus.stack.directory / "tests" / "deploy"  # nobody may not be able to read ours
    copies.mkdir(parents=True)
    shutil.copy(confined.__file__, copies)
    program = shutil.copy(sealed.__file__, bus.stack.directory)
    with bus.relay.entered(), bus.stack.opening():
        command = [*bus.stack.interpreter, "-c", OPENER, str(program)]
        bus.transmitter = bus.stack.spawn("transmitter", command, PROGRAM=str(bus.stack.program))
    tasks = Path(f"/proc/{bus.transmitter.process.pid}/task")
    wait_until(
        lambda: all("Seccomp:\t2" in path.read_text() for path in tasks.glob("*/status")),
        f"it is sealed: {bus.transmitter.text}",
    )
    return bus.transmitter


def test_nothing_is_opened_once_it_is_ready(start: Start) -> None:
    """Sealed by seccomp it does all it is for: no file, import or socket is opened, or it would be killed.

    Copies of every kind, by every way, through changes of the network and of the registry, frames, refusals, garbage.
    """
    bus = start(
        '[transmitter]\ninterfaces = ["up"]\nethertypes = [0x0801]\nsources = ["192.0.2.0/24", "2001:db8::/32"]\n'
    )
    transmitter = start_sealed(bus)
    asker, replies = bus.ends.publisher("fanwire.1"), bus.ends.subscriber("reply/fanwire.1/")
    many = [original(f"many {port}", port=port) for port in range(9600, 9616)]
    with Collector(bus.relay, "127.0.0.1", 9514) as here, Collector(bus.relay, "::1", 9514) as here6:
        bus.serve(
            *(original(address, address) for address in (SIEM4, SIEM6, "127.0.0.1", "::1", "10.2.0.77", "10.9.0.1")),
            original("loop", "127.0.0.1", 6667),
        )
        sent = [bytes([size % 251]) * size for size in (0, 100, 100, 100, 1473, 65_507, 7)]
        bus.worker.publish(sent, (ONE,))
        bus.worker.publish(sent, (ONE6,))
        bus.worker.publish([b"refused"], ("198.51.100.1",))
        for receiver in (here, here6, bus.wire):
            expected = sent * (2 if receiver is bus.wire else 1)
            assert sorted(payloads(receiver.read(len(expected)))) == sorted(expected)
    bus.account_when("10.2.0.77", dropped_no_neighbour=7)
    bus.change(joined=many, left=["127.0.0.1", "::1", SIEM6])
    bus.worker.publish(numbered(0, 200), (ONE, "192.0.2.2"))
    assert len(bus.wire.read(200 * 17)) == 200 * 17
    wait_wanted(asker, TRANSMIT_TOPIC)
    wait_wanted(asker, "reply/fanwire.1/")
    frame = bytes.fromhex("020000000001 020000000002 0801")
    for number, interface in enumerate(("up", "lo")):
        asker.publish(TRANSMIT_TOPIC, TransmitRequest(number, "reply/fanwire.1/", interface, frame, 3))
    answers = [take(replies).body for _ in range(2)]
    assert {each.sent for each in answers if isinstance(each, TransmitReply)} == {0, 3}
    bus.siem.run("ip", "link", "set", "dev", "eth", "down")

    def dropped(accounts: Accounts) -> bool:
        bus.worker.publish([b"x"], (ONE,))
        return bool(accounts["collector/many 9600"].get("dropped_interface_down"))

    bus.accounts_when(dropped)
    bus.siem.run("ip", "link", "set", "dev", "eth", "up")
    for parts in GARBAGE:
        bus.worker.publisher.socket.send_multipart(parts)
    bus.accounts_when(lambda found: found["transmitter"]["bus_rejected"] >= len(GARBAGE))
    assert transmitter.stop() == 0
    (modules,) = transmitter.events("modules")
    own = {"services", "shared", "tests"}
    loaded = {name for name in modules["names"] if not name.startswith("_")}
    assert loaded - STDLIB - own <= THIRD_PARTY | BROUGHT_ALONG


def test_it_drains(start: Start) -> None:
    """After SIGTERM what is still published is sent; exit 0 in time, and the last accounts are logged and add up."""
    bus = start()
    bus.until_known(SIEM4)
    bus.serve(original("c"), original("nobody", "10.2.0.77"))
    bus.worker.publish([b"before"], (ONE,))
    assert payloads(bus.wire.read(1)) == [b"before"]
    bus.transmitter.process.send_signal(signal.SIGTERM)
    bus.worker.lose(3)
    bus.worker.publish([b"after"], (ONE,))
    assert payloads(bus.wire.read(1)) == [b"after"]
    assert bus.transmitter.process.wait(DRAIN_SECONDS) == 0
    (drained,) = bus.transmitter.events("drained")
    assert list(discrepancies(drained["accounts"])) == []
    account = drained["accounts"]["collector/c"]
    assert (account["sent"], account["missed"], account["expected"]) == (2, 3, 5)


def test_what_waits_for_a_next_hop_is_sent_or_counted_at_the_end(start: Start) -> None:
    """After SIGTERM what waits for a next hop's answer leaves once that has come; the rest is counted, none is held."""
    bus = start()
    bus.siem.run("ip", "link", "set", "dev", "eth", "arp", "off")
    bus.serve(original("c"), original("nobody", "10.2.0.77"))
    bus.worker.publish(numbered(0, 5), (ONE,))
    bus.account_when("c", held=5)
    bus.transmitter.process.send_signal(signal.SIGTERM)
    bus.siem.run("ip", "link", "set", "dev", "eth", "arp", "on")
    assert bus.transmitter.process.wait(DRAIN_SECONDS) == 0
    accounts = bus.transmitter.events("drained")[0]["accounts"]
    came, account = payloads(bus.wire.take()), accounts["collector/c"]
    assert came == numbered(0, 5)[: len(came)]
    assert (account["held"], account.get("sent", 0)) == (0, len(came))
    assert len(came) + account.get("dropped_no_neighbour", 0) == 5
    assert accounts["collector/nobody"].items() >= {"held": 0, "dropped_no_neighbour": 5}.items()


def test_without_sockets_nobody_is_promised_anything(start: Start, open_stack: OpenStack) -> None:
    """A transmitter without privilege subscribes to no question and no request, reports, and sends nothing."""
    bus = start()
    bus.serve(original("c"))
    assert bus.transmitter.stop() == 0
    wait_unwanted(bus.gateway.publisher, serve_topic("original"))
    with bus.relay.entered():
        without = open_stack.start_without_privilege()
    accounts = bus.accounts_when(lambda found: found["transmitter"].get("raw_sockets") == 0)
    assert not [name for name in accounts if name.startswith("collector/")]
    bus.gateway.publisher.new_subscriptions()
    for topic in (serve_topic("original"), TRANSMIT_TOPIC, TOPIC):
        assert not bus.gateway.publisher.wanted(topic)
    bus.worker.publish(numbered(0, 5), (ONE,))
    bus.wire.assert_quiet()
    assert without.stop() == 0


def test_accounts_go_by_the_names_that_the_ledger_knows(start: Start) -> None:
    """Status carries what the process may do, the origin it follows, and each collector's account."""
    bus = start()
    bus.until_known(SIEM4)
    bus.serve(original("c"))
    bus.worker.publish(numbered(0, 5), (ONE,))
    accounts = bus.accounts_when(lambda found: found["collector/c"].get("sent") == 5)
    origin = f"origin/ingest.1/{bus.worker.publisher.boot:x}/messages"
    assert accounts.keys() == {"transmitter", "collector/c", origin}
    assert accounts["collector/c"] == {"offered": 5, "expected": 5, "sent": 5, "bytes": 30}
    assert accounts["transmitter"]["capabilities"] == 0
