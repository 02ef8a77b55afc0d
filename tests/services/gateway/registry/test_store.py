import contextlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from structlog.testing import capture_logs

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.registry import store as store_module
from services.gateway.registry.entry import Entry, Event, Origin
from services.gateway.registry.reached_places import Past
from services.gateway.registry.registry import Registry
from services.gateway.registry.store import SKIPPED, Store
from shared.client import Client, Withheld
from shared.process.lifecycle import OperatorError

HERE = Peer(7, "127.0.0.1", 4000, Rights("holder"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the database."""
    return tmp_path / "registry.sqlite"


def opened(path: Path | None) -> Store:
    """The store at time 0."""
    return Store(path, lambda: 0.0)


def registry_on(store: Store) -> Registry:
    """A registry that goes on from what is kept."""
    registry = Registry(lambda: 0.0, store.generation + 1, store.keep)
    registry.restore(store.entries, store.revision, store.withheld)
    return registry


def join(registry: Registry, name: str, *, hold: bool = False) -> Entry:
    """Enter a collector with everything that one may have."""
    asked: dict[str, Any] = {"streams": ("a", "b"), "source": "original", "prefixes": ("10.0.0.0/8",), "sample": 10}
    client = Client(name, 0, "192.0.2.1", 9, **asked, group="é", hop_limit=3, dscp=46)
    return registry.grant(client, HERE, Origin.JSON, ttl=5, hold=hold)


def shown(registry: Registry) -> list[tuple[object, ...]]:
    """Return what a restart has to keep of each entry, in order."""
    return [(entry.client, entry.origin, entry.ttl, entry.held) for entry in registry.entries()]


def test_everything_is_there_again(path: Path) -> None:
    """After a restart the entries, their order, the revision and the last generation are what they were."""
    with opened(path) as store:
        registry = registry_on(store)
        first, second, third = (join(registry, name) for name in ("one", "two", "three"))
        registry.release(second)
        join(registry, "one", hold=True)
        before, revision = shown(registry), registry.commit()
    assert (first.client.generation, third.client.name) == (1, "three")
    with opened(path) as store:
        again = registry_on(store)
        assert (shown(again), again.commit(), store.generation) == (before, revision, 4)
        assert [entry.client.name for entry in again.entries()] == ["one", "three"]
        assert {entry.peer for entry in again.entries()} == {Peer(0, "127.0.0.1", 4000, Rights("holder"))}
        assert join(again, "two").client.generation == 5


def test_entry_of_an_earlier_version(path: Path) -> None:
    """An entry written before entries had holders is read, and has none."""
    with opened(path) as store:
        join(registry_on(store), "one")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE client SET entry = json_remove(entry, '$.holder')")
    with opened(path) as store:
        assert [entry.peer.rights.holder for entry in store.entries] == [""]


def test_secret_of_groups_outlives_a_restart(path: Path) -> None:
    """Sources stay with their members over a restart, also of an earlier version; each registry has its own secret."""
    secrets = []
    for _ in range(2):
        with opened(path) as store:
            secrets.append(store.group_secret)
            join(registry_on(store), "one")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript("DROP TABLE history; DROP TABLE withheld; DROP TABLE past")
        database.execute("PRAGMA user_version = 1")
    for _ in range(2):
        with opened(path) as store:
            secrets.append(store.group_secret)
            assert [entry.client.name for entry in store.entries] == ["one"]
    assert secrets[0] == secrets[1] != secrets[2] == secrets[3]
    assert [len(secret) for secret in secrets] == [32] * 4


def test_orders_to_withhold_outlive_a_restart(path: Path) -> None:
    """They are there again, with or without their collector; a file of before there were any has none."""
    order = Withheld("ops", 12.5, "too slow")
    with opened(path) as store:
        registry = registry_on(store)
        for name in ("stays", "goes"):
            registry.withhold(join(registry, name), order)
        gone = registry.find("goes")
        assert gone
        registry.release(gone)
    with opened(path) as store:
        registry = registry_on(store)
        assert registry.withheld == {"stays": order, "goes": order}
        assert [entry.client.withheld for entry in registry.entries()] == [order]
        assert join(registry, "goes").client.withheld == order
        registry.end_withholding("stays")
        registry.release(join(registry, "goes"))
        registry.end_withholding("goes")
    with opened(path) as store:
        assert registry_on(store).withheld == {}
        assert [entry.client.withheld for entry in store.entries] == [None]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.executescript("DROP TABLE withheld; DROP TABLE past")
        database.execute("PRAGMA user_version = 3")
    with opened(path) as store:
        assert (store.withheld, [entry.client.name for entry in store.entries]) == ({}, ["stays"])


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    """A registry that is not kept works all the same."""
    with opened(None) as store:
        join(registry_on(store), "one")
    with opened(None) as store:
        assert (store.entries, store.revision) == ([], 0)
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(path: Path) -> None:
    """A file that another gateway has open is refused, by name."""
    with opened(path) as store:
        join(registry_on(store), "one")
        with pytest.raises(OperatorError, match="in use by another gateway"):
            opened(path)


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """One sentence gives the reason and the cure where no file can be made."""
    with pytest.raises(OperatorError, match=r"nowhere/registry.sqlite: .*name another \[gateway\] database"):
        opened(tmp_path / "nowhere" / "registry.sqlite")


def test_file_of_a_later_version(path: Path) -> None:
    """A file of a later version is left alone."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(OperatorError, match="later version of fanwire"):
        opened(path)


def garble_middle(path: Path) -> None:
    """Damage a page."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = b"\xa5" * 4096
    path.write_bytes(data)


def write_rubbish(path: Path) -> None:
    """Put in its place what is no database."""
    path.write_bytes(b"no database at all" * 1000)


def write_bad_row(path: Path) -> None:
    """Write a row that is no entry, as those of orders and places."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE client SET entry = '{}' WHERE name = 'n7'")
        database.execute("INSERT INTO withheld VALUES ('n7', '{}')")
        many = json.dumps({"holder": "", "generation": 1, "since_ns": 1, "streams": [str(each) for each in range(65)]})
        database.execute("INSERT INTO past VALUES ('n7', ?)", (many,))


def drop_state(path: Path) -> None:
    """Lose the revision."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM state")


def change(path: Path, old: bytes, new: bytes) -> None:
    """Change the bytes in a place, as a faulty disk does."""
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def write_no_utf8(path: Path) -> None:
    """Write an entry that is no text."""
    change(path, b'"original"', b'"origina\xff"')


def write_another_name(path: Path) -> None:
    """Write an entry whose name is not the one it is kept by."""
    change(path, b'{"name":"n7"', b'{"name":"m7"')


def write_huge_generation(path: Path) -> None:
    """Write a number that can't have been given yet: the next one would be more than the bus can carry."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "UPDATE client SET entry = json_set(entry, '$.client.generation', ?) WHERE name = 'n7'", (1 << 62,)
        )


def write_wrong_state(path: Path) -> None:
    """Write a revision that is no number."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE state SET revision = 'x'")


def write_huge_state(path: Path) -> None:
    """Write a number of the last generation behind which there is no room."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE state SET generation = ?", (1 << 62,))


def rename_column(path: Path) -> None:
    """Make the schema another one's."""
    change(path, b"boot_id TEXT", b"boot_iT TEXT")


def claim_a_later_format(path: Path) -> None:
    """Write a header by which SQLite reads, and writes nothing."""
    data = path.read_bytes()
    path.write_bytes(data[:18] + b"\x28" + data[19:])


DAMAGES = (
    garble_middle,
    write_rubbish,
    drop_state,
    write_wrong_state,
    write_huge_state,
    rename_column,
    claim_a_later_format,
)
DAMAGED_ROWS = (write_bad_row, write_no_utf8, write_another_name, write_huge_generation)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_set_aside(path: Path, damage: object) -> None:
    """A file that can't be read is kept under another name, and a new file takes its place."""
    with opened(path) as store:
        registry = registry_on(store)
        for number in range(200):
            join(registry, f"n{number}")
    damage(path)  # type: ignore[operator]
    with opened(path) as store:
        assert (store.entries, store.revision, store.generation) == ([], 0, 0)
        join(registry_on(store), "one")
    assert [each.name for each in path.parent.glob("registry.sqlite.damaged-*")]
    with opened(path) as store:
        assert [entry.client.name for entry in store.entries] == ["one"]


@pytest.mark.parametrize("damage", DAMAGED_ROWS)
def test_damaged_row_costs_itself_alone(path: Path, damage: Callable[[Path], None]) -> None:
    """Its client has to sign up again, all others are there; a copy of the file has the row, and the list an epoch."""
    with opened(path) as store:
        registry, epoch = registry_on(store), store.epoch
        for number in range(9):
            join(registry, f"n{number}")
    damage(path)
    with capture_logs() as logs, opened(path) as store:
        assert (len(store.entries), store.revision, store.withheld, store.pasts) == (8, 9, {}, {})
        assert store.epoch != epoch
    (aside,) = path.parent.glob("registry.sqlite.damaged-*")
    with contextlib.closing(sqlite3.connect(aside)) as database:
        assert database.execute("SELECT count(*) FROM client").fetchone() == (9,)
    assert [("starts without them" in each["event"], each["file"]) for each in logs] == [(True, str(aside))]
    with capture_logs() as logs, opened(path) as store:
        assert (len(store.entries), logs) == (8, [])


def fill(registry: Registry) -> None:
    """Enter more than one page holds."""
    for number in range(1000):
        join(registry, f"n{number}")


def test_change_that_cannot_be_written(path: Path) -> None:
    """It is refused whole, and the next one is taken when there is room again."""
    with opened(path) as store:
        registry = registry_on(store)
        join(registry, "one")
        store._database.execute("PRAGMA max_page_count = 1")
        with capture_logs() as logs, pytest.raises(OSError, match="can't be written to disk"):
            store.keep_pasts({f"n{number}": Past("", 1, 1, ("a" * 64,) * 64) for number in range(9)})
        with pytest.raises(OSError, match="can't be written to disk"):
            fill(registry)
        assert ["changes are refused until it can" in each["event"] for each in logs] == [True]
        before = shown(registry)
        store._database.execute("PRAGMA max_page_count = 100000")
        join(registry, "last")
    with opened(path) as store:
        again = registry_on(store)
        assert shown(again)[:-1] == before
        assert shown(again)[-1][0].name == "last"  # type: ignore[attr-defined]


def test_revision_skips_when_the_host_has_started_anew(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure may lose the last changes: no revision that was shown is given again for another content."""
    with opened(path) as store:
        join(registry_on(store), "one")
    with opened(path) as store:
        assert store.revision == 1
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(store_module, "BOOT_ID", tmp_path / "boot_id")
    for _ in range(2):
        with opened(path) as store:
            assert store.revision == 1 + SKIPPED


def test_boot_id_comes_from_systemd_where_the_file_is_hidden(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable that the unit sets says the same as the file, which the unit's sandbox hides: no revision skips."""
    known = store_module.BOOT_ID.read_text().strip()
    with opened(path) as store:
        join(registry_on(store), "one")
    monkeypatch.setattr(store_module, "BOOT_ID", tmp_path / "hidden")
    monkeypatch.setenv("BOOT_ID", known.replace("-", ""))
    with opened(path) as store:
        assert store.revision == 1


@pytest.mark.parametrize("busy", [False, True])
def test_file_that_others_have_removed_is_made_anew(path: Path, busy: bool) -> None:
    """It has the same list under the same epoch; where it can't be opened at once, changes are refused until it can."""
    with opened(path) as store, contextlib.closing(sqlite3.connect(path.with_name("other"))) as other:
        registry = registry_on(store)
        join(registry, "one")
        epoch, secret, rename = store.epoch, store.group_secret, Path.rename

        def rename_and_lock(aside: Path, target: Path) -> Path:
            """Let another program have the file as soon as it is there."""
            other.execute("ATTACH ? AS it", (str(rename(aside, target)),))
            other.execute("BEGIN EXCLUSIVE")
            other.execute("DELETE FROM it.past")
            return target

        path.unlink()
        with capture_logs() as logs, patch.object(Path, "rename", rename_and_lock if busy else rename):
            store.keep_file()
        if busy:
            assert "in use by another gateway" in logs[0]["reason"]
            with pytest.raises(OSError, match="can't be written to disk"):
                join(registry, "two")
            other.close()
            store.keep_file()
        assert (store.epoch, store.group_secret, store.restored) == (epoch, secret, 1)
        join(registry, "two")
    with opened(path) as store:
        assert [entry.client.name for entry in store.entries] == ["one", "two"]
        assert (store.epoch, store.group_secret) == (epoch, secret)


def test_keep_is_all_or_nothing(path: Path) -> None:
    """Of several changes at once either all are written or none."""
    with opened(path) as store:
        entries = [join(registry_on(opened(None)), name) for name in ("one", "two")]
        events: Sequence[Event] = [Event("joined", number, entry) for number, entry in enumerate(entries, 1)]
        broken = Event("joined", 3, Entry(Client("x", 1, "::1", object()), Origin.JSON, HERE, 0, 0, 0, False, 0))  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            store.keep([*events, broken], 2)
        store.keep(events, 2)
    with opened(path) as store:
        assert [entry.client.name for entry in store.entries] == ["one", "two"]
