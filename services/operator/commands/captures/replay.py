"""`fanwire replay`: sends a part of a stream's past, out of the journal, to one collector."""

import argparse
import select
import socket
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from services.operator.cli.arguments import Subparsers, add_command, positive_number
from services.operator.cli.numbers import counted
from services.operator.cli.output import cant_write, say
from services.operator.cli.progress import Bar
from services.operator.client.gateway_options import add_gateway_arguments, open_registry
from services.operator.client.journal_past import Wanted, add_past_arguments, find_past, shown, tell_losses
from services.operator.client.running_streams import streams_of
from shared.bus.bodies.journal_messages import JournalPlace
from shared.journal.segments import LATE_NS
from shared.net.addresses import pack_address, parse_endpoint
from shared.net.multicast import is_multicast
from shared.net.netlink import Netlink
from shared.process.lifecycle import FAILED, OK, USAGE, Lifecycle, OperatorError
from shared.settings.explain import did_you_mean
from shared.settings.model import Settings
from shared.settings.own_listeners import OwnListeners, listening_addresses

KEEP_SECONDS: Final = 1.0
"""Between two notes of the place in the file of `--resume`: after a kill as much is sent twice."""


class Bookmark(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The content of the file of `--resume`: what is replayed, and the next datagram."""

    stream: str
    to: str
    source: str | None
    since_ns: int
    until_ns: int
    segment: int = 0
    offset: int = 0
    began_ns: int = 0
    """The beginning of that segment."""
    last_ns: int = 0
    """The time of receipt of that batch."""
    rows: int = 0
    """Datagrams of that batch that were sent."""
    sent: int = 0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "replay", run, "send a part of a stream's past to a collector")
    add_past_arguments(parser)
    parser.add_argument("--to", required=True, metavar="COLLECTOR", help="a collector's name, or ADDRESS:PORT")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=positive_number, metavar="N", help="N datagrams a second")
    pace.add_argument(
        "--speed", type=positive_number, default=1.0, metavar="N", help="N times as fast as they came; default: 1"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="keeps the place in FILE, and goes on from there if it is there"
    )
    add_gateway_arguments(parser)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Send all of it, or what was sent until Ctrl-C; return 1 where something was not sent."""
    lifecycle = Lifecycle()
    wanted = find_past(arguments, settings)
    address, port = _find_target(arguments, settings)
    place = Bookmark(
        stream=arguments.stream,
        to=arguments.to,
        source=arguments.source,
        since_ns=wanted.past.since_ns,
        until_ns=wanted.past.until_ns,
    )
    if arguments.resume:
        place = _read_place(arguments.resume, place)
        wanted.past.since_ns, wanted.past.until_ns = place.since_ns, place.until_ns
    with ExitStack() as stack:
        sender = stack.enter_context(ReplaySender(address, port))
        bar = stack.enter_context(Bar())
        whole = _replay(lifecycle, wanted, sender, place, bar, arguments)
    _keep(arguments.resume, place, whole=whole)
    return _tell(arguments, wanted, sender, place, whole=whole)


def _find_target(arguments: argparse.Namespace, settings: Settings) -> tuple[str, int]:
    """Return the collector's address and port. OperatorError where there is none, or where it is fanwire itself."""
    if ":" in arguments.to:
        try:
            at = parse_endpoint(f"udp://{arguments.to}", ("udp",))
            address, port = at.host, at.port
            pack_address(address)
        except ValueError:
            told = f"--to: {arguments.to!r} is no ADDRESS:PORT such as 192.0.2.20:2055 or [2001:db8::1]:2055"
            raise OperatorError(USAGE, told) from None
    else:
        with open_registry(arguments, settings) as registry:
            entries = registry.ask("list").entries()
        entry = entries.get(arguments.to)
        if entry is None or not entry.streams:
            collectors = [name for name, each in entries.items() if each.streams]
            nearest = did_you_mean(arguments.to, collectors)
            known = f"the collectors are: {', '.join(collectors)}" if collectors else "there is no collector"
            raise OperatorError(USAGE, f"no collector {arguments.to!r}{nearest}; {known}")
        address, port = entry.address, entry.port
    if is_multicast(address):
        raise OperatorError(USAGE, f"{address} is the address of a group; expected that of one host")
    _refuse_loop(address, port, settings)
    return address, port


def _refuse_loop(address: str, port: int, settings: Settings) -> None:
    """Raise OperatorError where the datagrams would come back as new ones of a stream."""
    streams = {*settings.streams, *streams_of(settings).values()}
    with closing(Netlink()) as netlink:
        if OwnListeners(listening_addresses(streams)).receive(address, port, netlink.is_local):
            raise OperatorError(
                USAGE, f"{address} port {port} is one of fanwire's own listeners: the past would be taken for new; "
                "replay to a collector",
            )  # fmt: skip


@dataclass(slots=True)
class ReplaySender:
    """Sends payloads to one address from an address of this host."""

    address: str
    port: int
    sent: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Datagrams that could not be sent, by the error."""
    _socket: socket.socket = field(init=False)

    def __enter__(self) -> "ReplaySender":
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.connect((self.address, self.port))
        except OSError as error:
            self._socket.close()
            raise OperatorError(FAILED, f"can't send to {self.address} port {self.port}: {error.strerror}") from None
        return self

    def send(self, payload: memoryview) -> None:
        """Send a datagram; this waits while the send buffer is full."""
        try:
            self._socket.send(payload)
        except ConnectionRefusedError:  # of an earlier datagram, and this one was not sent
            self.refused["nobody listens"] += 1
        except OSError as error:
            self.refused[error.strerror or str(error)] += 1
        else:
            self.sent += 1

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def _replay(
    lifecycle: Lifecycle, wanted: Wanted, sender: ReplaySender, place: Bookmark, bar: Bar, arguments: argparse.Namespace
) -> bool:
    """Send datagrams at their pace, and note the place; return whether all were sent."""
    pace = Pace(arguments.rate, arguments.speed)
    start = JournalPlace(place.segment, place.offset, place.began_ns) if place.segment else None
    keep_at = time.monotonic() + KEEP_SECONDS
    passed = place.rows
    for batch, rows, _ in wanted.batches(start, place.last_ns):
        payload, offsets, lengths = memoryview(batch.payload), batch.offsets.tolist(), batch.length_list
        now_at = wanted.past.place
        assert now_at is not None
        there = (place.segment, place.offset, place.began_ns or now_at.began_ns)
        passed = passed if there == (now_at.segment, now_at.offset, now_at.began_ns) else 0
        place.segment, place.offset, place.began_ns = now_at.segment, now_at.offset, now_at.began_ns
        place.last_ns = batch.received_ns
        for number, row in enumerate(rows.tolist()[passed:], passed):
            wait = pace.wait(batch.received_ns)
            if wait > 0:
                select.select([lifecycle], [], [], wait)
            if lifecycle.draining:
                place.rows = number
                return False
            sender.send(payload[offsets[row] : offsets[row] + lengths[row]])
            place.sent, place.rows = place.sent + 1, number + 1
            if wait > 0:
                bar.show(place.sent, wanted.share_done(batch.received_ns))
            if arguments.resume and time.monotonic() >= keep_at:
                keep_at = time.monotonic() + KEEP_SECONDS
                _keep(arguments.resume, place, whole=False)
        passed = 0
        bar.show(place.sent, wanted.share_done(batch.received_ns))
    return True


class Pace:
    """Says how long the next datagram has to wait: for its turn at a rate, or for its time as it came."""

    def __init__(self, rate: float | None, speed: float) -> None:
        self._rate, self._speed = rate, speed
        self._began = time.monotonic()
        self._count, self._first_ns, self._newest_ns = 0, -1, 0
        self._ahead_ns = 0
        """The newest time before the clock was set back, if it was."""

    def wait(self, received_ns: int) -> float:
        """Return the seconds until the next datagram may leave; none where it is late.

        Where the clock was set back, what follows keeps its pace. Of another worker some of before may come behind it.
        """
        self._first_ns = received_ns if self._first_ns < 0 else self._first_ns
        if received_ns < self._newest_ns - LATE_NS:
            self._first_ns -= self._newest_ns - received_ns
            self._ahead_ns, self._newest_ns = self._newest_ns, received_ns
        if abs(received_ns - self._ahead_ns) < LATE_NS < received_ns - self._newest_ns:
            received_ns = self._newest_ns
        self._newest_ns = max(self._newest_ns, received_ns)
        after = self._count / self._rate if self._rate else (received_ns - self._first_ns) / 1e9 / self._speed
        self._count += 1
        return self._began + after - time.monotonic()


def _read_place(path: Path, fresh: Bookmark) -> Bookmark:
    """Return the place in a file, or the fresh one where there is no file. OperatorError: it is of another replay."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Bookmark)
    except FileNotFoundError:
        return fresh
    except OSError as error:
        raise OperatorError(USAGE, f"--resume {path}: {error.strerror}") from None
    except msgspec.MsgspecError:
        raise OperatorError(USAGE, f"--resume {path}: it is no file of `fanwire replay`; remove it") from None
    if (kept.stream, kept.to, kept.source) != (fresh.stream, fresh.to, fresh.source):
        told = f"it is of a replay of {kept.stream} to {kept.to}; name another file, or remove it"
        raise OperatorError(USAGE, f"--resume {path}: {told}")
    say(f"going on behind {counted(kept.sent, 'datagram')}, until {shown(kept.until_ns)}")
    return kept


def _keep(path: Path | None, place: Bookmark, *, whole: bool) -> None:
    """Write the place into the file, at once; remove it when all was sent."""
    if path is None:
        return
    try:
        if whole:
            path.unlink(missing_ok=True)
        else:
            fresh = path.with_name(f"{path.name}.new")
            fresh.write_bytes(msgspec.json.encode(place))
            fresh.replace(path)
    except OSError as error:
        raise cant_write(path, error) from None


def _tell(arguments: argparse.Namespace, wanted: Wanted, sender: ReplaySender, place: Bookmark, *, whole: bool) -> int:
    """Say what was sent and what was not; return the exit code."""
    say(f"{counted(sender.sent, 'datagram')} of {arguments.stream} sent to {sender.address} port {sender.port}")
    for cause, number in sender.refused.items():
        say(f"{number} not sent: {cause}")
    if not whole and arguments.resume:
        say("the same command goes on from here")
    if whole and not place.sent:
        say(f"warning: there is no datagram of {arguments.stream} in this time")
    return FAILED if tell_losses(wanted) or sender.refused else OK
