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
from shared.bus.borrowing import Borrower
from shared.bus.continuity import Continuity
from shared.bus.living_workers import living_workers
from shared.bus.messages import Message, Status, datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.prefixes import Prefixes, halves_of
from shared.process.lifecycle import OK, USAGE, Lifecycle, OperatorError
from shared.settings.model import Settings

TICK_MS: Final = 500
PATIENCE_SECONDS: Final = 2.0
"""Ingest answers a new subscription at once; if it has not by then, it is not there."""
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
    names = [stream.name for stream in settings.streams]
    if arguments.stream is not None and arguments.stream not in names:
        raise OperatorError(USAGE, f"no stream {arguments.stream!r}; the streams are: {', '.join(names)}")
    output = Output(sys.stdout.buffer, FORMS.get(arguments.form, as_text), arguments.count)
    printer = DatagramPrinter(output, arguments.stream or "all streams", arguments.prefix)
    lifecycle = Lifecycle()
    prefix = datagrams_topic(arguments.stream) if arguments.stream else ALL_DATAGRAMS
    workers = Workers(living_workers(settings.bus.path))
    with subscribed(settings, prefix, Borrower) as subscriber:
        subscriber.subscribe(REPORTS)
        _print_until_told(lifecycle, subscriber, printer, workers, output)
    printer.report_progress(last=True)
    return OK


def _print_until_told(
    lifecycle: Lifecycle, subscriber: Subscriber, printer: "DatagramPrinter", workers: "Workers", output: Output
) -> None:
    poller = zmq.Poller()
    poller.register(subscriber.socket, zmq.POLLIN)
    poller.register(lifecycle.fileno(), zmq.POLLIN)
    poller.register(sys.stdout.fileno(), zmq.POLLERR)  # the reader has gone: noticed without a write
    while not (lifecycle.draining or output.full):
        if (sys.stdout.fileno(), zmq.POLLERR) in poller.poll(TICK_MS):
            return
        while not (lifecycle.draining or output.full) and (message := subscriber.receive()):
            printer.print_message(message)
            printer.report_progress()
            if isinstance(message.body, Status):
                workers.note(message.envelope.sender)
        printer.report_progress()
        workers.report_silent()  # after all that had come


class Workers:
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


class DatagramPrinter:
    """Prints wanted datagrams, and reports missed ones on standard error."""

    def __init__(self, output: Output, what: str, wanted_prefix: str | None) -> None:
        self._output = output
        self._what = what
        self._wanted = Prefixes([wanted_prefix]) if wanted_prefix else None
        self._continuity = Continuity()
        self._connected = False
        self._missed = self._missed_said = 0
        self._speak_at = time.monotonic() + PATIENCE_SECONDS

    def print_message(self, message: Message) -> None:
        """Print a message's datagrams, unless it is a repeat. A message without any shows that ingest is there."""
        if message.batch is None:
            return
        missed = self._continuity.observe(message.topic, message.envelope, len(message.batch))
        if missed is None:
            return
        self._missed += missed
        if not self._connected:
            self._connected, self._speak_at = True, 0.0
            say(f"watching {self._what}")
        datagrams: Iterator[tuple[str, int, bytes]] = message.batch.datagrams()
        if self._wanted:
            datagrams = compress(datagrams, self._wanted.match(halves_of(message.batch)))
        self._output.write(datagrams)

    def report_progress(self, *, last: bool = False) -> None:
        """Report datagrams missed, at most once a second, or that no ingest answers."""
        now = time.monotonic()
        if now < self._speak_at and not last:
            return
        if self._missed > self._missed_said:
            self._missed_said, self._speak_at = self._missed, now + 1.0
            say(f"{self._missed} datagrams missed so far: they come faster than they are printed")
        elif not self._connected and not last:
            self._speak_at = float("inf")
            say(f"waiting for ingest: no worker publishes {self._what} yet")
