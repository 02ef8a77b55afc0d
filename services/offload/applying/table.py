"""The table in the kernel: the first plan makes it, and each later one replaces what is in it, at one moment.

A packet may find nothing in a map in the first moment after the transaction that makes it, and after the one that
deletes it (nf_tables_commit, nft_map_deactivate: net/netfilter/nf_tables_api.c). It would be marked without the copies
that the map leads to. So one transaction adds chains and maps, a second lets the chains of the interfaces lead to them,
and what was replaced is deleted later. Where a packet finds no listener in the map of such a chain itself, it goes up
unmarked, and the senders make its copies.
"""

import errno
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from services.offload.applying.nftables.connection import Counters, Nftables
from services.offload.applying.nftables.messages import Batch
from services.offload.applying.rules import PRIORITY, Chains, Marks, Renderer, Sources
from services.offload.kernel_plan import NO_COPIES, KernelPlan

TABLE: Final = "fanwire"
GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EEXIST, errno.EBUSY)
"""The kernel's answers when the table is not as it was left: with an interface its chain goes."""
SETTLED_SECONDS: Final = 0.25
"""Time after which no packet is on its way by rules that others have replaced: far more than any takes."""


@dataclass(frozen=True, slots=True)
class _Replaced:
    """The chains that a plan has left behind, and all counters of that plan."""

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
        self._counted: Counters = {}
        """Packets and bytes that counters had when the table was made anew: there they begin at 0."""
        self._replaced: list[_Replaced] = []

    def replace(self, plan: KernelPlan) -> None:
        """Let the kernel make exactly the copies of a plan from now on. OSError: it goes on as before."""
        if self._there and plan.interfaces == self._plan.interfaces:
            try:
                self._renew(plan)
                return
            except OSError as error:
                if error.errno not in GONE:
                    raise
        if self._there:
            self._let_all_go_up()
        try:
            self._make_anew(plan)
        except OSError:
            if self._there:
                with suppress(OSError):
                    self._make_anew(self._plan)
            raise

    def counters(self) -> Counters:
        """Return packets and bytes by a counter's name since the first plan that has it; none before the first plan."""
        counted = dict(self._counted)
        for name, (packets, size) in self._connection.counters(TABLE).items() if self._there else ():
            before = self._counted.get(name, (0, 0))
            counted[name] = before[0] + packets, before[1] + size
        return counted

    def _let_all_go_up(self) -> None:
        """Empty the chains of the interfaces, and wait until no packet is on its way by what they led to."""
        for place in range(len(self._plan.interfaces)):
            batch = Batch(TABLE)
            batch.flush_chain(_base_chain(place))
            with suppress(OSError):  # it has gone with its interface
                self._connection.commit(batch)
        time.sleep(SETTLED_SECONDS)

    def _make_anew(self, plan: KernelPlan) -> None:
        """Begin with an empty table."""
        batch, lead = Batch(TABLE), Batch(TABLE)
        counted = self.counters()
        batch.add_table()  # so that there is one to delete, whatever has become of it
        if self._there:
            batch.delete_table()
            batch.add_table()
        for place, interface in enumerate(plan.interfaces):
            lead.add_base_chain(_base_chain(place), interface, PRIORITY)
        renderer = self._render(batch, plan, {})
        self._connection.commit(batch)
        known = renderer.counters.union(self._counters, *(each.counters for each in self._replaced))
        self._counted = {name: count for name, count in counted.items() if name in known}
        self._replaced = []
        self._lead(lead, renderer, plan)

    def _renew(self, plan: KernelPlan) -> None:
        """Replace all but the chains of the interfaces."""
        batch, lead = Batch(TABLE), Batch(TABLE)
        for place in range(len(plan.interfaces)):
            lead.flush_chain(_base_chain(place))
        renderer = self._render(batch, plan, self._chains)
        staying, deleted = self._delete_replaced(batch, renderer.counters)
        self._connection.commit(batch)
        self._replaced = staying
        self._counted = {name: count for name, count in self._counted.items() if name not in deleted}
        before = self._streams, self._chains, self._counters
        try:
            self._lead(lead, renderer, plan)
        except OSError:
            self._leave_behind(renderer.streams, renderer.used, self._chains, renderer.counters)
            raise
        streams, chains, counters = before
        self._leave_behind(streams, chains, renderer.used, counters)

    def _render(self, batch: Batch, plan: KernelPlan, known: Chains) -> Renderer:
        self._serial += 1
        renderer = Renderer(batch, plan, self._serial, self._marks, self._sources, known)
        for name in sorted(renderer.counters):
            batch.add_counter(name)
        renderer.add_streams()
        return renderer

    def _lead(self, lead: Batch, renderer: Renderer, plan: KernelPlan) -> None:
        renderer.lead(lead, [_base_chain(place) for place in range(len(plan.interfaces))])
        if plan.interfaces:
            self._connection.commit(lead)
        self._there, self._plan = True, plan
        self._streams, self._chains, self._counters = renderer.streams, renderer.used, renderer.counters

    def _leave_behind(self, streams: list[str], chains: Chains, kept: Chains, counters: frozenset[str]) -> None:
        """Note the chains that nothing leads to any more, but for those that are `kept`."""
        names = (*streams, *({*chains.values()} - {*kept.values()}))
        self._replaced.append(_Replaced(time.monotonic(), names, counters))

    def _delete_replaced(self, batch: Batch, counters: frozenset[str]) -> tuple[list[_Replaced], frozenset[str]]:
        """Delete what plans have left behind that were replaced long ago; return what stays, and deleted counters."""
        before = time.monotonic() - SETTLED_SECONDS
        gone = [each for each in self._replaced if each.at <= before]
        staying = [each for each in self._replaced if each.at > before]
        for each in gone:
            for name in each.chains:
                batch.flush_chain(name)
            for name in each.chains:
                batch.delete_chain(name)
        used = counters.union(self._counters, *(each.counters for each in staying))
        deleted = frozenset[str]().union(*(each.counters for each in gone)) - used
        for name in sorted(deleted):
            batch.delete_counter(name)
        return staying, deleted


def _base_chain(place: int) -> str:
    return f"in{place}"
