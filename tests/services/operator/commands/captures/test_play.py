import ipaddress
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.operator.commands.captures import play
from services.operator.commands.captures.play import ExporterSockets, choose_target
from shared.capture.pcapng import Destination
from shared.capture.reader import CapturedDatagram
from shared.capture.writer import CaptureWriter
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.ledger.accounts import listener_account
from shared.net.addresses import Endpoint, pack_address
from shared.process.lifecycle import Lifecycle, OperatorError
from tests.services.operator.played import PlayedService
from tests.stack import Running, Stack, wait_until

NANOSECONDS = 1_000_000_000
Sent = tuple[str, int, bytes]


def capture(path: Path, *datagrams: Sent) -> str:
    """Write a capture of datagrams that are a second apart; return its path."""
    with path.open("xb", buffering=0) as file:
        writer = CaptureWriter(file.fileno(), "any", Destination())
        for number, (source, port, payload) in enumerate(datagrams):
            rows = make_rows([len(payload)], [pack_address(source)], port)
            writer.write(DatagramBatch("any", number * NANOSECONDS, rows, payload))
    return str(path)


class PlayedListener:
    """A socket in place of ingest, and the report of a worker that it is a listener of the stream `messages`."""

    def __init__(self, stack: Stack, host: str, ingest: PlayedService) -> None:
        self._stack, self._ingest = stack, ingest
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.settimeout(60)
        self.port = self.socket.getsockname()[1]
        endpoint = f"udp://{f'[{host}]' if ':' in host else host}:{self.port}"
        stack.configure(f'[[stream]]\nname = "messages"\nlisten = ["{endpoint}"]\n')
        self._accounts = {listener_account("messages", endpoint): {"received": 0}}

    def start(self, *arguments: str) -> Running:
        """Start the command; report until it has found the listener, or has ended."""
        command = self._stack.operator("play", *arguments, "--stream", "messages")

        def is_found() -> bool:
            self._ingest.report(self._accounts)
            return self.has_some or command.process.poll() is not None

        wait_until(is_found, lambda: f"play sends: {command.text}")
        return command

    @property
    def has_some(self) -> bool:
        """Return whether any datagram has come."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def take(self, count: int) -> list[Sent]:
        """Receive so many datagrams."""
        came = [self.socket.recvfrom(65_536) for _ in range(count)]
        return [(source[0], source[1], payload) for payload, source in came]


@contextmanager
def listening(stack: Stack, host: str = "127.0.0.1") -> Iterator[PlayedListener]:
    """Put a socket in place of ingest, beside a broker."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        listener = PlayedListener(stack, host, ingest)
        with listener.socket:
            yield listener


def test_plays_exporters_on_loopback(stack: Stack, tmp_path: Path) -> None:
    """Each exporter gets an address of loopback that ends as its own, and keeps its port; the order is kept."""
    datagrams = [
        *(("10.1.2.3", 40_001, b"one"), ("192.1.2.3", 40_001, b"two"), ("2001:db8::7:8:9", 40_002, b"three")),
        *(("127.9.9.9", 40_003, b""), ("10.1.2.3", 40_001, b"\0\xff" * 30_000)),
    ]
    path = capture(tmp_path / "exporters.pcapng", *datagrams)
    with listening(stack) as listener:
        command = listener.start(path, "--flat-out")
        assert command.process.wait(60) == 0, command.text
        assert listener.take(5) == [
            *(("127.1.2.3", 40_001, b"one"), ("127.1.2.4", 40_001, b"two"), ("127.8.0.9", 40_002, b"three")),
            *(("127.9.9.9", 40_003, b""), ("127.1.2.3", 40_001, b"\0\xff" * 30_000)),
        ]
        assert "exporters: 10.1.2.3 as 127.1.2.3, 192.1.2.3 as 127.1.2.4" in command.text
        assert f"5 datagrams sent to messages at 127.0.0.1 port {listener.port}" in command.text
        # Some only, from their own addresses as far as this host has them.
        command = listener.start(path, "--source", "original", "--from", "127.0.0.0/8")
        assert (command.process.wait(60), listener.take(1)) == (0, [("127.9.9.9", 40_003, b"")])
        command = listener.start(path, "--source", "original", "--count", "1")
        assert command.process.wait(60) == 1
        assert "can't send from 10.1.2.3 to 127.0.0.1: Cannot assign requested address; leave" in command.text
        # Datagrams behind a tear are not sent, and Ctrl-C ends a pause.
        torn = tmp_path / "torn.pcapng"
        torn.write_bytes(Path(path).read_bytes()[:-1])
        command = listener.start(str(torn), "--speed", "1000")
        assert (command.process.wait(60), len(listener.take(4))) == (1, 4)
        assert f"{torn} is damaged: what is behind the last whole datagram was not sent" in command.text
        command = listener.start(path, "--speed", "0.001")
        assert (listener.take(1)[0][2], command.stop(signal.SIGINT)) == (b"one", 0)
        assert "1 datagram sent" in command.text
        (tmp_path / "text").write_text("no capture")
        command = listener.start(str(tmp_path / "text"))
        assert (command.process.wait(60), "does not begin as pcapng or pcap does" in command.text) == (64, True)


def test_never_sends_to_what_no_worker_has(stack: Stack, tmp_path: Path) -> None:
    """A listener that no worker of ours reports gets nothing, though the settings name it and something is there."""
    path = capture(tmp_path / "one.pcapng", ("10.1.2.3", 40_001, b"one"))
    with listening(stack) as listener:
        listener._accounts = {listener_account("other", f"udp://127.0.0.1:{listener.port}"): {}}
        command = listener.start(path)
        assert command.process.wait(60) == 69
        assert "no ingest worker reports a udp:// listener of stream messages" in command.text
        assert not listener.has_some


ELSEWHERE = Endpoint("udp", "192.0.2.1", 7000)


@pytest.mark.parametrize(
    ("listeners", "said"),
    [
        ([ELSEWHERE], "--beyond-loopback allows another"),
        ([Endpoint("udp", "239.1.1.1", 7000)], "give it one that is not on a multicast group"),
    ],
)
def test_stays_on_loopback_unless_told(listeners: list[Endpoint], said: str) -> None:
    """A stream whose listeners are all elsewhere is refused, in words that say which option allows it."""
    with pytest.raises(OperatorError, match=said):
        choose_target("s", listeners, beyond_loopback=False)
    near = Endpoint("udp", "::1", 7000)
    assert choose_target("s", [ELSEWHERE, near], beyond_loopback=True) == ("::1", 7000)
    assert choose_target("s", [ELSEWHERE], beyond_loopback=True) == ("192.0.2.1", 7000)


@pytest.mark.parametrize(("speed", "waits"), [(1.0, [1.0, 4.0]), (2.0, [0.5, 2.0]), (0.0, [])])
def test_pace(monkeypatch: pytest.MonkeyPatch, speed: float, waits: list[float]) -> None:
    """Datagrams leave at the distances of their capture, or a factor of them; times that go back are no pause."""
    clock, waited = [0.0], list[float]()

    def wait(_readers: object, _writers: object, _errors: object, seconds: float) -> None:
        waited.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(play, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(play, "select", SimpleNamespace(select=wait))
    sent: list[Any] = []
    datagrams = [CapturedDatagram(at * NANOSECONDS, b"", 0, b"", 0, b"") for at in (10, 11, 10, 15, 15)]
    lifecycle = cast(Lifecycle, SimpleNamespace(draining=False))
    play._play(lifecycle, iter(datagrams), cast(ExporterSockets, SimpleNamespace(send=sent.append)), speed)
    assert (sent, waited) == (datagrams, waits)


def test_more_exporters_than_sockets(lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Very many exporters share a bounded number of sockets, and each keeps its address, also those of ::1 alone."""
    monkeypatch.setattr(play, "MAX_SOCKETS", 4)
    for host in ("127.0.0.1", "::1"):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind((host, 0))
            with ExporterSockets((host, receiver.getsockname()[1]), original=False) as exporters:
                for number in [*range(play.MAX_SOCKETS + 9), *range(3)]:
                    source = pack_address(str(ipaddress.IPv4Address((10 << 24) + 0xFFFFF0 + number)))
                    exporters.send(CapturedDatagram(0, source, 30_000, b"", 0, number.to_bytes(2)))
                assert len(exporters._sockets) == play.MAX_SOCKETS
                came = [receiver.recvfrom(9) for _ in range(exporters.sent)]
            assert len(came) == play.MAX_SOCKETS + 12
            addresses = {payload: source[0] for payload, source in came}
            assert len(set(addresses.values())) == (len(addresses) if host == "127.0.0.1" else 1)
