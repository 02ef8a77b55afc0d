"""The facts, gathered from /proc, /sys, netlink and the bus; missing ones are left out, and nothing is changed."""

import ctypes
import errno
import os
import pwd
import resource
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from shutil import which
from typing import Final

from services.operator.client.bus_reader import subscribed
from services.operator.doctor.host import BACKLOG_NAME, BUDGET_NAME, HostFacts, ListeningSocket, Softnet
from services.operator.doctor.network_paths import NetworkFacts, NetworkPath
from services.operator.doctor.services import RawSocketFacts, ServiceFacts
from shared.bus.endpoint import open_link
from shared.bus.living_workers import living_workers
from shared.bus.messages import Status
from shared.bus.status import INTERVAL_SECONDS, Report, Reports
from shared.bus.zmq_sockets import broker_is_up, check_directory
from shared.ledger.accounts import Accounts
from shared.net.addresses import resolve
from shared.net.netlink import RTN_LOCAL, Link, Netlink
from shared.net.queues import Queue, Queues
from shared.net.udp_sockets import UdpSocket, udp_sockets
from shared.process.file_locks import lock_at_once
from shared.settings.entries import Stream
from shared.settings.location import VARIABLE
from shared.settings.model import Settings
from shared.settings.own_listeners import udp_listeners

SYSCTLS: Final = (
    *("net.core.rmem_max", "net.core.wmem_max", BACKLOG_NAME, BUDGET_NAME),
    *("net.netfilter.nf_conntrack_count", "net.netfilter.nf_conntrack_max"),
)
LISTEN_SECONDS: Final = INTERVAL_SECONDS + 0.2
"""Every service reports to a new subscriber at once, and then each second."""
LOOPBACK: Final = "lo"
CLEANED: Final = frozenset({Path("/tmp"), Path("/var/tmp")})
CAP_NET_RAW: Final = 13
STA_UNSYNC: Final = 0x40
TIMEX_SIZE: Final = 208
"""Bytes: struct timex of adjtimex(2), at its largest."""
STATUS_AT: Final = 5 * ctypes.sizeof(ctypes.c_long)
"""Offset of its `status`, behind an int, padding, and four longs."""
NO_LIMIT: Final = 1 << 20
"""The kernel's own limit, fs.nr_open, where there is no other."""


def host_facts(settings: Settings, links: Iterable[Link]) -> HostFacts:
    """Return the facts of this host, from the kernel."""
    conf = "net/ipv4/conf"
    everywhere = _number(f"{conf}/all/rp_filter") or 0
    filters = {link.name: _number(f"{conf}/{link.name}/rp_filter") for link in links if link.up}
    sockets = udp_sockets()
    return HostFacts(
        sysctls={name: value for name in SYSCTLS if (value := _number(name.replace(".", "/"))) is not None},
        counters=dict(_counters()),
        softnet=_softnet(),
        reverse_path={
            name: max(everywhere, mode) for name, mode in filters.items() if mode is not None and name != LOOPBACK
        },
        listeners={stream.name: _listeners(stream, sockets) for stream in settings.streams},
        time=time.time(),
        synchronised=_synchronised(),
    )


def _read(path: str) -> str:
    """Return a file's text; nothing where there is no such file, or this user may not read it."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _number(name: str) -> int | None:
    words = _read(f"/proc/sys/{name}").split()
    return int(words[0]) if words and words[0].isdigit() else None


def _counters() -> Iterator[tuple[str, int]]:
    for line in _read("/proc/thread-self/net/snmp6").splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("Udp6"):
            yield name, int(value)
    for file, table, prefix in (("snmp", "Udp:", "Udp"), ("netstat", "TcpExt:", "")):
        rows = [line.split() for line in _read(f"/proc/thread-self/net/{file}").splitlines() if line.startswith(table)]
        for names, values in zip(rows[::2], rows[1::2], strict=False):
            yield from ((prefix + name, int(value)) for name, value in zip(names[1:], values[1:], strict=False))


def _softnet() -> Softnet | None:
    rows = [line.split() for line in _read("/proc/thread-self/net/softnet_stat").splitlines()]
    if not rows:
        return None
    return Softnet(*(sum(int(row[column], 16) for row in rows) for column in range(3)))


def _listeners(stream: Stream, sockets: Iterable[UdpSocket]) -> list[ListeningSocket]:
    has_ipv6 = Path("/proc/thread-self/net/if_inet6").exists()
    where = {
        (str(at[0]), endpoint.port)
        for endpoint in stream.endpoints
        if endpoint.scheme == "udp"
        for at in _resolved("0.0.0.0" if endpoint.host == "::" and not has_ipv6 else endpoint.host, endpoint.port)
    }
    return [
        ListeningSocket(each.receive_buffer, each.dropped) for each in sockets if (each.address, each.port) in where
    ]


def _resolved(host: str, port: int) -> list[tuple[str, int] | tuple[str, int, int, int]]:
    try:
        return [at for _, at in resolve(host, port, socket.SOCK_DGRAM)]
    except OSError:
        return []


def _synchronised() -> bool | None:
    timex = ctypes.create_string_buffer(TIMEX_SIZE)  # modes 0: only read
    if ctypes.CDLL(None).adjtimex(timex) < 0:
        return None
    return not ctypes.c_int.from_buffer(timex, STATUS_AT).value & STA_UNSYNC


def network_facts(
    settings: Settings, netlink: Netlink, links: Iterable[Link], addresses: Iterable[str]
) -> NetworkFacts:
    """Return the routes that the kernel would take to these addresses; nothing is sent."""
    by_index = {link.index: link for link in links}
    queued: dict[int, list[Queue]] = {}
    with closing(Queues()) as queues:
        for queue in queues.all():
            queued.setdefault(queue.link_index, []).append(queue)
    mtus = [link.mtu for link in by_index.values() if link.up and link.name != LOOPBACK]
    return NetworkFacts(
        paths={address: _network_path(netlink, by_index, queued, address) for address in set(addresses)},
        longest_mtu=max([NetworkFacts().longest_mtu, *mtus]),
        listeners=udp_listeners(settings),
        vendor=_read("/sys/class/dmi/id/sys_vendor").strip(),
    )


def _network_path(
    netlink: Netlink, links: dict[int, Link], queued: dict[int, list[Queue]], address: str
) -> NetworkPath | None:
    route = netlink.route(address)
    if route is None or (link := links.get(route.link_index)) is None:
        return None
    state = netlink.neighbour(link.index, route.next_hop).state if link.ethernet else 0
    return NetworkPath(
        route.kind == RTN_LOCAL,
        link.name,
        link.up,
        route.mtu or link.mtu,
        link.mtu,
        route.next_hop,
        state,
        mtu_known=bool(route.mtu),
        queues=queued.get(link.index, ()),
    )


def service_facts(settings: Settings, reports: list[Report], gateway: str, config: Path | None = None) -> ServiceFacts:
    """Return the visible facts of the services; `reports` are theirs, `gateway` is the reason of its silence.

    Of a bus on another host, neither the files nor the processes are looked for here.
    """
    directory, here = settings.bus.path, not settings.bus.connect
    bus = _bus_trouble(directory)
    broker = None if bus else broker_is_up(directory, open_link(settings.bus, "operator"))
    limits = {report.service: limit for report in reports if here and (limit := _descriptors_of(report.pid))}
    return ServiceFacts(
        bus=bus,
        as_owner=_as_owner(directory, config),
        removed=list(_removed(settings, gateway=not gateway)) if here and broker else [],
        cleaned=here and not bus and _is_cleaned(directory),
        broker=broker,
        gateway=gateway,
        accounts=by_service(reports),
        workers=[] if bus else living_workers(directory),
        descriptors={**limits, "": _hard_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1])},
        raw=_raw_sockets(settings.transmitter.user),
    )


def listen(settings: Settings, seconds: float = LISTEN_SECONDS) -> list[Report]:
    """Return the last report of every service that reports; none where this user can use no bus."""
    if _bus_trouble(settings.bus.path) or not broker_is_up(settings.bus.path, open_link(settings.bus, "operator")):
        return []
    reports, deadline = Reports(), time.monotonic() + seconds
    with subscribed(settings, "status/") as subscriber:
        while (left := deadline - time.monotonic()) > 0:
            subscriber.socket.poll(int(left * 1000) + 1)
            while message := subscriber.receive():
                if isinstance(message.body, Status):
                    reports.add(message.envelope, message.body)
    return list(reports.latest.values())


def by_service(reports: Iterable[Report]) -> dict[str, Accounts]:
    """Return the accounts by name; two processes of one name, which is a fault, are told apart by process id."""
    accounts: dict[str, Accounts] = {}
    for report in reports:
        taken = report.service in accounts
        accounts[f"{report.service} (process {report.pid})" if taken else report.service] = report.accounts
    return accounts


def _bus_trouble(directory: Path) -> str:
    """Return the fault of the bus directory; nothing where it does not exist yet, as the broker makes it."""
    try:
        if directory.exists():  # else the check would make it
            check_directory(directory)
            if not os.access(directory, os.X_OK):
                return "this user may not enter it"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _as_owner(directory: Path, config: Path | None) -> str:
    """Return the command that does the same as the owner of the bus directory, of whose PATH nothing is known."""
    try:
        owner = directory.owner()
    except (OSError, KeyError):
        owner = "fanwire"
    program = Path(sys.prefix, "bin", "fanwire")
    named = config or os.environ.get(VARIABLE)
    options = ["--config", str(Path(named).absolute())] if named else []
    return shlex.join(["sudo", "-u", owner, str(program) if program.exists() else "fanwire", "doctor", *options])


def _removed(settings: Settings, *, gateway: bool) -> Iterator[str]:
    """Yield files that are gone though the broker, or the gateway if it runs, has them open."""
    lock = settings.bus.path / "lock"
    if not lock.exists():
        yield str(lock)
    if gateway and settings.database is not None and not settings.database.exists():
        yield str(settings.database)


def _is_cleaned(directory: Path) -> bool:
    """Return whether systemd-tmpfiles would empty the directory: it skips what is locked (tmpfiles.d(5), Age)."""
    if not directory.is_dir() or not CLEANED & {*directory.resolve().parents} or which("systemd-tmpfiles") is None:
        return False
    try:
        os.close(lock_at_once(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)))
    except OSError:
        return False
    return True


def _descriptors_of(pid: int) -> int:
    """Return the hard limit of open files, to which a service raises its own."""
    for line in _read(f"/proc/{pid}/limits").splitlines():
        if line.startswith("Max open files"):
            hard = line.split()[4]
            return _hard_limit(int(hard) if hard.isdigit() else resource.RLIM_INFINITY)
    return 0


def _hard_limit(limit: int) -> int:
    return NO_LIMIT if limit == resource.RLIM_INFINITY else limit


def _raw_sockets(user: str) -> RawSocketFacts:
    lines = dict(line.split(":", 1) for line in _read("/proc/thread-self/status").splitlines())
    return RawSocketFacts(
        failed=_try_raw_socket(),
        in_bounds=bool(int(lines.get("CapBnd", "-1"), 16) >> CAP_NET_RAW & 1),
        no_new_privileges=lines.get("NoNewPrivs", "").strip() == "1",
        unfit=_unfit(user) if os.geteuid() == 0 else "",
    )


def _try_raw_socket() -> int:
    """Return the errno of opening a packet socket; with protocol 0 it receives nothing, and nothing is sent."""
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except OSError as error:
        return error.errno or errno.EPERM
    return 0


def _unfit(name: str) -> str:
    """Return why root's transmitter could not become this user, as it must where root is root outside too."""
    if _read("/proc/self/uid_map").split()[:2] != ["0", "0"]:
        return ""
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        return "" if name.isdigit() else f"there is no [transmitter] user {name!r}"
    groups = set(os.getgrouplist(entry.pw_name, entry.pw_gid))
    for path in (Path(sys.executable).resolve(), Path(__file__).resolve()):
        for part in (path, *path.parents):
            with suppress(OSError):
                found = part.stat()
                shift = 6 if found.st_uid == entry.pw_uid else 3 if found.st_gid in groups else 0
                if not found.st_mode >> shift & (4 if part is path else 1):
                    return f"[transmitter] user {name!r} can't read {path}: closed at {part}"
    return ""
