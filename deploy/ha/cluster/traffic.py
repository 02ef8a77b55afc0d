"""Exporters that number what they send, and collectors that note each number: what is lost is known to the datagram.

`python -m deploy.ha.cluster.traffic send` and `collect` are the processes; `Sent` and `Counted` are the files by which
others see how far they are.
"""

import json
import select
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from shared.datagrams.mmsg import UDP_GRO, ReceiveArena
from shared.net.sockets import enlarge_receive_buffer

UDP_SEGMENT: Final = 103
"""Socket option by which the kernel cuts one buffer into datagrams, udp(7)."""
SIZE, TRAIN, EXPORTERS, MOST = 220, 15, 200, 1 << 25
"""Bytes of a datagram, datagrams of one send call, addresses that send, and numbers that a run can have."""
SENT, STOP = range(2)
CAME, DISORDERED, WRONG_SOURCE, SILENCE_NS, LAST_NS, READY = range(6)
Numbers = npt.NDArray[np.int64]


class Sent:
    """How far exporters are."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        self._state: Numbers = np.memmap(path, np.int64, "w+" if new else "r+", shape=(2,))

    @property
    def count(self) -> int:
        """Datagrams so far."""
        return int(self._state[SENT])

    def stop(self) -> None:
        """Let exporters end."""
        self._state[STOP] = 1


class Counted:
    """The datagrams that one collector's socket got; `state` has a number for each of the names above."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        mode: Literal["w+", "r+"] = "w+" if new else "r+"
        self.state: Numbers = np.memmap(path, np.int64, mode, shape=(6,))
        self._times: npt.NDArray[np.uint8] = np.memmap(f"{path}.times", np.uint8, mode, shape=(MOST,))

    def lost(self, sent: int, first: int = 0) -> Numbers:
        """Return the numbers from `first` on that were sent and did not come."""
        return np.flatnonzero(self._times[first:sent] == 0) + first

    def doubled(self) -> int:
        """Return how many came more than once."""
        return int(np.count_nonzero(self._times > 1))


def send_command(path: Path, first: str, to: str, rate: int) -> list[str]:
    """Return a command that sends to `to`, ADDRESS:PORT or several, from 200 addresses: `first` and those behind it."""
    return [sys.executable, "-m", __name__, "send", str(path), first, to, str(rate)]


def collect_command(address: str, counted: Sequence[tuple[Path, int]], original: str = "-") -> list[str]:
    """Return a command that collects at ports, and checks sources if `original`, the first exporter, is given."""
    return [sys.executable, "-m", __name__, "collect", address, json.dumps([[str(p), q] for p, q in counted]), original]


def send(path: str, first: str, to: str, rate: int) -> None:
    """Send datagrams at a rate until told to stop."""
    state: Numbers = np.memmap(path, np.int64, "r+", shape=(2,))
    targets = [(address, int(port)) for address, port in (each.split(":") for each in to.split(","))]
    base = int.from_bytes(socket.inet_aton(first))
    sockets = []
    for number in range(EXPORTERS):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((socket.inet_ntoa((base + number).to_bytes(4)), 5000))
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SIZE)
        sockets.append(sock)
    train = np.full((TRAIN, SIZE), ord("."), np.uint8)
    steps = np.arange(TRAIN)
    sent, began = 0, time.monotonic()
    while not state[STOP]:
        if sent + TRAIN > min((time.monotonic() - began) * rate, MOST):
            time.sleep(0.001)
            continue
        train[:, :8] = (sent + steps).astype("<u8").view(np.uint8).reshape(TRAIN, 8)
        for target in targets:
            with suppress(OSError):  # it was to be sent, and there is no neighbour or route
                sockets[sent // TRAIN % EXPORTERS].sendto(train.data, target)
        sent += TRAIN
        state[SENT] = sent


def collect(address: str, told: str, original: str) -> None:
    """Note what comes, for ever."""
    base = int.from_bytes(socket.inet_aton(original)) if original != "-" else None
    poll, found = select.poll(), {}
    for path, port in json.loads(told):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        enlarge_receive_buffer(sock, 1 << 26)
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        sock.bind((address, port))
        state: Numbers = np.memmap(path, np.int64, "r+", shape=(6,))
        found[sock.fileno()] = sock, state, np.memmap(f"{path}.times", np.uint8, "r+"), np.full(EXPORTERS, -1, np.int64)
        poll.register(sock, select.POLLIN)
        state[READY] = 1
    arena = ReceiveArena()
    while True:
        for descriptor, _ in poll.poll():
            _, state, times, last = found[descriptor]
            count = arena.receive(descriptor, trains=64)
            now = time.monotonic_ns()
            lengths = arena.lengths(count).tolist()
            payload = np.frombuffer(arena.payload_of_few(lengths), np.uint8).reshape(-1, SIZE)
            numbers = payload[:, :8].copy().view("<u8")[:, 0].astype(np.int64)
            if base is not None:
                sources = arena.names["v4"][:count].copy().view(">u4")[:, 0].astype(np.int64)
                named = base + numbers // TRAIN % EXPORTERS
                state[WRONG_SOURCE] += np.count_nonzero(np.repeat(sources, np.array(lengths) // SIZE) != named)
            arena.restore(count)
            fresh = numbers[times[numbers] == 0]
            np.add.at(times, numbers, 1)
            state[DISORDERED] += disordered(fresh, last)
            state[CAME] += len(numbers)
            if state[LAST_NS]:
                state[SILENCE_NS] = max(state[SILENCE_NS], now - state[LAST_NS])
            state[LAST_NS] = now


def disordered(numbers: Numbers, last: Numbers) -> int:
    """Return how many are not behind the number before of their exporter; `last` is that, shape (EXPORTERS,)."""
    if not len(numbers):
        return 0
    exporter = numbers // TRAIN % EXPORTERS
    order = np.argsort(exporter, kind="stable")
    exporter, numbers = exporter[order], numbers[order]
    begins = np.flatnonzero(np.diff(exporter, prepend=-1))
    before = np.concatenate(([-1], numbers[:-1]))
    before[begins] = last[exporter[begins]]
    last[exporter] = np.maximum(last[exporter], numbers)  # the last one of each exporter stays
    return int(np.count_nonzero(numbers <= before))


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        collect(*sys.argv[2:5])
