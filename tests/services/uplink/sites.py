"""Sites for tests: whole stacks on bus directories of their own, which meet at a NATS server."""

import json
import socket
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from tests.openly import OpenStack
from tests.services.uplink.nats import NatsCluster, NatsServer, free_port
from tests.stack import Running, sign_up, wait_until
from tests.traffic import open_receiver

KEPT: Final = 1 << 30
"""Bytes of a stream: JetStream reserves them, and a small disk has fewer than the default."""


class Site(OpenStack):
    """A stack with an uplink; its streams have a listener where it is their home."""

    def __init__(
        self,
        directory: Path,
        name: str,
        server: NatsServer | NatsCluster,
        streams: str,
        uplink: str = "",
        more: str = "",
        bus: str = "",
    ) -> None:
        directory.mkdir()
        self.name = name
        self.gateway = free_port()
        self.settings = (
            f'{bus}\n[gateway]\nlisten = ["tcp://127.0.0.1:{self.gateway}"]\nserve_seconds = 10\n'
            'destinations = ["10.0.0.0/8"]\n'
            f'[uplink]\nservers = {json.dumps(server.addresses)}\nsite = "{name}"\nkeep_bytes = {KEPT}\n'
            f"{uplink}\n{more}\n{streams}"
        )
        super().__init__(directory, self.settings)

    def begin(self, *names: str) -> None:
        """Start these services."""
        for name in names or ("broker", "gateway", "ingest", "forwarder", "uplink"):
            self.start(name)

    @property
    def uplink(self) -> Running:
        """The uplink that was started last."""
        return self["uplink"]

    def sign_up(self, stream: str, port: int, **more: Any) -> socket.socket:
        """Sign a collector up, and return its socket."""
        receiver, _ = open_receiver("127.0.0.1", port)
        sign_up({"name": f"at{port}", "streams": [stream], "port": port, **more}, self.gateway)
        return receiver


def home(stream: str, port: int) -> str:
    """Settings of a stream that comes in here."""
    return f'[[stream]]\nname = "{stream}"\nlisten = ["udp://127.0.0.1:{port}"]\n'


def away(stream: str) -> str:
    """Settings of a stream that comes from other sites alone."""
    return f'[[stream]]\nname = "{stream}"\nlisten = []\n'


def exporter(address: str) -> socket.socket:
    """A socket that sends from an address of loopback."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    return sock


def receive(sock: socket.socket, count: int) -> list[bytes]:
    """Return as many datagrams as are expected."""
    sock.settimeout(60)
    return [sock.recv(65_536) for _ in range(count)]


def assert_balanced(*sites: Site) -> None:
    """Let the ledgers of these sites listen, for two seconds, at the same time; each adds up."""
    for ledger in [site.operator("ledger") for site in sites]:
        assert ledger.process.wait(60) == 0, ledger.text
        assert ledger.text.splitlines()[-1] == "balanced", ledger.text


def flows(site: Site) -> None:
    """Wait until the site receives from elsewhere."""
    wait_until(lambda: "made the consumer" in site.uplink.text, lambda: site.uplink.text)


__all__ = ["Site", "assert_balanced", "away", "closing", "exporter", "flows", "home", "receive"]
