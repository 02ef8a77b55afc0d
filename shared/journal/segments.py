"""The names of segments, which tell all that is known without opening one: STREAM/TIME-NUMBER.pcapng. No I/O.

The time is that of the first batch's receipt; the number grows from one segment of a stream to the next, whatever the
clock does. One that is being written has `.open` in its name, and one that can't be read ends in `.bad`. Of one that
another program has compressed only the name is known here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from typing import Final

SECOND: Final = 1_000_000_000
BAD: Final = ".bad"
PACKED: Final = ("", ".zst", ".gz", ".lz4")
"""Endings of segments that another program has compressed, such that Wireshark opens them."""
LATE_NS: Final = 20 * SECOND
"""The most by which a batch may be older than one that was written before it: workers differ, and hold some back."""
LASTING_NS: Final = 60 * SECOND
"""The longest that a segment is written, about."""
_NAME: Final = re.compile(r"(\d{8}T\d{6})\.(\d{9})Z-(\d{1,18})(\.open)?\.pcapng(\.bad)?(\.[a-z\d]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the journal: its number within the stream, the time of its first batch, and its state."""

    stream: str
    number: int
    began_ns: int
    is_open: bool = False
    is_bad: bool = False
    packed: str = ""

    @property
    def is_readable(self) -> bool:
        """Return whether its records can be read here, as far as its name tells."""
        return not (self.is_bad or self.packed)

    @property
    def name(self) -> str:
        """The file's name; `parse_name` is the way back.

        >>> Segment("netflow", 42, 1_795_887_000_000_000_007).name
        '20261128T173000.000000007Z-000042.pcapng'
        """
        seconds, rest = divmod(self.began_ns, SECOND)
        state = f"{'.open' if self.is_open else ''}.pcapng{BAD if self.is_bad else ''}{self.packed}"
        return f"{_time(seconds)}.{rest:09}Z-{self.number:06}{state}"

    @property
    def names(self) -> set[str]:
        """Return the names under which it may be by now: it may be sealed, or compressed by another program."""
        sealed = replace(self, is_open=False)
        return {self.name, sealed.name, *(replace(sealed, packed=each).name for each in PACKED)}


@lru_cache(maxsize=1 << 16)
def _time(seconds: int) -> str:
    """Return the time in a name; all names of a stream are wanted whenever one of them changes."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}"


def parse_name(stream: str, name: str) -> Segment | None:
    """Return the segment that a file's name tells of; None when it is another's file."""
    found = _NAME.fullmatch(name)
    if found is None or (found[6] or "") not in PACKED:
        return None
    try:
        at = datetime.strptime(f"{found[1]} +0000", "%Y%m%dT%H%M%S %z")
    except ValueError:
        return None
    began_ns = int(at.timestamp()) * SECOND + int(found[2])
    if not 0 <= began_ns < 1 << 63:  # before 1970, or in centuries: no clock says so, and no message has such times
        return None
    return Segment(stream, int(found[3]), began_ns, bool(found[4]), bool(found[5]), found[6] or "")


def first_for(segments: Sequence[Segment], since_ns: int) -> int:
    """Return the index of the first of these segments, in their order, that may have batches received since then.

    Its last batches are about as old as the next segment, give or take `LATE_NS`; where a clock was set back meanwhile,
    they are no later than it lasts. So some segments may be looked at in vain, but none is passed over.

    >>> [first_for([Segment("s", n, n * 60 * SECOND) for n in range(4)], t * SECOND) for t in (0, 61, 100, 500)]
    [0, 0, 1, 3]
    >>> set_back = [Segment("s", n, t * SECOND) for n, t in enumerate((0, 9000, 60, 120, 180))]
    >>> [first_for(set_back, t * SECOND) for t in (70, 9050, 9100)]
    [0, 1, 4]
    """
    for index, (segment, following) in enumerate(pairwise(segments)):
        if max(following.began_ns, segment.began_ns + LASTING_NS) + LATE_NS >= since_ns:
            return index
    return max(0, len(segments) - 1)
