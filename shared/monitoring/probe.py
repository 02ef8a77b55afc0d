"""A marked datagram, from a loopback address to a stream of this host, and the copy that a collector of ours gets.

It goes through the real listener, so other collectors of the stream get a copy too. Therefore it is sent only on
request, and says in plain text what it is. We send nothing to any other host. If one of those collectors, or one of
theirs, sends its copies to us, the datagram comes round again: nothing in it would ever end that.
"""

import os
import random
import secrets
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Final

from shared.client import Source
from shared.datagrams.limits import MAX_DATAGRAM
from shared.ledger.accounts import Accounts
from shared.ledger.counters import DROPPED, EXPECTED, MISSED, PUBLISHED, RECEIVED, SENT
from shared.ledger.equations import dropped
from shared.monitoring.finding import Finding, error, ok, warning
from shared.net.addresses import resolve
from shared.net.multicast import is_multicast
from shared.process.lifecycle import OperatorError
from shared.process.registry_client import Entry, RegistryClient
from shared.settings.entries import Stream

Ledger = Mapping[str, Accounts]
"""Accounts by service."""
COPY_SECONDS: Final = 2.0
ATTEMPTS: Final = 2
ROUND_SECONDS: Final = 1.0
"""Time for the datagram to come round again."""
MAX_NEIGHBOURS: Final = 64
"""Prefixes that one `register` may have."""
TTL_SECONDS: Final = 30.0
"""Our entry goes with our connection; this is for a gateway that does not notice its end."""
NOT_SERVED: Final = "ingest published it, and no sender serves this collector"
EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}


def probe(
    open_registry: Callable[[], RegistryClient],
    stream: Stream,
    source: Source,
    read_ledger: Callable[[], Ledger],
    neighbours: Sequence[str] = (),
) -> Finding:
    """Send a datagram to the stream, wait for a copy with `source`, then for one that has gone round.

    Where no sender knew of the collector yet, another one is sent.

    `neighbours` are the addresses of the stream's other collectors: by the forwarder it would come back from there.
    """
    name, subject = f"probe_{source}", stream.name
    target = _target(stream)
    if target is None:
        return warning(
            name,
            "the stream has no udp:// listener with an address of its own to send to",
            "try another by --probe",
            subject,
        )
    collector = f"probe-{os.getpid()}"
    try:
        with ExitStack() as closing:
            exporter = closing.enter_context(_bind(_claimed(target[0])))
            registry = closing.enter_context(open_registry())
            receiver, late = (closing.enter_context(_bind(_our_end(registry, target[0]))) for _ in range(2))
            own, own_port, *_ = exporter.getsockname()
            before = read_ledger()
            entries = [_sign_up(registry, collector, stream, source, receiver, [own])]
            if others := [address for address in neighbours if address != own]:
                entries.append(_sign_up(registry, f"{collector}-again", stream, source, late, others))
            for _ in range(ATTEMPTS):
                payload = _payload(stream.name)
                exporter.sendto(payload, target)
                came_from = _await([receiver], payload, COPY_SECONDS)
                lost = "" if came_from else where_lost(before, read_ledger(), stream.name, collector)
                if lost != NOT_SERVED:  # where senders are busy they hear of a collector late
                    break
            again = came_from and _await([receiver, late], payload, ROUND_SECONDS)
            for entry in entries:
                with suppress(OperatorError):  # else the entry goes with the connection
                    registry.ask("leave", name=entry.name, generation=entry.generation)
    except OperatorError as refused:
        return error(
            name, f"the probe's collector could not sign up: {refused}", "see services and raw_sockets", subject
        )
    except OSError as failed:
        return error(
            name, f"the probe could not be sent to {target[0]}: {failed.strerror}", "see `ip address`", subject
        )
    if came_from is None:
        return error(name, f"no copy came within {COPY_SECONDS:g} s: {lost}", "`fanwire ledger`", subject)
    if again:
        why = "the probe came back again: a collector of the stream sends its copies to the stream, in an endless loop"
        return error(name, why, "remove that collector: `fanwire leave NAME`; `fanwire clients` lists them", subject)
    if source == "original" and came_from != (own, own_port):
        why = f"sent from {own} port {own_port}, its copy came from {came_from[0]} port {came_from[1]}"
        return error(name, why, "look for NAT on loopback: `nft list ruleset`", subject)
    why = f"sent from {own} to {target[0]} port {target[1]}, its copy came from {came_from[0]}"
    return ok(name, why, subject)


def _payload(stream: str) -> bytes:
    """Return a text that nobody else sends, and that was not sent before."""
    return f"fanwire: a probe of stream {stream}, to be ignored by others; {secrets.token_hex(8)}".encode()


def _target(stream: Stream) -> tuple[str, int] | None:
    """Return an address at which the stream's first UDP listener receives, IPv4 if possible."""
    for endpoint in stream.endpoints:
        if endpoint.scheme == "udp" and not is_multicast(endpoint.host):
            with suppress(OSError):
                found = sorted(str(at[0]) for _, at in resolve(endpoint.host, endpoint.port, socket.SOCK_DGRAM))
                host = min(found, key=lambda address: ":" in address)
                return EVERYWHERE.get(host, host), endpoint.port
    return None


def _claimed(target: str) -> str:
    """Return the made-up exporter's address: one of the many of loopback, or the only one."""
    if target.startswith("127."):
        return ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])
    return target


def _our_end(registry: RegistryClient, target: str) -> str:
    """Return the address for our copies: loopback of the target's family, or our end of a connection to elsewhere."""
    local = str(registry.local[0]) if registry.local else "127.0.0.1"
    if local.startswith("127.") or local == "::1":
        return "::1" if ":" in target else "127.0.0.1"
    return local


def _bind(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind((host, 0))
    except OSError:
        sock.close()
        raise
    return sock


def _sign_up(
    registry: RegistryClient, name: str, stream: Stream, source: Source, receiver: socket.socket, senders: Sequence[str]
) -> Entry:
    """Sign up a collector of ours for what these addresses send to the stream."""
    host, port, *_ = receiver.getsockname()
    told = {"address": host} if host in EVERYWHERE.values() or host == "::1" else {}
    wishes = {"streams": [stream.name], "port": port, "source": source, "from": senders[:MAX_NEIGHBOURS]}
    return registry.ask("register", name=name, ttl=TTL_SECONDS, hold=True, **wishes, **told).entry()


def _await(receivers: Sequence[socket.socket], payload: bytes, seconds: float) -> tuple[str, int] | None:
    """Return the sender of the first copy; None when none came."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        for receiver in select.select(receivers, [], [], left)[0]:
            copy, source = receiver.recvfrom(MAX_DATAGRAM)
            if copy == payload:
                return str(source[0]), int(source[1])
    return None


def where_lost(before: Ledger, after: Ledger, stream: str, collector: str) -> str:
    """Return how far the datagram got, by the accounts, last step first: the streams' count other datagrams too."""
    for service, accounts in after.items():
        account = accounts.get(f"collector/{collector}", {})
        if account.get(SENT):
            return f"{service} sent it, and this host's kernel did not deliver it: rp_filter or a firewall on lo"
        if dropped(account):
            return f"{service} counts it as {', '.join(name for name in account if name.startswith(DROPPED))}"
        if account.get(MISSED):
            return f"the bus lost it on the way to {service}"
        if account.get(EXPECTED):
            return f"{service} got it, but it did not match this collector"
    received, published = (_grown(before, after, stream, counter) for counter in (RECEIVED, PUBLISHED))
    if received <= 0:  # less, where a worker is gone
        return "ingest did not receive it: does it run, and listen there? a firewall on lo?"
    if published <= 0:
        return "ingest received it, and no service had subscribed to the stream"
    return NOT_SERVED


def _grown(before: Ledger, after: Ledger, stream: str, counter: str) -> int:
    def total(ledger: Ledger) -> int:
        workers: Sequence[Accounts] = list(ledger.values())
        return sum(accounts.get(f"stream/{stream}", {}).get(counter, 0) for accounts in workers)

    return total(after) - total(before)
