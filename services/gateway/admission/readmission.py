"""Admission anew: at a start and a reload each entry keeps what today's tokens and settings allow. No I/O."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from services.gateway.admission.destinations import Destinations, parse_address
from services.gateway.admission.rights import HERE, Rights
from services.gateway.admission.tokens import Tokens
from services.gateway.protocol.requests import Register, RequestError, SignUp
from services.gateway.registry.entry import Entry, Origin
from shared.client import ALL_STREAMS


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
