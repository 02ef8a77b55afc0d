"""The names of segments, which tell all that is known without opening one: STREAM/TIME-NUMBER.pcapng. No I/O.

The time is that of the first batch's receipt; the number grows from one segment of a stream to the next, whatever the
clock does. One that is being written has `.open` in its name, and one that can't be read ends in `.bad`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

SECOND: Final = 1_000_000_000
BAD: Final = ".bad"
LATE_NS: Final = 20 * SECOND
"""The most by which a batch may be older than one that was written before it: workers differ, and hold some back."""
LASTING_NS: Final = 60 * SECOND
"""The longest that a segment is written, about."""
_NAME: Final = re.compile(r"(\d{8}T\d{6})\.(\d{9})Z-(\d{1,18})(\.open)?\.pcapng(\.bad)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the journal: its number within the stream, the time of its first batch, and its state."""

    stream: str
    number: int
    began_ns: int
    is_open: bool = False
    is_bad: bool = False

    @property
    def name(self) -> str:
        """The file's name; `parse_name` is the way back.

        >>> Segment("netflow", 42, 1_795_887_000_000_000_007).name
        '20261128T173000.000000007Z-000042.pcapng'
        """
        seconds, rest = divmod(self.began_ns, SECOND)
        at = datetime.fromtimestamp(seconds, UTC)
        state = f"{'.open' if self.is_open else ''}.pcapng{BAD if self.is_bad else ''}"
        return f"{at:%Y%m%dT%H%M%S}.{rest:09}Z-{self.number:06}{state}"


def parse_name(stream: str, name: str) -> Segment | None:
    """Return the segment that a file's name tells of; None when it is another's file."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    try:
        at = datetime.strptime(f"{found[1]} +0000", "%Y%m%dT%H%M%S %z")
    except ValueError:
        return None
    began_ns = int(at.timestamp()) * SECOND + int(found[2])
    return Segment(stream, int(found[3]), began_ns, bool(found[4]), bool(found[5]))


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
