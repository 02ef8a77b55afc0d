"""Source-preserving copies: how many datagrams a second the transmitter sends, from a message of the bus to the wire.

The wire is an `ifb` device that frees every frame at once, in a network namespace of its own: what is measured is the
sender alone. Beside it what others do: raw IP, one datagram a call; and a bare loop that hands the kernel frames with
PACKET_VNET_HDR, built before it began, as long as the runs of one source in a batch are.

The transmitter takes along what waits on the bus, so it is measured with one message waiting, and with as many as it
takes along under load.
"""

import argparse
import ctypes
import json
import os
import random
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np

from services.transmitter.packet_socket import PacketSocket
from services.transmitter.plan import FramePlan
from services.transmitter.privileges import KINDS, RawSockets
from services.transmitter.sender import Sender
from shared.addresses import pack_address
from shared.batch import MAX_ROWS, DatagramBatch, make_rows
from shared.gathering import MAX_GATHERED, Gathered
from shared.ledger import DELIVERED
from shared.mmsg import IOVEC, send
from shared.registry import Client
from shared.routing import ALL_ROWS
from shared.settings import Settings
from shared.sockets import enlarge_send_buffer
from shared.wire import Datagrams, Part, datagrams_topic, decode, encode
from tests.lab import enter_lab
from tests.network import End, Host, sink

SIZE = 200
COLLECTOR = "10.78.0.2"
DATAGRAMS = 300_000
UNDER_LOAD = MAX_GATHERED // MAX_ROWS


def runs_of(length: int) -> list[int]:
    """Which exporter each datagram of a batch comes from: runs of `length` from each."""
    return [row // length for row in range(MAX_ROWS)]


def mix() -> list[int]:
    """64 exporters in bursts of 1 to 8."""
    draw, found = random.Random(3), list[int]()
    while len(found) < MAX_ROWS:
        found += [draw.randrange(64)] * draw.randint(1, 8)
    return found[:MAX_ROWS]


WORKLOADS = {**{f"runs of {length}": runs_of(length) for length in (1, 4, 16, 64)}, "64 exporters": mix()}


def batch_of(exporters: list[int]) -> DatagramBatch:
    """A batch of datagrams of these exporters."""
    addresses = [pack_address(f"10.88.{exporter // 250}.{exporter % 250 + 1}") for exporter in exporters]
    return DatagramBatch("messages", 0, make_rows([SIZE] * MAX_ROWS, addresses, 514), bytes(SIZE * MAX_ROWS))


def message_of(batch: DatagramBatch) -> list[Part]:
    """The batch as it comes over the bus."""
    body = Datagrams(batch.stream, 0)
    parts = encode(datagrams_topic(batch.stream), body, sender="ingest.1", boot=1, sequence=0, total=0, batch=batch)
    return [bytes(part) for part in parts]


class Bench:
    """The transmitter's sender, with one collector on the sink."""

    def __init__(self, opened: ExitStack) -> None:
        sockets = {kind: tuple(opened.enter_context(raw_socket(*KINDS[kind])) for _ in range(2)) for kind in KINDS}
        self.packet, self.ip = sockets["packet"][0], sockets["ip4"][0]
        raw = RawSockets(sockets["packet"][1:], sockets["ip4"][1:], sockets["ip6"][1:])
        self.sender = opened.enter_context(closing(Sender(Settings(), raw)))
        self.account: Counter[str] = Counter()
        self.copies = self.sender.reach(Client("c", 1, COLLECTOR, 2055, ("*",)), self.account)

    def fanwire(self, exporters: list[int], together: int) -> int:
        """Send through the transmitter, so many messages of the bus at a time; return how many datagrams left."""
        message, before = message_of(batch_of(exporters)), self.account[DELIVERED]
        for _ in range(DATAGRAMS // (MAX_ROWS * together)):
            batches = [batch for _ in range(together) if (batch := decode(message).batch)]
            self.sender.send(Gathered(batches), [(self.copies, ALL_ROWS)])
        return self.account[DELIVERED] - before

    def _plan(self, exporters: list[int], *, link: bool) -> FramePlan:
        plan, way = FramePlan(), self.copies.way
        plan.build(Gathered([batch_of(exporters)]), None, 4, way.mtu, link=link, segmentation=link)
        target = self.copies.target(way)
        plan.address(target, PacketSocket(self.packet).name(target), self.copies.numbers)
        return plan

    def bare(self, exporters: list[int]) -> int:
        """Hand the kernel frames that were built before, and nothing else."""
        plan = self._plan(exporters, link=True)
        for _ in range(DATAGRAMS // MAX_ROWS):
            at = 0
            while at < plan.frames:
                taken, error = send(self.packet.fileno(), plan.messages, at, plan.frames)
                assert taken, os.strerror(error)
                at += taken
        return DATAGRAMS // MAX_ROWS * MAX_ROWS

    def one_by_one(self, exporters: list[int]) -> int:
        """Send by raw IP, a call for each datagram, as replicators do."""
        plan = self._plan(exporters, link=False)
        packets = [b"".join(memory_of(message)) for message in plan.messages[: plan.frames]]
        for _ in range(DATAGRAMS // MAX_ROWS):
            for packet in packets:
                self.ip.sendto(packet, (COLLECTOR, 0))
        return DATAGRAMS // MAX_ROWS * MAX_ROWS


def raw_socket(family: int, kind: int, protocol: int) -> socket.socket:
    """A socket as the opener makes them."""
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    enlarge_send_buffer(sock, 1 << 22)
    return sock


def memory_of(message: np.void) -> Iterator[bytes]:
    """The pieces of memory that a message is gathered from."""
    iovecs = np.frombuffer(ctypes.string_at(int(message["iov"]), int(message["iovlen"]) * IOVEC.itemsize), IOVEC)
    for base, size in iovecs.tolist():
        yield ctypes.string_at(base, size)


def rate_of(send_all: Callable[[], int], rounds: int) -> float:
    """Datagrams a second, the median of several rounds."""
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        count = send_all()
        rates.append(count / (time.perf_counter() - began))
        assert count >= DATAGRAMS - MAX_GATHERED, f"only {count} datagrams left"
    return statistics.median(rates)


def main() -> None:
    """Measure every workload each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if refused := enter_lab():
        sys.exit(f"needs a network namespace of its own, and {refused}")
    found = []
    with ExitStack() as opened:
        host = opened.enter_context(Host())
        opened.enter_context(sink(End(host, "sink", "10.78.0.1/24"), COLLECTOR))
        opened.enter_context(host.entered())
        bench = Bench(opened)
        for name, exporters in WORKLOADS.items():
            ways = {
                "raw IP, one a call": partial(bench.one_by_one, exporters),
                "bare VNET_HDR loop": partial(bench.bare, exporters),
                "fanwire, one message waits": partial(bench.fanwire, exporters, 1),
                "fanwire under load": partial(bench.fanwire, exporters, UNDER_LOAD),
            }
            rates = {way: rate_of(send_all, arguments.rounds) for way, send_all in ways.items()}
            first = rates["raw IP, one a call"]
            for way, rate in rates.items():
                print(f"{name:12} {way:28} {rate:12,.0f}/s  x{rate / first:5.2f}")
            found.append({"workload": name, "rates": rates})
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
