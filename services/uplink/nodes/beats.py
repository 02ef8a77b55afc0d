"""The beat of a node: that it lives, and how far its senders of copies have got. No I/O."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from services.uplink.incoming.arrivals import Key
from shared.bus.bodies.fields import Number, SenderName, StreamName
from shared.bus.bodies.nodes_message import MAX_NODES
from shared.client import Source

ROOT: Final = "fanwire-node"
MAX_BEAT: Final = 1 << 19
"""Bytes of a beat: an origin takes some sixty, and 128 with long names."""
MAX_ORIGINS: Final = 2048
State = Literal["joining", "live", "left"]
"""A node that is joining still gets what came before; one that has left sends no copies any more."""
Site = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")]


class Reached(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The number of datagrams that a sender has had of what a worker of a site published on a stream."""

    site: Site
    worker: SenderName
    boot: Number
    stream: StreamName
    total: Number

    @property
    def key(self) -> Key:
        """The origin that it is of."""
        return Key(self.site, self.worker, self.boot, self.stream)


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """A node tells that it lives: `number` grows with each beat of its start `boot`.

    `reached` has, for each source of copies that it sends, the place of its sender; `reports` grows with each report of
    a sender on that. `missed` has for other nodes the last time, in ns since 1970, at which this one served without
    them. Those that are `serving` are the nodes among which it shares collectors out.
    """

    node: Site
    boot: Number
    number: Number
    state: State
    reports: Number
    reached: dict[Source, Annotated[list[Reached], Meta(max_length=MAX_ORIGINS)]]
    missed: Annotated[dict[Site, Number], Meta(max_length=MAX_NODES)] = {}
    serving: Annotated[tuple[Site, ...], Meta(max_length=MAX_NODES)] = ()


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Beat).decode


def beat_subject(node: str) -> str:
    """Return the subject of a node's beats."""
    return f"{ROOT}.{node}"


def unparse_beat(beat: Beat) -> bytes:
    """Return a beat as it is sent; `parse_beat` is the way back."""
    return _encode(beat)


def parse_beat(subject: str, payload: bytes) -> Beat:
    """Return the beat that has come on a subject. ValueError when it is none, or another node's than its subject's."""
    if len(payload) > MAX_BEAT:
        raise ValueError(f"no beat has so many bytes: {len(payload)}")
    try:
        beat = _decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"no beat: {error}") from None
    if subject != beat_subject(beat.node):
        raise ValueError(f"the beat names another node than its subject: {beat.node} on {subject}")
    return beat
