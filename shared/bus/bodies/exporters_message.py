"""The message by which an ingest worker tells of its exporters while anybody asks."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from shared.bus.bodies.fields import MAX_NUMBER, Number, PackedAddress, StreamName

MAX_TOLD: Final = 1000
"""Exporters that a worker tells of, for each stream."""


class Exporters(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The exporters of a stream in the last `seconds`, as a worker published their `rows` datagrams.

    Every `every`-th of these was looked at, and `exporters` were found. `most` has the address (16 bytes, IPv4 mapped),
    datagrams and bytes of those with most, as they were looked at: multiply by `every`. `missed` has the address and
    the gaps in its own numbers, in their unit, of those with most; None: the stream's numbers are not read.
    """

    stream: StreamName
    seconds: Annotated[float, Meta(gt=0)]
    rows: Number
    every: Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
    exporters: Number
    most: Annotated[list[tuple[PackedAddress, Number, Number]], Meta(max_length=MAX_TOLD)]
    missed: Annotated[list[tuple[PackedAddress, Number]], Meta(max_length=MAX_TOLD)] | None = None
