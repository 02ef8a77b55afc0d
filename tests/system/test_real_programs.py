"""Telemetry of programs nobody here wrote, collected by programs nobody here wrote, through fanwire."""

import json
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.builders import BusEnds, accounts_when
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.stack import PATIENT, Running, Stack, ask_json, sign_up, wait_until
from tests.system.test_fan_out import need

FLOWS = 200


def write_capture(path: Path, network: int = 9) -> None:
    """Write a pcap of UDP packets from `FLOWS` sources, for an exporter to make flows of (libpcap's file format)."""
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for number in range(FLOWS * 3):
            flow = number % FLOWS
            body = bytes(20 + flow)
            udp = struct.pack(">HHHH", 10_000 + flow, 53, 8 + len(body), 0) + body
            source, destination = bytes((10, network, 0, flow + 1)), bytes((10, 9, 1, 1))
            ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), number, 0, 64, 17, 0, source, destination)
            frame = bytes.fromhex("020000000001020000000002") + b"\x08\x00" + ip + udp
            file.write(struct.pack("<IIII", 1_700_000_000 + number // 50, number, len(frame), len(frame)) + frame)


def listens(port: int) -> bool:
    """Return whether a socket of this host has the port; one that sends to it has not (proc_net_udp(5))."""
    lines = Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") for line in lines)


def start_nfcapd(stack: Stack, port: int) -> tuple[Running, Path]:
    """A flow collector on a port, and the directory it files flows in."""
    directory = stack.directory / f"flows{port}"
    directory.mkdir()
    command = [need("nfcapd"), "-b", "127.0.0.1", "-p", str(port), "-l", str(directory), "-t", "3600"]
    running = stack.spawn(f"nfcapd{port}", command)
    wait_until(lambda: listens(port), lambda: f"nfcapd listens on {port}: {running.text}")
    return running, directory


def start_sorting_nfcapd(open_stack: OpenStack, host: Host, port: int) -> tuple[Running, Path]:
    """A flow collector on another host that files each exporter's flows in a directory of its own."""
    directory = open_stack.directory / f"flows{port}"
    directory.mkdir()
    with host.entered():
        command = [need("nfcapd"), "-p", str(port), "-M", str(directory), "-t", "3600", "-B", "4000000"]
        running = open_stack.spawn(f"nfcapd{port}", command)
        wait_until(lambda: listens(port), lambda: f"nfcapd listens on {port}: {running.text}")
    return running, directory


def flows(directory: Path) -> list[str]:
    """Return the filed flows: source, source port, packets and bytes of each."""
    command = [need("nfdump"), "-q", "-R", str(directory), "-o", "fmt:%sa %sp %pkt %byt"]
    return sorted(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def test_flows_through_fanwire_are_those_without_it(stack: Stack) -> None:
    """NetFlow v9 of `softflowd`, filed by `nfcapd`, is the same by way of fanwire as directly, at two collectors."""
    softflowd = need("softflowd")
    stack.configure(f'{PATIENT}[[stream]]\nname = "netflow"\nlisten = ["udp://127.0.0.1:2055"]\n')
    stack.start_all()
    capture = stack.directory / "traffic.pcap"
    write_capture(capture)
    collectors = [start_nfcapd(stack, port) for port in (9991, 9992, 9993)]
    for port in (9992, 9993):
        sign_up({"name": f"nfcapd{port}", "streams": ["netflow"], "port": port})
    for port in (9991, 2055):
        command = [softflowd, "-d", "-r", str(capture), "-v", "9", "-n", f"127.0.0.1:{port}"]
        exporter = stack.spawn(f"softflowd{port}", command)
        assert exporter.process.wait(60) == 0, exporter.text
    ledger = stack.operator("ledger")
    assert ledger.process.wait(60) == 0, ledger.text
    for running, _ in collectors:
        running.stop()
    directly, *relayed = [flows(directory) for _, directory in collectors]
    assert len(directly) == FLOWS
    assert relayed == [directly, directly]


class Loser(threading.Thread):
    """A network that loses the datagrams of given numbers, on the way from one port of loopback to another."""

    def __init__(self, port: int, to: int, lost: set[int]) -> None:
        super().__init__()
        self.passed: list[bytes] = []
        self.dropped: list[bytes] = []
        self._to, self._lost = to, lost
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", port))

    def run(self) -> None:
        """Pass on until an empty datagram comes."""
        with self._socket:
            while datagram := self._socket.recv(65535):
                lost = len(self.passed) + len(self.dropped) in self._lost
                (self.dropped if lost else self.passed).append(datagram)
                if not lost:
                    self._socket.sendto(datagram, ("127.0.0.1", self._to))

    def stop(self) -> None:
        """End, once all that was sent before has been passed on."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self._socket.getsockname())
        self.join()


@pytest.mark.parametrize(("version", "unit"), [(5, "flows"), (9, "datagrams"), (10, "records")])
def test_loss_before_fanwire_is_pinned_upstream(stack: Stack, version: int, unit: str) -> None:
    """Of a real exporter whose third datagram is lost on its way `fanwire ledger` tells: upstream, how much of what."""
    softflowd = need("softflowd")
    protocol = "ipfix" if version == 10 else "netflow"
    stream = f'[[stream]]\nname = "flows"\nlisten = ["udp://127.0.0.1:2055"]\nprotocol = "{protocol}"\n'
    stack.configure(PATIENT + stream)
    stack.start_all()
    capture = stack.directory / "traffic.pcap"
    write_capture(capture)
    network = Loser(2056, 2055, lost={2})
    network.start()
    try:
        command = [softflowd, "-d", "-r", str(capture), "-v", str(version), "-n", "127.0.0.1:2056"]
        exporter = stack.spawn("softflowd", command)
        assert exporter.process.wait(60) == 0, exporter.text
    finally:
        network.stop()
    assert len(network.passed) > 4
    (lost,) = network.dropped

    def losses() -> list[dict[str, Any]]:
        ledger = stack.operator("ledger", "--json")
        assert ledger.process.wait(60) == 0, ledger.text
        told: list[dict[str, Any]] = json.loads(ledger.text)["losses"]
        return [loss for loss in told if loss["place"] == "upstream"]

    wait_until(losses, "the loss is told")
    count = {5: int.from_bytes(lost[2:4]), 9: 1, 10: 0}[version]
    if version == 10:  # how many records it had follows from the numbers of its neighbours
        before, after = network.passed[1:3]
        whole = int.from_bytes(after[8:12]) - int.from_bytes(before[8:12])
        count = whole - (int.from_bytes(lost[8:12]) - int.from_bytes(before[8:12]))
    assert losses() == [{"place": "upstream", "service": "ingest.1", "of": "flows", "lost": count, "what": unit}]


def test_flow_collector_tells_exporters_apart(open_stack: OpenStack) -> None:
    """`nfcapd`, which files by exporter's address, files the flows of three exporters apart, as without fanwire."""
    softflowd = need("softflowd")
    open_stack.configure(
        f'{PATIENT}destinations = ["10.2.0.0/24"]\n[[stream]]\nname = "netflow"\nlisten = ["udp://0.0.0.0:2055"]\n'
    )
    with ExitStack() as opened:
        relay, siem = opened.enter_context(Host()), opened.enter_context(Host())
        opened.enter_context(veth(End(relay, "siem", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")))
        routers = [opened.enter_context(Host()) for _ in range(3)]
        for number, router in enumerate(routers):
            near, far = f"10.1.{number}.1/24", f"10.1.{number}.2/24"
            opened.enter_context(veth(End(relay, f"port{number}", near), End(router, "eth", far)))
            router.route("10.2.0.0/24", via=f"10.1.{number}.1")
            siem.route(f"10.1.{number}.0/24", via="10.2.0.1")
        relay.forward()  # what is exported directly passes the same host
        with relay.entered():
            open_stack.start_all()
            open_stack.start("transmitter")
        collectors = [start_sorting_nfcapd(open_stack, siem, port) for port in (9995, 9996)]
        with relay.entered():
            request = {"name": "n", "streams": ["netflow"], "port": 9996, "source": "original"}
            sign_up(request | {"address": "10.2.0.2"})
        for number, router in enumerate(routers):
            capture = open_stack.directory / f"traffic{number}.pcap"
            write_capture(capture, network=20 + number)
            for to in ("10.2.0.2:9995", f"10.1.{number}.1:2055"):
                with router.entered():
                    exporter = open_stack.spawn("softflowd", [softflowd, "-d", "-r", str(capture), "-v", "9", "-n", to])
                assert exporter.process.wait(60) == 0, exporter.text
        with relay.entered():
            ledger = open_stack.operator("ledger")
        assert ledger.process.wait(60) == 0, ledger.text
        for running, _ in collectors:
            running.stop()
    directly, relayed = ({path.name: flows(path) for path in directory.iterdir()} for _, directory in collectors)
    assert len(directly) == 3
    assert {len(found) for found in directly.values()} == {FLOWS}
    assert relayed == directly


FLOW_FIELDS = [(8, 4), (12, 4), (7, 2), (11, 2), (4, 1), (2, 4), (1, 4), (21, 4), (22, 4)]
"""Source, destination, their ports, protocol, packets, bytes, and the uptime at the last and the first of them."""
SAMPLING_FIELDS = [(34, 4), (35, 1)]
PACKETS, SAMPLED = 10, 100


def field_specifiers(fields: Sequence[tuple[int, int]]) -> bytes:
    """Fields as templates describe them."""
    return b"".join(struct.pack(">HH", *field) for field in fields)


class RareTemplates:
    """An exporter of NetFlow v9 or IPFIX that told its templates, and its sampling rate, once at its start."""

    def __init__(self, version: int) -> None:
        self._version, self._number, self.sent = version, 0, 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.9", 0))
        self._socket.connect(("127.0.0.1", 2055))
        scope, records = [(1 if version == 9 else 149, 4)], field_specifiers(SAMPLING_FIELDS)
        head = (300, 4, 8) if version == 9 else (300, 3, 1)
        self._send(0 if version == 9 else 2, struct.pack(">HH", 256, 9) + field_specifiers(FLOW_FIELDS), 0)
        self._send(1 if version == 9 else 3, struct.pack(">HHH", *head) + field_specifiers(scope) + records, 0)
        self._send(300, struct.pack(">IIB", 0, SAMPLED, 1), 1)

    def flow(self, number: int) -> None:
        """Send one flow of `PACKETS` packets."""
        uptime = 60_000
        record = struct.pack(
            ">4s4sHHBII", bytes((10, 9, 0, number)), bytes((10, 9, 1, 1)), number, 53, 17, PACKETS, 999
        )
        self._send(256, record + struct.pack(">II", uptime, uptime - 1000), 1)

    def _send(self, number: int, content: bytes, records: int) -> None:
        body = struct.pack(">HH", number, 4 + len(content)) + content
        now = int(time.time())
        if self._version == 9:
            self._socket.send(struct.pack(">HHIIII", 9, 1, 61_000, now, self._number, 5) + body)
        else:
            self._socket.send(struct.pack(">HHIII", 10, 16 + len(body), now, self._number, 5) + body)
        self._number += 1 if self._version == 9 else records
        self.sent += 1

    def close(self) -> None:
        """Close its socket."""
        self._socket.close()


def start_late(stack: Stack, version: int, more: str = "") -> RareTemplates:
    """Start everything, and an exporter that tells its templates and flows before any collector is there.

    With `more` settings, of the stream and others, the journal is started too.
    """
    protocol = "ipfix" if version == 10 else "netflow"
    stream = f'[[stream]]\nname = "flows"\nlisten = ["udp://127.0.0.1:2055"]\nprotocol = "{protocol}"\n'
    stack.configure(PATIENT + stream + more)
    stack.start_all()
    if more:
        stack.start("journal")
        with BusEnds(stack.bus) as bus:
            accounts_when(bus, "journal.1", lambda accounts: any(name.startswith("origin/") for name in accounts))
    exporter = RareTemplates(version)
    for number in range(1, 4):
        exporter.flow(number)
    with BusEnds(stack.bus) as bus:  # what still waits in the kernel would be for those that come
        accounts_when(
            bus, "ingest.1", lambda accounts: accounts.get("stream/flows", {}).get("received") == exporter.sent
        )
    return exporter


def join_late(exporter: RareTemplates, name: str) -> None:
    """Sign a collector up at port 9995, and send three flows more."""
    with closing(exporter):
        sign_up({"name": name, "streams": ["flows"], "port": 9995})
        for number in range(100, 103):
            exporter.flow(number)


@pytest.mark.parametrize("version", [9, 10])
def test_a_collector_that_joins_late_files_the_first_flow(stack: Stack, version: int) -> None:
    """`nfcapd`, begun after an exporter has told its templates, files the first flow it gets, and misses no number."""
    exporter = start_late(stack, version)
    nfcapd, directory = start_nfcapd(stack, 9995)
    join_late(exporter, "nfcapd")
    with BusEnds(stack.bus) as bus:
        accounts_when(bus, "forwarder.1", lambda accounts: accounts["collector/nfcapd"].get("sent") == 3)
    nfcapd.stop()
    filed = [line.split() for line in flows(directory)]
    assert [(source, packets) for source, _, packets, _ in filed] == [
        (f"10.9.0.{number}", str(PACKETS)) for number in range(100, 103)
    ]
    assert "Sequence Errors: 0" in nfcapd.text


@pytest.mark.parametrize("version", [9, 10])
def test_a_collector_that_catches_up_files_the_first_flow(stack: Stack, version: int) -> None:
    """`nfcapd` is given a past without templates, then is away and restarted: it files each flow, and misses none."""
    collector = (
        '[[collector]]\nname = "siem"\nstreams = ["flows"]\naddress = "127.0.0.1"\nport = 9995\ncatch_up = true\n'
    )
    journal = f'journal = true\n{collector}[journal]\ndirectory = "{stack.directory / "journal"}"\nmin_free = 0\n'
    with closing(start_late(stack, version, journal)) as exporter, BusEnds(stack.bus) as bus:

        def has(account: str, counter: str, count: int) -> None:
            service = "journal.1" if account.startswith("journal") else "forwarder.1"
            accounts_when(bus, service, lambda accounts: accounts.get(account, {}).get(counter) == count)

        has("journal/flows", "written", 6)
        began = time.time()
        for number in range(4, 7):
            exporter.flow(number)
        has("journal/flows", "written", 9)
        late, filed = start_nfcapd(stack, 9996)
        since = datetime.fromtimestamp(began, UTC).isoformat()
        answer = ask_json({"op": "register", "name": "late", "streams": ["flows"], "port": 9996, "since": since})
        assert answer["ok"], answer
        has("collector/late", "sent", 3)
        siem, again = start_nfcapd(stack, 9995)
        wait_until(lambda: not ask_json({"op": "list"})["clients"]["siem"].get("catching_up"), lambda: siem.text)
        for running, directory, first in ((late, filed, 4), (siem, again, 1)):
            running.stop()
            sources = [line.split()[0] for line in flows(directory)]
            assert sources == [f"10.9.0.{number}" for number in range(first, 7)]
            assert "Sequence Errors: 0" in running.text


@pytest.mark.soak
@pytest.mark.parametrize("version", [9, 10])
def test_a_collector_that_joins_late_knows_the_sampling_rate(stack: Stack, version: int) -> None:
    """`nfacctd` of pmacct, begun after that was told once, multiplies the first flow it gets by the sampling rate."""
    nfacctd = need("nfacctd")
    exporter = start_late(stack, version)
    settings, filed = stack.directory / "nfacctd.conf", stack.directory / "filed.csv"
    settings.write_text(
        "daemonize: false\nnfacctd_ip: 127.0.0.1\nnfacctd_port: 9995\nnfacctd_renormalize: true\nplugins: print\n"
        "aggregate: src_host\nprint_output: csv\nprint_output_file_append: true\nprint_refresh_time: 1\n"
        f"print_output_file: {filed}\n"
    )
    running = stack.spawn("nfacctd", [nfacctd, "-f", str(settings)])
    running.wait_for("Purging cache - END")  # before that it takes nothing, though it listens
    join_late(exporter, "nfacctd")
    try:
        wait_until(lambda: filed.exists() and "10.9.0.102," in filed.read_text(), lambda: f"flows: {running.text}", 10)
    finally:
        running.stop(signal.SIGINT)
    found = sorted(line for line in filed.read_text().splitlines() if line.startswith("10.9."))
    assert [line.split(",")[:2] for line in found] == [
        [f"10.9.0.{number}", str(PACKETS * SAMPLED)] for number in range(100, 103)
    ]
