"""The way out: batches of the bus are packed into messages, which wait for JetStream in the outbox."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from services.uplink.batches import BusBatches, Taken
from services.uplink.outbox import Outbox
from services.uplink.packs import Packer
from services.uplink.subjects import Origin
from services.uplink.troubles import Troubles
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.ledger.accounts import Accounts
from shared.ledger.counters import HELD, NO_MEMORY, SERVER_SLOW, STOPPED, TAKEN, UNSERVED, UNSURE
from shared.process.memory import Memory
from shared.settings.uplink import Uplink

TURN_MESSAGES: Final = 256
SENDING: Final = "sending/"
WAITING_SHARE: Final = 3
"""One part in this many of the memory ceiling may wait for JetStream."""
FORGET_SECONDS: Final = 60.0
"""Time after which a worker that sends nothing is no longer known to the sending side."""

_Key = tuple[str, int, str]
"""Worker, its boot id, and stream."""


class Sending:
    """Packs batches; `offered` is called when a message waits to be sent."""

    def __init__(
        self,
        uplink: Uplink,
        batches: BusBatches,
        kept: KeptFile,
        memory: Memory,
        troubles: Troubles,
        offered: Callable[[], None],
    ) -> None:
        self.accounts: dict[str, KeptCounts] = {}
        """By `sending/STREAM`."""
        self.outbox = Outbox(uplink.memory // WAITING_SHARE, uplink.in_flight, self._new_account, time.monotonic)
        self._site = uplink.site
        self._fill = uplink.fill_ms / 1000
        self._batches = batches
        self._kept = kept
        self._memory = memory
        self._troubles = troubles
        self._offered = offered
        self._packers: dict[_Key, Packer] = {}
        self._packed_at: defaultdict[_Key, float] = defaultdict(lambda: -math.inf)

    def _new_account(self, stream: str) -> KeptCounts:
        self.accounts[f"{SENDING}{stream}"] = account = self._kept.new_counts()
        return account

    def begin(self, streams: tuple[str, ...], tables: Mapping[str, Mapping[str, int]]) -> None:
        """Send these streams, and go on with the accounts and positions that the last process has left."""
        for name, counts in tables.items():
            if name.startswith(SENDING):
                account = self.outbox.accounts[name.removeprefix(SENDING)]
                account.update(counts)
                account[UNSURE] += account[HELD]  # it was in the hands of the last process when that was killed
                account[HELD] = 0
        for stream in streams:
            self.outbox.accounts[stream].update()  # there from the start
        self._batches.begin(streams, tables)

    @property
    def filling(self) -> bool:
        """Return whether any message is being filled."""
        return any(packer.datagrams for packer in self._packers.values())

    @property
    def due_at(self) -> float:
        """Return the time at which a message is to go, however full it is."""
        return min((self._due_at(packer) for packer in self._packers.values() if packer.datagrams), default=math.inf)

    def turn(self) -> None:
        """Take what has come by the bus, and let full messages go."""
        for taken in self._batches.read(TURN_MESSAGES):
            self._pack(taken)
        for stream, count in self._batches.unserved():
            self.outbox.take(stream, count)
            self.outbox.settle(stream, count, UNSERVED)
        now = time.monotonic()
        for key, packer in self._packers.items():
            if packer.datagrams and now >= self._due_at(packer):
                self._close(key, packer, now)

    def _pack(self, taken: Taken) -> None:
        message, batch = taken
        envelope = message.envelope
        key = (envelope.sender, envelope.boot, batch.stream)
        packer, now = self._packers.get(key), time.monotonic()
        if packer is None:
            origin = Origin(self._site, batch.stream, envelope.sender)
            packer = self._packers[key] = Packer(origin, envelope.boot)
        if not packer.datagrams:
            packer.since = now
            if now - self._packed_at[key] > 4 * self._fill:  # a lone batch goes at once
                packer.since -= self._fill
        self.outbox.take(batch.stream, len(batch))
        packer.add(message, batch)
        if packer.full:
            self._close(key, packer, now)

    def _due_at(self, packer: Packer) -> float:
        return packer.since + self._fill

    def _close(self, key: _Key, packer: Packer, now: float) -> None:
        self._packed_at[key] = now
        pack = packer.close()
        self._memory.measure()
        if self._memory.short:
            self.outbox.settle(pack.origin.stream, pack.datagrams, NO_MEMORY)
            return
        if cause := self.outbox.put(pack):
            self._troubles.say("room", _NO_ROOM[cause == SERVER_SLOW])
        self._offered()

    def close_all(self) -> None:
        """Let all messages go that are being filled."""
        now = time.monotonic()
        for key, packer in self._packers.items():
            if packer.datagrams:
                self._close(key, packer, now)

    def keep_up(self) -> None:
        """Do what is due each second."""
        self._batches.keep_up()
        now = time.monotonic()
        for key, packer in list(self._packers.items()):
            if not packer.datagrams and now - self._packed_at[key] > FORGET_SECONDS:
                del self._packers[key], self._packed_at[key]
        if self.outbox.room:
            self._troubles.end("room", "there is room again for what waits for JetStream")

    def taken(self) -> int:
        """Return the datagrams that have come to be sent, of all streams."""
        return sum(account[TAKEN] for account in self.accounts.values())

    def finish(self) -> None:
        """Drop what is left, as this process ends."""
        self.outbox.drop_all(STOPPED)

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        return {**self._batches.tables(), **self.accounts}

    def report(self) -> Accounts:
        """Return the accounts of what came by the bus, and of what became of it."""
        return {**self._batches.accounts(), **{name: dict(account) for name, account in self.accounts.items()}}


_NO_ROOM: Final = (
    "no more may wait for the NATS servers: datagrams for other sites are dropped until one can be reached",
    "JetStream acknowledges too slowly: datagrams for other sites are dropped",
)
