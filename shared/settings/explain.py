"""Explanations of settings that are refused: line, entry, key, and what was expected. No I/O."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from shared.net.printable import printable
from shared.settings.lines import line_of

Place = str | int
"""A section, the number of an entry in its list from 0 on, or a key."""
WORDS: Final = {
    "array": "a list in brackets", "object": "a table", "str": "a text in quotes", "int": "a whole number",
    "float": "a number", "bool": "true or false", "date": "a date", "datetime": "a time", "time": "a time",
}  # fmt: skip
"""msgspec's names of types, in the words of people who write settings."""
TOML: Final = {
    "Cannot overwrite a value": "this key is there already",
    "Cannot declare": "this table is there already",
    "Invalid value": "invalid value; a text needs quotes, a switch is true or false",
    "Illegal character '\\n'": "the quotes are not closed on this line",
    "Unclosed array": "the bracket is not closed",
}
"""Beginnings of tomllib's sentences that do not say what to do."""


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


def explain_toml(error: Exception) -> str:
    """Turn tomllib's sentence into: line, what is wrong there.

    >>> explain_toml(ValueError("Invalid value (at line 2, column 18)"))
    'line 2: not TOML: invalid value; a text needs quotes, a switch is true or false'
    """
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"line {line}: not UTF-8; save the file in that encoding"
    reason, at, place = str(error).rpartition(" (at ")
    reason = reason if at else str(error)
    better = next((words for begin, words in TOML.items() if reason.startswith(begin)), reason)
    known = re.match(r"line \d+", place)
    return f"{known[0]}: not TOML: {better}" if known else f"not TOML: {better}"


def explain(error: msgspec.ValidationError, whole: type[Struct], found: Any, text: str = "") -> str:
    """Turn msgspec's sentence about a file's `text`, declared by `whole`, with `found` in it, into: line, key, cure."""
    reason, at, path = str(error).rpartition(" - at `$")
    reason = reason if at else str(error)
    places: list[Place] = []
    declared: Any = whole
    for key, number in re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", path if at else ""):
        places.append(key or (int(number) if number != "..." else 0))
        if key:
            declared = keys(table_of(declared) or whole).get(key, whole)  # a value may look like a path
    if entry := re.match(r'\[\[(\w+)\]\] "(.*)" (\w+): ', reason):  # of several entries together: it names one itself
        numbers = [number for number, each in enumerate(found[entry[1]]) if each.get("name") == entry[2]]
        places = [entry[1], numbers[-1], entry[3]]
        reason = reason[entry.end() :]
    elif unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL):
        places.append(unknown[1])
        reason = _unknown(places, table_of(declared) or whole, whole, found)
    elif missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        reason = f"{missing[1]} is missing"
    elif (table := table_of(declared)) and (key := reason.partition(": ")[0]) in keys(table):
        places.append(key)
        reason = reason.removeprefix(f"{key}: ")
    else:
        reason = _other_brackets(reason, places, whole) or expected(reason, declared)
    line = line_of(text, places) if places else None
    title = _title(places, found)
    return "".join(f"{part}: " for part in (f"line {line}" if line else "", title) if part) + reason


def _unknown(places: Sequence[Place], table: type[Struct], whole: type[Struct], found: Any) -> str:
    """Return the reason why a key is refused that its table does not have."""
    known, name = keys(table), str(places[-1])
    nearest = did_you_mean(name, known)
    if table is whole and not _is_table(found.get(name)):
        return f"this key is in no table{_owners(name, whole)}"
    if table is whole:
        return f"unknown table{nearest}; expected one of {', '.join(map(_in_brackets, known, known.values()))}"
    return f"unknown key{nearest or _owners(name, whole)}; expected one of {', '.join(known)}"


def _owners(key: str, whole: type[Struct]) -> str:
    """Return the tables that have a key, to be put behind it."""
    tables = {_in_brackets(name, kind): table for name, kind in keys(whole).items() if (table := table_of(kind))}
    owners = [title for title, table in tables.items() if key in keys(table)]
    return f" (it belongs to {' or '.join(owners)})" if owners else ""


def _in_brackets(section: str, kind: Any) -> str:
    return f"[[{section}]]" if get_args(kind) else f"[{section}]"


def _other_brackets(reason: str, places: Sequence[Place], whole: type[Struct]) -> str:
    """Return the reason why a section is refused that has the brackets of the other kind; empty where it has not."""
    if len(places) == 1 and (section := str(places[0])) in keys(whole):
        if "Expected `array`, got `object`" in reason:
            return f"write [[{section}]], as there may be several, not [{section}]"
        if "Expected `object`, got `array`" in reason:
            return f"write [{section}], as there is only one, not [[{section}]]"
    return ""


def _is_table(value: Any) -> bool:
    """Return whether a value of the file is written as a table, or as several."""
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(next(iter(value), None), dict))


def _title(places: Sequence[Place], found: Any) -> str:
    """Return an entry, and a key of it, as people find it in the file.

    >>> _title(["stream", 1, "listen", 0], {"stream": [{}, {"name": "syslog"}]}), _title(["bus", "pool"], {})
    ('[[stream]] "syslog" listen', '[bus] pool')
    """
    if not places:
        return ""
    section, *rest = places
    value = found.get(section)
    if rest and isinstance(rest[0], int):
        number, *rest = rest
        try:
            first = f'[[{section}]] "{value[number]["name"]}"'
        except (LookupError, TypeError):
            first = f"[[{section}]] number {int(number) + 1}"
    elif rest or _is_table(value):
        first = f"[[{section}]]" if isinstance(value, list) else f"[{section}]"
    else:
        first = str(section)  # a key above all tables
    return " ".join([first, *(str(key) for key in rest if isinstance(key, str))])


def table_of(declared: Any) -> type[Struct] | None:
    """Return the struct that a type is, or that is the table of its list."""
    types = (each for each in (declared, *get_args(declared)) if isinstance(each, type))
    return next((each for each in types if issubclass(each, Struct)), None)


def expected(reason: str, declared: Any) -> str:
    """Turn msgspec's reason why a value is not of the declared type into words, with the values that are allowed.

    >>> expected("Expected `int`, got `str`", int)
    'expected a whole number, got a text in quotes'
    """
    if "enum" in reason.split("'")[0]:
        wrong = reason.partition("'")[2].rpartition("'")[0]
        choices = list(_choices(declared))
        return f"{wrong!r} is not allowed{did_you_mean(wrong, choices)}; expected one of {', '.join(choices)}"
    match = re.match(r"Expected `([a-z |]+)`(?:.*, got `(\w+)`)?", reason, re.DOTALL)
    if match is None:
        return reason
    kinds = [WORDS.get(kind, kind) for kind in match[1].split(" | ") if kind != "null"]
    limits = next((limit for meta in _metas(declared) if (limit := _limits(meta, match[1]))), "")
    got = f", got {WORDS.get(match[2], match[2])}" if match[2] else ""
    return f"expected {' or '.join(kinds)}{limits}{got}"


def _limits(meta: Meta, kind: str) -> str:
    """Return the range of a value in words: of numbers, of the length of a text, or of the number of entries."""
    if meta.description:
        return f": {meta.description}"
    if meta.le is not None:
        return f" from {f'above {meta.gt}' if meta.ge is None else meta.ge} to {meta.le}"
    low, high = meta.min_length or 0, meta.max_length
    if high is None:
        return " that is not empty" if low else ""
    return f" with {low} to {high} {'entries' if kind == 'array' else 'characters'}"


def _metas(declared: Any) -> Iterator[Meta]:
    """Yield the constraints of a type, its own before those of its parts."""
    yield from (each for each in getattr(declared, "__metadata__", ()) if isinstance(each, Meta))
    for each in (*([declared.__origin__] if hasattr(declared, "__metadata__") else []), *get_args(declared)):
        if not isinstance(each, Meta):
            yield from _metas(each)


def _choices(declared: Any) -> Iterator[str]:
    """Yield the texts that a type allows, where it allows no others."""
    if get_origin(declared) is Literal:
        yield from get_args(declared)
    else:
        yield from (choice for each in get_args(declared) for choice in _choices(each))
