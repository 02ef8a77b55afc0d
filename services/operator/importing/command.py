"""`fanwire import`: settings from the receiver file of samplicator or pmacct, and a list of what they can't express."""

import argparse
import ipaddress
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from services.operator.cli.arguments import Subparsers, add_command, or_usage
from services.operator.cli.output import say
from services.operator.cli.progress import Progress
from services.operator.importing import pmacct, samplicator
from services.operator.importing.receivers import Line, parse, parse_number, to_settings
from shared.net.addresses import is_host_name, parse_endpoint, resolve
from shared.process.lifecycle import FAILED, OK
from shared.settings.entries import STREAM_SCHEMES, Stream
from shared.settings.explain import SettingsError
from shared.settings.file import render
from shared.settings.model import Settings
from shared.settings.values import Name

TOOLS: Final = {
    "samplicator": (samplicator.parse_line, samplicator.DEFAULT_LISTEN),
    "pmacct": (pmacct.parse_line, pmacct.DEFAULT_LISTEN),
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "import", run, "print settings made of another replicator's receiver file")
    parser.add_argument(
        "tool", choices=tuple(TOOLS), help="the program of the file: samplicator's -c FILE, or pmacct's tee_receivers"
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--stream", type=_stream_name, default="imported", metavar="NAME", help="default: imported")
    parser.add_argument(
        "--listen",
        type=_endpoint,
        action="append",
        metavar="ENDPOINT",
        help="a listener for exporters, as udp://HOST:PORT; default: every address, and the tool's own port",
    )
    parser.add_argument(
        "--source",
        choices=("relay", "original"),
        default="relay",
        help="original: samplicator's -S, pmacct's tee_transparent; default: relay",
    )


def _stream_name(text: str) -> str:
    try:
        return msgspec.convert(text, Name)
    except msgspec.ValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _endpoint(text: str) -> str:
    return str(or_usage(parse_endpoint, text, STREAM_SCHEMES))


class Lookup:
    """Looks up hosts and services; remembers the addresses of hosts, and those that have none, with the reason."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.found: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        self._progress = progress

    def address(self, host: str) -> str:
        """Do as `receivers.Names` says."""
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            pass
        if not (host and host.isprintable()):
            raise ValueError(f"{host!r} is not a host name or address")
        if host not in self.found and host not in self.unknown:
            if self._progress:
                self._progress.show(len(self.found) + len(self.unknown))
            try:
                self.found[host] = str(resolve(host, 0, socket.SOCK_DGRAM)[0][1][0])
            except OSError as error:
                self.unknown[host] = error.strerror or str(error)
        if host in self.unknown:
            raise LookupError(f"host {host!r} has no address: {self.unknown[host]}")
        return self.found[host]

    def receiver(self, host: str) -> str:
        """Do as `receivers.Names` says."""
        try:
            address = self.address(host)
        except LookupError:
            if not is_host_name(host):
                raise
            return host
        return host if is_host_name(host) else address

    def port(self, service: str) -> int:
        """Do as `receivers.Names` says."""
        try:
            return socket.getservbyname(service, "udp")
        except (OSError, ValueError):
            return parse_number(service, 1, 65_535, "port")


def run(arguments: argparse.Namespace, _settings: Settings) -> int:
    """Print the settings; print their gaps on stderr. Return 1 when anything was left out, or a host has no address."""
    parse_line, listen = TOOLS[arguments.tool]
    stream = Stream(name=arguments.stream, listen=tuple(arguments.listen or [listen]))
    try:
        with Progress("host names looked up") as progress:
            lookup = Lookup(progress)
            lines = parse(arguments.file.read_bytes().decode("utf-8", "backslashreplace"), parse_line, lookup)
        settings = to_settings(lines, stream, arguments.source, lookup.found)
    except OSError as error:
        raise SettingsError(f"{arguments.file}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{arguments.file}: {error}") from None
    sys.stdout.writelines(f"# {host!r} was {address} at the import\n" for host, address in lookup.found.items())
    print(render(settings, defaults=False), end="")
    return _tell(lines, settings, lookup.unknown)


def _tell(lines: list[Line], settings: Settings, unknown: Mapping[str, str]) -> int:
    """Print what a person should know; return the exit code."""
    for line in lines:
        for text in line.notes:
            say(f"line {line.number}: {text}")
        for text in line.left_out:
            say(f"line {line.number}: left out: {text}")
    named = {collector.host: collector for collector in settings.collectors}
    for host, reason in unknown.items():
        if host in named:
            also = "; add its address to [transmitter] destinations" if named[host].source == "original" else ""
            say(f"host {host!r} has no address now: {reason}; fanwire looks it up again while it runs{also}")
    if not settings.collectors:
        say("the imported lines name no receiver")
    return FAILED if unknown or any(line.left_out for line in lines) or not settings.collectors else OK
