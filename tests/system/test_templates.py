"""Collectors of flow streams join between templates, and have them all the same."""

import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any, Self

import pytest

from shared.net.sockets import enlarge_receive_buffer, kernel_drops
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.services.ingest.flows import exported
from tests.services.ingest.flows.test_template_reader import (
    Kept,
    a_template,
    an_options_template,
    datagram,
    known_of,
    read,
)
from tests.stack import PATIENT, Stack, ask_json, sign_up

PORTS = {9: 2055, 10: 4739}
STREAMS = {9: "netflow", 10: "ipfix"}
SETTINGS = PATIENT + "".join(
    f'[[stream]]\nname = "{name}"\nprotocol = "{name}"\nlisten = ["udp://127.0.0.1:{PORTS[version]}"]\n'
    for version, name in STREAMS.items()
)
FLOW = exported.a_set(256, bytes(range(8)))
Source = tuple[str, int]
MOST_ON_THEIR_WAY = 200
"""Datagrams, each perhaps a message: more would find no room on the bus while a sender of copies gets no time."""


class Exporter:
    """A socket with an address and port of its own that sends flows; `sent` has what it has sent, `told` its sets."""

    def __init__(self, version: int, address: str, number: int = 1000) -> None:
        self.version, self.number = version, number
        self.domain = version * 100 + int(address[-1])
        self.sent: list[bytes] = []
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((address, 0))
        self.sock.connect(("127.0.0.1", PORTS[version]))
        self.source: Source = self.sock.getsockname()
        self.template = a_template(version, 256, [4, 4])
        self.options = an_options_template(version, 300, [4, 1])
        self.data = exported.a_set(300, bytes([0, 0, 0, 7, len(address)]))

    def send(self, *sets: bytes, records: int = 1) -> None:
        """Send a datagram with these sets, of which so many are data records."""
        self.sent.append(datagram(self.version, self.number, *sets, count=len(sets), domain=self.domain))
        self.number += 1 if self.version == 9 else records
        self.sock.send(self.sent[-1])

    def tell(self) -> None:
        """Send templates, and options data in a datagram with flows."""
        self.send(self.template, records=0)
        self.send(self.options, self.data, FLOW, records=2)

    def flow(self, count: int = 1) -> None:
        """Send datagrams with flows."""
        for _ in range(count):
            self.send(FLOW)

    @property
    def known(self) -> object:
        """Return what a collector knows of it that has had all."""
        sets = ((int.from_bytes(each[:2]), each[4:]) for each in (self.template, self.options, self.data))
        return known_of(self.version, [Kept(self.version, 0, 0, 0, list(sets))])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Collector:
    """A collector's socket; datagrams that came to it, in order, by source."""

    def __init__(self, name: str, streams: Sequence[str] = (*STREAMS.values(),), **fields: Any) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        enlarge_receive_buffer(self.sock, 16 << 20)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.settimeout(60)
        self.name = name
        self.request = {"name": name, "streams": streams, "port": self.sock.getsockname()[1]} | fields

    def join(self) -> Self:
        """Sign up."""
        sign_up(self.request)
        return self

    def take(self, last: Sequence[bytes]) -> dict[Source, list[bytes]]:
        """Take what comes, by source, until each of these datagrams has come."""
        came: defaultdict[Source, list[bytes]] = defaultdict(list)
        left = list(last)
        while left:
            payload, source = self.sock.recvfrom(65_535)
            came[source].append(payload)
            if payload in left:
                left.remove(payload)
        return came

    def waiting(self) -> list[bytes]:
        """Return what is there."""
        came = []
        self.sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                came.append(self.sock.recv(65_535))
        self.sock.settimeout(60)
        return came

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def start(stack: Stack, ingest: int = 1) -> None:
    """Start everything, with these streams."""
    stack.configure(SETTINGS)
    stack.start_all(ingest)
    stack.start("transmitter")


def end_of(kept: Sequence[Kept], version: int) -> int:
    """Check that numbers of datagrams with templates have no gap; return the number due behind them."""
    for one, other in pairwise(kept):
        assert other.number == one.number + takes(one, version)
    return kept[-1].number + takes(kept[-1], version)


def takes(kept: Kept, version: int) -> int:
    """Return the quantity of numbers that a datagram takes."""
    return 1 if version == 9 else sum(kind >= 256 for kind, _ in kept.sets)


@pytest.fixture
def exporters() -> Iterator[list[Exporter]]:
    """Exporters of both versions, two each."""
    with ExitStack() as opened:
        yield [
            opened.enter_context(Exporter(version, f"127.0.{version}.{number}"))
            for version in PORTS
            for number in (1, 2)
        ]


@pytest.mark.parametrize("source", ["relay", "original"])
def test_a_collector_that_joins_gets_templates_first(
    open_stack: OpenStack, exporters: list[Exporter], source: str
) -> None:
    """Before its first copy of an exporter a collector gets templates and options data, and numbers have no gap."""
    start(open_stack, ingest=2)
    with BusEnds(open_stack.bus) as bus, Collector("early", source=source) as early:
        early.join()
        for exporter in exporters:
            exporter.tell()
            exporter.flow(5)
        early.take([exporter.sent[-1] for exporter in exporters])
        with Collector("siem", source=source) as siem:
            siem.join()
            joined = {exporter.source: len(exporter.sent) for exporter in exporters}
            for exporter in exporters:
                exporter.flow(3)
            came = siem.take([exporter.sent[-1] for exporter in exporters])
            live = early.take([exporter.sent[-1] for exporter in exporters])
            payloads = [payload for each in came.values() for payload in each]
            for exporter in exporters:
                copies = exporter.sent[joined[exporter.source] :]
                own = came[exporter.source] if source == "original" else payloads
                kept = [read(payload) for payload in own[: own.index(copies[0])] if payload not in exporter.sent]
                if source == "relay":
                    kept = [each for each in kept if each.domain == exporter.domain]
                else:
                    assert own[len(kept) :] == copies
                    assert live[exporter.source] == copies
                    assert end_of(kept, exporter.version) == read(copies[0]).number
                assert known_of(exporter.version, kept) == exporter.known
        count = sum(map(len, came.values())) - 3 * len(exporters)
        assert count == 2 * len(exporters)

        def counted(accounts: dict[str, dict[str, int]]) -> bool:
            account = accounts.get("collector/siem", {})
            return account.get("sent") == 3 * len(exporters) == account.get("offered")

        service = "forwarder.1" if source == "relay" else "transmitter.1"
        account = accounts_when(bus, service, counted)["collector/siem"]
        assert account["templates"] == account["templates_sent"] == count
        assert "templates_sent" not in accounts_when(bus, service, lambda _: True)["collector/early"]
        open_stack[service.partition(".")[0]].stop()
        open_stack.start(service.partition(".")[0])
        with Collector("later", source=source) as later:
            later.join()
            for exporter in exporters:
                exporter.flow()
            got = later.take([exporter.sent[-1] for exporter in exporters])
            assert all(knows([each for some in got.values() for each in some], exporter) for exporter in exporters)
            live = early.take([exporter.sent[-1] for exporter in exporters])
            assert sum(map(len, live.values())) == len(exporters)  # and no templates: it had them all


def knows(came: Sequence[bytes], exporter: Exporter) -> bool:
    """Return whether a collector knows from these datagrams all that an exporter has told last."""
    found = [read(payload) for payload in came]
    own = [each for each in found if (each.version, each.domain) == (exporter.version, exporter.domain)]
    told = [each._replace(sets=[one for one in each.sets if one[0] != 256]) for each in own]
    return known_of(exporter.version, told) == exporter.known


def test_shares_filters_and_orders_of_an_admin(stack: Stack, exporters: list[Exporter]) -> None:
    """Every member of a group, and who samples, gets all templates; filters hold for them; the withheld get none."""
    stack.configure(SETTINGS)
    stack.start_all()
    with BusEnds(stack.bus) as bus, ExitStack() as opened:

        def join(name: str, **fields: Any) -> Collector:
            return opened.enter_context(Collector(name, **fields)).join()

        def told(accounts: dict[str, dict[str, int]]) -> bool:
            return all(accounts[f"stream/{name}"]["received"] == 4 for name in STREAMS.values())

        for exporter in exporters:
            exporter.tell()
        accounts_when(bus, "ingest.1", told)
        filtered, sampling = join("filtered", **{"from": ["127.0.9.1/32"]}), join("sampling", sample=100)
        members = [join(f"member{number}", group="shared") for number in range(3)]
        withheld = join("withheld")
        assert ask_json({"op": "withhold", "name": "withheld"})["ok"]
        before = withheld.waiting()
        for exporter in exporters:
            exporter.flow()
        members.append(join("member3", group="shared"))
        for exporter in exporters:
            exporter.template = a_template(exporter.version, 256, [2, 2, 4])
            exporter.send(exporter.template, records=0)
            exporter.flow(100)
        count = sum(len(exporter.sent[2:]) for exporter in exporters)  # before that nobody wanted any

        def routed(accounts: dict[str, dict[str, int]]) -> bool:
            came = [each["baseline"] + each["taken"] for name, each in accounts.items() if name.startswith("origin/")]
            waits = [each.get("held", 0) + each.get("templates_held", 0) for each in accounts.values()]
            return sum(came) == count and not any(waits)

        accounts_when(bus, "forwarder.1", routed)
        came = {each.name: each.waiting() for each in (filtered, sampling, *members)}
        for exporter in exporters:
            assert knows(came["filtered"], exporter) == (exporter.source[0] == "127.0.9.1")
            for collector in (sampling, *members):
                assert knows(came[collector.name], exporter)
            flows = [payload for payload in exporter.sent if exported.a_set(256, bytes(range(8))) == payload[-12:]]
            taken = [[payload for payload in came[member.name] if payload in flows] for member in members]
            assert sorted(payload for each in taken for payload in each) == sorted(flows[1:])
            for member, own in zip(members, taken, strict=True):
                others = [read(each) for each in came[member.name]]
                others = [each for each in others if each.domain == exporter.domain]
                numbers = [each.number for each in others]
                assert numbers == sorted(numbers)
                if not own and member is members[-1]:
                    end_of(others, exporter.version)
        assert not withheld.waiting()
        assert len(before) == 2 * len(exporters)
        assert ask_json({"op": "release", "name": "withheld"})["ok"]
        for exporter in exporters:
            exporter.flow()
        got = withheld.take([exporter.sent[-1] for exporter in exporters])
        assert all(knows([each for some in got.values() for each in some], exporter) for exporter in exporters)
        code, said, _ = stack.run("ledger")
        assert code == 0, said


@pytest.mark.parametrize("source", ["relay", "original"])
@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.soak)])
def test_joining_under_load(open_stack: OpenStack, source: str, count: int) -> None:
    """Collectors that join while datagrams flow miss no template, and others lose nothing."""
    start(open_stack, ingest=2)
    with ExitStack() as opened:
        many = [
            opened.enter_context(Exporter(version, f"127.{version}.{number // 200}.{number % 200 + 1}"))
            for version in PORTS
            for number in range(count)
        ]
        for number, exporter in enumerate(many):
            exporter.domain = number
        steady = opened.enter_context(Collector("steady", source=source)).join()
        for exporter in many:
            exporter.tell()
        stop = threading.Event()

        before: defaultdict[Source, list[bytes]] = defaultdict(list)

        def on_their_way() -> int:
            return sum(len(exporter.sent) for exporter in many) - sum(map(len, before.values()))

        def flood() -> None:
            while not stop.is_set():
                for exporter in many:
                    exporter.flow()
                    time.sleep(0.001)
                while select.select([steady.sock], [], [], 0)[0] or on_their_way() > MOST_ON_THEIR_WAY:
                    payload, source = steady.sock.recvfrom(65_535)
                    before[source].append(payload)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            for number in range(5):
                joined = opened.enter_context(Collector(f"siem{number}", source=source))
                joined.join()
                known: dict[int, dict[int, bytes]] = defaultdict(dict)
                numbers, due = dict[int, int](), dict[int, int]()
                while len(numbers) < len(many):
                    kept = read(joined.sock.recv(65_535))
                    for kind, content in kept.sets:
                        if kind < 256:
                            known[kept.domain][int.from_bytes(content[:2])] = content
                        else:
                            assert kind in known[kept.domain] or kernel_drops(joined.sock)
                    if kept.sets[-1][0] == 256:
                        numbers.setdefault(kept.domain, kept.number)
                    else:
                        due[kept.domain] = kept.number + takes(kept, kept.version)
                assert kernel_drops(joined.sock) == 0, "this host is too busy"
                assert numbers == due
                assert all({256, 300} <= known[number].keys() for number in range(len(many)))
        finally:
            stop.set()
            flooding.join()
        left = [exporter.sent[-1] for exporter in many]
        after = steady.take([payload for payload in left if not any(payload in each for each in before.values())])
        came = {each: before[each] + after.get(each, []) for each in {*before, *after}}
        if source == "original":
            assert {exporter.source: exporter.sent for exporter in many} == came
        else:
            assert sum(map(len, came.values())) == sum(len(exporter.sent) for exporter in many)
