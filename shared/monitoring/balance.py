"""Compares the accounts of different processes. No I/O: reports go in as they come, sentences come out.

A worker's datagrams and its reports pass the broker on one connection and reach every subscriber in that order. So the
count of published datagrams in a worker's first report must have reached each consumer soon after; and a consumer can't
have reached more than the worker reports *later*. Both are checked by the worker's running count, which `reached`
follows, so nothing needs to stand still while it is checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shared.ledger.accounts import Accounts, is_origin, parse_origin
from shared.ledger.counters import DISCREPANCIES, PUBLISHED, REACHED
from shared.ledger.equations import discrepancies
from shared.losses import Loss, losses

NEEDED = ("broker", "gateway", "ingest", "forwarder")
"""Services without which no copies flow."""
ORIGINAL_SENDERS = "senders_original"
"""The gateway's count of transmitters that it sees on the bus."""
Origin = tuple[str, int, str]
"""Worker, boot id, stream."""


@dataclass(slots=True)
class _Consumer:
    """The last report of a consumer, such as the forwarder, about the origins that it follows."""

    heard_at: float
    reached: dict[Origin, int]


@dataclass(slots=True)
class Balance:
    """The reports of one round, compared."""

    accounts: dict[str, Accounts] = field(default_factory=dict)
    """The last report of each service."""
    workers: Sequence[str] = ()
    """Workers that live, whether they report or not."""
    asked_for: Sequence[str] = ()
    """Kinds of service that the settings ask for, beside those that are always needed."""
    _due: dict[Origin, int] = field(default_factory=dict)
    _consumers: dict[str, _Consumer] = field(default_factory=dict)
    _compared: set[tuple[str, Origin]] = field(default_factory=set)
    _ahead: dict[tuple[str, Origin], str] = field(default_factory=dict)

    def add_report(self, service: str, boot: int, heard_at: float, accounts: Accounts) -> None:
        """Add a whole report; `heard_at` is the time of its first piece, on a clock that only grows."""
        self.accounts[service] = accounts
        reached = {parse_origin(name): kept.get(REACHED, 0) for name, kept in accounts.items() if is_origin(name)}
        if reached:
            self._consumers[service] = _Consumer(heard_at, reached)
        else:
            self._consumers.pop(service, None)
        for name, kept in accounts.items():
            if name.startswith("stream/"):
                origin = (service, boot, name.removeprefix("stream/"))
                self._take_published(origin, heard_at, kept.get(PUBLISHED, 0))

    def _take_published(self, origin: Origin, heard_at: float, published: int) -> None:
        self._due.setdefault(origin, published)
        for name, consumer in self._consumers.items():
            if origin not in consumer.reached or heard_at <= consumer.heard_at:
                continue
            self._compared.add((name, origin))
            if (surplus := consumer.reached[origin] - published) > 0:
                self._ahead[name, origin] = f"{_kind(name)} counts {surplus} datagrams more than {_say(origin)}"

    def reports(self, kind: str) -> bool:
        """Return whether any service of that kind has reported."""
        return any(_kind(name) == kind for name in self.accounts)

    def silent(self) -> list[str]:
        """Kinds of service, and workers, that do not report though they have to, or are known to be there."""
        there = any(kept.get("gateway", {}).get(ORIGINAL_SENDERS) for kept in self.accounts.values())
        wanted = (*NEEDED, *["transmitter"] * there, *self.asked_for)
        kinds = [kind for kind in wanted if not self.reports(kind)]
        return kinds + [name for name in self.workers if name not in self.accounts and self.reports(_kind(name))]

    @property
    def settled(self) -> bool:
        """Return whether every consumer has caught up with every worker that reports, and was compared with it."""
        return all(
            consumer.reached[origin] >= self._due[origin] and (name, origin) in self._compared
            for name, consumer in self._consumers.items()
            for origin in consumer.reached.keys() & self._due.keys()
        )

    def discrepancies(self) -> Iterator[str]:
        """Yield a sentence for everything that does not add up, delays among it: wait until it has settled."""
        for service, accounts in sorted(self.accounts.items()):
            yield from (f"{service}: {each}" for each in discrepancies(accounts))
            if found := accounts.get(_kind(service), {}).get(DISCREPANCIES, 0):
                yield f"{service}: has found {found} discrepancies in its accounts since it was started; see its log"
        yield from self._ahead.values()
        for name, consumer in sorted(self._consumers.items()):
            for origin, reached in sorted(consumer.reached.items()):
                if (behind := self._due.get(origin, 0) - reached) > 0:
                    yield f"{_kind(name)} is {behind} datagrams behind {_say(origin)}"

    def gone(self) -> Iterator[str]:
        """Yield the origins whose worker does not report any more: killed, or ended."""
        followed = {origin for consumer in self._consumers.values() for origin in consumer.reached}
        yield from (_say(origin) for origin in sorted(followed - self._due.keys()))

    def losses(self) -> list[Loss]:
        """Return the losses, in the order of the way."""
        return losses(self.accounts)


def _kind(service: str) -> str:
    return service.partition(".")[0]


def _say(origin: Origin) -> str:
    worker, boot, stream = origin
    return f"{worker} (boot {boot:x}) on stream {stream}"
