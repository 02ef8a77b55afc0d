"""Copies by the kernel and copies by us on a relay with every service: whatever changes, each datagram comes once."""

import random
import signal
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytest

from shared.ledger.accounts import Accounts
from shared.net.sockets import enlarge_receive_buffer
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.services.offload.site import EXPORTERS, KINDS, OUT, PORT, RELAY, SIEMS, TERMS, OffloadSite
from tests.stack import wait_until
from tests.system.offload_collectors import Connections, Entry, Place, open_relay, settings
from tests.traffic import pause

NAMES: Final = tuple("abcdefghijkl")
AT_ONCE: Final = 8
"""Collectors that change at the same time."""
GROUPED: Final[tuple[dict[str, Any], ...]] = ({}, {"hop_limit": 7})
FAR: Final = 2 * AT_ONCE
LARGE: Final = 3000
"""Bytes of a datagram that comes in fragments."""


@dataclass
class Owed:
    """A datagram, and where a copy of it has to come, or may."""

    exporter: str
    must: dict[str, Place] = field(default_factory=dict)
    shared: dict[str, set[Place]] = field(default_factory=dict)
    """By group: the places of its members, of which one has to get it."""
    may: set[Place] = field(default_factory=set)


class Around:
    """All services on a relay, its collectors, and what each of them has got."""

    def __init__(
        self, stack: OpenStack, site: OffloadSite, opened: ExitStack, draw: random.Random, grouped: float
    ) -> None:
        self.stack, self.site, self.draw, self.grouped = stack, site, draw, grouped
        self.entries: dict[str, Entry] = {}
        self._past: defaultdict[str, set[Place]] = defaultdict(set)
        """By exporter: the places of entries of before that wanted its datagrams: the kernel may still make copies."""
        self._owed: dict[int, Owed] = {}
        self._came: defaultdict[Place, Counter[int]] = defaultdict(Counter)
        self.number = self._barrier = 0
        self._exporters = {}
        for version in (4, 6):
            for number, address in enumerate(EXPORTERS[version]):
                self._exporters[address] = opened.enter_context(site.exporting(number, version))
        self._sinks: dict[Place, socket.socket] = {}
        self._connections = Connections(site, opened)
        self._opened = opened

    def _wait_for_both_senders(self) -> None:
        """Wait until both serve the present registry: who has left a group, or its sender, gets nothing more of it."""
        self._barrier += 1
        terms = {"from": ["192.0.2.1/32"], "dscp": self._barrier % 2}
        for number, kind in enumerate(KINDS):
            request = Entry(kind, (SIEMS[4][4], 8000 + number), kind, terms).registration()
            self._connections.send(request)
            self._answer(request)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._connections.answer(request["name"])
        while answer.get("error") == "no_transmitter":  # the gateway has yet to see that it is back
            pause(0.1)
            self._connections.send(request)
            answer = self._connections.answer(request["name"])
        assert answer["ok"], answer
        return answer

    def _sink(self, version: int, address: str, port: int) -> None:
        if (address, port) not in self._sinks:
            family = socket.AF_INET6 if version == 6 else socket.AF_INET
            sock = self._sinks[address, port] = self._opened.enter_context(
                self.site.siem.socket(family, socket.SOCK_DGRAM)
            )
            sock.bind((address, port))
            enlarge_receive_buffer(sock, 1 << 25)  # for a plain user, as far as the kernel allows
            sock.setblocking(False)

    def draw_entry(self) -> tuple[int, int, str, dict[str, Any]]:
        """Draw a collector's version, number of its address, kind, and terms; members of groups are of IPv4."""
        if self.draw.random() < self.grouped:
            source = self.draw.choice(KINDS)
            terms = {"group": f"{source}s", **self.draw.choice(GROUPED)}
            return 4, self.draw.randint(0, 1), source, terms
        return self.draw.choice((4, 6)), self.draw.randint(0, 1), self.draw.choice(KINDS), self.draw.choice(TERMS)

    def change(self, wanted: dict[str, tuple[int, int, str, dict[str, Any]] | None]) -> None:
        """Let collectors join, change, move or, where nothing is wanted for them, leave, all at the same time."""
        requests: dict[str, dict[str, Any]] = {}
        for name, drawn in wanted.items():
            if name in self.entries:
                for exporter in filter(self.entries[name].wants, self._exporters):
                    self._past[exporter].add(self.entries[name].place)
                self._owe_anew_of(self.entries[name].group)
            if drawn is None:
                requests[name] = {"op": "leave", "name": name, "generation": self.entries.pop(name).generation}
            else:
                version, number, source, terms = drawn
                address, port = SIEMS[version][number], 9000 + (NAMES.index(name) if name in NAMES else 50)
                # One that changes the kind at one place may get both for a moment, of two senders.
                port += 100 * KINDS.index(source)
                port += 200 * ("group" in terms)  # and who joins a group may still get what others of it get
                self._sink(version, address, port)
                self.entries[name] = Entry(name, (address, port), source, terms)
                requests[name] = self.entries[name].registration()
            self._connections.send(requests[name])
        for name, request in requests.items():
            answer = self._answer(request)
            if name in self.entries:
                self.entries[name] = replace(self.entries[name], generation=answer["client"]["generation"])
            self._owe_anew(name)
        self._wait_for_both_senders()

    def change_some(self) -> None:
        """Draw some collectors, and what becomes of them."""
        names = self.draw.sample(NAMES, AT_ONCE)
        self.change(
            {name: None if name in self.entries and self.draw.random() < 0.2 else self.draw_entry() for name in names}
        )

    def _owe_anew(self, name: str) -> None:
        """Note that a collector wants other datagrams, or elsewhere, from now on: those under way may come or not."""
        entry = self.entries.get(name)
        if entry:
            self._owe_anew_of(entry.group)
        for owed in self._owed.values():
            wanted = entry is not None and entry.wants(owed.exporter)
            if wanted and entry:
                owed.may.add(entry.place)
            if not wanted or not entry or owed.must.get(name) != entry.place:
                owed.must.pop(name, None)

    def _owe_anew_of(self, group: str) -> None:
        """Note that a group has other members from now on."""
        for owed in self._owed.values():
            owed.shared.pop(group, None)

    def export(self) -> None:
        """Let a datagram arrive."""
        exporter, large = self.draw.choice(list(self._exporters)), self.draw.random() < 0.2
        version = 6 if ":" in exporter else 4
        self.number += 1
        owed = self._owed[self.number] = Owed(exporter)
        wanting = {name: each for name, each in self.entries.items() if each.wants(exporter)}
        owed.must = {name: each.place for name, each in wanting.items() if not each.group}
        for each in wanting.values():
            if each.group:
                owed.shared.setdefault(each.group, set()).add(each.place)
        owed.may = {*(each.place for each in wanting.values()), *self._past[exporter]}
        payload = self.number.to_bytes(4) + bytes(LARGE if large else 100 + self.number % 900)
        self._exporters[exporter].sendto(payload, (RELAY[version], PORT))

    def wait_for_rules(self, bus: BusEnds) -> None:
        """Let datagrams arrive until the kernel copies some of them."""

        def is_copied(accounts: Accounts) -> bool:
            self.export()
            return accounts.get("rules/steady", {}).get("copied", 0) > 0

        accounts_when(bus, "offload.1", is_copied)
        self.look()

    def look(self) -> None:
        """Wait until all that is owed has come; nothing has come twice, or to whom did not want it."""
        owing = [(place, number) for number, owed in self._owed.items() for place in owed.must.values()]
        wait_until(
            lambda: (
                self._read()
                and all(self._came[place][number] for place, number in owing)
                and all(got for _, _, got in self._shared())
            ),
            self._missing,
        )
        several = [each for each in self._shared() if each[2] > 1]
        assert not several, f"groups got datagrams more than once: {several[:9]}"
        for place, came in self._came.items():
            twice = [number for number, count in came.items() if count > 1]
            assert not twice, f"datagrams {twice[:9]} came to {place} twice"
            unwanted = [number for number in came if number in self._owed and place not in self._owed[number].may]
            assert not unwanted, f"datagrams {unwanted[:9]} came to {place}, where nobody wanted them"
        self._owed = {}

    def _shared(self) -> Iterator[tuple[str, int, int]]:
        """Yield group, datagram, and how many members have got it."""
        for number, owed in self._owed.items():
            for group, places in owed.shared.items():
                yield group, number, sum(self._came[place][number] for place in places)

    def _read(self) -> bool:
        for place, sock in self._sinks.items():
            try:
                while True:
                    payload, peer = sock.recvfrom(1 << 16)
                    number = int.from_bytes(payload[:4])
                    self._came[place][number] += 1
                    if number in self._owed:
                        assert peer[0] in (self._owed[number].exporter, *OUT.values()), peer
            except BlockingIOError:
                pass
        return True

    def _missing(self) -> str:
        missing = [
            (name, number, owed.exporter)
            for number, owed in self._owed.items()
            for name, place in owed.must.items()
            if not self._came[place][number]
        ]
        missing += [(group, number, self._owed[number].exporter) for group, number, got in self._shared() if not got]
        return f"all comes; {len(missing)} datagrams do not: {missing[:9]}"

    def came(self, name: str) -> int:
        """The number of datagrams that came to a collector."""
        return self._came[self.entries[name].place].total()

    def restart(self, name: str, number: signal.Signals) -> None:
        """End a service and start it again; datagrams arrive meanwhile."""
        self.stack[name].stop(number)
        for _ in range(9):
            self.export()
        with self.site.relay.entered():
            self.stack.start(name)


@contextmanager
def around(stack: OpenStack, draw: random.Random, grouped: float) -> Iterator[Around]:
    """Everything runs on the relay; so many of the collectors that change are members of groups."""
    stack.configure(settings(serve_seconds=10))
    with open_relay(stack) as (site, opened):
        yield Around(stack, site, opened, draw, grouped)


@pytest.mark.parametrize(
    ("changes", "grouped"), [(40, 0.1), (40, 0.9), pytest.param(10_000, 0.3, marks=pytest.mark.soak)]
)
def test_each_datagram_comes_once_by_the_kernel_or_by_us(open_stack: OpenStack, changes: int, grouped: float) -> None:
    """IPv4, IPv6 and fragments, relayed and with the exporter's address, while collectors join, leave and change."""
    draw = random.Random(changes)
    with around(open_stack, draw, grouped) as site, BusEnds(open_stack.bus) as bus:
        site.change({"steady": (4, 3, "original", {})})
        site.wait_for_rules(bus)
        for number in range(0, changes, AT_ONCE):
            site.change_some()
            for _ in range(draw.randint(10, 90)):
                site.export()
            if number % FAR < AT_ONCE:
                site.look()
            if changes // 2 - AT_ONCE < number <= changes // 2:
                site.restart("transmitter", signal.SIGTERM)
        site.look()
        accounts = accounts_when(bus, "transmitter.1", lambda told: told["collector/steady"]["offered"] == site.number)
        account = accounts["collector/steady"]
        assert site.came("steady") == account["sent"] + account["by_kernel"]
        assert account["by_kernel"] > site.number // 10
        rules = accounts_when(bus, "offload.1", lambda told: told["rules/steady"]["copied"] >= account["by_kernel"])
        assert rules["rules/steady"]["copied"] == account["by_kernel"]
        read = accounts_when(bus, "ingest.1", lambda told: told["stream/netflow"]["received"] == site.number)
        assert read["stream/netflow"]["marks_read"] == rules["marks/netflow"]["marked"]
        site.restart("offload", signal.SIGKILL)
        site.look()
        site.wait_for_rules(bus)
        for _ in range(9):
            site.export()
        site.look()
        assert open_stack.run("ledger")[0] == 0
