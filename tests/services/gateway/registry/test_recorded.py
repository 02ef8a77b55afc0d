"""Registry files of earlier releases: each version of the file, as a release of its time wrote it."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.gateway.registry.store import SCHEMA, Store, _Kept
from shared.client import Client

RECORDED = {
    int(path.stem.rpartition("-")[2]): path for path in (Path(__file__).parent / "recorded").glob("registry-*.sql")
}
"""By version of the file: its content, as sqlite3(1) dumps it."""


def made(path: Path, version: int) -> Path:
    """Make the file of a version."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(RECORDED[version].read_text())
    return path


def rows(path: Path) -> dict[str, Any]:
    """Return what is kept of each entry."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {name: json.loads(text) for name, text in database.execute("SELECT name, entry FROM client")}


def test_every_version_is_recorded() -> None:
    """A step of the schema comes with a file of the version that it makes."""
    assert sorted(RECORDED) == list(range(1, len(SCHEMA) + 1))


@pytest.mark.parametrize("version", RECORDED)
def test_file_is_taken_forward(tmp_path: Path, version: int) -> None:
    """Every entry is read as it was written; the file is of today's version then, and opens again."""
    path = made(tmp_path / "registry.sqlite", version)
    before = rows(path)
    for _ in range(2):
        with Store(path, lambda: 0.0) as store:
            found = {entry.client.name: entry for entry in store.entries}
            assert store.generation == len(before)
            assert len(store.group_secret) == 32
        assert list(found) == list(before)
        for name, kept in before.items():
            entry = found[name]
            assert entry.client == msgspec.convert(kept["client"], Client)
            assert (entry.ttl, entry.held, entry.origin.value) == (kept["ttl"], kept["held"], kept["origin"])
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (len(SCHEMA),)


ON_THE_BUS = {"node"}
"""Fields that a client has on the bus alone."""


def test_field_of_an_entry_comes_with_a_version(tmp_path: Path) -> None:
    """An earlier release would lose a field that it does not know: a step of the schema has it refuse the file."""
    kept = rows(made(tmp_path / "registry.sqlite", len(SCHEMA))).values()
    assert {key for each in kept for key in each} == set(_Kept.__struct_fields__)
    assert {key for each in kept for key in each["client"]} == set(Client.__struct_fields__) - ON_THE_BUS
