"""Contents of the journal, and what collectors are owed of it, out of services' accounts. No I/O."""

from collections.abc import Iterator, Mapping

import msgspec

from shared.ledger.accounts import Accounts, parse_owed
from shared.ledger.counters import KEPT_BYTES, KEPT_LIMIT, NEWEST, OLDEST, OWED, OWED_FROM


class Owed(msgspec.Struct, frozen=True, gc=False):
    """Datagrams of a stream that wait in the journal for a collector that catches up."""

    collector: str
    stream: str
    datagrams: int
    since: float
    """Unix time at which the last one that it got was received; or since when it is owed any."""
    level_in: float | None
    """Seconds until it is level, at the pace of the last report; None: it does not get nearer."""


class KeptStream(msgspec.Struct, frozen=True, gc=False):
    """A stream in a journal, with its account (`shared.ledger`)."""

    stream: str
    service: str
    account: Mapping[str, int]
    limit: int | None
    """Bytes that all streams may take together; None: the journal does not tell."""

    @property
    def size(self) -> int:
        """Return the bytes that it takes."""
        return self.account.get(KEPT_BYTES, 0)

    @property
    def since(self) -> float | None:
        """Return the Unix time of the first datagram; None: there is none."""
        return _seconds(self.account.get(OLDEST, 0))

    @property
    def until(self) -> float | None:
        """Return the Unix time of the last datagram; None: there is none since the journal was started."""
        return _seconds(self.account.get(NEWEST, 0))


def _seconds(at_ns: int) -> float | None:
    return at_ns / 1e9 if at_ns else None


def kept_streams(accounts: Mapping[str, Accounts]) -> Iterator[KeptStream]:
    """Yield the streams that journals keep, or have kept."""
    for service, told in sorted(accounts.items()):
        limit = told.get("journal", {}).get(KEPT_LIMIT)
        for name, account in sorted(told.items()):
            if name.startswith("journal/"):
                yield KeptStream(name.removeprefix("journal/"), service, account, limit)


def owed(accounts: Accounts, before: Accounts | None = None, seconds: float = 0.0) -> Iterator[Owed]:
    """Yield what a sender's collectors are owed; `before` are its accounts so many seconds ago."""
    for name, account in sorted(accounts.items()):
        if found := parse_owed(name):
            stream, collector = found
            count, passed = account.get(OWED, 0), (before or {}).get(name, {}).get(OWED, 0) - account.get(OWED, 0)
            level_in = count * seconds / passed if passed > 0 else None if count else 0.0
            yield Owed(collector, stream, count, account.get(OWED_FROM, 0) / 1e9, level_in)
