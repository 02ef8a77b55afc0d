"""The way of each collector's copies, for `clients` and `doctor`: by the kernel, or how else and why. No I/O."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from shared.bus.bodies.offload_messages import MAX_REASON, CollectorPath, Way
from shared.client import Client

BEING_TOLD: Final = "its sender is being told of it"
"""The reason of a collector that the plan serves and the rules do not yet."""


def paths_of(
    clients: Iterable[Client],
    served: Collection[str],
    reasons: Mapping[str, str],
    refusal: str,
    leaves_as_packets: Callable[[str], bool],
) -> list[CollectorPath]:
    """Return the way of each collector.

    `served` are those that the rules serve now, `reasons` why the plan does not serve others. `refusal`: the reason for
    which there are no rules by the plan yet; empty: they are to come.
    """
    refused = f"the rules with it were refused: {refusal.removeprefix('refused: ')}"
    otherwise = refused[:MAX_REASON] if refusal else BEING_TOLD
    told = []
    for client in (client for client in clients if client.streams):
        way: Way = "frames"
        if client.name in served:
            way = "kernel"
        elif client.source == "relay":
            way = "relay"
        elif leaves_as_packets(client.address):
            way = "packets"
        told.append(CollectorPath(client.name, way, "" if way == "kernel" else reasons.get(client.name, otherwise)))
    return told
