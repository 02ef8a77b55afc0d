"""Copies by the kernel beside ours, counted at the collectors: whatever changes, each datagram comes once."""

import ipaddress
import json
import random
import socket
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Self

import pytest

from shared.bus.bodies.offload_messages import OffloadReply
from shared.bus.messages import REGISTRY_TOPIC, RegistryChange, RegistrySnapshot, offload_topic
from shared.client import Client
from shared.datagrams.mmsg import SO_MARK
from shared.fanout.registry_replica import RegistryReplica
from shared.settings.tables import Offload
from tests.builders import BusEnds, PlayedOffload, accounts_when
from tests.openly import OpenStack
from tests.stack import PATIENT, wait_until
from tests.traffic import open_receiver

OFFLOAD = Offload()
STREAM: Final = '[[stream]]\nname = "flows"\nlisten = ["udp://127.0.0.1:7000", "udp://[::1]:7000"]\n'
EXPORTERS: Final = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5", "::1")
TERMS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"from": ["127.0.0.2/31"]},
    {"from": ["127.0.0.3/32", "::/0"]},
    {"from": ["127.0.0.0/29"], "hop_limit": 9},
)
NAMES: Final = ("a", "b", "c")
PORTS: Final = {**{name: (9600 + number, 9700 + number) for number, name in enumerate(NAMES)}, "steady": (9650,)}
GENERATIONS: Final = 40
"""Numbers that rules take in turn."""
FAR: Final = 10
"""Changes between two looks at what has come."""


def wants(client: Client, source: str) -> bool:
    """Return whether a datagram from this source is one for a client."""
    address = ipaddress.ip_address(source)
    return not client.prefixes or any(address in ipaddress.ip_network(prefix) for prefix in client.prefixes)


class Registry:
    """Signs collectors up and off, on one connection."""

    def __init__(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", 5000), timeout=60)
        self._lines = self._socket.makefile("rb")
        self.entries: dict[str, Client] = {}

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer."""
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._lines.readline())
        assert answer["ok"], answer
        return answer

    def register(self, name: str, port: int, terms: dict[str, Any]) -> None:
        """Sign a collector up, or up anew; with the answer copies flow by the new terms."""
        found = self.ask(op="register", name=name, streams=["flows"], port=port, take_over=True, **terms)["client"]
        prefixes = tuple(terms.get("from", ()))
        self.entries[name] = Client(
            name=name, generation=found["generation"], address="127.0.0.1", port=port, prefixes=prefixes
        )

    def leave(self, name: str) -> None:
        """Sign a collector off."""
        self.ask(op="leave", name=name, generation=self.entries.pop(name).generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


@dataclass
class Owed:
    """A datagram, and where a copy of it has to come, or may."""

    source: str
    must: dict[str, int] = field(default_factory=dict)
    """Ports of collectors by name, whose entry wanted it when it was sent, and still does at the next look."""
    may: set[int] = field(default_factory=set)


class Kernel:
    """Plays the kernel and the planner of its rules, who follow the registry late: copies and marks as rules do."""

    def __init__(self, bus: BusEnds, opened: ExitStack, draw: random.Random) -> None:
        self._draw = draw
        self._offload = PlayedOffload(bus)
        self._registry = bus.subscriber(REGISTRY_TOPIC)
        self._replica = RegistryReplica()
        self._boot = 0
        self._known: dict[int, tuple[list[Client], int, int]] = {}
        """By generation: whom it serves, and the registry that it was made of."""
        self._pending, self._answered = (0, 0), False
        """The generation that is to come next, its serial, and whether the forwarder knows it."""
        self._last, self._generation, self._rules = 0, 0, list[Client]()
        self.swaps = 0
        self.sent: Counter[int] = Counter()
        self._copies = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._exporters = {}
        for address in EXPORTERS:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = self._exporters[address] = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.bind((address, 0))
            sock.connect(("::1" if ":" in address else "127.0.0.1", 7000))

    def export(self, number: int, source: str, fragments: bool) -> set[int]:
        """Let a datagram arrive; return the ports that the kernel has sent it to. It leaves fragments to us."""
        payload, sock = number.to_bytes(4) + bytes(100), self._exporters[source]
        generation = 0 if fragments else self._generation
        ports = {each.port for each in self._rules if wants(each, source)} if generation else set()
        for port in ports:
            self._copies.sendto(payload, ("127.0.0.1", port))
        self.sent.update(ports)
        others = self._draw.getrandbits(32) & ~OFFLOAD.mark_mask
        mark = generation << OFFLOAD.mark_shift | others
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark.to_bytes(4, "little"))
        sock.send(payload)
        return ports

    def follow(self) -> None:
        """Plan now and then; put rules in once the forwarder has answered, or a while later."""
        self.listen()
        if self._answered and self._draw.random() < 0.7:
            self._generation = self._pending[0]
            self._rules, self._pending, self._answered = self._known[self._generation][0], (0, 0), False
            self.swaps += 1
        if not self._pending[0] or self._draw.random() < 0.1:
            self._plan()

    def listen(self) -> bool:
        """Read the bus; tell a forwarder that has just begun of all generations, and return whether there was one."""
        while message := self._registry.receive():
            if isinstance(message.body, RegistrySnapshot | RegistryChange):
                self._replica.apply_message(message.envelope, message.body)
                self._boot = message.envelope.boot
        fresh = self._offload.publisher.new_subscriptions()
        begun = any(offload_topic("relay").startswith(prefix) for prefix in fresh)
        if begun:
            for generation in self._known:
                self._tell(generation)
        while message := self._offload.replies.receive():
            self._answered |= message.body == OffloadReply(self._pending[1])
        return begun

    def _plan(self) -> None:
        self._last = self._last % GENERATIONS + 1
        clients = list(self._replica.clients.values())
        served = self._draw.sample(clients, self._draw.randint(len(clients) // 2, len(clients)))
        self._known[self._last] = served, self._boot, max(0, self._replica.revision)
        self._pending, self._answered = (self._last, 0), False
        self._tell(self._last)

    def _tell(self, generation: int) -> None:
        served, registry, revision = self._known[generation]
        serial = self._offload.tell(generation, *served, registry=registry, revision=revision)
        if generation == self._pending[0]:
            self._pending, self._answered = (generation, serial), False


class Site:
    """Registry, kernel and collectors; the counts of what came where, by number."""

    def __init__(self, bus: BusEnds, opened: ExitStack, draw: random.Random) -> None:
        self.draw = draw
        self.registry = opened.enter_context(Registry())
        self.kernel = Kernel(bus, opened, draw)
        self._sinks = {port: open_receiver("127.0.0.1", port)[0] for ports in PORTS.values() for port in ports}
        for sock in self._sinks.values():
            opened.callback(sock.close)
            sock.setblocking(False)
        self._came: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._owed: dict[int, Owed] = {}
        self._left: dict[str, Client] = {}
        """Collectors that have left: who does so may get copies for a moment longer."""
        self.number = 0

    def change(self) -> None:
        """Sign a collector up, up anew, or off; what it was owed of the last datagrams depends on which came first."""
        name = self.draw.choice(NAMES)
        if name in self.registry.entries and self.draw.random() < 0.3:
            self._left[name] = self.registry.entries[name]
            self.registry.leave(name)
        else:
            self._left.pop(name, None)
            port = self.draw.choice(PORTS[name])
            self.registry.register(name, port, self.draw.choice(TERMS))
        entry = self.registry.entries.get(name)
        for owed in self._owed.values():
            wanted = entry is not None and wants(entry, owed.source)
            if wanted and entry:
                owed.may.add(entry.port)
            if not wanted or not entry or owed.must.get(name) != entry.port:
                owed.must.pop(name, None)

    def export(self) -> None:
        """Let a datagram arrive."""
        source, self.number = self.draw.choice(EXPORTERS), self.number + 1
        owed = self._owed[self.number] = Owed(source)
        owed.must = {name: each.port for name, each in self.registry.entries.items() if wants(each, source)}
        owed.may = {*owed.must.values()} | {each.port for each in self._left.values() if wants(each, source)}
        owed.may |= self.kernel.export(self.number, source, self.draw.random() < 0.25)

    def look(self) -> None:
        """Wait until all that is owed has come; nothing has come twice, or to whom did not want it."""
        owing = [(port, number) for number, owed in self._owed.items() for port in owed.must.values()]
        wait_until(lambda: self._read() and all(self._came[port][number] for port, number in owing), self._missing)
        for port, came in self._came.items():
            twice = [number for number, count in came.items() if count > 1]
            assert not twice, f"datagrams {twice[:9]} came to port {port} twice"
            unwanted = [number for number in came if number in self._owed and port not in self._owed[number].may]
            assert not unwanted, f"datagrams {unwanted[:9]} came to port {port}, where nobody wanted them"
        self._owed = {}

    def _read(self) -> bool:
        self.kernel.listen()
        for port, sock in self._sinks.items():
            try:
                while True:
                    self._came[port][int.from_bytes(sock.recv(1000)[:4])] += 1
            except BlockingIOError:
                pass
        return True

    def _missing(self) -> str:
        missing = [
            (name, number)
            for number, owed in self._owed.items()
            for name, port in owed.must.items()
            if not self._came[port][number]
        ]
        return f"all comes; {len(missing)} datagrams do not: {missing[:9]}"

    def came(self, name: str) -> int:
        """The number of datagrams that came to a collector's ports."""
        return sum(self._came[port].total() for port in PORTS[name])


@pytest.mark.parametrize("changes", [40, pytest.param(10_000, marks=pytest.mark.soak)])
def test_each_datagram_comes_once_whatever_changes(open_stack: OpenStack, changes: int) -> None:
    """Collectors join, leave, move and change, rules follow late, and the forwarder is restarted under it."""
    open_stack.configure(f'{PATIENT}[offload]\ninterfaces = ["lo"]\n{STREAM}')
    open_stack.start_all()
    draw = random.Random(changes)
    with BusEnds(open_stack.bus) as bus, ExitStack() as opened:
        site = Site(bus, opened, draw)
        site.registry.register("steady", PORTS["steady"][0], {})
        for number in range(changes):
            site.change()
            site.kernel.follow()
            for _ in range(draw.randint(1, 9)):
                site.export()
            if number % FAR == FAR - 1:
                site.look()
            if number in (changes // 3, 2 * changes // 3):
                open_stack["forwarder"].stop()
                for _ in range(9):
                    site.export()
                site.kernel.listen()
                open_stack.start("forwarder", ready=False)
                wait_until(site.kernel.listen, "the next forwarder has been told of the rules")
        site.look()
        steady = site.came("steady")
        accounts = accounts_when(
            bus, "forwarder.1", lambda told: told.get("collector/steady", {}).get("offered") == site.number
        )
        account = accounts["collector/steady"]
        assert steady == site.number
        assert account["by_kernel"] == site.kernel.sent[PORTS["steady"][0]]
        assert account["sent"] == site.number - account["by_kernel"]
        assert site.kernel.swaps > changes // 10
        open_stack.configure(f"{PATIENT}{STREAM}")  # offload, which is played and does not report, is not asked for
        assert open_stack.run("ledger")[0] == 0
