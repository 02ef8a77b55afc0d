"""The journal beside live copies: it costs them nothing, whatever becomes of it, and has what they have."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.capture.reader import CaptureReader
from shared.journal.directory import segments_in
from shared.net.sockets import enlarge_receive_buffer
from tests.builders import BusEnds, accounts_when
from tests.stack import PATIENT, Stack, sign_up, wait_until
from tests.traffic import payload

SETTINGS = (
    PATIENT
    + """
[journal]
directory = "{directory}"
bytes = 1048576
min_free = 0
[[stream]]
name = "messages"
listen = ["udp://127.0.0.1:6667"]
journal = true
"""
)
SMALL_DISK = "mkdir -p {at} && mount -t tmpfs -o size=3m fanwire {at} && exec {python} -m services.journal"


def kept(directory: Path) -> list[bytes]:
    """Return the payloads in the journal, in their order, read as any program does."""
    found = []
    for segment in segments_in(directory, "messages"):
        with (directory / "messages" / segment.name).open("rb") as file:
            found += [each.payload for each in CaptureReader(file)]
    return found


def test_live_copies_know_nothing_of_the_journals_fate(stack: Stack) -> None:
    """A journal whose disk is full, that is killed, and comes back: no copy is lost, and all accounts add up."""
    new = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*new, "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    directory = stack.directory / "journal"
    stack.configure(SETTINGS.format(directory=directory))
    stack.start_all()
    script = SMALL_DISK.format(at=directory, python=sys.executable)
    journal = stack.spawn("journal", [*new, "sh", "-c", script], HONCHO_PROCESS_NAME="journal.1")
    wait_until(lambda: journal.events("ready"), lambda: f"it is ready: {journal.text}")
    inside = Path(f"/proc/{journal.process.pid}/root{directory}")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter,
        BusEnds(stack.bus) as bus,
    ):
        enlarge_receive_buffer(collector, 16 << 20)
        collector.bind(("127.0.0.1", 0))
        collector.settimeout(60)
        port = collector.getsockname()[1]
        sign_up({"name": "siem", "streams": ["messages"], "port": port})
        sent: list[bytes] = []

        def send(count: int) -> None:
            for _ in range(count):
                sent.append(b"%d " % len(sent) * 50)
                exporter.sendto(sent[-1], ("127.0.0.1", 6667))
            assert [collector.recv(1 << 16) for _ in range(count)] == sent[-count:]

        send(200)
        accounts_when(bus, "journal.1", lambda now: now.get("journal/messages", {}).get("written") == 200)
        assert kept(inside) == sent
        (inside / "others").write_bytes(bytes(2 << 20))
        while not journal.events("the journal can't write: datagrams come to collectors as ever, and are not kept"):
            send(100)
        told = accounts_when(bus, "journal.1", lambda now: now["journal/messages"]["taken"] == len(sent))
        account = told["journal/messages"]
        assert account["written"] + account["dropped_disk_full"] == len(sent)
        code, said, _ = stack.run("ledger")
        assert (code, said.splitlines()[-1]) == (0, "balanced"), said
        assert "disk_full" in said
        journal.stop(signal.SIGKILL)
        send(100)
        stack.start("journal")  # on another disk: it begins anew
        send(100)
        accounts_when(bus, "journal.1", lambda now: now.get("journal/messages", {}).get("written") == 100)
        assert kept(directory) == sent[-100:]
        code, said, _ = stack.run("ledger")
        assert (code, said.splitlines()[-1]) == (0, "balanced"), said


def test_it_has_every_byte_that_came(stack: Stack) -> None:
    """Datagrams of all sizes, lent ones among them, are in the journal as they were sent, each exporter's in order."""
    directory = stack.directory / "journal"
    stack.configure(SETTINGS.format(directory=directory).replace("1048576", "1073741824"))
    stack.start("broker")
    journal = stack.start("journal")
    stack.start("ingest")
    exporters = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
    with BusEnds(stack.bus) as bus:
        accounts_when(bus, "journal.1", lambda now: any(name.startswith("origin/") for name in now))
        sent: dict[int, list[bytes]] = {}
        for number, exporter in enumerate(exporters):
            exporter.bind((f"127.0.0.{number + 1}", 0))
            sent[exporter.getsockname()[1]] = [payload(number, each) for each in range(200)]
        for each in range(200):
            for exporter in exporters:
                exporter.sendto(sent[exporter.getsockname()[1]][each], ("127.0.0.1", 6667))
        told = accounts_when(bus, "journal.1", lambda now: now["journal/messages"].get("written", 0) == 600)
        assert sum(kept.get("missed", 0) for kept in told.values()) == 0
    for exporter in exporters:
        exporter.close()
    assert journal.stop() == 0
    found: dict[int, list[bytes]] = {port: [] for port in sent}
    for segment in segments_in(directory, "messages"):
        with (directory / "messages" / segment.name).open("rb") as file:
            for datagram in CaptureReader(file):
                found[datagram.source_port].append(datagram.payload)
                assert datagram.port == 6667
    assert found == sent
