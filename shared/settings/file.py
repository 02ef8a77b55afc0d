"""Reading of settings, from one TOML file and the environment, into one frozen object; and writing of such a file.

The environment overrides every scalar of a section: `FANWIRE_GATEWAY__MAX_CLIENTS=500`. Lists are for the file.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from msgspec import Struct

from shared.settings.explain import SettingsError, did_you_mean, expected, explain, explain_toml, keys
from shared.settings.location import VARIABLE, settings_file
from shared.settings.model import Settings
from shared.settings.tables import Gateway

MAX_DIRECTORY: Final = 107 - len("/pool.999999999")
"""Bytes that sun_path (unix(7)) leaves for the bus directory."""
NOT_SETTINGS: Final = frozenset({VARIABLE})


def load(path: Path | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings file, else the defaults; then the environment. SettingsError."""
    path = settings_file(path, environment)
    where = "settings" if path is None else str(path)
    text, found = ("", {}) if path is None else _parsed(path)
    overrides = {name: text for name, text in environment.items() if name.startswith("FANWIRE_")}
    for name in sorted(overrides.keys() - NOT_SETTINGS):
        found = _override(found, name, overrides[name])
    try:
        settings = msgspec.convert(found, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {explain(error, Settings, found, text)}") from None
    if len(os.fsencode(settings.bus.path)) > MAX_DIRECTORY:
        raise SettingsError(f"{where}: [bus] directory: expected at most {MAX_DIRECTORY} bytes, for socket paths in it")
    return settings


def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a file, and its values."""
    try:
        text = path.read_text("utf-8-sig")  # some editors begin a file with a mark
        return text, tomllib.loads(f"{text}\n")  # the last line has a number only if it ends
    except OSError as error:
        other = "name the file by --config or FANWIRE_CONFIG"
        cure = "let this user read it, or run as one who may" if isinstance(error, PermissionError) else other
        raise SettingsError(f"{path}: {error.strerror}; {cure}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of thousands of digits
        raise SettingsError(f"{path}: {explain_toml(error)}") from None


def load_listeners(path: Path | None) -> Settings:
    """Return default settings with the gateway's listeners of a file, which may be wrong in all else."""
    path = settings_file(path, os.environ)
    with suppress(SettingsError, LookupError, TypeError, msgspec.ValidationError):
        if path is not None:
            listen = _parsed(path)[1]["gateway"]["listen"]
            return Settings(gateway=msgspec.convert({"listen": listen}, Gateway))
    return Settings()


def load_again(path: Path | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings as `load` did before; SettingsError too when their source can be read only once."""
    named = settings_file(path, environment)
    if named is not None and named.exists() and not named.is_file():
        raise SettingsError(f"{named}: not a regular file, so it can't be read a second time; restart instead")
    return load(path, environment)


def differing(one: Struct, other: Struct, prefix: str = "") -> Iterator[str]:
    """Yield the keys, such as `gateway.listen`, in which two settings of one kind differ; for a list, its own key."""
    for entry in msgspec.structs.fields(one):
        mine, theirs, key = getattr(one, entry.name), getattr(other, entry.name), f"{prefix}{entry.encode_name}"
        if isinstance(mine, Struct):
            yield from differing(mine, theirs, f"{key}.")
        elif mine != theirs:
            yield key


def render(settings: Settings, *, defaults: bool = True) -> str:
    """Return settings as TOML that `load` reads back to the same; `defaults`: also default values."""
    values: dict[str, Any] = msgspec.to_builtins(settings) if defaults else _changed(settings)
    sections, lists = [], []
    if not settings.streams:
        sections.append("stream = []\n")  # there is a stream by default; a key of no table stands before all tables
    for name, value in values.items():
        if isinstance(value, dict):
            sections.append(_table(f"[{name}]", value))
        else:
            lists += [_table(f"[[{name}]]", entry) for entry in value]
    return "\n".join(sections + lists)


def _changed(struct: Struct) -> dict[str, Any]:
    """Return the fields, as `to_builtins` writes them, that differ from their defaults."""
    changed = {}
    for entry in msgspec.structs.fields(struct):
        value = getattr(struct, entry.name)
        if value == entry.default:
            continue
        if isinstance(value, Struct):
            value = _changed(value)
        elif isinstance(value, tuple):
            value = [_changed(each) if isinstance(each, Struct) else each for each in value]
        changed[entry.encode_name] = value
    return changed


def _table(title: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join([title, *lines, ""])


def _toml(value: Any) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's too, but for DEL, which TOML wants escaped.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def _override(found: dict[str, Any], variable: str, text: str) -> dict[str, Any]:
    """Return `found` with the scalar that an environment variable names set to its text, read as its type."""
    section, _, rest = variable.removeprefix("FANWIRE_").lower().partition("__")
    sections = keys(Settings)
    if not rest and not section.startswith(tuple(sections)):
        return found  # another program's variable; a section with one underscore too few is a mistake
    if section not in sections or not rest:
        known = ", ".join(name for name, declared in sections.items() if not get_args(declared))
        raise SettingsError(f"{variable}: not a setting; expected FANWIRE_SECTION__KEY, sections {known}")
    if get_args(sections[section]):
        raise SettingsError(f"{variable}: [[{section}]] is a list; set it in the settings file")
    values = found.get(section, {})
    if not isinstance(values, dict):
        return found  # the file is wrong there, and is refused when it is converted
    field_type = keys(sections[section]).get(rest)
    if field_type is None:
        there = keys(sections[section])
        raise SettingsError(f"{variable}: not a setting{did_you_mean(rest, there)}; [{section}] has {', '.join(there)}")
    try:
        value = msgspec.to_builtins(msgspec.convert(text, field_type, strict=False))
    except msgspec.ValidationError as error:
        cure = "; set it in the settings file" if "`array`" in str(error) else ""
        raise SettingsError(f"{variable}: {expected(str(error), field_type)}{cure}") from None
    return {**found, section: {**values, rest: value}}
