"""The messages by which ingest hands on templates of flow exporters, for collectors that can't have them by copies.

*Templates* are all that a worker has kept of a stream. They answer a subscription to their topic, in one order with the
stream's batches. *Renewals* are those that have just come, each before the batch that has its datagram. No I/O.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.bus.bodies.fields import Number, PackedAddress, StreamName
from shared.datagrams.limits import MAX_DATAGRAM


class TemplateDatagram(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A datagram to be sent: its source, its payload, and the number instead of its own for who gets only such ones.

    `back` is by how much its number is less than that of what its exporter sends next. `since_ns` is the time, in ns
    since 1970, before which the exporter may have defined the same otherwise; 0: nothing is known of that.
    """

    address: PackedAddress
    port: Annotated[int, Meta(ge=0, le=0xFFFF)]
    payload: Annotated[bytes, Meta(min_length=16, max_length=MAX_DATAGRAM)]
    aside: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
    back: Number = 0
    since_ns: Number = 0


class Templates(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A piece of the kept templates of a stream: the `piece`-th of `pieces`."""

    stream: StreamName
    piece: Number
    pieces: Number
    datagrams: list[TemplateDatagram]


class Renewals(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Templates and options data of a stream that have just come, changed or not."""

    stream: StreamName
    datagrams: list[TemplateDatagram]


def templates_topic(stream: str) -> str:
    """The topic of a stream's `Templates`: each subscription to it is answered by every worker."""
    return f"templates/{stream}/"


def renewals_topic(stream: str) -> str:
    """The topic of a stream's `Renewals`; there are none while nobody subscribes."""
    return f"renewals/{stream}/"
