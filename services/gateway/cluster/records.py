"""Records of the bucket: JSON under a key. Whatever others write there is refused here, and never taken in. No I/O."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.cluster import keys
from services.gateway.protocol.client_names import check_name
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.reached_places import Past
from services.gateway.registry.revisions import largest_number
from shared.client import Client, Generation, Withheld
from shared.net.addresses import pack_address

VERSION: Final = 1
LARGEST: Final = 65_536
"""Bytes of a record: the largest entry has under 18 KB."""
GONE_SECONDS: Final = 86_400
"""Time for which the bucket keeps that an entry has gone: a node that was away for longer reads the whole log."""
PAST_SECONDS: Final = 604_800
AWAY: Final = -1
"""The number of a peer whose connection is at another node."""
Text = Annotated[str, Meta(max_length=255)]
Node = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")]
Number = Annotated[int, Meta(ge=0, le=1 << 62)]


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """The change that a record belongs to: the node, its gateway's boot, its count of changes, and the part."""

    node: Node
    boot: Number
    change: Number
    part: Number = 0


class Listed(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True):
    """A record of the list, which is at `revision` with it."""

    by: Identity
    revision: Number


class Entered(Listed, frozen=True, tag="entered", kw_only=True):
    """An entry. `home` measures its lease, `node` has made it; `held` by a connection to that gateway of `node`."""

    home: Node
    node: Node
    boot: Number
    client: Client
    origin: Origin
    address: Text
    port: Annotated[int, Meta(ge=0, le=65_535)]
    ttl: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    held: bool = False
    holder: Text = ""
    proven: bool = False
    host: Text = ""


class Gone(Listed, frozen=True, tag="gone", kw_only=True):
    """The end of an entry."""

    name: Text
    generation: Generation
    expired: bool = False


class Ordered(Listed, frozen=True, tag="withheld", kw_only=True):
    """An order to withhold copies; None: it has ended."""

    name: Text
    order: Withheld | None = None


class Left(msgspec.Struct, frozen=True, tag="past", tag_field="kind", kw_only=True):
    """The place that a name has reached; None: nothing is known of it any more."""

    name: Text
    past: Past | None = None


class Session(msgspec.Struct, frozen=True, tag="session", tag_field="kind", kw_only=True):
    """The session of a node's gateway, and its count of these records; not `live`: it has ended.

    `revision` and `generation` are the last ones of the list: records of what has gone do not stay for ever.
    """

    node: Node
    boot: Number
    count: Number
    live: bool = True
    revision: Number = 0
    generation: Number = 0


class ListIdentity(msgspec.Struct, frozen=True, tag="meta", tag_field="kind", kw_only=True):
    """The list as such: its epoch, and the secret of groups."""

    epoch: Annotated[str, Meta(min_length=1, max_length=64)]
    group_secret: Annotated[bytes, Meta(min_length=16, max_length=64)]
    version: Number = VERSION


Record = Entered | Gone | Ordered | Left | Session | ListIdentity


class LaterError(ValueError):
    """A record of a later release; such a release tells of itself by the version in the list's identity."""


_decode: Final = msgspec.json.Decoder(Record).decode
encode: Final = msgspec.json.Encoder().encode


def key_of(record: Record) -> str:
    """Return the key that a record stands under."""
    match record:
        case Entered():
            return keys.CLIENT + keys.unparse_name(record.client.name)
        case Gone():
            return keys.CLIENT + keys.unparse_name(record.name)
        case Ordered():
            return keys.WITHHELD + keys.unparse_name(record.name)
        case Left():
            return keys.PAST + keys.unparse_name(record.name)
        case Session():
            return keys.SESSION + record.node
        case ListIdentity():
            return keys.META


def seconds_of(record: Record) -> int:
    """Return the time for which the bucket is to keep a record that is not a session's; 0: for ever."""
    match record:
        case Left():
            return PAST_SECONDS
        case Gone() | Ordered(order=None):
            return GONE_SECONDS
        case _:
            return 0


def decode(key: str, data: bytes, stored_at: float) -> Record:
    """Return the record under a key, which JetStream has stored at this Unix time. ValueError: it is none, or damaged.

    All gateways are told the same time, so all refuse the same records.
    """
    if len(data) > LARGEST:
        raise ValueError(f"{len(data)} bytes: too long for a record")
    try:
        record = _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)[:200]) from None
    if key_of(record) != key:
        raise ValueError("it stands under the key of another one")
    match record:
        case Entered():
            _check_name(record.client.name)
            pack_address(record.address)
            pack_address(record.client.address)  # a client that gets no copies may have any on the bus
        case Gone() | Ordered() | Left():
            _check_name(record.name)
        case ListIdentity() if record.version > VERSION:
            raise LaterError(f"of version {record.version}; this release knows {VERSION}")
    _check_numbers(record, largest_number(stored_at))
    return record


def _check_numbers(record: Record, most: int) -> None:
    """Raise ValueError where a number that all nodes count on from is too large."""
    match record:
        case Entered():
            node, numbers = record.by.node, (record.revision, record.client.generation)
        case Gone():
            node, numbers = record.by.node, (record.revision, record.generation)
        case Ordered():
            node, numbers = record.by.node, (record.revision, 0)
        case Session():
            node, numbers = record.node, (record.revision, record.generation)
        case _:
            return
    if max(numbers) > most:
        raise ValueError(f"a revision or generation that can't have been given yet, by node {node}")


def _check_name(name: str) -> None:
    try:
        check_name(name.encode())
    except (RequestError, UnicodeEncodeError):
        raise ValueError("a name that no client may have") from None


def record_of(entry: Entry, by: Identity, revision: int) -> Entered:
    """Return the record of an entry."""
    return Entered(
        by=by,
        revision=revision,
        home=entry.home,
        node=entry.node,
        boot=entry.boot,
        client=entry.client,
        origin=entry.origin,
        address=entry.peer.address,
        port=entry.peer.port,
        ttl=entry.ttl,
        held=entry.held,
        holder=entry.peer.rights.holder,
        proven=entry.proven,
        host=entry.host,
    )


def entry_of(record: Entered, now: float) -> Entry:
    """Return the entry of a record, as one whose connection is elsewhere; its lease has not begun."""
    peer = Peer(AWAY, record.address, record.port, Rights(record.holder))
    entry = Entry(record.client, record.origin, peer, record.ttl, float("inf"), 0, record.held, now, record.proven)
    entry.host, entry.home, entry.node, entry.boot = record.host, record.home, record.node, record.boot
    return entry
