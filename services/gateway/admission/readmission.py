"""Admission anew: each entry keeps what today's tokens, settings and addresses of this host allow."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from services.gateway.admission.destinations import Destinations, parse_address
from services.gateway.admission.ownership import is_reached_elsewhere
from services.gateway.admission.rights import HERE, Rights
from services.gateway.admission.tokens import Tokens
from services.gateway.protocol.requests import Register, RequestError, SignUp
from services.gateway.registry.changes import ignore
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from shared.client import ALL_STREAMS
from shared.log import get_logger

log = get_logger()


def expel_loops(destinations: Destinations, registry: Registry, expelled: set[str]) -> None:
    """Remove collectors whose copies would come back: a listener or an address may be newer than the entry.

    Those of the settings are noted in `expelled`, by name: nobody signs them up again. While the kernel can't tell this
    host's addresses, none is removed.
    """
    mine = (entry for entry in registry.entries() if not is_reached_elsewhere(entry, registry.node))
    try:
        loops = [entry for entry in mine if destinations.find_loop(entry.client)]
    except OSError:
        return
    if loops:
        log.warning(
            "collector removed: its address is one of fanwire's own listeners (loop)",
            clients=[entry.client.name for entry in loops[:10]],
            count=len(loops),
        )
        expelled.update(entry.client.name for entry in loops if entry.origin is Origin.SETTINGS)
        registry.expel(loops)


class Readmission:
    """Takes from entries what tokens and settings do not allow any more, once that can be stored."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._due: Callable[[], None] | None = None

    def begin(self, tokens: Tokens, destinations: Destinations) -> None:
        """Compare each entry with these from now on."""
        self._due = partial(readmit, self._registry, tokens, destinations)
        self.check()

    def check(self) -> None:
        """Try again what could not be stored. Due every second."""
        if self._due is not None:
            with suppress(OSError):  # the store has logged it
                self._registry.changes.make(self._due, ignore)
                self._due = None


def readmit(registry: Registry, tokens: Tokens, destinations: Destinations) -> None:
    """Take from entries what these tokens and settings do not allow. OSError when that can't be stored."""
    measured = [entry for entry in registry.entries() if registry.leases.measures(entry)]
    excess = find_excess(measured, tokens, destinations)
    registry.expel(excess.removed)
    _log_excess("client removed: its token or [gateway] destinations do not allow it any more", excess.removed)
    registry.narrow(excess.narrowed)
    narrowed = [entry for entry, _ in excess.narrowed]
    _log_excess("client narrowed to the streams that its token still allows", narrowed)


def _log_excess(event: str, entries: Sequence[Entry]) -> None:
    if entries:
        log.warning(event, clients=[entry.client.name for entry in entries[:10]], count=len(entries))


@dataclass(slots=True)
class Excess:
    """Entries that are to be removed, and those that keep some of their streams, with these."""

    removed: list[Entry] = field(default_factory=list)
    narrowed: list[tuple[Entry, tuple[str, ...]]] = field(default_factory=list)


def find_excess(entries: Iterable[Entry], tokens: Tokens, destinations: Destinations) -> Excess:
    """Return the entries that have more than their holders may have now."""
    excess = Excess()
    for entry in entries:
        if entry.origin is Origin.SETTINGS:
            continue
        rights = _rights_of(entry.peer.rights.holder, tokens)
        streams = _streams_left(entry.client.streams, rights)
        if not _may_stay(entry, rights, destinations) or (entry.client.streams and not streams):
            excess.removed.append(entry)
        elif streams != entry.client.streams:
            excess.narrowed.append((entry, streams))
    return excess


def _rights_of(holder: str, tokens: Tokens) -> Rights:
    return tokens.rights_of_holder(holder) if holder else HERE


def _may_stay(entry: Entry, rights: Rights, destinations: Destinations) -> bool:
    name = entry.client.name
    try:
        rights.check(SignUp(name) if entry.origin is Origin.NAMES else Register(name))
    except RequestError:
        return False
    peer = replace(entry.peer, rights=rights)
    return entry.proven or not destinations.needs_proof(parse_address(entry.client.address), peer)


def _streams_left(streams: tuple[str, ...], rights: Rights) -> tuple[str, ...]:
    if ALL_STREAMS in rights.streams:
        return streams
    if ALL_STREAMS in streams:
        return rights.streams
    return tuple(stream for stream in streams if stream in rights.streams)
