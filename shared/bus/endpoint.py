"""The way to the broker: by the bus directory or by TCP, with a key or by the directory's mode alone."""

import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import zmq

from shared.bus.curve_keys import Keys, load_keys
from shared.net.addresses import Endpoint, SocketAddress, resolve
from shared.settings.explain import SettingsError
from shared.settings.tables import Bus

HEARTBEAT_MS: Final = 5000
"""Between two questions over TCP whether the other end is there; a host that loses power sends no farewell."""
HEARTBEAT_TIMEOUT_MS: Final = 15_000
PROBE_SECONDS: Final = 2.0
QUEUE_SHARE: Final = 4
"""A queue may take one part in this many of a process's memory ceiling."""
PLACE: Final = 64 * 1024
"""Bytes of a place in a queue. A message takes one, and another one for each of as many bytes that it has."""


@dataclass(frozen=True, slots=True)
class BusLink:
    """The broker's TCP address, None: it is in the bus directory; and keys, None: it asks for none."""

    broker: Endpoint | None = None
    keys: Keys | None = None

    def connect(self, sock: zmq.Socket[bytes], directory: Path, side: str) -> None:
        """Connect a socket to a side of the broker, `publish` or `subscribe`."""
        if self.keys is not None:
            sock.set(zmq.CURVE_PUBLICKEY, self.keys.public)
            sock.set(zmq.CURVE_SECRETKEY, self.keys.secret)
            sock.set(zmq.CURVE_SERVERKEY, self.keys.broker)
        if self.broker is None:
            sock.connect(ipc_endpoint(directory, side))
        else:
            keep_alive(sock)
            sock.connect(str(tcp_endpoint(self.broker, side)))

    def is_up(self, directory: Path) -> bool:
        """Return whether anything accepts subscribers' connections. ZeroMQ itself would wait in silence.

        A broker that stands still, with a full queue of connections, is up.
        """
        try:
            if self.broker is not None:
                at = tcp_endpoint(self.broker, "subscribe")
                found = resolve(at.host, at.port, socket.SOCK_STREAM, PROBE_SECONDS)
                return any(_accepts(family, address) for family, address in found)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                with suppress(BlockingIOError):
                    probe.connect(f"{directory}/subscribe")
        except OSError:
            return False
        return True


def _accepts(family: socket.AddressFamily, address: SocketAddress) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe, suppress(OSError):
        probe.settimeout(PROBE_SECONDS)
        probe.connect(address)
        return True
    return False


DIRECT: Final = BusLink()
"""By the bus directory, which is closed to strangers, and without keys."""


def open_link(bus: Bus, role: str) -> BusLink:
    """The link that the settings name for a role. SettingsError when it lacks a key."""
    return BusLink(bus.broker, load_keys(bus.key_directory, role) if bus.key_directory else None)


def has_key(bus: Bus, role: str) -> bool:
    """Return whether a role may connect: it has its key, or the bus asks for none."""
    try:
        open_link(bus, role)
    except SettingsError:
        return False
    return True


def queue_limit(high_water_mark: int, memory_ceiling: int) -> int:
    """Return the messages that a queue may hold: the high-water mark, or fewer where the largest would not fit.

    `memory_ceiling` is the process's, in bytes; 0: there is none.
    """
    if not memory_ceiling:
        return high_water_mark
    return min(high_water_mark, max(1, memory_ceiling // QUEUE_SHARE // PLACE))


def ipc_endpoint(directory: Path, side: str) -> str:
    """The ZeroMQ endpoint of a side of the broker in the bus directory."""
    return f"ipc://{directory}/{side}"


def tcp_endpoint(broker: Endpoint, side: str) -> Endpoint:
    """Return the TCP endpoint of a side of a broker: publishers have the port that is named, subscribers the next."""
    return replace(broker, port=broker.port + (side == "subscribe"))


def keep_alive(sock: zmq.Socket[bytes]) -> None:
    """Prepare a socket for TCP: either family, and an end to connections whose other end is gone."""
    sock.set(zmq.IPV6, 1)
    sock.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
