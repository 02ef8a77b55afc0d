"""Ownership of entries: which peers may replace or change one, and how many a holder may have. No I/O."""

from itertools import islice
from typing import Final

from services.gateway.admission.destinations import parse_address
from services.gateway.admission.peer import Peer
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from shared.client import ALL_STREAMS, Client, CopyTerms, Source
from shared.net.addresses import are_apart
from shared.settings.tables import Gateway

_OTHER_SOURCE: Final[dict[Source, Source]] = {"relay": "original", "original": "relay"}

MOST_AT_A_PLACE: Final = 64
"""Entries at one address and port: as a new one is compared with each of them."""


def check_replaceable(present: Entry, peer: Peer, origin: Origin, *, take_over: bool) -> None:
    """Raise `RequestError` unless this peer may replace `present` with another entry."""
    name = present.client.name
    same = peer.is_client_of(present.peer)
    own = (same and present.peer.id == peer.id) or (origin is Origin.NAMES and peer.controls(present.peer))
    if present.origin is origin and own:
        return
    if take_over and present.origin is Origin.SETTINGS:
        raise _configured(name)
    # A restart of the gateway ended the connection that held the entry; its client may be back without knowing that.
    orphaned = present.held and not present.peer.id and present.origin is origin
    if (take_over and (same or peer.rights.everything)) or (orphaned and same):
        return
    if present.origin is Origin.SETTINGS:
        raise RequestError("name_taken", f"{name!r} is a [[collector]] in the gateway's settings; choose another name")
    holder = present.peer.rights.holder
    how = f" as its owner, {holder!r}" if holder else " from the address of its owner, without a token"
    raise RequestError(
        "name_taken",
        f"{name!r} belongs to another client; choose another name, or register with take_over (`--take-over` of the "
        f"commands){'' if peer.rights.everything else how}",
    )


def check_changeable(entry: Entry | None, name: str, generation: int, peer: Peer) -> Entry:
    """Return the entry if this peer may renew or remove it under this generation; else raise `RequestError`."""
    if entry is not None and entry.origin is Origin.SETTINGS:
        raise _configured(name)
    if entry is None or entry.client.generation != generation:
        raise RequestError("stale_generation", f"this generation of {name!r} is no longer registered; register again")
    if not peer.controls(entry.peer):
        raise RequestError(
            "not_permitted",
            f"{name!r} belongs to another client; only its owner or a token with scope `admin` may change it",
        )
    return entry


def check_room(registry: Registry, holder: str, limits: Gateway, replaced: Entry | None) -> None:
    """Raise `RequestError` when the limit of entries is reached, in all or of this holder."""
    if replaced is not None and replaced.peer.rights.holder == holder:
        return
    if replaced is None and len(registry) >= limits.max_clients:
        raise RequestError(
            "registry_full",
            f"the limit of {limits.max_clients} clients is reached; retry, or raise [gateway] max_clients",
        )
    most = limits.max_clients_per_holder
    if holder and registry.count_of_holder(holder) >= most:
        raise RequestError("registry_full", f"{holder!r} has reached its limit of {most} clients; remove some first")


def check_group(registry: Registry, client: Client, peer: Peer, origin: Origin, replaced: Entry | None) -> None:
    """Raise `RequestError` when its group has members of the other source, with which it could share nothing."""
    groups, other = registry.groups, _OTHER_SOURCE[client.source]
    identifier = groups.identify(client.group, peer, origin)
    before = groups.for_bus(replaced) if replaced is not None else None
    itself = before is not None and (before.group, before.source) == (identifier, other)
    check_same_source(client, other if groups.count(identifier, other) > itself else client.source)


def is_reached_elsewhere(entry: Entry, node: str) -> bool:
    """Return whether an entry's address is one of another node's loopback: there it is another place."""
    return entry.node not in ("", node) and parse_address(entry.client.address).is_loopback


def check_place(registry: Registry, client: Client, peer: Peer, origin: Origin) -> None:
    """Raise `RequestError` when another entry has datagrams sent to the same address and port that this one would."""
    there = (each for each in registry.at(client.address, client.port) if each.client.name != client.name)
    others = [each for each in there if not is_reached_elsewhere(each, registry.node)]
    if not client.streams or not others:
        return
    group = registry.groups.identify(client.group, peer, origin) if client.group else ""
    place = f"{client.address} port {client.port}"
    if len(others) >= MOST_AT_A_PLACE:
        raise RequestError("address_taken", f"{place} has reached the limit of {len(others)} clients; use another port")
    for other in others:
        if _get_the_same(client, group, registry.groups.for_bus(other)):
            why = f"{place} gets these datagrams as {other.client.name!r} already"
            raise RequestError("address_taken", f"{why}; use another port, other streams or prefixes, or one group")


def _get_the_same(one: Client, group: str, other: Client) -> bool:
    if one.source != other.source or (group and group == other.group):
        return False
    streams = {*one.streams} & {*other.streams} or ALL_STREAMS in (*one.streams, *other.streams)
    return bool(streams) and not (one.prefixes and other.prefixes and are_apart(one.prefixes, other.prefixes))


def find_doubles(registry: Registry) -> set[tuple[str, str]]:
    """Return the names of pairs at one address and port that get the same datagrams; one of each is of the settings."""
    found = set()
    for entry in registry.entries():
        if entry.origin is not Origin.SETTINGS or not entry.client.streams:
            continue
        client, there = registry.groups.for_bus(entry), registry.at(entry.client.address, entry.client.port)
        for other in islice(there, MOST_AT_A_PLACE):
            apart = other is entry or is_reached_elsewhere(other, registry.node)
            if not apart and _get_the_same(client, client.group, registry.groups.for_bus(other)):
                one, two = sorted((entry.client.name, other.client.name))
                found.add((one, two))
    return found


def check_same_source(client: CopyTerms, source: Source) -> None:
    """Raise `RequestError` unless a member of a group takes copies of the source that the others do."""
    if client.group and client.source != source:
        raise RequestError(
            "bad_request",
            f'group: {client.group!r} has members with source "{source}"; all members need the same, or another group',
        )


def _configured(name: str) -> RequestError:
    return RequestError("not_permitted", f"{name!r} is a [[collector]] in the gateway's settings; change it there")
