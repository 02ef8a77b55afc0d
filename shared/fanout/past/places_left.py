"""The places at which collectors have left, as their sender knows them: told to the gateway, which keeps them."""

from collections.abc import Sequence
from typing import Final

from shared.bus.bodies.journal_messages import Behind
from shared.client import MAX_PLACES, Client, Place, Resume

MAX_LEFT: Final = 1024
"""Collectors that have left and are told of again to a gateway that was restarted; the first to leave go first."""


class PlacesLeft:
    """Collectors that have left, each with the generation and the places that it had."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[int, int, tuple[Place, ...]]] = {}

    def note(self, client: Client, since_ns: int, places: Sequence[Place]) -> None:
        """Note that a collector has left: it has had what was received before `since_ns`, or is before its places."""
        self._left.pop(client.name, None)
        self._left[client.name] = client.generation, since_ns, tuple(places[-MAX_PLACES:])
        while len(self._left) > MAX_LEFT:
            del self._left[next(iter(self._left))]

    def resume(self, name: str, resume: Resume) -> Resume:
        """Return where a name goes on: where it was seen to leave, if under the generation that the registry means."""
        generation, since_ns, places = self._left.get(name, (0, 0, ()))
        return Resume(since_ns, generation, places) if generation and generation == resume.generation else resume

    def report(self, name: str) -> Behind:
        """Return what the gateway is told of one."""
        generation, since_ns, places = self._left[name]
        return Behind(name, generation, "left", max(1, since_ns), list(places))

    def reports(self) -> list[Behind]:
        """Return that of all."""
        return [self.report(name) for name in self._left]
