"""What other replicators' receiver files come to: receivers by line, and settings made of them. No I/O.

Each tool has a module with a `parse_line`; what it can't express is said in `left_out`, what differs in `notes`.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from services.operator.cli.numbers import parse_whole
from shared.client import Source
from shared.settings.model import Collector, Settings, Stream, Transmitter


class Names(Protocol):
    """Looks up what a file names. ValueError when there is no such thing."""

    def address(self, host: str) -> str:
        """The first address of a host; an address is its own."""

    def port(self, service: str) -> int:
        """The number of a UDP service; a number is its own."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Who gets copies, of which sources (none: of all), 1 in `sample` of them."""

    address: str
    port: int
    prefixes: tuple[str, ...] = ()
    sample: int = 1
    hop_limit: int = 64


@dataclass(slots=True)
class Line:
    """A line of a file: its receivers, whether they share the sources, and what a person should hear about it."""

    number: int
    receivers: list[Receiver] = field(default_factory=list)
    shared: bool = False
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


ParseLine = Callable[[str, Line, Names], None]


def parse(text: str, parse_line: ParseLine, names: Names) -> list[Line]:
    """Read a file; ValueError names the line that could not be understood."""
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        line = Line(number)
        try:
            parse_line(content, line, names)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        lines.append(line)
    return lines


def to_settings(lines: Sequence[Line], stream: Stream, source: Source) -> Settings:
    """One stream, and a collector a receiver, named by its line. ValueError names the line."""
    collectors = tuple(collector for line in lines for collector in _collectors(line, stream.name, source))
    destinations = Transmitter().destinations
    if source == "original":
        allowed = [ipaddress.ip_network(text) for text in destinations]
        addresses = dict.fromkeys(ipaddress.ip_address(collector.address) for collector in collectors)
        beyond = [each for each in addresses if not any(each in network for network in allowed)]
        destinations += tuple(f"{each}/{each.max_prefixlen}" for each in beyond)
    return Settings(streams=(stream,), collectors=collectors, transmitter=Transmitter(destinations=destinations))


def _collectors(line: Line, stream: str, source: Source) -> list[Collector]:
    group = f"line-{line.number}" if line.shared and len(line.receivers) > 1 else ""
    collectors: dict[str, Collector] = {}
    for receiver in line.receivers:
        name = f"line-{line.number}-{receiver.address}-{receiver.port}"
        if name in collectors:  # it gets so many copies
            name += f"-{len(collectors) + 1}"
        fields = {
            "name": name,
            "streams": [stream],
            "address": receiver.address,
            "port": receiver.port,
            "source": source,
            "from": list(receiver.prefixes),
            "sample": receiver.sample,
            "group": group,
            "hop_limit": receiver.hop_limit,
        }
        try:
            collectors[name] = msgspec.convert(fields, Collector)
        except msgspec.ValidationError as error:
            raise ValueError(f"line {line.number}: {receiver.address}: {error}") from None
    return list(collectors.values())


def parse_number(text: str, smallest: int, largest: int, what: str) -> int:
    """A number between both. ValueError says what it was to be."""
    try:
        return parse_whole(text, smallest, largest)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
