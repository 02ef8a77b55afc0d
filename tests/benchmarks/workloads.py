"""Datagrams of exporters: sizes, bursts and payloads that look like the protocol they are named after.

Every payload ends in a mark of 13 characters: exporter and number in hexadecimal, and `P` where the datagram is a
probe, whose way through the relay is timed, else `.`.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

MARK_SIZE: Final = 13
PROBE: Final = ord("P")
PROBE_EVERY: Final = 64


@dataclass(frozen=True)
class Workload:
    """`count` datagrams by so many exporters in turn, each sending `burst` of them in a row; `mtu` is of every link."""

    name: str
    count: int
    exporters: int
    burst: int
    size: Callable[[random.Random], int]
    head: bytes
    mtu: int = 1500
    streams: int = 1
    """Number of ports that they send to, each exporter to one."""
    trains: bool = False
    """True if a burst comes as one piece, as a network card hands it over."""
    whole: bool = False
    """True if collectors take such pieces too, so that nothing cuts them on the sender's time: behind a cable a card
    does that, or another host's kernel. All datagrams are equally long then."""

    def exporter(self, number: int) -> int:
        """Return the exporter of the datagram with that number."""
        return number // self.burst % self.exporters

    def payloads(self) -> list[bytes]:
        """Every datagram's payload, the same in every run."""
        draw, body = random.Random(7), self.head + bytes(range(32, 127)) * 90
        return [body[: self.size(draw) - MARK_SIZE] + self._mark(number) for number in range(self.count)]

    def _mark(self, number: int) -> bytes:
        return b"%04x%08x%c" % (self.exporter(number), number, PROBE if number % PROBE_EVERY == 0 else ord("."))


def exporter_address(number: int) -> IPv4Address:
    """The address of an exporter."""
    return IPv4Address(f"10.81.{1 + number // 250}.{1 + number % 250}")


def read_mark(payload: bytes) -> tuple[int, int]:
    """Return exporter and number."""
    return int(payload[-13:-9], 16), int(payload[-9:-1], 16)


NETFLOW: Final = struct.pack(">HHIIIIBBH", 5, 30, 1, 1, 1, 1, 0, 0, 0)
"""Version 5, 30 records: with them 1,464 bytes, as most routers send them."""
SFLOW: Final = struct.pack(">II4sIIII", 5, 1, bytes((10, 81, 0, 1)), 0, 1, 1, 0)
SYSLOG: Final = b"<134>1 2026-01-01T00:00:00Z router app 1 - - "

WORKLOADS: Final = (
    Workload("netflow", 40_000, 16, 16, lambda _: 1464, NETFLOW),
    Workload("trains", 40_000, 16, 16, lambda _: 1464, NETFLOW, trains=True),
    Workload("cable", 40_000, 16, 16, lambda _: 1464, NETFLOW, trains=True, whole=True),
    Workload("syslog", 60_000, 500, 1, lambda draw: min(400, max(80, int(draw.lognormvariate(5.2, 0.4)))), SYSLOG),
    Workload("sflow", 40_000, 64, 4, lambda draw: draw.randint(64, 350) * 4, SFLOW),
    Workload("small", 80_000, 4, 64, lambda _: 200, SYSLOG),
    Workload("jumbo", 10_000, 16, 8, lambda _: 8000, NETFLOW, mtu=9000),
)
BY_NAME: Final = {workload.name: workload for workload in WORKLOADS}
