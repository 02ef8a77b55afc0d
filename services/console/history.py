"""The last 15 minutes of each rate, in steps of five seconds. No I/O."""

from array import array
from collections.abc import Iterable
from typing import Final

from shared.monitoring.picture import Picture

STEP_SECONDS: Final = 5.0
STEPS: Final = 180
UNKNOWN: Final = -1.0
"""Stands in an array for a rate that is not known."""
Key = tuple[str, str]
"""A kind, such as `collector`, and a name."""


class History:
    """Two series for each stream, collector and exporter: its rate, and the rate of its losses."""

    def __init__(self) -> None:
        self._series: dict[Key, tuple[array[float], array[float]]] = {}
        self._next_at = 0.0
        self.taken = 0
        """Steps taken so far."""

    def note(self, picture: Picture) -> bool:
        """Take a step if it is time to; return whether one was taken. What is not in the picture is forgotten."""
        if picture.at < self._next_at:
            return False
        self._next_at = picture.at + STEP_SECONDS - 0.5
        present: dict[Key, tuple[float | None, float | None]] = {
            ("stream", each.name): (each.rate, each.lost_rate) for each in picture.streams
        }
        present |= {("collector", each.client.name): (each.rate, each.lost_rate) for each in picture.collectors or ()}
        present |= {("exporter", each.address): (each.rate, None) for each in picture.exporters or ()}
        kept: dict[Key, tuple[array[float], array[float]]] = {}
        for key, rates in present.items():
            kept[key] = series = self._series.get(key) or (array("f"), array("f"))
            for values, rate in zip(series, rates, strict=True):
                values.append(UNKNOWN if rate is None else rate)
                del values[:-STEPS]
        self._series = kept
        self.taken += 1
        return True

    def rates(self, kind: str, name: str, most: int = STEPS) -> list[float | None]:
        """Return the last rates, the oldest first."""
        return _known(self._of(kind, name)[0][-most:])

    def losses(self, kind: str, name: str) -> list[float | None]:
        """Return the last rates of losses, the oldest first."""
        return _known(self._of(kind, name)[1])

    def forget_exporters(self) -> None:
        """Make room: exporters are what there may be most of."""
        self._series = {key: series for key, series in self._series.items() if key[0] != "exporter"}

    def _of(self, kind: str, name: str) -> "tuple[array[float], array[float]]":
        return self._series.get((kind, name)) or (array("f"), array("f"))


def _known(values: Iterable[float]) -> list[float | None]:
    return [None if value == UNKNOWN else round(value, 2) for value in values]
