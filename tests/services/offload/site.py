"""A relay between exporters and collectors, and the kernel's rules on it: what arrives, where, with which mark."""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

import msgspec

from services.offload.applying.nftables.connection import Nftables
from services.offload.applying.rules import Marks, Sources
from services.offload.applying.table import Table
from services.offload.kernel_plan import Copy, KernelPlan, Listener, Prefix, StreamCopies
from tests.capture import Arrival, Receiver
from tests.network import End, Host, veth

SO_RCVMARK, SO_MARK, SO_NO_CHECK = 75, 36, 11
MASK: Final = 0xFFF00000
PORT: Final = 5514
RELAY: Final = {4: "10.1.0.1", 6: "fd01::1"}
EXPORTERS: Final = {
    4: [f"10.1.0.{number}" for number in range(10, 14)],
    6: [f"fd01::{number}" for number in range(10, 14)],
}
OUT: Final = {4: "10.2.0.1", 6: "fd02::1"}
SIEMS: Final = {4: [f"10.2.0.{number}" for number in range(11, 16)], 6: [f"fd02::{number}" for number in range(11, 16)]}
KINDS: Final = ("relay", "original")
TERMS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"from": ["10.1.0.10/31"]},
    {"from": ["10.1.0.12/32", "fd01::/64"]},
    {"from": ["10.1.0.0/24", "fd01::10/128"], "hop_limit": 9},
    {"dscp": 8},
)
"""Terms that a collector may ask for."""


def packed(address: str) -> bytes:
    """An address as 4 or 16 bytes."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def prefix(text: str) -> Prefix:
    """A network, as in `10.1.0.0/24`."""
    address, _, length = text.partition("/")
    return Prefix(packed(address), int(length))


def _with_length(addresses: dict[int, list[str]]) -> str:
    """Return addresses for a link, with the lengths of their prefixes."""
    return " ".join([*(f"{address}/24" for address in addresses[4]), *(f"{address}/64" for address in addresses[6])])


@dataclass(frozen=True)
class Marked(Arrival):
    """A datagram as the listener sees it."""

    mark: int


class Listening(Receiver[Marked]):
    """A listener that reads marks, as ingest does."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        self.sock = host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        self.sock.bind((address, port))

    def take(self) -> Iterator[Marked]:
        while True:
            try:
                payload, ancillary, _, peer = self.sock.recvmsg(65536, 128, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            mark = next((struct.unpack("=I", value)[0] for _, kind, value in ancillary if kind == SO_MARK), 0)
            yield Marked(peer[0], peer[1], payload, mark)

    def missing(self) -> str:
        return ""


@dataclass
class OffloadSite:
    """Exporters, a relay with rules, collectors; closed by `with`."""

    checksum_offload: bool = False
    mtu: int = 1500
    exporter: Host = field(default_factory=Host)
    relay: Host = field(default_factory=Host)
    siem: Host = field(default_factory=Host)

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for host in (self.exporter, self.relay, self.siem):
                opened.enter_context(host)
            self.exporter_end = End(self.exporter, "eth", _with_length(EXPORTERS))
            self.into = End(self.relay, "in", f"{RELAY[4]}/24 {RELAY[6]}/64")
            self.out = End(self.relay, "out", f"{OUT[4]}/24 {OUT[6]}/64")
            self.siem_end = End(self.siem, "eth", _with_length(SIEMS))
            opened.enter_context(
                veth(self.exporter_end, self.into, checksum_offload=self.checksum_offload, mtu=self.mtu)
            )
            opened.enter_context(veth(self.out, self.siem_end, checksum_offload=self.checksum_offload, mtu=self.mtu))
            self.out_index = int(self.relay.link("out")["ifindex"])
            with self.relay.entered():
                self.connection = Nftables()
            opened.callback(self.connection.close)
            self.table = Table(
                self.connection, Marks(MASK, 20), Sources((prefix("127.0.0.0/8"),), (prefix("169.254.0.0/16"),))
            )
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def copy(self, number: int, port: int, version: int = 4, **more: Any) -> Copy:
        """A copy for the siem's address of this number."""
        link_addresses = [bytes.fromhex(end.link_address.replace(":", "")) for end in (self.siem_end, self.out)]
        found = Copy(
            f"siem-{number}",
            100 + number,
            self.out_index,
            link_addresses[0],
            link_addresses[1],
            packed(SIEMS[version][number]),
            port,
        )
        return msgspec.structs.replace(found, **more)

    def plan(self, copies: Sequence[Copy], generation: int = 7, version: int = 4, longest: int = 0) -> KernelPlan:
        """All these copies of what arrives for the listener."""
        listeners = (Listener(packed(RELAY[version]), PORT),)
        stream = StreamCopies("netflow", generation, version, listeners, tuple(range(len(copies))), longest)
        return KernelPlan(("in",), tuple(copies), (stream,))

    def exporting(self, number: int, version: int = 4) -> socket.socket:
        """A socket of an exporter."""
        sock = self.exporter.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((EXPORTERS[version][number], 2000 + number))
        return sock


@contextmanager
def exporters(site: OffloadSite, version: int = 4) -> Iterator[list[socket.socket]]:
    """A socket of each exporter."""
    socks = [site.exporting(number, version) for number in range(len(EXPORTERS[version]))]
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()
