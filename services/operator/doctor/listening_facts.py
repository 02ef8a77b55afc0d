"""The facts about listeners, gathered from files and /proc; nothing is changed."""

import ipaddress
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from services.operator.doctor.listening import ListeningFacts, PathSeen
from shared.bus.port_sharers import workers_of_other_buses
from shared.net.addresses import Endpoint, resolve
from shared.net.multicast import is_multicast
from shared.settings.model import Settings

IsLocal = Callable[[str], bool]


def listening_facts(settings: Settings, is_local: IsLocal | None) -> ListeningFacts:
    """Check every listener of every stream; `is_local` says whether an address is this host's, None: unknown."""
    endpoints = [endpoint for stream in settings.streams for endpoint in stream.endpoints]
    joined = set(_joined())
    found = {str(each): address for each in endpoints if is_local and (address := _unassigned(each, is_local))}
    return ListeningFacts(
        paths={str(each): _path_seen(Path(each.path)) for each in endpoints if each.path},
        groups={str(each): _is_joined(each.host, joined) for each in endpoints if is_multicast(each.host)},
        unassigned=found,
        shared={} if settings.ingest.share_ports else dict(_shared(endpoints, settings.bus.path)),
    )


def _shared(endpoints: Iterable[Endpoint], directory: Path) -> Iterator[tuple[str, str]]:
    for endpoint in endpoints:
        for worker in () if is_multicast(endpoint.host) else workers_of_other_buses(endpoint, directory):
            yield str(endpoint), f"the ingest worker with pid {worker.pid}, of the bus in {worker.directory},"


def _path_seen(path: Path) -> PathSeen:
    try:
        mode = path.stat().st_mode
    except OSError:
        return PathSeen(False)
    closed = [parent for parent in path.parents if not parent.stat().st_mode & stat.S_IXOTH]
    return PathSeen(stat.S_ISSOCK(mode), stat.S_IMODE(mode), str(closed[-1]) if closed else "")


def _joined() -> Iterator[tuple[str, str]]:
    """Yield every group with the interface on which it is joined, from /proc/net/igmp and igmp6 (proc(5))."""
    interface = ""
    for line in _lines("igmp")[1:]:
        words = line.split()
        if not line.startswith("\t"):
            interface = words[1]
        else:
            packed = int(words[0], 16).to_bytes(4, sys.byteorder)
            yield socket.inet_ntop(socket.AF_INET, packed), interface
    for line in _lines("igmp6"):
        _, interface, group, *_ = line.split()
        yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(group)), interface


def _lines(name: str) -> list[str]:
    try:
        return Path("/proc/thread-self/net", name).read_text().splitlines()
    except OSError:
        return []


def _is_joined(host: str, joined: set[tuple[str, str]]) -> bool:
    group, _, wanted = host.partition("%")
    text = str(ipaddress.ip_address(group))
    return any(text == address and wanted in ("", interface) for address, interface in joined)


def _unassigned(endpoint: Endpoint, is_local: IsLocal) -> str:
    """Return an address of a listener that this host does not have; empty: it has all of them."""
    if endpoint.path or is_multicast(endpoint.host):
        return ""
    kind = socket.SOCK_STREAM if endpoint.scheme == "tcp" else socket.SOCK_DGRAM
    found: list[str] = []
    with suppress(OSError):
        found = [str(at[0]) for _, at in resolve(endpoint.host, endpoint.port, kind)]
    if endpoint.host == "localhost":  # bound as far as this host has it
        return ""
    return next((each for each in found if not _is_everywhere(each) and not is_local(each)), "")


def _is_everywhere(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return ip.is_unspecified or (ip.version == 6 and ip.is_link_local) or address == "255.255.255.255"
