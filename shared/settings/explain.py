"""Explanations of settings that are refused: the entry by its name, the key, what was expected. No I/O."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from shared.net.printable import printable


class SettingsError(ValueError):
    """Settings that can't be used: one line with file, key and what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a question about the nearest of the words, to be put behind one that is none of them; often empty.

    >>> did_you_mean("legder", ["clients", "ledger"]), did_you_mean("x", ["clients"])
    (" (did you mean 'ledger'?)", '')
    """
    from difflib import get_close_matches  # for mistakes alone

    return "".join(f" (did you mean {near!r}?)" for near in get_close_matches(word, list(words), 1))


def keys(struct: type[Struct]) -> dict[str, Any]:
    """Return the keys of a table as they are written in the file, each with its type."""
    hints = get_type_hints(struct, include_extras=True)
    return {entry.encode_name: hints[entry.name] for entry in msgspec.structs.fields(struct)}


def explain(message: str, whole: type[Struct], found: Any) -> str:
    """Turn msgspec's sentence about a file, declared by `whole` and with `found` in it, into: key, expected value."""
    reason, at, path = message.rpartition(" - at `$")
    reason = reason if at else message
    declared: Any = whole
    places: list[str | int] = []
    for key, number in re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", path if at else ""):
        places.append(key or (int(number) if number != "..." else 0))
        if key:
            declared = keys(table_of(declared) or whole).get(key, whole)  # a value may look like a path
    title, table = _title(places, found), table_of(declared)
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL):
        known = keys(table or whole)
        title = f"{title} {unknown[1]}" if title else unknown[1]
        return f"{title}: unknown key{did_you_mean(unknown[1], known)}; expected one of {', '.join(known)}"
    if len(places) == 1 and (section := str(places[0])) in keys(whole) and table:
        if "Expected `array`, got `object`" in reason:
            reason += f"; write [[{section}]], as there may be several, not [{section}]"
        elif "Expected `object`, got `array`" in reason:
            reason += f"; write [{section}], as there is only one, not [[{section}]]"
    reason = with_choices(reason, declared)
    if table and reason.partition(": ")[0] in keys(table):
        return f"{title} {reason}".lstrip()
    return f"{title}: {reason}" if title else reason


def _title(places: list[str | int], found: Any) -> str:
    """Return an entry, and a key of it, as people find it in the file.

    >>> _title(["stream", 1, "listen", 0], {"stream": [{}, {"name": "syslog"}]}), _title(["bus", "pool"], {})
    ('[[stream]] "syslog" listen', '[bus] pool')
    """
    if not places:
        return ""
    section, *rest = places
    if not (rest and isinstance(rest[0], int)):
        is_list = isinstance(found, dict) and section in ("stream", "collector", "token")
        first = f"[[{section}]]" if is_list else f"[{section}]"
    else:
        try:
            first = f'[[{section}]] "{found[section][rest[0]]["name"]}"'
        except (LookupError, TypeError):
            first = f"[[{section}]] number {rest[0] + 1}"
        rest = rest[1:]
    return " ".join([first, *(str(key) for key in rest if isinstance(key, str))])


def table_of(declared: Any) -> type[Struct] | None:
    """Return the struct that a type is, or that is the table of its list."""
    types = (each for each in (declared, *get_args(declared)) if isinstance(each, type))
    return next((each for each in types if issubclass(each, Struct)), None)


def with_choices(reason: str, declared: Any) -> str:
    """Add the texts that are allowed to msgspec's reason, where it is that a text is none of them."""
    if "enum" not in reason.split("'")[0]:
        return reason
    choices = list(_choices(declared))
    wrong = reason.partition("'")[2].rpartition("'")[0]
    return f"{reason}{did_you_mean(wrong, choices)}; expected one of {', '.join(choices)}"


def _choices(declared: Any) -> Iterator[str]:
    """Yield the texts that a type allows, where it allows no others."""
    if get_origin(declared) is Literal:
        yield from get_args(declared)
    else:
        yield from (choice for each in get_args(declared) for choice in _choices(each))
