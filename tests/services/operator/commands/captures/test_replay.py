import os
import pty
import signal
import socket
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from services.operator.cli.progress import Bar
from services.operator.client.journal_past import find_past
from services.operator.commands.captures import replay
from shared.settings.model import Settings
from tests.services.operator.commands.captures.test_export import fill
from tests.shared.journal.filled import batch_of, identities, write_segment
from tests.stack import PATIENT, Stack, ask_json

SETTINGS = (
    PATIENT
    + """
[journal]
directory = "{directory}"
[[stream]]
name = "messages"
listen = ["udp://127.0.0.1:6667"]
"""
)


def journaled(stack: Stack) -> list[bytes]:
    """Fill a journal, and name it in the settings; return the payloads in it."""
    directory = stack.directory / "journal"
    put = fill(directory)
    stack.configure(SETTINGS.format(directory=directory))
    return [payload for *_, payload in put]


def receiver() -> socket.socket:
    """A collector's socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(60)
    return sock


def waiting(sock: socket.socket) -> list[bytes]:
    """Return what the socket has received."""
    sock.setblocking(False)
    found = []
    try:
        while True:
            found.append(sock.recv(1 << 16))
    except BlockingIOError:
        return found


def test_a_segment_that_can_not_be_read_ends_no_replay(stack: Stack) -> None:
    """All that is behind it is sent, too; the exit code is 1, and a line says what is missing."""
    payloads = journaled(stack)
    first = min((stack.directory / "journal" / "flows").iterdir())
    first.unlink()
    first.mkdir()
    with receiver() as sock:
        to = f"127.0.0.1:{sock.getsockname()[1]}"
        code, _, said = stack.run("replay", "--stream", "flows", "--to", to, "--rate", "100000")
        assert (code, waiting(sock)) == (1, payloads[40:])
    assert "segments that can't be read: 1 (Is a directory); they are left out" in said


def test_the_past_comes_again_to_a_collector(stack: Stack) -> None:
    """A collector by name, or an address, gets the past in its order; never a listener of fanwire."""
    payloads = journaled(stack)
    stack.start("broker")
    stack.start("gateway")
    with receiver() as sock:
        port = sock.getsockname()[1]
        ask_json({"op": "register", "name": "siem", "streams": ["messages"], "port": port})
        code, _, said = stack.run("replay", "--stream", "flows", "--to", "siem", "--rate", "100000")
        assert (code, waiting(sock)) == (0, payloads)
        assert f"120 datagrams of flows sent to 127.0.0.1 port {port}" in said
        flags = ("--source", "10.0.2.0/24", "--to", f"127.0.0.1:{port}", "--speed", "1000")
        code, _, said = stack.run("replay", "--stream", "flows", *flags)
        assert (code, waiting(sock)) == (0, payloads[2::4])
        _, _, said = stack.run("replay", "--stream", "flows", "--until", "1h ago", "--to", f"127.0.0.1:{port}")
        assert "warning: there is no datagram of flows in this time" in said
    for to, words in (
        ("127.0.0.1:6667", "127.0.0.1 port 6667 is one of fanwire's own listeners: the past would be taken for new"),
        ("siam", "no collector 'siam'; did you mean 'siem'? the collectors are: siem"),
        ("localhost:9", "--to: 'localhost:9' is no ADDRESS:PORT such as 192.0.2.20:2055"),
        ("192.0.2.1:9", "can't send to 192.0.2.1 port 9: Network is unreachable"),
        ("239.1.1.1:9", "239.1.1.1 is the address of a group; expected that of one host"),
    ):
        code, _, said = stack.run("replay", "--stream", "flows", "--to", to)
        assert (code, words.split(";")[0] in said) == (1 if to.startswith("192") else 64, True), said
    assert stack.run("leave", "siem")[0] == 0
    assert "there is no collector" in stack.run("replay", "--stream", "flows", "--to", "siem")[2]


def test_a_replay_goes_on_where_it_was_interrupted(stack: Stack) -> None:
    """After Ctrl-C the same command sends the rest, and no datagram twice; its file is gone at the end."""
    payloads = journaled(stack)
    place = stack.directory / "place"
    found: list[bytes] = []
    with receiver() as sock:
        to = f"127.0.0.1:{sock.getsockname()[1]}"
        flags = ("--stream", "flows", "--to", to, "--resume", str(place), "--rate")
        for _ in range(2):
            running = stack.operator("replay", *flags, "40")
            found += [sock.recv(1 << 16) for _ in range(10)]
            assert running.stop(signal.SIGINT) == 0
            assert "the same command goes on from here" in running.text
            found += waiting(sock)
            sock.settimeout(60)
            assert msgspec.json.decode(place.read_bytes())["sent"] == len(found)
        assert found == payloads[: len(found)]
        assert len(found) < len(payloads)
        code, _, said = stack.run("replay", "--stream", "flows", "--to", "127.0.0.1:9", "--resume", str(place))
        assert (code, f"it is of a replay of flows to {to}; name another file, or remove it" in said) == (64, True)
        code, _, said = stack.run("replay", *flags, "100000")
        assert (code, found + waiting(sock)) == (0, payloads)
        assert f"going on behind {len(found)} datagrams, until " in said
        assert not place.exists()
        place.write_text("{}")
        code, _, said = stack.run("replay", *flags, "100000")
        assert (code, "it is no file of `fanwire replay`; remove it" in said) == (64, True)


def test_a_replay_goes_on_after_segments_were_removed(stack: Stack) -> None:
    """The newest were removed by hand: it sends nothing twice, says that some is missing, and its exit code is 1.

    So it does where the journal has used their numbers again, and what is new is sent.
    """
    payloads = journaled(stack)
    directory, place = stack.directory / "journal", stack.directory / "place"
    with receiver() as sock:
        to = f"127.0.0.1:{sock.getsockname()[1]}"
        flags = ("--stream", "flows", "--to", to, "--resume", str(place), "--rate")
        running = stack.operator("replay", *flags, "200")
        found = [sock.recv(1 << 16) for _ in range(90)]
        assert running.stop(signal.SIGINT) == 0
        found += waiting(sock)
        assert found == payloads[: len(found)]
        (directory / "flows" / sorted((directory / "flows").iterdir())[2].name).unlink()
        kept = place.read_bytes()
        missing = "segments that were removed before they were read: 1; they are left out"
        code, _, said = stack.run("replay", *flags, "100000")
        assert (code, waiting(sock), missing in said) == (1, [], True)
        (identity,) = identities("ingest.2", rows=[1])
        write_segment(directory / "flows", [(identity, batch_of([("192.0.2.1", 1, b"new")], time.time_ns()))], 3)
        bookmark = msgspec.json.decode(kept) | {"until_ns": time.time_ns()}
        place.write_bytes(msgspec.json.encode(bookmark))
        code, _, said = stack.run("replay", *flags, "100000")
        assert (code, waiting(sock), missing in said) == (1, [b"new"], True)


def test_its_place_is_kept_within_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may take minutes to send: by the second the file tells how far it was sent, also after a kill."""
    fill(tmp_path, 1, 2)
    asked = Namespace(stream="flows", since="", until="now", source=None, directory=tmp_path)
    wanted, place = find_past(asked, Settings()), tmp_path / "place"
    sent, kept = list[bytes](), list[tuple[int, int]]()

    class Sender:
        """Takes datagrams, and reads each time what the file says."""

        def send(self, payload: memoryview) -> None:
            """Take one."""
            sent.append(bytes(payload))
            if place.exists():
                at = msgspec.json.decode(place.read_bytes(), type=replay.Bookmark)
                kept.append((at.sent, at.rows))

    monkeypatch.setattr(replay, "KEEP_SECONDS", 0.0)
    bookmark = replay.Bookmark(stream="flows", to="siem", source=None, since_ns=0, until_ns=0)
    options = Namespace(rate=1e9, speed=1.0, resume=place)
    with Bar() as bar:
        assert replay._replay(SimpleNamespace(draining=False), wanted, Sender(), bookmark, bar, options)  # type: ignore[arg-type]
    assert len(sent) == 8
    assert kept == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 2), (7, 3)]


def test_nobody_listens(stack: Stack) -> None:
    """Datagrams that reach nobody are counted, and the exit code is 1."""
    journaled(stack)
    with receiver() as sock:
        to = f"127.0.0.1:{sock.getsockname()[1]}"
    code, _, said = stack.run("replay", "--stream", "flows", "--to", to, "--rate", "100000")
    assert code == 1
    assert "not sent: nobody listens" in said


def test_a_bar_shows_how_far_it_is(stack: Stack) -> None:
    """On a terminal there is a bar with a share and a count, which is gone at the end."""
    payloads = journaled(stack)
    ours, theirs = pty.openpty()
    with receiver() as sock:
        to = f"127.0.0.1:{sock.getsockname()[1]}"
        command = [sys.executable, "-m", "services.operator", "replay", "--stream", "flows", "--to", to]
        pid = os.posix_spawn(
            sys.executable,
            [*command, "--rate", "200"],
            stack.environment | {"TERM": "xterm", "COLUMNS": "100"},
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 2)],
        )
        os.close(theirs)
        assert [sock.recv(1 << 16) for _ in payloads] == payloads
        _, code = os.waitpid(pid, 0)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:
            break
    os.close(ours)
    assert code == 0
    assert b"%" in shown
    assert b"datagrams sent" in shown


def test_the_pace_is_kept_where_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was an hour ahead: what was received after it was set back leaves as fast as it came, and not at once.

    A batch of before, which another worker has handed on late, waits for nothing.
    """
    now, hour = [0.0], 3600
    monkeypatch.setattr(replay, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = replay.Pace(None, 1.0)
    waits = []
    for second in (hour, hour + 1, 1.5, hour + 1.2, 2.5, 3.5, hour - 30, hour - 15, hour, hour + 3):
        wait = pace.wait(int((1e9 + second) * 1e9))
        waits.append(round(wait, 3))
        now[0] += max(0.0, wait)
    assert waits == [0, 1, 0, 0, 1, 1, hour - 33.5, 15, 15, 3]
