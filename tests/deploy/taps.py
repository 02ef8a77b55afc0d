"""Taps at the links of nodes: which datagrams of exporters have got to which node, whatever became of them there.

`python -m tests.deploy.taps FILE BIT` notes them; `Taps` starts one at each node, and reads what they have noted.
"""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from deploy.ha.cluster.traffic import MOST, SIZE, Numbers
from tests.network import Host
from tests.stack import CHECKOUT

LINK: Final = "eth0"
ETH_P_IP, SO_RCVBUFFORCE = 0x0800, 33
HEADERS: Final = 28
"""Bytes of IPv4 and UDP in front of a payload. What was sent as a train is one packet here, of many payloads."""


class Taps:
    """Knows what has got to the links of nodes."""

    def __init__(self, path: Path, names: Mapping[str, int]) -> None:
        self._bits = names
        self._noted: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "w+", shape=(MOST,))

    def at(self, name: str, numbers: Numbers) -> Numbers:
        """Return those of these numbers that have got to a node."""
        return numbers[(self._noted[numbers] & self._bits[name]) > 0]


@contextmanager
def taps(path: Path, hosts: Mapping[str, Host]) -> Iterator[Taps]:
    """Note what gets to these hosts until the block ends."""
    bits = {name: 1 << number for number, name in enumerate(hosts)}
    noted = Taps(path, bits)
    with ExitStack() as opened:
        for name, host in hosts.items():
            with host.entered():
                command = [sys.executable, "-m", __name__, str(path), str(bits[name])]
                process = subprocess.Popen(command, cwd=CHECKOUT)
            opened.callback(process.wait)
            opened.callback(process.send_signal, signal.SIGKILL)
        yield noted


def note(path: str, bit: int) -> None:
    """Note what gets to this host, for ever."""
    noted: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r+", shape=(MOST,))
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        sock.bind((LINK, ETH_P_IP))
        while True:
            with suppress(OSError):  # the link is down
                packet, (_, _, kind, *_) = sock.recvfrom(1 << 16)
                if kind == socket.PACKET_HOST and packet[9] == socket.IPPROTO_UDP and packet[22:24] == b"\x02\x02":
                    payload = np.frombuffer(packet, np.uint8)[HEADERS:]
                    payload = payload[: len(payload) // SIZE * SIZE].reshape(-1, SIZE)
                    noted[payload[:, :8].copy().view("<u8")[:, 0].astype(np.int64)] |= bit


if __name__ == "__main__":
    note(sys.argv[1], int(sys.argv[2]))
