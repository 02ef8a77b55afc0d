"""The message by which a sender of copies tells how its collectors are."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from shared.bus.bodies.fields import Number
from shared.client import Source, Trouble

MAX_NAME: Final = 255
"""Characters of a client's name, which has as many bytes at most."""
MAX_PIECES: Final = 4096
"""The most pieces of a list of collectors: the longest list, of the longest names, fits into fewer."""


class Troubled(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A collector with a trouble, and its age, `age_ms`, when the message was made; or without one, but with losses.

    `lost` counts its datagrams that are known to have reached nobody (`shared.ledger.equations.lost`).
    """

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
    generation: Number
    trouble: Trouble | None
    age_ms: Number
    lost: Number


class Health(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of a list, numbered `report`: the collectors of `source` that have a trouble or losses."""

    source: Source
    report: Number
    piece: Annotated[int, Meta(ge=0, lt=MAX_PIECES)]
    pieces: Annotated[int, Meta(ge=1, le=MAX_PIECES)]
    troubled: list[Troubled]
