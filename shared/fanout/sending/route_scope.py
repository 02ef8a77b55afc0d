"""The scope of a collector's route, as far as the sources of its copies matter. No I/O."""

from enum import IntEnum, auto


class RouteScope(IntEnum):
    """The scope of a route, as ip-route(8) has it: to this host, to a link of it, or behind a router."""

    HOST = auto()
    LINK = auto()
    ROUTED = auto()
