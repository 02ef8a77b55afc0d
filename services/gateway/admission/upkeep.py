"""Removal of entries that may not stay: what is newer than they are speaks against them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.ownership import is_reached_elsewhere
from services.gateway.admission.readmission import find_excess
from services.gateway.admission.tokens import Tokens
from services.gateway.registry.changes import ignore
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from shared.log import get_logger

log = get_logger()


def expel_loops(destinations: Destinations, registry: Registry, expelled: set[str]) -> None:
    """Remove collectors whose copies would come back: a listener or an address may be newer than the entry.

    Those of the settings are noted in `expelled`, by name: nobody signs them up again. While the kernel can't tell this
    host's addresses, none is removed.
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
        expelled.update(entry.client.name for entry in loops if entry.origin is Origin.SETTINGS)
        registry.expel(loops)


class Readmission:
    """Takes from entries what tokens and settings do not allow any more, once that can be stored."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._due: Callable[[], None] | None = None

    def begin(self, tokens: Tokens, destinations: Destinations) -> None:
        """Compare each entry with these from now on."""
        self._due = partial(readmit, self._registry, tokens, destinations)
        self.check()

    def check(self) -> None:
        """Try again what could not be stored. Due every second."""
        if self._due is not None:
            with suppress(OSError):  # the store has logged it
                self._registry.changes.make(self._due, ignore)
                self._due = None


def readmit(registry: Registry, tokens: Tokens, destinations: Destinations) -> None:
    """Take from entries what these tokens and settings do not allow. OSError when that can't be stored."""
    measured = [entry for entry in registry.entries() if registry.leases.measures(entry)]
    excess = find_excess(measured, tokens, destinations)
    registry.expel(excess.removed)
    _log_excess("client removed: its token or [gateway] destinations do not allow it any more", excess.removed)
    registry.narrow(excess.narrowed)
    narrowed = [entry for entry, _ in excess.narrowed]
    _log_excess("client narrowed to the streams that its token still allows", narrowed)


def _log_excess(event: str, entries: Sequence[Entry]) -> None:
    if entries:
        log.warning(event, clients=[entry.client.name for entry in entries[:10]], count=len(entries))
