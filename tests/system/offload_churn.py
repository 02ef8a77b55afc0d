"""A relay under steady traffic, of which the kernel copies what it can, and collectors that join, leave and change."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.openly import OpenStack
from tests.services.offload.site import EXPORTERS, KINDS, SIEMS, TERMS, OffloadSite
from tests.stack import wait_until
from tests.system.offload_collectors import Connections, Entry, Place, open_relay, settings
from tests.system.offload_traffic import ADDRESSES, Frames, Traffic, key_of

COLLECTORS: Final = 16
AT_ONCE: Final = 8
"""Collectors that change at the same time."""
LOST: Final = re.compile("dropped|missed|rejected|unsure|late|unserved")
CHANGED_TERMS: Final[tuple[dict[str, Any], ...]] = (
    *TERMS,
    {"from": ["10.1.0.0/16", "fd01::/48"], "dscp": 8},
    {"sample": 3},
    {"sample": 2, "from": ["10.1.0.10/31", "fd01::/64"]},
)
STEADY: Final = {"relay4": (4, "relay"), "original4": (4, "original"), "original6": (6, "original")}
"""Collectors that stay, at addresses of their own."""
STEADY_AT: Final = 3
DUE: Final = 400
"""Stretches of numbers that may be incomplete while changes go on: the readers of IPv4 and IPv6 come one by one."""
MARGIN: Final = 64
"""Numbers before the last datagram in fragments that has come: it may be in the middle of its batch."""


@dataclass(frozen=True)
class Due:
    """Numbers of an exporter's datagrams that have to come to one of these places, once."""

    places: tuple[Place, ...]
    exporter: int
    start: int
    stop: int


def wanted_by(entry: Entry) -> npt.NDArray[np.bool_]:
    """Return which exporters a collector gets copies of."""
    return np.array([entry.wants(exporter) for exporter in ADDRESSES])


class Churn:
    """The registry's collectors, and which datagrams have to come to whom."""

    def __init__(
        self, stack: OpenStack, site: OffloadSite, opened: ExitStack, draw: random.Random, rate: float
    ) -> None:
        self._stack, self.site, self._draw = stack, site, draw
        self.frames = Frames(site, opened)
        self.traffic = Traffic(site, opened, rate, np.random.default_rng(draw.randrange(1 << 32)))
        self.entries: dict[str, Entry] = {}
        self._from: dict[Place, npt.NDArray[np.int64]] = {}
        """By place and exporter: the number from which on each datagram has to come there; -1: none has to."""
        self._groups: dict[str, tuple[tuple[Place, ...], npt.NDArray[np.int64]]] = {}
        """Members of groups by places, and the number from which on one of them has to get each datagram."""
        self._unsure: set[str] = set()
        """Collectors that have a sample no more."""
        self._connections = Connections(site, opened)
        self._due: list[Due] = []
        self.owed = 0
        """Copies that had to come, and have."""

    def begin(self) -> None:
        """Let traffic flow, to those that stay alone."""
        for address in (*SIEMS[4], *SIEMS[6]):  # to ask for them takes up to a second, which is no matter of this test
            self.site.relay.neighbour(address, self.site.siem_end.link_address, "out")
        for name, (version, source) in STEADY.items():
            place = SIEMS[version][STEADY_AT], 9000 + KINDS.index(source)
            self._register({name: Entry(name, place, source, {})})
        self._owe(self.traffic.sent.copy())
        self.frames.start()
        self.traffic.start()

    def _ask_all(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send all requests at the same time; return the answers."""
        for request in requests:
            self._connections.send(request)
        answers = [self._connections.answer(request["name"]) for request in requests]
        assert all(answer["ok"] for answer in answers), answers
        return answers

    def _register(self, wanted: dict[str, Entry]) -> None:
        requests = [each.registration() for each in wanted.values()]
        for each in wanted.values():
            version = 6 if ":" in each.place[0] else 4
            self.frames.expect(version, each.place, relayed=each.source == "relay")
        for (name, each), answer in zip(wanted.items(), self._ask_all(requests), strict=True):
            self.entries[name] = replace(each, generation=answer["client"]["generation"])

    def _owe(self, now: npt.NDArray[np.int64]) -> None:
        """Note that all that is sent from now on has to come to whom it is for, unless it had to before."""
        for each in self.entries.values():
            if not each.group and "sample" not in each.terms and each.name not in self._unsure:
                begun = self._from.setdefault(each.place, np.full(len(ADDRESSES), -1))
                begun[(begun < 0) & wanted_by(each)] = now[(begun < 0) & wanted_by(each)]
        members: defaultdict[str, list[Place]] = defaultdict(list)
        for each in self.entries.values():
            if each.group:
                members[each.group].append(each.place)
        for group, places in members.items():
            self._groups.setdefault(group, (tuple(places), now))

    def draw_entry(self, name: str) -> Entry:
        """Draw what a collector becomes. It has a port for each kind, and another one in groups, of IPv4 alone."""
        source = self._draw.choice(KINDS)
        number = int(name[1:])
        port = 9100 + number + 100 * KINDS.index(source)
        if self._draw.random() < 0.3:
            terms = {"group": f"{source}s", **self._draw.choice(({}, {"hop_limit": 7}))}
            return Entry(name, (SIEMS[4][number % 2], port + 200), source, terms)
        version = self._draw.choice((4, 6))
        return Entry(name, (SIEMS[version][number % 2], port), source, self._draw.choice(CHANGED_TERMS))

    def change(self) -> None:
        """Let some collectors join, leave, move or change at the same time."""
        names = self._draw.sample([f"c{number}" for number in range(COLLECTORS)], AT_ONCE)
        leaving = [name for name in names if name in self.entries and self._draw.random() < 0.25]
        wanted = {name: self.draw_entry(name) for name in names if name not in leaving}
        for name in names:
            self._settle(name, wanted.get(name))
        self._ask_all(
            [{"op": "leave", "name": name, "generation": self.entries.pop(name).generation} for name in leaving]
        )
        barrier = {
            kind: Entry(kind, (SIEMS[4][4], 8000 + number), kind, {"from": ["192.0.2.1/32"], "dscp": len(wanted)})
            for number, kind in enumerate(KINDS)
        }  # when both senders serve these, they serve no more whom the others have left
        for name in wanted:
            self.entries.pop(name, None)
        self._register({**wanted})
        self._register(barrier)
        self._owe(self.traffic.sent.copy())

    def _settle(self, name: str, wanted: Entry | None) -> None:
        """Check that what had to come has, as far as it does not have to come any more."""
        before = self.entries.get(name)
        for group in {each.group for each in (before, wanted) if each and each.group}:
            self._settle_group(group)
        # Rules that sample are replaced a moment later, and nobody can tell which datagrams they have chosen meanwhile.
        self._unsure.discard(name)
        if before and wanted and "sample" in before.terms and before.place == wanted.place:
            self._unsure.add(name)
        if before is None or before.place not in self._from:
            return
        goes_on = np.zeros(len(ADDRESSES), bool)
        if wanted and wanted.place == before.place and "sample" not in wanted.terms:
            goes_on = wanted_by(wanted)
        self._check_place(before.place, ~goes_on)

    def _check_place(self, place: Place, ending: npt.NDArray[np.bool_]) -> None:
        begun, until = self._from[place], self._reached(place)
        for exporter in np.flatnonzero(ending & (begun >= 0)):
            self._due.append(Due((place,), int(exporter), int(begun[exporter]), int(until[exporter])))
        begun[ending] = -1

    def _settle_group(self, group: str) -> None:
        places, begun = self._groups.pop(group, ((), np.zeros(0)))
        if not places:
            return
        until = np.min([self._reached(place) for place in places], axis=0)
        for exporter in range(len(EXPORTERS[4]) if group == "originals" else len(ADDRESSES)):
            self._due.append(Due(places, exporter, int(begun[exporter]), int(until[exporter])))

    def _missing(self) -> list[Due]:
        """Return what is due and has not come yet; the rest has come once."""
        self.frames.digest()
        left = []
        for due in self._due:
            got = np.sum([self._seen(place, due) for place in due.places], axis=0)
            assert (got <= 1).all(), f"{due}: {np.flatnonzero(got > 1)[:9] + due.start} come more than once"
            if got.all():
                self.owed += len(got)
            else:
                left.append(due)
        self._due = left
        return left

    def _seen(self, place: Place, due: Due) -> npt.NDArray[np.uint8]:
        seen = self.frames.came[key_of(place, due.exporter)].seen
        found = np.zeros(max(0, due.stop - due.start), np.uint8)
        some = seen[due.start : max(due.start, due.stop)]
        found[: len(some)] = some
        return found

    def _reached(self, place: Place) -> npt.NDArray[np.int64]:
        """Return, by exporter, the number up to which the sender of copies to a place has sent what it has to."""
        relayed = key_of(place) in self.frames.relayed
        steady = [name for name, (_, source) in STEADY.items() if (source == "relay") == relayed]
        reached = np.zeros(len(ADDRESSES), np.int64)
        for name in steady:
            keys = [key_of(self.entries[name].place, exporter) for exporter in range(len(ADDRESSES))]
            reached = np.maximum(reached, [self.frames.came[key].large - MARGIN for key in keys])
        return np.maximum(0, reached)

    def goes_on(self, sent: npt.NDArray[np.int64]) -> bool:
        """Return whether collectors that stay have got later datagrams of each exporter that they get any of."""
        self.frames.digest()
        return all(
            self.frames.came[key_of(self.entries[name].place, int(exporter))].foremost > sent[exporter]
            for name in STEADY
            for exporter in np.flatnonzero(wanted_by(self.entries[name]))
        )

    def look(self) -> None:
        """Nothing has come twice, out of order, or has not come."""
        assert not self.frames.faults, "\n".join(self.frames.faults[:40])
        assert self.traffic.refused == self.frames.lost() == 0
        if len(self._due) > DUE:
            wait_until(lambda: not self._missing(), self._tell_missing)
        self._missing()

    def _tell_missing(self) -> str:
        missing = [
            (due, (np.flatnonzero(np.sum([self._seen(place, due) for place in due.places], axis=0) == 0) + due.start))
            for due in self._due
        ]
        ledger = self._stack.run("ledger", "--json")[1]
        lost = {
            (service, account): {name: count for name, count in counters.items() if count and LOST.search(name)}
            for service, accounts in json.loads(ledger)["services"].items()
            for account, counters in accounts.items()
            if any(count and LOST.search(name) for name, count in counters.items())
        }
        steady = {
            name: int(self.traffic.sent[wanted_by(self.entries[name])].sum())
            - self.frames.total(self.entries[name].place)
            for name in STEADY
        }
        told = f"{steady} have not come; known as lost: {lost}; {self.frames.lost()} frames were lost here\n"
        return told + "\n".join(f"{due}: {len(some)}: {some[:9]}" for due, some in missing[:20])

    def finish(self) -> None:
        """Stop the traffic, and check all that had to come."""
        self.traffic.stop()
        before = len(self._due)
        for place in list(self._from):
            self._check_place(place, np.ones(len(ADDRESSES), bool))
        for group in list(self._groups):
            self._settle_group(group)
        self._due[before:] = [replace(due, stop=int(self.traffic.sent[due.exporter])) for due in self._due[before:]]
        wait_until(lambda: not self._missing(), self._tell_missing)
        self.look()


@contextmanager
def churn(stack: OpenStack, rate: float, draw: random.Random) -> Iterator[Churn]:
    """Everything runs on the relay; the traffic of exporters flows, and copies to collectors that stay."""
    stack.configure(settings(serve_seconds=30))
    with open_relay(stack) as (site, opened):
        found = Churn(stack, site, opened, draw, rate)
        opened.callback(found.frames.stop)
        opened.callback(found.traffic.stop)
        found.begin()
        yield found
