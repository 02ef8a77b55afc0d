"""The listeners of ingest: whether anything can come to them, and whether it is received. No I/O."""

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Final

from shared.ledger.accounts import Accounts
from shared.ledger.counters import RECEIVE_ERRNO, RECEIVE_ERRORS
from shared.monitoring.finding import Finding, error, ok, warning
from shared.net.multicast import is_multicast
from shared.settings.model import Settings

EVERYBODY_WRITES: Final = 0o002
RESTART: Final = "restart the first ingest worker, or its socket unit"


@dataclass(frozen=True)
class PathSeen:
    """A unixgram:// path: whether a socket is there, its mode, and a directory above it that others may not enter."""

    is_socket: bool
    mode: int = 0
    closed_at: str = ""


@dataclass(frozen=True)
class ListeningFacts:
    """Facts of listeners, by endpoint as written in the settings; missing ones were not checked."""

    paths: Mapping[str, PathSeen] = field(default_factory=dict)
    groups: Mapping[str, bool] = field(default_factory=dict)
    """True if the multicast group is joined, on its interface if it names one."""
    unassigned: Mapping[str, str] = field(default_factory=dict)
    """Addresses that no interface of this host has."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """The worker of another bus that listens there too."""


def check_listening(facts: ListeningFacts, accounts: Mapping[str, Accounts], settings: Settings) -> Iterator[Finding]:
    """Yield every finding about the listeners; `accounts` are those of each service that reports."""
    workers = {name: kept for name, kept in accounts.items() if name.partition(".")[0] == "ingest"}
    if not workers:
        yield ok("listeners", "no ingest worker reports: nothing listens")
        yield ok("receiving", "no ingest worker reports: nothing is received")
        return
    found = [
        finding
        for stream in settings.streams
        for endpoint in stream.endpoints
        for finding in _listener(facts, stream.name, str(endpoint), is_multicast(endpoint.host))
    ]
    yield from found or [ok("listeners", "datagrams can reach the listeners of every stream")]
    failing = [finding for service, kept in workers.items() for finding in _receiving(service, kept)]
    yield from failing or [ok("receiving", "no receive call has failed")]


def _listener(facts: ListeningFacts, stream: str, listen: str, group: bool) -> Iterator[Finding]:
    name = "listeners"
    if group and not facts.groups.get(listen, True):
        why = f"{listen}: this host has not joined the group on that interface: nothing arrives"
        yield error(name, why, "`ip maddress show`; is the interface there? " + RESTART, stream)
    if address := facts.unassigned.get(listen):
        why = f"{listen}: no interface of this host has {address}: nothing arrives"
        yield error(name, why, "`ip address show`; add it, or listen elsewhere", stream)
    if worker := facts.shared.get(listen):
        why = f"{listen}: {worker} listens there too: each gets a part of the datagrams"
        yield error(name, why, "stop that one, or give one of them another port", stream)
    path = facts.paths.get(listen)
    if path is None:
        return
    if not path.is_socket:
        yield error(name, f"{listen}: there is no socket: another program has removed or replaced it", RESTART, stream)
    elif path.closed_at:
        why = f"{listen}: other users may not enter {path.closed_at}: their datagrams are refused"
        yield warning(name, why, f"`chmod o+x {quote(path.closed_at)}`, or put the path elsewhere, as in /run", stream)
    elif not path.mode & EVERYBODY_WRITES:
        why = f"{listen}: its mode is {path.mode & 0o777:04o}: datagrams of other users are refused"
        yield warning(name, why, f"`chmod 0666 {quote(listen.partition('://')[2])}`; or {RESTART}", stream)


def _receiving(service: str, accounts: Accounts) -> Iterator[Finding]:
    for name, account in accounts.items():
        if not name.startswith("listener/"):
            continue
        _, stream, listen = name.split("/", 2)
        failed = account.get(RECEIVE_ERRORS, 0)
        if number := account.get(RECEIVE_ERRNO, 0):
            word = errno.errorcode.get(number, str(number))
            why = f"{service} receives nothing at {listen}: {os.strerror(number)} ({word}), {failed} times by now"
            yield error("receiving", why, "check its seccomp or AppArmor profile and SELinux; see its log", stream)
        elif failed > 1:
            why = f"{failed} receive calls of {service} at {listen} have failed; the last one succeeded"
            yield warning("receiving", why, "see why in its log: `journalctl -u 'fanwire-ingest@*'`", stream)
