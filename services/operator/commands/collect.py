"""`fanwire collect`: signs up as a collector, prints or writes what arrives, and leaves again."""

import argparse
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from services.operator.cli.arguments import Subparsers, add_command, add_wishes, wishes
from services.operator.cli.output import (
    NO_ROOM,
    Output,
    add_output_arguments,
    as_hex,
    as_payload,
    as_text,
    cant_write,
    is_capture,
    open_capture,
    say,
)
from services.operator.client.gateway_options import access, add_gateway_arguments
from services.operator.client.lease import Lease
from services.operator.client.running_streams import unknown_explained
from shared.client import CHALLENGE_PREFIX
from shared.datagrams.limits import MAX_DATAGRAM
from shared.net.addresses import SocketAddress
from shared.net.sockets import enlarge_receive_buffer, kernel_drops
from shared.process.lifecycle import CANT_CREATE, FAILED, OK, Lifecycle, OperatorError
from shared.settings.model import Settings

if TYPE_CHECKING:
    from services.operator.cli.capture_output import CaptureOutput

ANSWER_SECONDS: Final = 3.0
"""Time that the gateway may take, on top of its own waiting: the UDP socket is not read meanwhile."""
RECEIVE_BUFFER: Final = 33_554_432
"""Bytes asked of the kernel: the buffer fills while the gateway is asked, or while a terminal is slow."""
TAKE_AT_ONCE: Final = 256
PROOF_SECONDS: Final = 1.0
"""Time that the datagram may take that asks for proof of an address."""
LOOPBACK: Final = "127.0.0.1"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "collect", run, "sign up as a collector and print what arrives")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--stream", dest="streams", action="append", required=True, metavar="STREAM", help="or *; may be repeated"
    )
    add_wishes(parser)
    add_gateway_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="append payloads to FILE, a line each, or whole datagrams to a new FILE.pcapng; print nothing",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Collect until Ctrl-C, until the terminal closes, or until the wanted number has come; then leave."""
    lifecycle = Lifecycle()
    with ExitStack() as closing:
        file = _open_file(arguments, closing)
        answer_seconds = ANSWER_SECONDS + settings.gateway.serve_seconds
        lease = Lease(access(arguments, settings), answer_seconds, arguments.name, wishes(arguments))
        receiver = closing.enter_context(_open_receiver(arguments.address, arguments.port or 0, lease.local))
        closing.callback(lease.leave)  # before the port is closed: copies to a closed port would count as refused
        lease.prove = partial(_await_nonce, receiver)
        port = receiver.getsockname()[1]
        # On AF_UNIX the gateway sees no address of ours, so it is told one.
        told = {} if arguments.address or lease.local else {"address": LOOPBACK}
        with unknown_explained(settings):
            entry = lease.register(port=port, **told)
        output = _make_output(arguments, file, (entry.address, port))
        say(f"collecting {', '.join(entry.streams)} at {entry.address} port {port} as {entry.name}")
        if entry.withheld:
            say(f"an admin withholds the copies{f': {entry.withheld.reason}' if entry.withheld.reason else ''}")
        try:
            _write_until_drained(lifecycle, lease, receiver, output, printing=arguments.write is None)
        except OSError as error:
            if arguments.write is None or error.errno not in NO_ROOM:
                raise
            raise OperatorError(FAILED, f"{arguments.write}: {error.strerror}; later datagrams are lost") from None
        if dropped := kernel_drops(receiver):
            say(f"{dropped} datagrams dropped by the kernel: the receive buffer was full")
    return OK


def _open_file(arguments: argparse.Namespace, closing: ExitStack) -> BinaryIO:
    if arguments.write is None:
        return sys.stdout.buffer
    if is_capture(arguments.write):
        return open_capture(arguments.write, closing)
    try:
        file: BinaryIO = closing.enter_context(arguments.write.open("ab", buffering=0))
    except OSError as error:
        raise cant_write(arguments.write, error) from None
    return file


def _make_output(arguments: argparse.Namespace, file: BinaryIO, at: tuple[str, int]) -> "Output | CaptureOutput":
    """Return the output for datagrams that come to this address and port."""
    if arguments.write is None:
        return Output(file, as_hex if arguments.hex else as_text, arguments.count)
    if is_capture(arguments.write):
        from services.operator.cli.capture_output import CaptureOutput  # others start without numpy
        from shared.capture.destination import destination_at

        return CaptureOutput(file, arguments.name, destination_at(at), arguments.count)
    return Output(file, as_payload, arguments.count)


def _open_receiver(asked: str | None, port: int, local: SocketAddress | None) -> socket.socket:
    """Return a UDP socket for the copies: at our end of the connection; everywhere if another address was asked for."""
    anywhere = ("::" if ":" in asked else "0.0.0.0", 0) if asked else None
    host, _, *scope = anywhere or local or (LOOPBACK, 0)
    receiver = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        receiver.bind((host, port, *scope))
    except (OSError, OverflowError) as error:
        receiver.close()
        raise OperatorError(CANT_CREATE, f"UDP {host} port {port}: {error}; leave --port out for a free one") from None
    enlarge_receive_buffer(receiver, RECEIVE_BUFFER)
    return receiver


def _await_nonce(receiver: socket.socket) -> str | None:
    """Return the nonce by which the gateway asks for proof of our address; other datagrams before it are discarded."""
    deadline = time.monotonic() + PROOF_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if select.select([receiver], [], [], left)[0]:
            payload = receiver.recv(MAX_DATAGRAM)
            if payload.startswith(CHALLENGE_PREFIX):
                return payload.removeprefix(CHALLENGE_PREFIX).decode(errors="replace")
    return None


def _write_until_drained(
    lifecycle: Lifecycle, lease: Lease, receiver: socket.socket, output: "Output | CaptureOutput", *, printing: bool
) -> None:
    while not (lifecycle.draining or output.full):
        poller = select.poll()
        poller.register(receiver, select.POLLIN)
        poller.register(lifecycle, select.POLLIN)
        if lease.fileno() >= 0:
            poller.register(lease, select.POLLIN)
        if printing:
            poller.register(sys.stdout, 0)  # reported only when the reader has gone
        ready = {descriptor for descriptor, _ in poller.poll(lease.seconds_left * 1000)}
        if printing and sys.stdout.fileno() in ready:
            return
        if receiver.fileno() in ready:
            output.write(_arrived(receiver))
        if lease.fileno() in ready:
            lease.heed()
        lease.keep()


def _arrived(receiver: socket.socket) -> Iterator[tuple[str, int, bytes]]:
    for _ in range(TAKE_AT_ONCE):
        try:
            payload, source = receiver.recvfrom(MAX_DATAGRAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        yield source[0], source[1], payload
