"""Opens the sockets of a stream's listeners; a failure ends the start with one line that says the cure."""

import errno
import ipaddress
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from services.ingest.reuseport_sharing import is_shareable, share_port
from shared.bus.endpoint import open_link
from shared.bus.port_sharers import workers_of_other_buses
from shared.bus.zmq_sockets import broker_is_up
from shared.log import get_logger
from shared.net.addresses import Endpoint
from shared.net.bpf import refuse_mapped_sources
from shared.net.host_lookups import HostLookups
from shared.net.multicast import is_multicast, join_group
from shared.net.port_holders import holder
from shared.net.sockets import InheritedSocket, PathSocket, bind_endpoint, close_listener, inherited, try_endpoint
from shared.process.lifecycle import BAD_SETTINGS, FAILED, OperatorError
from shared.settings.entries import Stream
from shared.settings.model import Settings

TCP_BACKLOG: Final = 1024
UNPRIVILEGED_PORT: Final = 1024
"""The first port that a user may bind, unless net.ipv4.ip_unprivileged_port_start says otherwise."""

StreamEndpoint = tuple[str, Endpoint]
"""A stream's name, and one of its endpoints."""

log = get_logger()


def take_inherited() -> list[InheritedSocket]:
    """Return the sockets that the service manager passed; OperatorError when one of them is something else."""
    try:
        return inherited()
    except OSError as error:
        raise OperatorError(
            BAD_SETTINGS, f"inherited descriptors: {error.strerror}; the socket unit may pass sockets only"
        ) from None


def refuse_left_over(held: Iterable[socket.socket]) -> None:
    """Raise OperatorError when a passed socket belongs to no listener: its input would never be read."""
    for sock in (sock for sock in held if isinstance(sock, InheritedSocket)):
        raise OperatorError(
            BAD_SETTINGS,
            f"the inherited socket {sock.type.name} {sock.getsockname()} is no listener of this worker; "
            "make [[stream]] listen and the socket unit agree",
        )


def listeners_of(worker: str, streams: Iterable[Stream], settings: Settings) -> dict[StreamEndpoint, Stream]:
    """Return the listeners that a worker serves: those that can't be shared are the first worker's of its host.

    That is number 1 beside the broker. A host whose workers connect to the broker of another one has no number 1.
    """
    every = {(stream.name, endpoint): stream for stream in streams for endpoint in stream.endpoints}
    if worker.endswith("1" if settings.bus.connect else ".1"):
        return every
    return {listener: stream for listener, stream in every.items() if is_shareable(listener[1])}


def with_addresses(wanted: Mapping[StreamEndpoint, Stream], lookups: HostLookups) -> dict[StreamEndpoint, Stream]:
    """Return the listeners with the addresses of hosts that were looked up. OperatorError when a host has none."""
    for (_, endpoint), stream in wanted.items():
        host = lookups[endpoint.host]
        if host.trouble:
            raise _unresolved(stream, endpoint, host.trouble)
    return {
        (name, replace(endpoint, known=lookups[endpoint.host].addresses)): stream
        for (name, endpoint), stream in wanted.items()
    }


def reopen(
    wanted: Mapping[StreamEndpoint, Stream],
    before: Mapping[StreamEndpoint, list[socket.socket]],
    held: Iterable[socket.socket],
    settings: Settings,
) -> tuple[dict[StreamEndpoint, list[socket.socket]], list[socket.socket]]:
    """Return the sockets of the listeners that are wanted, and the sockets that no listener uses any more.

    A listener that was there before keeps its sockets. A new one is served by sockets that are left of others, or that
    are `held`, as far as they have its addresses. OperatorError when one can't be had, with everything as it was.
    """
    new = wanted.keys() - before.keys()
    for listener in new:
        refuse_shared(wanted[listener], listener[1], settings)
    spare = [*held, *(sock for listener in before.keys() - wanted.keys() for sock in before[listener])]
    had = frozenset(spare)
    listening: dict[StreamEndpoint, list[socket.socket]] = {}
    try:
        for listener, stream in wanted.items():
            listening[listener] = before.get(listener) or bind_listener(stream, listener[1], spare)
            check_reply(stream, listener[1], listening[listener])
        refuse_doubles(listening)
        refuse_left_over(spare)
        for listener in new:  # again: another one may have begun at the same time
            refuse_shared(wanted[listener], listener[1], settings, listening[listener])
    except OperatorError:
        for listener in listening.keys() - before.keys():
            for sock in listening[listener]:
                if sock not in had:
                    close_listener(sock)
        raise
    return listening, spare


def refuse_doubles(listening: Mapping[StreamEndpoint, Iterable[socket.socket]]) -> None:
    """Raise OperatorError for an address of two streams: by SO_REUSEPORT the kernel would split its datagrams."""
    bound: set[object] = set()
    for (stream, endpoint), sockets in listening.items():
        at: set[object] = {(sock.type, sock.getsockname()[0], endpoint.port) for sock in sockets if not endpoint.path}
        at |= {endpoint.path} - {""}
        if at & bound:
            raise OperatorError(
                BAD_SETTINGS,
                f"{_title(stream)}: {endpoint} is the address of another listener too; give each its own",
            )
        bound |= at


def check_listeners(settings: Settings) -> None:
    """Raise what a worker with these settings would raise here for its listeners or its key; bind nothing for long.

    The ports are left alone where a broker runs, since its workers may have them, and below 1024, which systemd binds.
    """
    link = open_link(settings.bus, "ingest")
    running = broker_is_up(settings.bus.path, link)
    listening: dict[StreamEndpoint, list[socket.socket]] = {}
    try:
        for stream in settings.streams:
            for endpoint in stream.endpoints:
                port_too = not running and endpoint.port >= UNPRIVILEGED_PORT
                bind = partial(try_endpoint, made=settings.bus.path, port_too=port_too)
                refuse_shared(stream, endpoint, settings)
                with _explained(stream, endpoint):
                    listening[stream.name, endpoint] = bind(endpoint, partial(_prepare, endpoint))
                check_reply(stream, endpoint, listening[stream.name, endpoint])
        refuse_doubles(listening)
    finally:
        for sock in (sock for sockets in listening.values() for sock in sockets):
            sock.close()


def _prepare(endpoint: Endpoint, sock: socket.socket) -> None:
    share_port(sock)
    if is_multicast(endpoint.host):
        join_group(sock, endpoint.host)


def bind_listener(stream: Stream, endpoint: Endpoint, held: list[socket.socket]) -> list[socket.socket]:
    """Return the sockets of every address of an endpoint, each taken from `held` if it is there, else bound.

    OperatorError when none can be had, or one is in use.
    """
    with _explained(stream, endpoint):
        sockets = bind_endpoint(endpoint, partial(_prepare, endpoint), held=held)
        for sock in sockets:
            if is_multicast(endpoint.host) and isinstance(sock, InheritedSocket):
                join_group(sock, endpoint.host)
            if endpoint.host == "::" and sock.family == socket.AF_INET:
                log.warning("this host has no IPv6: listening by IPv4 alone", stream=stream.name, listen=str(endpoint))
            if sock.type == socket.SOCK_STREAM and not isinstance(sock, InheritedSocket):
                sock.listen(TCP_BACKLOG)
            if (sock.family, sock.type) == (socket.AF_INET6, socket.SOCK_DGRAM):
                refuse_mapped_sources(sock)
    return sockets


class Upkeep:
    """Keeps listeners able to receive, though others remove paths and interfaces. Call it each second."""

    def __init__(self) -> None:
        self._said: dict[StreamEndpoint, str] = {}
        """The last message about each listener that can't receive."""

    def renew(self, stream: Stream, endpoint: Endpoint, sock: socket.socket) -> socket.socket | None:
        """Join a group again whose interface was made anew; return another socket where the path is no longer ours."""
        try:
            fresh = self._renew(stream, endpoint, sock)
        except OperatorError as error:
            if self._said.get((stream.name, endpoint)) != str(error):
                self._said[stream.name, endpoint] = str(error)
                log.error(f"a listener receives nothing: {error}")
            return None
        self._said.pop((stream.name, endpoint), None)
        return fresh

    def _renew(self, stream: Stream, endpoint: Endpoint, sock: socket.socket) -> socket.socket | None:
        if is_multicast(endpoint.host):
            with _explained(stream, endpoint):
                if join_group(sock, endpoint.host):
                    log.warning(
                        "joined the multicast group again: its interface is a new one",
                        stream=stream.name,
                        listen=str(endpoint),
                    )
            return None
        if not endpoint.path or (sock.in_place if isinstance(sock, PathSocket) else Path(endpoint.path).is_socket()):
            return None
        if isinstance(sock, InheritedSocket):
            name = f"{_title(stream.name)}: {endpoint}"
            raise OperatorError(FAILED, f"{name}: another program has removed its path; restart the socket unit")
        (fresh,) = bind_listener(stream, endpoint, [])
        log.warning("bound the path again: another program had removed it", stream=stream.name, listen=str(endpoint))
        return fresh


def refuse_shared(stream: Stream, endpoint: Endpoint, settings: Settings, own: Iterable[socket.socket] = ()) -> None:
    """Raise OperatorError where another bus's worker listens besides our `own` sockets.

    All members of a multicast group get everything.
    """
    if settings.ingest.share_ports or not is_shareable(endpoint):
        return
    for worker in workers_of_other_buses(endpoint, settings.bus.path, own):
        raise OperatorError(
            FAILED,
            f"{_title(stream.name)}: {endpoint}: the ingest worker with pid {worker.pid}, of the bus in "
            f"{worker.directory}, listens there: each would get a part of the datagrams; stop that one, listen "
            "elsewhere, or set [ingest] share_ports = true",
        )


def check_reply(stream: Stream, endpoint: Endpoint, sockets: Iterable[socket.socket]) -> None:
    """Raise OperatorError when a listener, with these sockets, may not have the stream's reply."""
    if not stream.reply or endpoint.scheme != "udp" or stream.reply_beyond_loopback:
        return
    hosts = (str(sock.getsockname()[0]).partition("%")[0] for sock in sockets)
    if not all(ipaddress.ip_address(host).is_loopback for host in hosts):
        raise OperatorError(
            BAD_SETTINGS,
            f"{_title(stream.name)}: a reply on {endpoint} would let forged sources aim it at others; "
            "remove reply, listen on loopback, or set reply_beyond_loopback = true",
        )


@contextmanager
def _explained(stream: Stream, endpoint: Endpoint) -> Iterator[None]:
    try:
        yield
    except socket.gaierror as error:
        code = FAILED if error.errno == socket.EAI_AGAIN else BAD_SETTINGS  # the next start may have an answer
        raise _unresolved(stream, endpoint, str(error.strerror), code) from None
    except OSError as error:
        raise OperatorError(
            FAILED, f"{_title(stream.name)}: {endpoint}: {error.strerror or error}{_cure(endpoint, error)}"
        ) from None


def _unresolved(stream: Stream, endpoint: Endpoint, reason: str, code: int = BAD_SETTINGS) -> OperatorError:
    return OperatorError(code, f"{_title(stream.name)}: {endpoint}: {reason}; name a host that resolves")


def _title(stream: str) -> str:
    return f'[[stream]] "{stream}" listen'


def _cure(endpoint: Endpoint, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        pid, name = holder(endpoint)
        if pid:
            return f" by process {pid} ({name}); stop that, or listen elsewhere"
        tool = "ss -xlp" if endpoint.path else f"ss -{endpoint.scheme[0]}lnp"
        return f"; see what holds it with `{tool}`, stop that or listen elsewhere"
    if error.errno == errno.ENODEV or (error.errno is None and is_multicast(endpoint.host)):
        group = endpoint.host.partition("%")[0]
        return f"; name an interface of this host (`ip link`), as in {replace(endpoint, host=f'{group}%eth0')}"
    if error.errno == errno.EADDRNOTAVAIL:
        return "; no interface of this host has that address; listen on one that `ip address` shows"
    if error.errno == errno.EEXIST:
        return "; remove it, or choose another path"
    if error.errno == errno.ENOENT and endpoint.path:
        return "; make its directory"
    if error.errno in (errno.EACCES, errno.EPERM) and endpoint.path:
        return "; choose a path this user may write to"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "; ports below 1024 need `sysctl net.ipv4.ip_unprivileged_port_start` lowered or CAP_NET_BIND_SERVICE"
    return ""


def warn_of_small_buffers(granted: dict[int, int]) -> None:
    """Log once the receive buffers that are smaller than asked for, {asked: granted} in bytes, and the cure."""
    small = {wanted: had for wanted, had in granted.items() if had < wanted}
    if small:
        wanted, had = max(small.items())
        log.warning(
            "receive buffers are smaller than asked for: bursts may be dropped by the kernel",
            asked=wanted,
            granted=had,
            cure=f"sysctl -w net.core.rmem_max={wanted}, or run with CAP_NET_ADMIN",
        )
