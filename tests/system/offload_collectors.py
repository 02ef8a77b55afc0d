"""Collectors on a relay with the services that copy, and how they sign up: what they want, and where it comes."""

import ipaddress
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from tests.openly import OpenStack
from tests.services.offload.site import PORT, OffloadSite

Place = tuple[str, int]
SERVICES: Final = ("broker", "gateway", "forwarder", "ingest", "transmitter", "offload")


def settings(serve_seconds: int) -> str:
    """Settings of a relay for IPv4 and IPv6; a sign-up is answered within so many seconds."""
    return f"""
[gateway]
destinations = ["10.2.0.0/24", "fd02::/64"]
serve_seconds = {serve_seconds}
[[stream]]
name = "netflow"
listen = ["udp://0.0.0.0:{PORT}", "udp://[::]:{PORT}"]
[offload]
interfaces = ["in"]
"""


@contextmanager
def open_relay(stack: OpenStack, services: Sequence[str] = SERVICES) -> Iterator[tuple[OffloadSite, ExitStack]]:
    """These services run on the relay, until what was opened there is closed."""
    with OffloadSite() as site, ExitStack() as opened:
        with site.relay.entered():
            for name in services:
                stack.start(name)
        yield site, opened
        stack["offload"].stop()


@dataclass(frozen=True)
class Entry:
    """A collector as it has signed up."""

    name: str
    place: Place
    source: str
    terms: dict[str, Any]
    generation: int = 0

    @property
    def group(self) -> str:
        """The group that it is a member of."""
        return str(self.terms.get("group", ""))

    def wants(self, exporter: str) -> bool:
        """Return whether it gets copies of an exporter's datagrams."""
        if self.source == "original" and (":" in exporter) != (":" in self.place[0]):
            return False
        networks = [ipaddress.ip_network(prefix) for prefix in self.terms.get("from", ())]
        address = ipaddress.ip_address(exporter)
        return not networks or any(address in network for network in networks)

    def registration(self) -> dict[str, Any]:
        """Return the request that signs it up."""
        address, port = self.place
        request = {"op": "register", "name": self.name, "streams": ["netflow"], "take_over": True}
        return request | {"source": self.source, "address": address, "port": port, **self.terms}


class Connections:
    """Connections to the gateway, one for each collector: several may ask at the same time."""

    def __init__(self, site: OffloadSite, opened: ExitStack) -> None:
        self._site, self._opened = site, opened
        self._of: dict[str, tuple[socket.socket, BinaryIO]] = {}

    def send(self, request: dict[str, Any]) -> None:
        """Send a collector's request."""
        name = request["name"]
        if name not in self._of:
            with self._site.relay.entered():
                gateway = self._opened.enter_context(socket.create_connection(("127.0.0.1", 5000), timeout=60))
            self._of[name] = gateway, self._opened.enter_context(gateway.makefile("rb"))
        self._of[name][0].sendall(json.dumps(request).encode() + b"\n")

    def answer(self, name: str) -> dict[str, Any]:
        """Return the answer to a collector's oldest request."""
        answer: dict[str, Any] = json.loads(self._of[name][1].readline())
        return answer
