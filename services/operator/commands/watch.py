"""`fanwire watch`: prints the datagrams of a stream as they pass the bus, without signing up for anything."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Final

import zmq

from services.operator.cli.arguments import Subparsers, add_command, prefix
from services.operator.cli.output import (
    Output,
    add_count_argument,
    as_documented_answerer,
    as_hex,
    as_json,
    as_text,
    say,
)
from services.operator.client.bus_reader import subscribed
from services.operator.client.datagram_reader import DatagramReader
from services.operator.client.running_streams import stream_named
from shared.bus.living_workers import living_workers
from shared.bus.loans.borrower import Borrower
from shared.bus.messages import Status, datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.prefix_set import Prefixes, halves_of
from shared.process.lifecycle import OK, Lifecycle
from shared.settings.model import Settings

TICK_MS: Final = 500
SILENT_SECONDS: Final = 3.0
"""Workers report each second."""
REPORTS: Final = "status/ingest."
ALL_DATAGRAMS: Final = "datagrams/"
FORMS: Final = {"hex": as_hex, "answering": as_documented_answerer, "json": as_json}


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "watch", run, "print datagrams as they come in")
    parser.add_argument("stream", nargs="?", metavar="STREAM", help="default: every stream")
    parser.add_argument("--from", dest="prefix", type=prefix, metavar="CIDR", help="only datagrams of these exporters")
    add_count_argument(parser)
    forms = parser.add_mutually_exclusive_group()
    for name, help_text in (
        ("hex", "print payloads in hexadecimal"),
        ("answering", "print two lines a datagram, as the documented server that answers does"),
        ("json", "print one JSON object a datagram and line: address, port, and the payload in hexadecimal"),
    ):
        forms.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=help_text)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print until Ctrl-C, or until the wanted number was printed."""
    if arguments.stream is not None:
        stream_named(arguments.stream, settings)
    output = Output(sys.stdout.buffer, FORMS.get(arguments.form, as_text), arguments.count)
    reader = DatagramReader("watching", arguments.stream or "all streams", "printed")
    wanted = Prefixes([arguments.prefix]) if arguments.prefix else None
    lifecycle = Lifecycle()
    prefix = datagrams_topic(arguments.stream) if arguments.stream else ALL_DATAGRAMS
    workers = WorkerWatch(living_workers(settings.bus.path))
    with subscribed(settings, prefix, Borrower) as subscriber:
        subscriber.subscribe(REPORTS)
        _print_until_told(lifecycle, subscriber, reader, wanted, workers, output)
    reader.report_progress(last=True)
    return OK


def _print_until_told(
    lifecycle: Lifecycle,
    subscriber: Subscriber,
    reader: DatagramReader,
    wanted: Prefixes | None,
    workers: "WorkerWatch",
    output: Output,
) -> None:
    poller = zmq.Poller()
    poller.register(subscriber.socket, zmq.POLLIN)
    poller.register(lifecycle.fileno(), zmq.POLLIN)
    poller.register(sys.stdout.fileno(), zmq.POLLERR)  # the reader has gone: noticed without a write
    while not (lifecycle.draining or output.full):
        if (sys.stdout.fileno(), zmq.POLLERR) in poller.poll(TICK_MS):
            return
        while not (lifecycle.draining or output.full) and (message := subscriber.receive()):
            if (batch := reader.take(message)) is not None:
                datagrams: Iterator[tuple[str, int, bytes]] = batch.datagrams()
                output.write(compress(datagrams, wanted.match(halves_of(batch))) if wanted else datagrams)
            reader.report_progress()
            if isinstance(message.body, Status):
                workers.note(message.envelope.sender)
        reader.report_progress()
        workers.report_silent()  # after all that had come


class WorkerWatch:
    """Reports on standard error which ingest workers are heard no more, and which are back."""

    def __init__(self, living: Iterable[str]) -> None:
        self._heard_at = dict.fromkeys(living, time.monotonic())
        self._silent: set[str] = set()

    def note(self, worker: str) -> None:
        """Note that a worker is heard, as it is each second."""
        self._heard_at[worker] = time.monotonic()
        if worker in self._silent:
            self._silent.remove(worker)
            say(f"{worker} is heard again")

    def report_silent(self) -> None:
        """Report workers that have become silent, each once."""
        after = time.monotonic() - SILENT_SECONDS
        silent = {worker for worker, heard_at in self._heard_at.items() if heard_at < after}
        for worker in sorted(silent - self._silent):
            say(f"nothing heard of {worker} for {SILENT_SECONDS:g} s: it has ended, or hangs; see `fanwire doctor`")
        self._silent |= silent
