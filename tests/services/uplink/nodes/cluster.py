"""Clusters for tests: nodes on one host, each a whole stack with an uplink, and collectors that all can reach."""

import asyncio
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from nats.aio.client import Client
from pyroute2 import IPRoute

from services.uplink.nodes.beats import beat_subject
from tests.lab import assert_entered
from tests.services.uplink.nats import NatsServer, free_port
from tests.services.uplink.sites import Site, home
from tests.stack import ask_json, wait_until

ADDRESS: Final = "10.99.0.9"
"""The collectors' address: not one of loopback's, which only its own node could reach."""
LOOPBACK: Final = 1


def add_address() -> None:
    """Give the collectors' address to this namespace."""
    assert_entered()
    with IPRoute() as route:
        if not route.get_addr(index=LOOPBACK, address=ADDRESS):
            route.addr("add", index=LOOPBACK, address=ADDRESS, prefixlen=32)


class Collector:
    """A collector that keeps each payload that it gets, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.got: list[bytes] = []
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.sock.bind((ADDRESS, 0))
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.sock.getsockname()[1])

    def _receive(self) -> None:
        while payload := self.sock.recv(65_536):
            self.got.append(payload)

    def count(self) -> Counter[bytes]:
        """Return how often each payload came."""
        return Counter(self.got)

    def settings(self) -> str:
        """Its entry in the settings of each node."""
        return f'[[collector]]\nname = "{self.name}"\nstreams = ["flows"]\naddress = "{ADDRESS}"\nport = {self.port}\n'

    def close(self) -> None:
        """End its thread and its socket."""
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.sendto(b"", (ADDRESS, self.port))
        self._thread.join()
        self.sock.close()


class Exporter:
    """Sends numbered datagrams to a port in a thread, at a steady pace, until it is stopped."""

    def __init__(self, name: str, port: int, per_second: int) -> None:
        self.sent: list[bytes] = []
        self._name = name
        self._port = port
        self._pause = 1 / per_second
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            due = time.monotonic()
            while not self._stopped.is_set():
                payload = f"{self._name} {len(self.sent)}".encode()
                sock.sendto(payload, ("127.0.0.1", self._port))
                self.sent.append(payload)
                due += self._pause
                time.sleep(max(0.0, due - time.monotonic()))

    def stop(self) -> list[bytes]:
        """Stop; return all that was sent."""
        self._stopped.set()
        self._thread.join()
        return self.sent


class Cluster:
    """Nodes by name, with these collectors in the settings of each."""

    def __init__(self, directory: Path, nodes: Iterable[str], collectors: int, more: str = "") -> None:
        self._stack = ExitStack()
        add_address()
        names = tuple(nodes)
        self.server = self._stack.enter_context(NatsServer(directory))
        self.collectors = [Collector(f"collector-{number}") for number in range(collectors)]
        self.ports = {name: free_port() for name in names}
        told = ", ".join(f'"{name}"' for name in names)
        listed = "".join(collector.settings() for collector in self.collectors)
        self.nodes = {
            name: self._stack.enter_context(
                Site(
                    directory / name,
                    name,
                    self.server,
                    home("flows", self.ports[name]) + listed,
                    f"nodes = [{told}]{more}",
                )
            )
            for name in names
        }

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.push(self)
            for node in self.nodes.values():
                node.begin()
            self.wait_live(*self.nodes)
            self.wait_served(*self.nodes)
            undo.pop_all()
        return self

    def wait_live(self, *live: str) -> None:
        """Wait until each of these nodes knows that these live, and no others."""
        for name in live:
            wait_until(partial(self._knows, name, sorted(live)), partial(self._log, name))

    def heard_by(self, name: str) -> list[list[str]]:
        """Return the nodes that live, as a node knew one time after the other."""
        return [each["live"] for each in self.nodes[name].uplink.events("nodes of the cluster")]

    def _knows(self, name: str, live: list[str]) -> bool:
        return self.heard_by(name)[-1:] == [live]

    def _log(self, name: str) -> str:
        return f"{name} knows who lives: {self.nodes[name].uplink.text[-2000:]}"

    def end(self, name: str, number: signal.Signals) -> None:
        """Send all services of a node a signal at once, and wait until they have ended."""
        running = self.nodes[name].running
        for each in running:
            each.process.send_signal(number)
        for each in running:
            each.process.wait(60)
        running.clear()

    def told_by(self, name: str) -> dict[str, Any]:
        """Return what a node's `fanwire nodes` tells."""
        code, text, errors = self.nodes[name].run("nodes", "--json")
        assert code in (0, 1), errors
        return {**msgspec.json.decode(text), "code": code}

    def speak_as(self, name: str, payload: bytes) -> None:
        """Send bytes to where a node's beats go."""

        async def send() -> None:
            client = Client()
            await client.connect(self.server.address)
            await client.publish(beat_subject(name), payload)
            await client.close()

        asyncio.run(send())

    def served_by(self, collector: Collector) -> str:
        """Return the node that serves a collector, as the first node says."""
        first = next(iter(self.nodes.values()))
        return str(ask_json({"op": "list"}, first.gateway)["clients"][collector.name]["node"])

    def wait_served(self, *nodes: str) -> None:
        """Wait until these nodes and no others serve collectors, as the first one says."""
        wait_until(lambda: {self.served_by(each) for each in self.collectors} == {*nodes}, "all nodes serve collectors")

    def wait_quiet(self) -> None:
        """Wait until no collector has got anything for a second."""
        before, since = -1, time.monotonic()
        while time.monotonic() < since + 1:
            got = sum(len(collector.got) for collector in self.collectors)
            if got != before:
                before, since = got, time.monotonic()
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        for collector in self.collectors:
            collector.close()
