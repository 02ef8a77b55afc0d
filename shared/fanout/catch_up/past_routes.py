"""Collectors that get no live copies of a stream, since they catch up: their rows of the past, and their accounts."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol

import numpy as np

from shared.client import Client
from shared.datagrams.gathered import Gathered, Mask
from shared.datagrams.routing import Selection
from shared.fanout.catch_up.copied_meanwhile import Outcomes, leave_out
from shared.fanout.catch_up.shares_meanwhile import SharesMeanwhile, Sharing
from shared.fanout.catch_up.window import Numbered
from shared.fanout.served_collector import PASSED, UNSEEN, D, Served, count_rows
from shared.ledger.counters import (
    BASELINE,
    BY_KERNEL,
    EXPECTED,
    EXPIRED_UNREAD,
    FILTERED,
    NOT_JOURNALED,
    OFFERED,
    SAMPLED_OUT,
    SHARED_OUT,
    UNPLANNED,
    WITHHELD_BY_ADMIN,
)


class ServedByName(Protocol[D]):
    """The collectors that are served."""

    @property
    def clients(self) -> list[Client]:
        """Return their entries."""

    def __getitem__(self, name: str) -> Served[D]:
        """Return one of them."""


class PastRoutes(Generic[D]):
    """The collectors that are behind, by stream, each with the routes by which it gets the past."""

    def __init__(self, collectors: ServedByName[D]) -> None:
        self._collectors = collectors
        self._behind: dict[str, dict[str, SharesMeanwhile]] = {}

    def behind(self, stream: str) -> Collection[str]:
        """Return the names of those that get no live copies of a stream."""
        return self._behind.get(stream, ())

    def yielding(self, stream: str, joining: Collection[str]) -> Collection[str]:
        """Return those of some that are joining whose share of a group the others get: who is behind gets it later."""
        return [name for name in joining if name not in self.behind(stream)]

    def refresh(self) -> None:
        """Use the present entries, since collectors have changed."""
        for behind in self._behind.values():
            for name, shares in behind.items():
                shares.replace(self._sharers(name))

    def set_behind(self, name: str, stream: str) -> None:
        """Give a collector no live copies of a stream from now on."""
        self._behind.setdefault(stream, {})[name] = SharesMeanwhile(self._sharers(name))

    def end_behind(self, name: str, stream: str) -> None:
        """Give a collector live copies of a stream again."""
        if behind := self._behind.get(stream):
            behind.pop(name, None)
            if not behind:
                del self._behind[stream]

    def _sharers(self, name: str) -> list[Client]:
        """Return the entries of one collector, and of those with whom it shares."""
        own = self._collectors[name].destination.client
        return [each for each in self._collectors.clients if each.group == own.group] if own.group else [own]

    def note_live(self, live: Numbered, joining: Collection[str]) -> None:
        """Note who shares a live batch, for those that get their rows of it later."""
        yielding = self.yielding(live.batch.stream, joining)
        for shares in self._behind.get(live.batch.stream, {}).values():
            shares.note(live, yielding)

    def shared(self, name: str, rows: Numbered) -> Iterator[tuple[Sharing, Numbered]]:
        """Yield a batch in parts, each with those who share it with a collector that is behind."""
        return self._behind[rows.batch.stream][name].parts(rows)

    def count_discovered(self, name: str, count: int) -> None:
        """Count datagrams of the past that are owed to a collector, and that its account did not have so far."""
        account = self._collectors[name].account
        account[EXPECTED] += count
        account[OFFERED] += count

    def count_unread(self, name: str, missing: int, expired: int) -> None:
        """Count datagrams that a collector was to have from the journal and that are not there."""
        account = self._collectors[name].account
        if expired:
            account[EXPIRED_UNREAD] += expired
        if missing > expired:
            account[NOT_JOURNALED] += missing - expired

    def excuse(self, name: str, count: int) -> None:
        """Count datagrams that now come live, and that a collector has had from the journal before, not once more."""
        marks = self._collectors[name].marks
        marks[BASELINE] += count
        marks[UNSEEN] += count
        marks[PASSED] -= count

    def route_past(
        self, name: str, batch: Gathered, sharing: Sharing, outcomes: Outcomes | None
    ) -> list[tuple[D, Selection]]:
        """Return the rows of a batch of the past that its collector gets, and count those that it does not get."""
        served, router = self._collectors[name], sharing.router
        account, client = served.account, served.destination.client
        copied = partial(_leave_out, name, outcomes) if outcomes is not None else None
        routed = router.route(batch, copied, joining=sharing.joining)
        selection = next((rows for each, rows in routed if each.name == name), None)
        if selection is None:
            account[FILTERED] += len(batch)
            return []
        if outcomes is not None and client.sample == 1:
            selection = _without(selection, outcomes)
        for counter, count in (
            (FILTERED, selection.filtered),
            (SHARED_OUT, selection.shared_out),
            (SAMPLED_OUT, selection.sampled_out),
            (BY_KERNEL, selection.by_kernel),
            (UNPLANNED, selection.unplanned),
        ):
            if count:
                account[counter] += count
        if client.withheld:
            account[WITHHELD_BY_ADMIN] += count_rows(batch, selection)
            return []
        return [(served.destination, selection)] if selection.indices is None or len(selection.indices) else []


def _leave_out(name: str, outcomes: Outcomes, client: Client, rows: Mask) -> tuple[Mask, Selection]:
    """Return which of the rows that a collector samples are left to us; those of others in its group all are."""
    return leave_out(outcomes, rows) if client.name == name else (rows, Selection(None))


def _without(selection: Selection, outcomes: Outcomes) -> Selection:
    """Return what is left to us of a selection of all these rows, and what became of the others."""
    rows = np.full(len(outcomes), selection.indices is None)
    if selection.indices is not None:
        rows[selection.indices] = True
    rest, left = leave_out(outcomes, rows)
    return replace(left, indices=np.flatnonzero(rest), filtered=selection.filtered, shared_out=selection.shared_out)
