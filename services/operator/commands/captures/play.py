"""`fanwire play`: sends the UDP payloads of a capture to a stream of this host, as if its exporters were here."""

import argparse
import errno
import ipaddress
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command, positive_number, prefix
from services.operator.cli.numbers import counted
from services.operator.cli.output import add_count_argument, say
from services.operator.cli.progress import Progress
from services.operator.client.bus_reader import subscribed
from services.operator.client.running_streams import stream_named
from services.operator.client.status_reader import heard_reports
from shared.capture.reader import CapturedDatagram, CaptureError, CaptureReader
from shared.ledger.accounts import listener_account
from shared.net.addresses import Endpoint, parse_endpoint, unpack_address
from shared.net.multicast import is_multicast
from shared.process.lifecycle import FAILED, OK, UNAVAILABLE, USAGE, Lifecycle, OperatorError
from shared.settings.model import Settings

WORKER_SECONDS: Final = 3.0
"""Time that a worker may take to report: at once, and then each second."""
NEAREST: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to send to where a listener takes every address of a host."""
MAX_SOCKETS: Final = 256
"""Exporters, each an address and port, that have a socket open at a time: well below the usual limit of files."""
SHOWN: Final = 5
"""Exporters whose address in the play is printed."""
LAST_OF_LOOPBACK: Final = int(ipaddress.IPv4Address("127.255.255.255"))


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "play", run, "send the UDP payloads of a capture to a stream of this host")
    parser.add_argument("file", type=Path, metavar="FILE", help="pcapng or pcap, as tap, tcpdump or Wireshark write it")
    parser.add_argument("--stream", required=True, metavar="STREAM", help="a stream whose ingest runs")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--speed", type=positive_number, default=1.0, metavar="N", help="N times as fast as captured; default: 1"
    )
    pace.add_argument("--flat-out", action="store_true", help="without any pause; what a full buffer drops is lost")
    parser.add_argument(
        "--source",
        choices=("loopback", "original"),
        default="loopback",
        help="loopback: each exporter gets an address of 127.0.0.0/8; original: its own, which this host must have",
    )
    parser.add_argument("--beyond-loopback", action="store_true", help="allow a listener that is not on loopback")
    parser.add_argument("--from", dest="prefix", type=prefix, metavar="CIDR", help="only datagrams of these exporters")
    add_count_argument(parser)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Play to the end, or until Ctrl-C; return 1 when the file is damaged or something could not be sent."""
    stream_named(arguments.stream, settings)
    lifecycle = Lifecycle()
    with ExitStack() as closing:
        try:
            reader = CaptureReader(closing.enter_context(arguments.file.open("rb")))
        except OSError as error:
            raise OperatorError(USAGE, f"{arguments.file}: {error.strerror}") from None
        listeners = _listeners(arguments.stream, settings)
        target = choose_target(arguments.stream, listeners, beyond_loopback=arguments.beyond_loopback)
        exporters = closing.enter_context(ExporterSockets(target, original=arguments.source == "original"))
        progress = closing.enter_context(Progress("datagrams sent"))
        try:
            _play(
                lifecycle,
                _wanted(reader, arguments, lambda: progress.show(exporters.sent)),
                exporters,
                0 if arguments.flat_out else arguments.speed,
            )
        except CaptureError as error:
            raise OperatorError(USAGE, f"{arguments.file}: {error}") from None
    return _tell(arguments, reader, exporters, target)


def _listeners(stream: str, settings: Settings) -> list[Endpoint]:
    """Return the UDP listeners of the stream that a worker of ours reports: what holds a port may be anybody's."""
    prefix = listener_account(stream, "udp://")
    with subscribed(settings, "status/ingest.") as subscriber:
        for report in heard_reports(subscriber, WORKER_SECONDS):
            if names := [name for name in report.accounts if name.startswith(prefix)]:
                return [parse_endpoint(name.removeprefix(listener_account(stream, "")), ("udp",)) for name in names]
    raise OperatorError(
        UNAVAILABLE, f"no ingest worker reports a udp:// listener of stream {stream}; does ingest run with these "
        "settings? `fanwire ready ingest`",
    )  # fmt: skip


def choose_target(stream: str, listeners: Sequence[Endpoint], *, beyond_loopback: bool) -> tuple[str, int]:
    """Return where to send for one of the listeners, on loopback and by IPv4 if possible. OperatorError if it is not.

    >>> choose_target("s", [Endpoint("udp", "::", 514), Endpoint("udp", "0.0.0.0", 514)], beyond_loopback=False)
    ('127.0.0.1', 514)
    """
    targets = [(NEAREST.get(each.host, each.host), each.port) for each in listeners if not is_multicast(each.host)]
    near = [each for each in targets if ipaddress.ip_address(each[0]).is_loopback]
    if not targets or not (near or beyond_loopback):
        cure = "--beyond-loopback allows another" if targets else "give it one that is not on a multicast group"
        raise OperatorError(USAGE, f"stream {stream} has no udp:// listener on loopback to send to; {cure}")
    return min(near or targets, key=lambda target: ":" in target[0])


def _wanted(
    reader: CaptureReader, arguments: argparse.Namespace, show_progress: Callable[[], None]
) -> Iterator[CapturedDatagram]:
    network = ipaddress.ip_network(arguments.prefix) if arguments.prefix else None
    left = arguments.count or float("inf")
    for each in reader:
        if network is None or ipaddress.ip_address(unpack_address(each.source)) in network:
            yield each
            show_progress()
            left -= 1
            if left <= 0:
                return


def _play(
    lifecycle: Lifecycle, datagrams: Iterator[CapturedDatagram], exporters: "ExporterSockets", speed: float
) -> None:
    """Send the datagrams, at their pace times `speed`; 0: without pauses. Times that go back are no pause."""
    began, first_ns = time.monotonic(), -1
    for each in datagrams:
        first_ns = each.captured_ns if first_ns < 0 else first_ns
        if speed and (wait := began + (each.captured_ns - first_ns) / 1e9 / speed - time.monotonic()) > 0:
            select.select([lifecycle], [], [], wait)
        if lifecycle.draining:
            return
        exporters.send(each)


@dataclass(slots=True)
class ExporterSockets:
    """The sockets of a play: one for each exporter, the one that was used longest ago is closed when they are many."""

    target: tuple[str, int]
    original: bool
    sent: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Datagrams that could not be sent, by the error."""
    addresses: dict[bytes, str] = field(default_factory=dict)
    """The address that each exporter has in the play."""
    _sockets: dict[tuple[bytes, int], socket.socket] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def send(self, datagram: CapturedDatagram) -> None:
        """Send a datagram from its exporter's socket. OperatorError if this host does not have the exporter's address.

        The socket waits while its send buffer is full; a full receive buffer drops without a word.
        """
        key = (datagram.source, datagram.source_port)
        sock = self._sockets.pop(key, None) or self._open(*key)
        self._sockets[key] = sock  # the last one now
        try:
            sock.send(datagram.payload)
        except ConnectionRefusedError:  # of an earlier datagram: the listener was away
            self.refused["nobody listens"] += 1
        except OSError as error:
            self.refused[error.strerror or str(error)] += 1
        else:
            self.sent += 1

    def _open(self, source: bytes, port: int) -> socket.socket:
        if len(self._sockets) >= MAX_SOCKETS:
            self._sockets.pop(next(iter(self._sockets))).close()
        address = self.addresses.get(source) or self._address_of(source)
        sock = socket.socket(socket.AF_INET6 if ":" in self.target[0] else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            _bind(sock, address, port)
            sock.connect(self.target)
        except OSError as error:
            sock.close()
            raise OperatorError(
                FAILED, f"can't send from {address} to {self.target[0]}: {error.strerror}; leave --source original "
                "out, or give this host the address, as `ip route add local NETWORK dev lo` does in a namespace",
            ) from None  # fmt: skip
        self.addresses[source] = address
        return sock

    def _address_of(self, source: bytes) -> str:
        """Return the address that an exporter gets; one of loopback ends as the exporter's own does, if it is free."""
        text = unpack_address(source)
        if self.original:
            return text
        if ":" in self.target[0]:
            return self.target[0] if self.target[0] == "::1" else "::"
        number = 127 << 24 | int.from_bytes(source[-3:])
        if not 127 << 24 < number < LAST_OF_LOOPBACK:
            number = 127 << 24 | 1
        while (address := str(ipaddress.IPv4Address(number))) in self._taken:
            number = number + 1 if number + 1 < LAST_OF_LOOPBACK else 127 << 24 | 1
        self._taken.add(address)
        return address

    def __enter__(self) -> "ExporterSockets":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets.values():
            sock.close()


def _bind(sock: socket.socket, address: str, port: int) -> None:
    """Bind to the exporter's port; to any other where that is taken, or is for root alone."""
    try:
        sock.bind((address, port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        sock.bind((address, 0))


def _tell(
    arguments: argparse.Namespace, reader: CaptureReader, exporters: ExporterSockets, target: tuple[str, int]
) -> int:
    """Say what was sent and what was not; return the exit code."""
    here = {unpack_address(source): address for source, address in exporters.addresses.items()}
    moved = [f"{source} as {address}" for source, address in here.items() if source != address]
    if moved:
        more = f" and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
        say(f"exporters: {', '.join(moved[:SHOWN])}{more}")
    sent = counted(exporters.sent, "datagram")
    say(f"{sent} sent to {arguments.stream} at {target[0]} port {target[1]}")
    for cause, skipped in (*reader.skipped.items(), *exporters.refused.items()):
        say(f"{skipped} left out: {cause}")
    if reader.damaged:
        say(f"{arguments.file} is damaged: what is behind the last whole datagram was not sent")
    return FAILED if reader.damaged or exporters.refused or not exporters.sent else OK
