"""Imported settings behave as their file says, and as the program that the file is for: the receivers are compared."""

import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.services.operator.importing.test_command import imported
from tests.stack import Stack, ask_json, wait_until
from tests.system.test_fan_out import need
from tests.traffic import exporters, pause

EXPORTERS, EACH = 8, 12
LISTEN = 7000
Sent = tuple[int, int]
"""Exporter, number."""
Got = dict[int, list[Sent]]
"""By port, in the order in which they came."""

SAMPLICATOR = """
127.0.1.1: 127.0.0.1/7101                                # one exporter
127.0.1.4/255.255.255.252: 127.0.0.1/7102/3 127.0.0.1/7103
127.0.1.6/31: 127.0.0.1/7101/2,9 127.0.0.1/7104-7105     # again, with the line before
0.0.0.0/0: 127.0.0.1/7106/5
"""
PMACCT = """
! everything to both
id=1 ip=127.0.0.1:7101,127.0.0.1:7102
id=2 ip=127.0.0.1:7103,127.0.0.1:7104,127.0.0.1:7105 balance-alg=hash-crc32
"""
PORTS = range(7101, 7107)
TURNS = [(exporter, number) for number in range(EACH) for exporter in range(1, EXPORTERS + 1)]


def datagram(exporter: int, number: int) -> bytes:
    """NetFlow version 5 with one record; its sequence says who sent it, and as which."""
    return struct.pack(">HHIIIIBBH", 5, 1, 1, 1, 1, exporter << 16 | number, 0, 0, 0) + bytes(48)


def who(payload: bytes) -> Sent:
    """Do as `datagram` does, backwards."""
    exporter, number = struct.unpack_from(">HH", payload, 16)
    return exporter, number


@contextmanager
def receiving() -> Iterator[dict[int, socket.socket]]:
    """A socket on every receiver's port."""
    with ExitStack() as opened:
        sockets = {}
        for port in PORTS:
            sockets[port] = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sockets[port].setblocking(False)
            sockets[port].bind(("127.0.0.1", port))
        yield sockets


def exchange(sockets: dict[int, socket.socket], expected: int) -> Got:
    """Send each exporter's datagrams in turn; return who got what, when so many came and no more do."""
    got: Got = defaultdict(list)

    def came() -> int:
        for port, sock in sockets.items():
            while True:
                try:
                    got[port].append(who(sock.recv(65536)))
                except BlockingIOError:
                    break
        return sum(map(len, got.values()))

    with exporters(EXPORTERS, LISTEN) as sending:
        for exporter, number in TURNS:
            sending[exporter - 1].send(datagram(exporter, number))
    wait_until(lambda: came() >= expected, f"{expected} copies")
    pause(0.3)
    assert came() == expected
    return got


def start(stack: Stack, program: str, tool: str, text: str, command: list[str]) -> None:
    """Start fanwire with what was imported, or the program that the file is for."""
    if program == "fanwire":
        code, printed, said = imported(stack, tool, text, "--listen", f"udp://127.0.0.1:{LISTEN}")
        assert code == 0, said
        stack.configure(printed)
        stack.start_all()
        wait_until(
            lambda: {each["health"] for each in ask_json({"op": "list"})["clients"].values()} == {"ok"}, "copies flow"
        )
    else:
        stack.spawn(program, [need(program), *command])
        wait_until(lambda: f":{LISTEN:04X} " in Path("/proc/self/net/udp").read_text(), f"{program} listens")


@pytest.mark.parametrize("program", ["fanwire", "samplicate"])
def test_samplicators_file_means_the_same(stack: Stack, program: str) -> None:
    """Every rule that matches applies, and each receiver of each rule samples for itself, the first one first."""
    path = stack.directory / "samplicator.conf"
    path.write_text(SAMPLICATOR)
    command = ["-s", "127.0.0.1", "-p", str(LISTEN), "-b", "1000000", "-c", str(path)]
    start(stack, program, "samplicator", SAMPLICATOR, command)
    wide, narrow = ([turn for turn in TURNS if turn[0] in few] for few in (range(4, 8), range(6, 8)))
    one = [turn for turn in TURNS if turn[0] == 1]
    expected = {
        7101: sorted(one + narrow[::2]),
        7102: sorted(wide[::3]),
        7103: sorted(wide),
        7104: sorted(narrow),
        7105: sorted(narrow),
        7106: sorted(TURNS[::5]),
    }
    with receiving() as sockets:
        got = exchange(sockets, sum(map(len, expected.values())))
    assert {port: sorted(turns) for port, turns in got.items()} == expected


def test_pmaccts_receivers_mean_what_is_documented(stack: Stack) -> None:
    """Every receiver of a pool gets everything; of a pool that hashes, each exporter has one, which gets all of it."""
    start(stack, "fanwire", "pmacct", PMACCT, [])
    with receiving() as sockets:
        got = exchange(sockets, 3 * len(TURNS))
    assert sorted(got[7101]) == sorted(got[7102]) == sorted(TURNS)
    pool = (7103, 7104, 7105)
    assert sorted(turn for port in pool for turn in got[port]) == sorted(TURNS)
    holders = {exporter: [port for port in pool if exporter in dict(got[port])] for exporter, _ in TURNS}
    assert all(len(ports) == 1 for ports in holders.values()), holders
