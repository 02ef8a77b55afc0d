"""Changes of the registry: planned first, then stored, then made. No I/O; the store is handed in.

`Changes` stands between requests and the registry. On one host it stores a change in the file, and makes it at once. In
a cluster (`services/gateway/cluster`) a change may have to wait, and to be planned anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from services.gateway.registry.entry import NO_ORDERS, Entry, Event, Orders
from services.gateway.registry.reached_places import NO_PASTS, PastByName

FAULT: Final = "the gateway failed at this request, as its log says"
"""The refusal of a request at which a fault of ours came to light."""


class Keep(Protocol):
    """Stores changes before they are made, all or none; OSError when it can't."""

    def __call__(
        self,
        events: Sequence[Event],
        generation: int,
        withheld: Orders = NO_ORDERS,
        pasts: PastByName = NO_PASTS,
    ) -> None:
        """Store `events`, orders that came or ended, and places left; `generation` is the last one given."""


def keep_nothing(*_: object, **__: object) -> None:
    """Store nothing, for a registry that ends with its process."""


def never_keep(*_: object, **__: object) -> None:
    """Refuse to store a change that went past `Changes`, where it is others' too."""
    raise AssertionError("a change of the cluster's registry goes by Registry.changes")


@dataclass(frozen=True, slots=True)
class Change:
    """Events that are stored and made together, orders that came or ended, and places left.

    `generation` is the last one given, with theirs.
    """

    events: Sequence[Event]
    orders: Orders
    pasts: PastByName
    generation: int


T = TypeVar("T")


class Changes(Protocol):
    """Makes changes of the registry."""

    def make(
        self, act: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None] | None = None
    ) -> None:
        """Decide and change by `act`, a call of the registry's methods, and call `done` with what it returns.

        `done` is called once the change is stored and made, now or later. Where it is not made: RequestError or
        OSError, raised or handed to `failed`. In a cluster `act` may be called several times, and without `failed` its
        error is `done` with None.
        """

    def renew(
        self, find: Callable[[], Entry], done: Callable[[Entry], None], failed: Callable[[Exception], None]
    ) -> None:
        """Give the entry that `find` returns its whole lease; as `make`."""


class LocalChanges:
    """Makes each change at once; `renew_lease` begins the lease of an entry anew."""

    def __init__(self, renew_lease: Callable[[Entry], object]) -> None:
        self._renew_lease = renew_lease

    def make(
        self,
        act: Callable[[], T],
        done: Callable[[T], None],
        failed: Callable[[Exception], None] | None = None,  # noqa: ARG002
    ) -> None:
        """Make a change now; what it raises passes through."""
        done(act())

    def renew(
        self,
        find: Callable[[], Entry],
        done: Callable[[Entry], None],
        failed: Callable[[Exception], None],  # noqa: ARG002
    ) -> None:
        """Renew a lease now; what `find` raises passes through."""
        entry = find()
        self._renew_lease(entry)
        done(entry)


def ignore(_: object) -> None:
    """Do nothing more, whether a change was made or not."""
