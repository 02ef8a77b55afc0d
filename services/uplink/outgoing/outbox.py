"""Messages that wait for JetStream, in order; a bounded number is under way, each until it is acknowledged.

No I/O: the caller sends what `next` returns, and tells what became of it. After a failure all that is under way goes
again, in order, one message first and then more (the server knows each by its number, and keeps it once). So what
reaches JetStream is in order, but where a server fails between two messages; `after` in a message tells its reader.
"""

from collections import Counter, deque
from collections.abc import Callable, Container
from typing import Final

from services.uplink.packs import Pack
from services.uplink.subjects import unparse_subject
from shared.ledger.counters import ACKNOWLEDGED, HELD, SERVER_AWAY, SERVER_SLOW, TAKEN

LARGEST_MESSAGE: Final = 1 << 20
"""Bytes of a message that a server takes by its default."""
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 5.0
"""Time between a failure and the next attempt: twice as long after each one that follows another."""


class _Accounts(dict[str, Counter[str]]):
    """An account for each stream, made when it is first asked for."""

    def __init__(self, new_account: Callable[[str], Counter[str]]) -> None:
        super().__init__()
        self._new_account = new_account

    def __missing__(self, stream: str) -> Counter[str]:
        self[stream] = account = self._new_account(stream)
        return account


class Outbox:
    """Messages that wait, up to `most` bytes, of which up to `in_flight` are under way."""

    def __init__(
        self, most: int, in_flight: int, new_account: Callable[[str], Counter[str]], clock: Callable[[], float]
    ) -> None:
        self.accounts = _Accounts(new_account)
        """By stream of this host. What a caller has noted as taken is held until it has another fate."""
        self.connected = False
        self.on_settled: Callable[[Pack], None] = _ignore
        """Called with each message that needs not be sent any more."""
        self.size = 0
        """Bytes that wait or are under way."""
        self.largest = LARGEST_MESSAGE
        """Bytes of a message that the server takes which was connected last."""
        self._most = most
        self._in_flight = in_flight
        self._window = 1
        self._clock = clock
        self._waiting: deque[Pack] = deque()
        self._flying: dict[str, tuple[Pack, float]] = {}
        self._known: dict[str, Pack] = {}
        self._resume_at = self._pause = 0.0

    @property
    def room(self) -> bool:
        """Return whether there is room for a message of any size."""
        return self.size < self._most

    @property
    def waiting(self) -> bool:
        """Return whether any message is not under way."""
        return bool(self._waiting)

    @property
    def empty(self) -> bool:
        """Return whether nothing waits, nor is under way."""
        return not self._known

    def take(self, stream: str, datagrams: int) -> None:
        """Note datagrams that have come to be sent."""
        account = self.accounts[stream]
        account[TAKEN] += datagrams
        account[HELD] += datagrams

    @property
    def half(self) -> int:
        """Return the bytes that there is room for in its half for what can be had again, later."""
        return self._most // 2 - self.size

    @property
    def full_because(self) -> str:
        """Return the cause of what is dropped when there is no room."""
        return SERVER_SLOW if self.connected else SERVER_AWAY

    def put(self, pack: Pack) -> str:
        """Let a message wait, or drop it where there is no room; return the cause then."""
        if self.size + len(pack.payload) > self._most:
            cause = self.full_because
            self._settle(pack, cause)
            return cause
        self.add(pack)
        return ""

    def add(self, pack: Pack) -> None:
        """Let a message wait whose room the caller has seen to."""
        self._waiting.append(pack)
        self._known[pack.number] = pack
        self.size += len(pack.payload)

    def next(self) -> Pack | None:
        """Return the message that is to be sent now, and note that it is; None: not now."""
        if not self.connected or len(self._flying) >= self._window or self._clock() < self._resume_at:
            return None
        while self._waiting:
            pack = self._waiting.popleft()
            if pack.number in self._known:
                self._flying[pack.number] = pack, self._clock()
                return pack
        return None

    def pause_left(self) -> float:
        """Return the seconds until `next` may return something again after a failure."""
        return max(0.0, self._resume_at - self._clock())

    def acknowledge(self, number: str) -> None:
        """Note that JetStream keeps a message."""
        if self.drop(number, ACKNOWLEDGED):
            self._pause = 0.0
            self._window = min(self._in_flight, 2 * self._window)

    def drop(self, number: str, fate: str) -> bool:
        """Send a message no more; return whether it was waiting or under way. `fate` is the counter of its rows."""
        pack = self._known.pop(number, None)
        self._flying.pop(number, None)
        if pack is not None:
            self.size -= len(pack.payload)
            self._settle(pack, fate)
        return pack is not None

    def drop_subject(self, subject: str, fate: str) -> int:
        """Drop all messages of a subject; return their number. NATS tells the subject in small letters."""
        found = [each for each, pack in self._known.items() if unparse_subject(pack.origin).lower() == subject.lower()]
        return sum(self.drop(number, fate) for number in found)

    def drop_all(self, fate: str, but: Container[str]) -> None:
        """Drop all that is left, `but` what is of these streams."""
        for number, pack in list(self._known.items()):
            if pack.origin.stream not in but:
                self.drop(number, fate)

    def fail(self) -> bool:
        """Send all again that is under way, in order, after a pause; return whether anything is."""
        if not self._flying:
            return False
        self._pause = min(LONGEST_PAUSE_SECONDS, 2 * self._pause or FIRST_PAUSE_SECONDS)
        self._resume_at = self._clock() + self._pause
        self._rewind()
        return True

    def connect(self) -> None:
        """Begin with a new connection: whatever was under way on the one before goes again."""
        self._resume_at = self._pause = 0.0
        self._rewind()
        self.connected = True

    def disconnect(self) -> None:
        """Send nothing until there is a connection again."""
        self.connected = False

    def _rewind(self) -> None:
        self._window = 1
        self._waiting.extendleft(pack for pack, _ in reversed(self._flying.values()))
        self._flying.clear()

    def overdue(self, seconds: float) -> bool:
        """Return whether a message is under way for longer than this."""
        oldest = next(iter(self._flying.values()), None)
        return oldest is not None and self._clock() - oldest[1] > seconds

    def settle(self, stream: str, datagrams: int, fate: str) -> None:
        """Note the fate of datagrams that were taken."""
        account = self.accounts[stream]
        account[HELD] -= datagrams
        account[fate] += datagrams

    def _settle(self, pack: Pack, fate: str) -> None:
        self.settle(pack.origin.stream, pack.datagrams, fate)
        self.on_settled(pack)


def _ignore(_: Pack) -> None:
    """Nobody wants to know."""
