"""`fanwire tap`: writes the datagrams of a stream, or those for a collector, into a capture as they pass the bus."""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
import zmq

from services.operator.cli.arguments import Subparsers, add_command, positive_number, prefix
from services.operator.cli.capture_output import CaptureOutput
from services.operator.cli.numbers import counted
from services.operator.cli.output import NO_ROOM, STANDARD_OUTPUT, add_count_argument, open_capture, say
from services.operator.client.bus_reader import subscribed
from services.operator.client.datagram_reader import DatagramReader
from services.operator.client.running_streams import streams_of
from shared.bus.loans.borrower import Borrower
from shared.bus.messages import REGISTRY_TOPIC, Message, RegistryChange, RegistrySnapshot, datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.capture.destination import destination_at, destination_of
from shared.client import ALL_STREAMS, Client
from shared.datagrams.batch import DatagramBatch, Indices
from shared.datagrams.prefix_set import Prefixes, halves_of
from shared.datagrams.routing import Router
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.snapshot_request import SnapshotRequest
from shared.process.lifecycle import FAILED, OK, UNAVAILABLE, USAGE, Lifecycle, OperatorError
from shared.settings.entries import Stream
from shared.settings.explain import did_you_mean
from shared.settings.model import Settings

REGISTRY_SECONDS: Final = 3.0
"""Time that the gateway may take to tell who is registered."""
QUIET_SECONDS: Final = 2.0
"""Time without any datagram after which we say so."""
TICK_MS: Final = 200


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "tap", run, "write datagrams as they come in into a capture, for tshark")
    parser.add_argument("what", metavar="STREAM|COLLECTOR", help="a stream, or what a collector should get")
    parser.add_argument(
        "--write", type=Path, required=True, metavar="FILE.pcapng", help="a new file; -: standard output, for a pipe"
    )
    parser.add_argument("--from", dest="prefix", type=prefix, metavar="CIDR", help="only datagrams of these exporters")
    add_count_argument(parser)
    parser.add_argument("--seconds", type=positive_number, metavar="N", help="end after N seconds")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Write until Ctrl-C, until the time is over, or until the wanted number was written."""
    lifecycle = Lifecycle()
    streams = streams_of(settings)
    with ExitStack() as closing:
        subscriber = closing.enter_context(subscribed(settings, REGISTRY_TOPIC, Borrower))
        stream = streams.get(arguments.what)
        tapped = StreamTap(stream) if stream else _tap_collector(subscriber, arguments.what, list(streams))
        for topic in tapped.topics:
            subscriber.subscribe(topic)
        file = open_capture(arguments.write, closing)
        try:
            output = CaptureOutput(file, arguments.what, tapped.destination, arguments.count)
            _write(lifecycle, subscriber, tapped, output, arguments)
        except OSError as error:
            if arguments.write == STANDARD_OUTPUT or error.errno not in NO_ROOM:
                raise
            raise OperatorError(FAILED, f"{arguments.write}: {error.strerror}; the capture ends here") from None
    return OK


class StreamTap:
    """All datagrams of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.topics = [datagrams_topic(stream.name)]
        self.destination = destination_of(stream.endpoints)

    def heed(self, message: Message) -> None:
        """Ignore the registry: a stream is the same for all."""

    def rows(self, _batch: DatagramBatch) -> Indices | None:
        """Return the rows to be written; None for all."""
        return None


class CollectorTap:
    """The datagrams that a collector should get, with its address as their destination.

    It follows the registry, so what the collector asks for in the meantime counts too.
    """

    def __init__(self, client: Client, registry: RegistryReplica, subscriber: Subscriber) -> None:
        self._name, self._source, self._registry = client.name, client.source, registry
        self._snapshot = SnapshotRequest(subscriber)
        self._router = Router()
        self._route()
        topics = map(datagrams_topic, client.streams)
        self.topics = ["datagrams/"] if ALL_STREAMS in client.streams else list(topics)
        self.destination = destination_at((client.address, client.port))

    def _route(self) -> None:
        """Route as the sender of these copies does; the members of a group share, so all have a route."""
        clients = self._registry.clients.values()
        self._router.replace(each for each in clients if each.streams and each.source == self._source)

    def heed(self, message: Message) -> None:
        """Apply a change of the registry."""
        if isinstance(message.body, RegistrySnapshot | RegistryChange):
            self._registry.apply_message(message.envelope, message.body)
            self._route()
        if self._registry.stale:
            self._snapshot.ask()

    def rows(self, batch: DatagramBatch) -> Indices | None:
        """Return the rows to be written; None for all."""
        for client, selection in self._router.route(batch):
            if client.name == self._name:
                return selection.indices
        return np.empty(0, np.intp)


def _tap_collector(subscriber: Subscriber, name: str, streams: list[str]) -> CollectorTap:
    """Wait for the registry, and look the collector up there."""
    registry, deadline = RegistryReplica(), time.monotonic() + REGISTRY_SECONDS
    while registry.revision < 0:
        if (left := deadline - time.monotonic()) <= 0:
            raise OperatorError(
                UNAVAILABLE, f"{name!r} is no stream, and no gateway tells who is registered; the streams are: "
                f"{', '.join(streams)}",
            )  # fmt: skip
        subscriber.socket.poll(int(left * 1000) + 1)
        while message := subscriber.receive():
            if isinstance(message.body, RegistrySnapshot | RegistryChange):
                registry.apply_message(message.envelope, message.body)
    client, known = registry.clients.get(name), [*streams, *registry.clients]
    if client is None or not client.streams:
        where = f"the streams are: {', '.join(streams)}; `fanwire clients` lists the collectors"
        raise OperatorError(USAGE, f"no stream or collector {name!r}{did_you_mean(name, known)}; {where}")
    return CollectorTap(client, registry, subscriber)


def _write(
    lifecycle: Lifecycle,
    subscriber: Subscriber,
    tapped: StreamTap | CollectorTap,
    output: CaptureOutput,
    arguments: argparse.Namespace,
) -> None:
    reader = DatagramReader("tapping", arguments.what, "written")
    wanted = Prefixes([arguments.prefix]) if arguments.prefix else None
    poller = zmq.Poller()
    poller.register(subscriber.socket, zmq.POLLIN)
    poller.register(lifecycle.fileno(), zmq.POLLIN)
    started = time.monotonic()
    end_at, quiet_at = started + (arguments.seconds or float("inf")), started + QUIET_SECONDS
    while not (lifecycle.draining or output.full) and time.monotonic() < end_at:
        poller.poll(int(min(TICK_MS, 1000 * max(0.0, end_at - time.monotonic()))))
        while not (lifecycle.draining or output.full) and (message := subscriber.receive()):
            tapped.heed(message)
            if batch := reader.take(message):
                rows = tapped.rows(batch)
                if wanted:
                    passing = np.flatnonzero(wanted.match(halves_of(batch)))
                    rows = passing if rows is None else np.intersect1d(rows, passing, assume_unique=True)
                output.write_rows(batch, rows)
            reader.report_progress()
        reader.report_progress()
        if time.monotonic() >= quiet_at:
            quiet_at = float("inf")
            if not output.written and reader.connected_at is not None:
                say(f"{_nothing(arguments)} in {QUIET_SECONDS:g} s; waiting")
    reader.report_progress(last=True)
    if output.written:
        where = "standard output" if arguments.write == STANDARD_OUTPUT else arguments.write
        say(f"{counted(output.written, 'datagram')} in {where}")
    else:
        say(f"{_nothing(arguments)}; `fanwire streams` shows which streams flow")


def _nothing(arguments: argparse.Namespace) -> str:
    exporters = f" from {arguments.prefix}" if arguments.prefix else ""
    return f"warning: no datagram of {arguments.what}{exporters} has come"
