"""The distance of a collector, as far as the sources of its copies matter. No I/O."""

from enum import IntEnum, auto


class Distance(IntEnum):
    """The distance of a collector: on this host, on a link of it, or behind a router."""

    HOST = auto()
    LINK = auto()
    ROUTED = auto()
