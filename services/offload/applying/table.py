"""The table in the kernel: the first plan makes it, and each later one replaces what is in it, at one moment."""

import errno
from collections.abc import Callable
from typing import Final

from services.offload.applying.nftables.connection import Counters, Nftables
from services.offload.applying.nftables.messages import Batch
from services.offload.applying.rules import PRIORITY, Chains, Marks, Renderer, Sources, counter_names
from services.offload.kernel_plan import KernelPlan

TABLE: Final = "fanwire"
GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EEXIST, errno.EBUSY)
"""The kernel's answers when the table is not as it was left: with an interface its chain goes."""


class Table:
    """Fills the table by plans; it goes with the connection."""

    def __init__(self, connection: Nftables, marks: Marks, sources: Sources) -> None:
        self._connection = connection
        self._marks = marks
        self._sources = sources
        self._there = False
        self._serial = 0
        self._interfaces: tuple[str, ...] = ()
        self._streams: list[str] = []
        self._chains: Chains = {}
        self._counters: set[str] = set()
        self._unused: set[str] = set()
        """Counters of the plan before: read once more, then removed."""

    def replace(self, plan: KernelPlan) -> None:
        """Let the kernel make exactly the copies of a plan from now on. OSError: it goes on as before."""
        if self._there and plan.interfaces == self._interfaces:
            try:
                self._commit(plan, self._renew)
                return
            except OSError as error:
                if error.errno not in GONE:
                    raise
        self._commit(plan, self._make_anew)

    def counters(self) -> Counters:
        """Return packets and bytes by a counter's name; none before the first plan."""
        return self._connection.counters(TABLE) if self._there else {}

    def _commit(self, plan: KernelPlan, begin: Callable[[Batch, KernelPlan], None]) -> None:
        self._serial += 1
        batch = Batch(TABLE)
        begin(batch, plan)
        counters = {*counter_names(plan).values()}
        for name in sorted(counters):
            batch.add_counter(name)
        renewed = begin == self._renew
        known = self._chains if renewed else {}
        renderer = Renderer(batch, plan, self._serial, self._marks, self._sources, known)
        renderer.add(_base_chain(place) for place in range(len(plan.interfaces)))
        if renewed:
            self._delete_former(batch, {*renderer.used.values()}, counters)
        self._connection.commit(batch)
        self._there, self._interfaces = True, plan.interfaces
        self._streams, self._chains = renderer.streams, renderer.used
        self._unused = (self._counters - counters) if renewed else set()
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

    def _delete_former(self, batch: Batch, used: set[str], counters: set[str]) -> None:
        for name in self._streams:
            batch.flush_chain(name)
        former = [name for name in self._chains.values() if name not in used]
        for name in (*self._streams, *reversed(former)):  # before those that they lead to
            batch.delete_chain(name)
        for name in sorted(self._unused - counters):
            batch.delete_counter(name)


def _base_chain(place: int) -> str:
    return f"in{place}"
