"""Contents of other replicators' receiver files: receivers by line, and settings made of them. No I/O.

Each tool has a module with a `parse_line`; `left_out` names what it can't express, `notes` names differences.
"""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import msgspec

from services.operator.cli.numbers import parse_whole
from shared.client import Source
from shared.settings.entries import Collector, Stream
from shared.settings.model import Settings
from shared.settings.tables import Transmitter


class Names(Protocol):
    """Looks up the names in a file. ValueError when a text can't be one."""

    def address(self, host: str) -> str:
        """Return the first address of a host; an address stands for itself. LookupError when it has none now."""

    def receiver(self, host: str) -> str:
        """Return an address as it is written in settings, or a host name that settings may have, answered or not."""

    def port(self, service: str) -> int:
        """Return the number of a UDP service; a number stands for itself."""


@dataclass(frozen=True, slots=True)
class ForeignReceiver:
    """A receiver of copies of some sources (none: of all), 1 in `sample` of them; `address` may be a host name."""

    address: str
    port: int
    prefixes: tuple[str, ...] = ()
    sample: int = 1
    hop_limit: int = 64


@dataclass(slots=True)
class Line:
    """A line of a file: its receivers, whether they share the sources, and messages about it for a person."""

    number: int
    receivers: list[ForeignReceiver] = field(default_factory=list)
    shared: bool = False
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


ParseLine = Callable[[str, Line, Names], None]


def parse(text: str, parse_line: ParseLine, names: Names) -> list[Line]:
    """Read a file; ValueError names the line that could not be understood. One with an unknown host is left out."""
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        line = Line(number)
        try:
            parse_line(content, line, names)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        except LookupError as error:
            line = Line(number, left_out=[str(error.args[0])])
        lines.append(line)
    return lines


def to_settings(
    lines: Sequence[Line], stream: Stream, source: Source, hosts: Mapping[str, str] = MappingProxyType({})
) -> Settings:
    """Return one stream, and a collector a receiver, named by its line; `hosts` has addresses of host names.

    ValueError names the line.
    """
    collectors = tuple(collector for line in lines for collector in _collectors(line, stream.name, source))
    destinations = Transmitter().destinations
    if source == "original":
        allowed = [ipaddress.ip_network(text) for text in destinations]
        known = [hosts.get(each.host, "") if each.host else each.address for each in collectors]
        addresses = dict.fromkeys(ipaddress.ip_address(address) for address in known if address)
        beyond = [each for each in addresses if not any(each in network for network in allowed)]
        destinations += tuple(f"{each}/{each.max_prefixlen}" for each in beyond)
    return Settings(streams=(stream,), collectors=collectors, transmitter=Transmitter(destinations=destinations))


def _collectors(line: Line, stream: str, source: Source) -> list[Collector]:
    group = f"line-{line.number}" if line.shared and len(line.receivers) > 1 else ""
    collectors: dict[str, Collector] = {}
    for receiver in line.receivers:
        name = f"line-{line.number}-{receiver.address}-{receiver.port}"
        if name in collectors:  # it gets several copies
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
    """Return a number in a range. ValueError says what it should be."""
    try:
        return parse_whole(text, smallest, largest)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
