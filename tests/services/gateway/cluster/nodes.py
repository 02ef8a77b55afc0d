"""Nodes for tests: gateways with brokers of their own, which share a registry in one, or three, NATS servers."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.services.uplink.nats import NatsServer, free_port
from tests.stack import Stack, ask_json, wait_until

REGISTRY: Final = "of-test"


class Servers:
    """NATS servers that are one cluster, with a replica of everything at each."""

    def __init__(self, directory: Path, number: int) -> None:
        self.each: list[NatsServer] = []
        ports = [free_port() for _ in range(number)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        for index, port in enumerate(ports):
            (directory / f"nats{index}").mkdir()
            own = f'server_name: "s{index}"\ncluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{routes}] }}\n'
            self.each.append(NatsServer(directory / f"nats{index}", own if number > 1 else ""))

    @property
    def addresses(self) -> list[str]:
        """The addresses for `[uplink] servers`."""
        return [server.address for server in self.each]

    def __enter__(self) -> Self:
        with ExitStack() as started:
            for server in self.each:
                started.enter_context(server)
            self._stack = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.each:
            if server.process is not None:
                server.process.send_signal(signal.SIGCONT)
        self._stack.close()


class Node(Stack):
    """A broker and a gateway; its database is its own."""

    def __init__(self, directory: Path, name: str, servers: Servers, uplink: str = "", more: str = "") -> None:
        directory.mkdir()
        self.name = name
        self.gateway = free_port()
        settings = (
            f'[gateway]\nlisten = ["tcp://127.0.0.1:{self.gateway}"]\nserve_seconds = 0.2\n'
            f'database = "{directory}/registry.sqlite"\n{more if more.startswith("#gateway") else ""}\n'
            f'[uplink]\nservers = {servers.addresses}\nsite = "{name}"\nregistry = "{REGISTRY}"\n'
            f"replicas = {len(servers.each)}\n{uplink}\n{more if not more.startswith('#gateway') else ''}"
        )
        super().__init__(directory, settings.replace("'", '"'))

    def begin(self) -> Self:
        """Start it, and wait until it takes part."""
        self.start("broker")
        self.start("gateway")
        self.takes_part()
        return self

    def takes_part(self) -> None:
        """Wait until the gateway that was started last takes part."""
        self["gateway"].wait_for("takes part in the cluster's registry")

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """Send one request by a connection of its own; return the answer."""
        return ask_json({"op": op, **request}, self.gateway)

    def register(self, name: str, **more: Any) -> dict[str, Any]:
        """Register a name; return the answer."""
        return self.ask("register", name=name, **more)

    def clients(self) -> dict[str, Any]:
        """The list that it gives."""
        listed: dict[str, Any] = self.ask("list")["clients"]
        return listed

    def lists(self, *names: str) -> None:
        """Wait until it lists these and no others."""
        wait_until(lambda: {*self.clients()} == {*names}, lambda: f"{names} in the list {[*self.clients()]}")


def agree(*nodes: Node) -> None:
    """Wait until the nodes have the same list, at the same revision."""

    def lists() -> list[object]:
        found: list[object] = []
        for node in nodes:
            answer = node.ask("list")
            clients = {name: (each["generation"], each["port"]) for name, each in answer["clients"].items()}
            found.append((clients, answer["revision"], answer["epoch"], answer["withheld"]))
        return found

    wait_until(lambda: all(each == lists()[0] for each in lists()), lambda: str(lists()))


def until(seconds: float) -> float:
    """Return the time at which some seconds are over."""
    return time.monotonic() + seconds
