"""Lines on which the entries of a settings file stand: tomllib tells none. No I/O."""

import re
from collections.abc import Sequence
from typing import Final

_HEADER: Final = re.compile(r"\s*\[\[?\s*([A-Za-z0-9_-]+)\s*\]\]?\s*(#.*)?")
_KEY: Final = re.compile(r"""\s*(?:([A-Za-z0-9_-]+)|"([^"]*)"|'([^']*)')\s*=""")
_LONG_QUOTE: Final = re.compile("\"\"\"|'''")


def line_of(text: str, places: Sequence[str | int]) -> int | None:
    r"""Return the line of a key, such as `["stream", 1, "listen"]`, else of its table; None where it has none.

    >>> line_of('[[stream]]\n[[stream]]\nname = "a"\nlisten = 3', ["stream", 1, "listen"])
    4
    """
    section, *rest = places
    wanted = next((place for place in rest if isinstance(place, int)), 0)
    key = next((place for place in rest if isinstance(place, str)), None)
    table, seen, quoted, found = "", -1, False, None
    for number, line in enumerate(text.split("\n"), 1):
        was_quoted, quoted = quoted, quoted ^ bool(len(_LONG_QUOTE.findall(line)) % 2)
        if was_quoted:
            continue
        if header := _HEADER.fullmatch(line.rstrip("\r")):
            table = header[1]
            seen += table == section
            if table == section and seen == wanted:
                found = number
        elif match := _KEY.match(line):
            name = next(group for group in match.groups() if group is not None)
            if (table, seen, name) == (section, wanted, key) or (table, name) == ("", section):
                return number
    return found
