"""The registry on disk: SQLite, one transaction a change, so that a restart continues with the list and its revision.

Renewals are not stored: after a restart each lease begins anew. An answer is given only after its change is written, so
a killed process loses nothing. After a power failure the last changes may be missing: then the revision skips.
"""

import contextlib
import errno
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec
from msgspec.structs import asdict

from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.registry.entry import NO_ORDERS, Entry, Event, Orders, Origin
from services.gateway.registry.reached_places import NO_PASTS, Past, PastByName
from services.gateway.registry.revisions import largest_number
from shared.bus.bodies.fields import Number
from shared.client import Client, Withheld
from shared.log import get_logger
from shared.process.file_locks import KeptDirectory
from shared.process.lifecycle import FAILED, OperatorError

SCHEMA: Final = (
    """
CREATE TABLE client (name TEXT PRIMARY KEY, entry TEXT NOT NULL);
CREATE TABLE state (revision INTEGER NOT NULL, generation INTEGER NOT NULL, boot_id TEXT NOT NULL);
INSERT INTO state VALUES (0, 0, '');
""",
    """
CREATE TABLE history (epoch TEXT NOT NULL, group_secret BLOB NOT NULL);
INSERT INTO history VALUES ('', randomblob(32));
""",
    "ALTER TABLE history ADD COLUMN file TEXT NOT NULL DEFAULT '';",
    "CREATE TABLE withheld (name TEXT PRIMARY KEY, withheld TEXT NOT NULL);",
    "CREATE TABLE past (name TEXT PRIMARY KEY, past TEXT NOT NULL);",
)
"""The statements that make each version of the database of the one before, from the first on.

A field of an entry that an earlier release must not lose comes with a step too, if an empty one: that release then
refuses the file. tests/services/gateway/registry/recorded has a file of each version.
"""
PUT: Final = "INSERT INTO client VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET entry = excluded.entry"
"""Keeps the row, and so the order of first registration."""
NO_DAMAGE: Final = frozenset({
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_PROTOCOL,
})  # fmt: skip
"""Errors that the operator can mend while the file may be intact; any other means that its content is damaged."""
PRIMARY: Final = 0xFF
"""The part of an error's code that an extended code extends."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
"""Also an environment variable: systemd tells it to a service that sees no more of /proc than processes."""
SKIPPED: Final = 1 << 20
"""Revisions passed over after a restart of the host: more than can have been lost with it."""

log = get_logger()


def _boot_id() -> str:
    return (os.environ.get("BOOT_ID") or BOOT_ID.read_text()).strip().replace("-", "")


class _Kept(msgspec.Struct, frozen=True):
    """An entry as it is written."""

    client: Client
    origin: Origin
    address: str
    port: int
    ttl: float
    held: bool
    holder: str = ""
    proven: bool = True  # so it may have been when an earlier version wrote it
    host: str = ""


class _KeptOfCluster(_Kept, frozen=True):
    """An entry of a registry that several nodes share, in its file of its own."""

    home: str = ""
    node: str = ""
    boot: int = 0


_State = tuple[Number, Number, str]
"""Revision, generation, and the host's boot id."""
_History = tuple[str, str, bytes]
"""Epoch, the file that it is kept in, secret of groups."""
_Damaged = tuple[str, int, str]
"""Table, number of the row, and the reason."""
T = TypeVar("T")


class Store:
    """The database file, locked by this process while it is open; without a path it lasts as long as the process.

    An earlier start has kept `entries`, `revision`, and `generation`, which is the last one given. `withheld` are the
    orders to withhold copies, by name, and `pasts` the places that collectors have reached. The first start drew
    `group_secret`, and `epoch`, which stands for the list that the revisions count.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._failed = False
        self._closed = False
        """The file was made anew, and could not be opened yet: changes are refused meanwhile."""
        self._kept = KeptDirectory(path.parent) if path else None
        self.restored = 0
        """Number of times that others have removed the file and it was made anew."""
        try:
            self._open(clock)
        except _DamagedError as damage:
            assert path is not None
            aside = _set_aside(path)
            log.error(
                "the registry's file is damaged: it was renamed to `file`, and the registry starts empty",
                file=str(aside),
                reason=str(damage),
            )
            self._open(clock)

    def _open(self, clock: Callable[[], float]) -> None:
        try:
            # One process at a time: a second gateway on the same file is refused, and no shared memory is needed.
            self._database = sqlite3.connect(self._path or ":memory:", timeout=0.5, isolation_level=None)
            try:
                self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._database.execute("PRAGMA journal_mode = WAL")
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._load(clock)
            except BaseException:
                self._database.close()
                raise
        except sqlite3.ProgrammingError:
            raise  # a bug, and no damage
        except (sqlite3.DatabaseError, msgspec.MsgspecError, ValueError) as error:
            if isinstance(error, sqlite3.DatabaseError) and not self._is_damage(error):
                raise OperatorError(FAILED, f"{self._path}: {_cure(error)}") from None
            raise _DamagedError(str(error)) from None

    def _load(self, clock: Callable[[], float]) -> None:
        database, boot_id = self._database, _boot_id()
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > len(SCHEMA):
            raise OperatorError(
                FAILED,
                f"{self._path}: written by a later version of fanwire; upgrade, or name another [gateway] database",
            )
        if version < len(SCHEMA):
            with self._transaction():
                for statement in filter(None, map(str.strip, "".join(SCHEMA[version:]).split(";"))):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {len(SCHEMA)}")
        if (found := database.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise ValueError(found)
        damaged: list[_Damaged] = []
        self.entries = [*self._read("client", "entry", partial(_parse, now=clock()), damaged).values()]
        self.withheld = self._read("withheld", "withheld", partial(_decode, Withheld), damaged)
        self.pasts = self._read("past", "past", partial(_decode, Past), damaged)
        if damaged:
            self._leave_out(damaged)
        state = database.execute("SELECT revision, generation, boot_id FROM state").fetchall()
        ((self.revision, self.generation, former),) = msgspec.convert(state, tuple[_State])
        _check_given(self.revision, self.generation)
        if former not in ("", boot_id):
            self.revision += SKIPPED
        # Write in any case: a file that can't be written must be noticed now, even where there is nothing to write.
        now = (self.revision, boot_id, boot_id)
        database.execute("UPDATE state SET revision = ?, boot_id = ? WHERE boot_id <> ?", now)
        history = database.execute("SELECT epoch, file, group_secret FROM history").fetchall()
        ((self.epoch, kept_in, self.group_secret),) = msgspec.convert(history, tuple[_History])
        identity = _identity(self._path) if self._path else ""
        # It may be a copy, of an earlier state.
        if not self.epoch or kept_in != identity or former != boot_id or damaged:
            self.epoch = secrets.token_urlsafe(12)
            database.execute("UPDATE history SET epoch = ?, file = ?", (self.epoch, identity))

    def _read(self, table: str, column: str, parse: Callable[[str, bytes], T], damaged: list[_Damaged]) -> dict[str, T]:
        """Return what is kept in a table, by name; note rows that can't be read in `damaged`."""
        found = {}
        rows = f"SELECT rowid, CAST(name AS BLOB), CAST({column} AS BLOB) FROM {table} ORDER BY rowid"
        for number, *content in self._database.execute(rows).fetchall():
            try:
                name, text = msgspec.convert(content, tuple[bytes, bytes])
                found[name.decode()] = parse(name.decode(), text)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                damaged.append((table, number, str(error)))
        return found

    def _leave_out(self, damaged: Sequence[_Damaged]) -> None:
        """Go on without these rows, and keep a copy of the file that has them."""
        assert self._path is not None
        aside = _name_aside(self._path)
        with contextlib.closing(sqlite3.connect(aside)) as copy:
            self._database.backup(copy)
        for table, number, _ in damaged:
            self._database.execute(f"DELETE FROM {table} WHERE rowid = ?", (number,))
        log.error(
            "rows of the registry's file are damaged: `file` is a copy with them, and the registry starts without them",
            file=str(aside),
            rows=len(damaged),
            reason=damaged[0],
        )

    def _is_damage(self, error: sqlite3.DatabaseError) -> bool:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # text that is no UTF-8 comes without a code
        if code == sqlite3.SQLITE_READONLY and self._path is not None:
            return os.access(self._path, os.W_OK)  # then the file's own header makes it read-only
        return code & PRIMARY not in NO_DAMAGE

    def keep(
        self,
        events: Sequence[Event],
        generation: int,
        withheld: Orders = NO_ORDERS,
        pasts: PastByName = NO_PASTS,
    ) -> None:
        """Write changes, all or none; OSError when they can't be written."""
        try:
            with self._transaction():
                for event in events:
                    self._write(event)
                for name, order in withheld.items():
                    self._database.execute("DELETE FROM withheld WHERE name = ?", (name,))
                    if order is not None:
                        text = msgspec.json.encode(order).decode()
                        self._database.execute("INSERT INTO withheld VALUES (?, ?)", (name, text))
                for name, past in pasts.items():
                    self._write_past(name, past)
                if events:
                    last = events[-1].revision, generation
                    self._database.execute("UPDATE state SET revision = ?, generation = ?", last)
        except sqlite3.Error as error:
            if not self._failed:
                log.error(
                    "the registry can't be written to disk: changes are refused until it can",
                    file=str(self._path),
                    reason=str(error),
                )
            self._failed = True
            raise OSError(errno.EIO, "the registry can't be written to disk just now") from None
        self._failed = False

    def keep_identity(self, epoch: str, group_secret: bytes) -> None:
        """Keep the identity of a list that a cluster keeps: this file has what was known of it last."""
        if (epoch, group_secret) != (self.epoch, self.group_secret):
            self.epoch, self.group_secret = epoch, group_secret
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("UPDATE history SET epoch = ?, group_secret = ?", (epoch, group_secret))

    def keep_pasts(self, changed: PastByName) -> None:
        """Write the places that these names have reached; as `keep`."""
        self.keep((), 0, pasts=changed)

    def _write_past(self, name: str, past: Past | None) -> None:
        self._database.execute("DELETE FROM past WHERE name = ?", (name,))
        if past is not None:
            self._database.execute("INSERT INTO past VALUES (?, ?)", (name, msgspec.json.encode(past).decode()))

    def keep_file(self) -> None:
        """Make the file anew if others have removed it. Due every second."""
        if self._path is None or self._kept is None:
            return
        self._kept.hold()
        if self._path.exists() and not self._closed:
            return
        try:
            if not self._closed:
                self._write_anew(self._path)
            self._open(self._clock)
        except (OSError, sqlite3.Error, OperatorError, _DamagedError) as error:
            log.error("the registry's file was removed and can't be made anew", file=str(self._path), reason=str(error))
        else:
            self._closed = False
            self.restored += 1
            log.warning("another program has removed the registry's file: it was made anew", file=str(self._path))

    def _write_anew(self, path: Path) -> None:
        """Write the file anew. The removed one is still there, as it is open: copy it, then close it."""
        aside = path.with_name(f"{path.name}.anew")
        aside.unlink(missing_ok=True)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(aside)) as copy:
            self._database.backup(copy)
            with copy:  # it is the same list, not a copy of an earlier state
                copy.execute("UPDATE history SET file = ?", (_identity(aside),))
        path.with_name(f"{path.name}-wal").unlink(
            missing_ok=True
        )  # it would be taken for that of the copy, which has it
        aside.rename(path)
        self._database.close()
        self._closed = True

    def _write(self, event: Event) -> None:
        entry = event.entry
        if event.kind in ("left", "expired"):
            self._database.execute("DELETE FROM client WHERE name = ?", (entry.client.name,))
            return
        peer = entry.peer
        holder = peer.rights.holder
        lease = (entry.ttl, entry.held, holder, entry.proven)
        kept = _Kept(entry.client, entry.origin, peer.address, peer.port, *lease, entry.host)
        if entry.home:
            kept = _KeptOfCluster(**asdict(kept), home=entry.home, node=entry.node, boot=entry.boot)
        self._database.execute(PUT, (entry.client.name, msgspec.json.encode(kept).decode()))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk may have ended it already
                self._database.execute("ROLLBACK")
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()
        if self._kept:
            self._kept.close()


class _DamagedError(Exception):
    """The content of the file can't be read."""


def _decode(kind: type[T], _name: str, text: bytes) -> T:
    return msgspec.json.decode(text, type=kind)


def _parse(name: str, text: bytes, now: float) -> Entry:
    kept = msgspec.json.decode(text, type=_KeptOfCluster)
    if kept.client.name != name:
        raise ValueError(f"{kept.client.name!r} is kept as {name!r}")
    _check_given(kept.client.generation)
    peer = Peer(0, kept.address, kept.port, Rights(kept.holder))
    entry = Entry(kept.client, kept.origin, peer, kept.ttl, float("inf"), 0, kept.held, now, kept.proven)
    entry.host, entry.home, entry.node, entry.boot = kept.host, kept.home, kept.node, kept.boot
    return entry


def _check_given(*numbers: int) -> None:
    if max(numbers) > largest_number(time.time()):
        raise ValueError(f"a revision or generation that can't have been given yet: {max(numbers)}")


def _identity(path: Path) -> str:
    file = path.stat()
    return f"{file.st_dev} {file.st_ino}"


def _name_aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged-{time.time_ns()}")


def _set_aside(path: Path) -> Path:
    aside = _name_aside(path)
    path.rename(aside)
    for ending in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    return aside


def _cure(error: sqlite3.Error) -> str:
    if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
        return "in use by another gateway; stop that one, or name another [gateway] database"
    return f"{error}; name another [gateway] database"
