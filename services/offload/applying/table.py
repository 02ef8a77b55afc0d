"""The table in the kernel: the first plan makes it, and each later one replaces what is in it, at one moment."""

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from services.offload.applying.nftables.connection import Counters, Nftables
from services.offload.applying.nftables.messages import Batch
from services.offload.applying.rules import PRIORITY, Chains, Marks, Renderer, Sources, counter_names
from services.offload.kernel_plan import NO_COPIES, KernelPlan

TABLE: Final = "fanwire"
GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EEXIST, errno.EBUSY)
"""The kernel's answers when the table is not as it was left: with an interface its chain goes."""
SETTLED_SECONDS: Final = 0.25
"""Time after which no packet is on its way by rules that others have replaced: far more than any takes."""


@dataclass(frozen=True, slots=True)
class _Replaced:
    """The chains that a plan has left behind, each before those that it leads to, and all counters of that plan.

    They stay for a moment. A packet that is on its way finds nothing in a map that was just deleted
    (nft_map_deactivate, net/netfilter/nf_tables_api.c): it would be marked without the copies that the map leads to.
    """

    at: float
    chains: tuple[str, ...]
    counters: frozenset[str]


class Table:
    """Fills the table by plans; it goes with the connection."""

    def __init__(self, connection: Nftables, marks: Marks, sources: Sources) -> None:
        self._connection = connection
        self._marks = marks
        self._sources = sources
        self._there = False
        self._serial = 0
        self._plan = NO_COPIES
        self._streams: list[str] = []
        self._chains: Chains = {}
        self._counters: frozenset[str] = frozenset()
        self._replaced: list[_Replaced] = []

    def replace(self, plan: KernelPlan) -> None:
        """Let the kernel make exactly the copies of a plan from now on. OSError: it goes on as before."""
        if self._there and plan.interfaces == self._plan.interfaces:
            try:
                self._commit(plan, self._renew)
                return
            except OSError as error:
                if error.errno not in GONE:
                    raise
        if self._there:
            self._let_all_go_up()
        try:
            self._commit(plan, self._make_anew)
        except OSError:
            with suppress(OSError):
                self._commit(self._plan, self._renew)
            raise

    def counters(self) -> Counters:
        """Return packets and bytes by a counter's name; none before the first plan."""
        return self._connection.counters(TABLE) if self._there else {}

    def _let_all_go_up(self) -> None:
        """Empty the chains of the interfaces, and wait until no packet is on its way by what they led to."""
        for place in range(len(self._plan.interfaces)):
            batch = Batch(TABLE)
            batch.flush_chain(_base_chain(place))
            with suppress(OSError):  # it has gone with its interface
                self._connection.commit(batch)
        time.sleep(SETTLED_SECONDS)

    def _commit(self, plan: KernelPlan, begin: Callable[[Batch, KernelPlan], None]) -> None:
        self._serial += 1
        batch = Batch(TABLE)
        begin(batch, plan)
        counters = frozenset(counter_names(plan).values())
        for name in sorted(counters):
            batch.add_counter(name)
        renewed = begin == self._renew
        known = self._chains if renewed else {}
        renderer = Renderer(batch, plan, self._serial, self._marks, self._sources, known)
        renderer.add(_base_chain(place) for place in range(len(plan.interfaces)))
        replaced = self._delete_replaced(batch, counters) if renewed else []
        self._connection.commit(batch)
        if renewed:
            used = {*renderer.used.values()}
            former = [name for name in self._chains.values() if name not in used]
            chains = (*self._streams, *reversed(former))
            self._replaced = [*replaced, _Replaced(time.monotonic(), chains, self._counters)]
        else:
            self._replaced = []
        self._there, self._plan = True, plan
        self._streams, self._chains = renderer.streams, renderer.used
        self._counters = counters

    def _make_anew(self, batch: Batch, plan: KernelPlan) -> None:
        """Begin with an empty table."""
        if self._there:
            batch.add_table()  # so that there is one to delete, whatever has become of it
            batch.delete_table()
        batch.add_table()
        for place, interface in enumerate(plan.interfaces):
            batch.add_base_chain(_base_chain(place), interface, PRIORITY)

    def _renew(self, batch: Batch, plan: KernelPlan) -> None:
        """Begin with the chains of the interfaces alone."""
        for place in range(len(plan.interfaces)):
            batch.flush_chain(_base_chain(place))

    def _delete_replaced(self, batch: Batch, counters: frozenset[str]) -> list[_Replaced]:
        """Delete what plans have left behind that were replaced long ago; return what stays."""
        before = time.monotonic() - SETTLED_SECONDS
        gone = [each for each in self._replaced if each.at <= before]
        staying = [each for each in self._replaced if each.at > before]
        for each in gone:
            for name in each.chains:
                batch.flush_chain(name)
            for name in each.chains:
                batch.delete_chain(name)
        used = counters.union(self._counters, *(each.counters for each in staying))
        for name in sorted(frozenset().union(*(each.counters for each in gone)) - used):
            batch.delete_counter(name)
        return staying


def _base_chain(place: int) -> str:
    return f"in{place}"
