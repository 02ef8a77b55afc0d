"""Removal of entries that may not stay: what is newer than they are speaks against them."""

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.ownership import is_reached_elsewhere
from services.gateway.admission.readmission import find_excess
from services.gateway.admission.tokens import Tokens
from services.gateway.registry.registry import Registry
from shared.log import get_logger

log = get_logger()


def expel_loops(destinations: Destinations, registry: Registry) -> None:
    """Remove collectors whose copies would come back: a listener or an address may be newer than the entry.

    While the kernel can't tell this host's addresses, none is removed.
    """
    mine = (entry for entry in registry.entries() if not is_reached_elsewhere(entry, registry.node))
    try:
        loops = [entry for entry in mine if destinations.find_loop(entry.client)]
    except OSError:
        return
    if loops:
        log.warning(
            "collector removed: its address is one of fanwire's own listeners (loop)",
            clients=[entry.client.name for entry in loops[:10]],
            count=len(loops),
        )
        registry.expel(loops)


def readmit(registry: Registry, tokens: Tokens, destinations: Destinations) -> None:
    """Take from entries what today's tokens and settings do not allow."""
    measured = [entry for entry in registry.entries() if registry.leases.measures(entry)]
    excess = find_excess(measured, tokens, destinations)
    narrowed = [entry for entry, _ in excess.narrowed]
    for event, entries in (
        ("client removed: its token or [gateway] destinations do not allow it any more", excess.removed),
        ("client narrowed to the streams that its token still allows", narrowed),
    ):
        if entries:
            log.warning(event, clients=[entry.client.name for entry in entries[:10]], count=len(entries))
    registry.expel(excess.removed)
    registry.narrow(excess.narrowed)
