"""Nodes for tests: gateways with brokers of their own, which share a registry in one, or three, NATS servers."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError

from services.gateway.cluster.keys import stream_name
from tests.network import HERE, End, Host, veth
from tests.services.gateway.test_server import counters
from tests.services.uplink.nats import NatsCluster, NatsServer, free_port
from tests.stack import Stack, ask_json, wait_until

T = TypeVar("T")
REGISTRY: Final = "of-test"


class ServersApart(NatsCluster):
    """Three servers, each on a host of its own, that can be cut off from the others; nodes are where the test is."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, 3, [f"10.77.{index}.2" for index in range(3)])
        self.hosts = [Host() for _ in self.each]

    def __enter__(self) -> Self:
        HERE.forward()
        with ExitStack() as links:
            for index, host in enumerate(self.hosts):
                links.enter_context(host)
                here = End(HERE, f"ha{index}", f"10.77.{index}.1/24")
                there = End(host, "eth0", f"10.77.{index}.2/24")
                links.enter_context(veth(here, there))
                host.route("10.77.0.0/16", f"10.77.{index}.1")
            self._links = links.pop_all()
        return super().__enter__()

    def start(self, server: NatsServer) -> None:
        """Start one of them on its host."""
        with self.hosts[self.each.index(server)].entered():
            server.start()

    def cut_off(self, index: int) -> None:
        """Let a server reach no other one from now on."""
        for other in {0, 1, 2} - {index}:
            self.hosts[index].run("ip", "route", "add", "blackhole", f"10.77.{other}.0/24")

    def heal(self, index: int) -> None:
        """Let it reach the others again."""
        for other in {0, 1, 2} - {index}:
            self.hosts[index].run("ip", "route", "del", "blackhole", f"10.77.{other}.0/24")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._links.close()


class Node(Stack):
    """A broker and a gateway; its database is its own."""

    def __init__(
        self,
        directory: Path,
        name: str,
        servers: NatsCluster,
        uplink: str = "",
        more: str = "",
        only: int | None = None,
    ) -> None:
        directory.mkdir()
        self.name = name
        self.gateway = free_port()
        addresses = servers.addresses if only is None else [servers.addresses[only]]
        settings = (
            f'[gateway]\nlisten = ["tcp://127.0.0.1:{self.gateway}"]\nserve_seconds = 0.2\n'
            f'destinations = ["192.0.2.0/24"]\n'
            f'database = "{directory}/registry.sqlite"\n'
            f'[uplink]\nservers = {addresses}\nsite = "{name}"\nregistry = "{REGISTRY}"\n'
            f"plain_beyond_loopback = true\nreplicas = {len(servers.each)}\n{uplink}\n{more}"
        )
        self.settings = settings.replace("'", '"')
        super().__init__(directory, self.settings)

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


def leader_of(servers: NatsCluster) -> NatsServer:
    """Return the server that leads the bucket, once there is one."""
    found: list[str] = []

    async def ask(client: Client) -> bool:
        try:
            answer = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream_name(REGISTRY)}", b"", 2)).data)
        except (NatsError, TimeoutError):
            return False
        found.append(answer.get("cluster", {}).get("leader", ""))
        return bool(found[-1])

    wait_until(lambda: in_loop(servers, ask), "the bucket has a leader")
    return servers.each[int(found[-1][1:])]


def accounts_of(node: Node) -> dict[str, int]:
    """Return the account of a node's gateway."""
    return counters(node)


def in_loop(servers: NatsCluster, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """Do some work with a connection to a server, as somebody who is no gateway."""

    async def run() -> T:
        running = next(server for server in servers.each if server.process is not None)
        client = await nats.connect(running.address, allow_reconnect=False)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())
