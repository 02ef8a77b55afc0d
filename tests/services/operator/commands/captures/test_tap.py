import itertools
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.operator.cli.output import STANDARD_OUTPUT, open_capture
from shared.bus.messages import REGISTRY_TOPIC
from shared.capture.reader import CaptureReader
from shared.net.addresses import unpack_address
from shared.process.lifecycle import OperatorError
from tests.builders import BusEnds, PlayedGateway, make_client, wait_unwanted
from tests.services.operator.played import PlayedService, finish, run
from tests.stack import Running, Stack, wait_until

TOPIC = "datagrams/messages/"


def captured(path: Path) -> list[tuple[str, int, str, int, bytes]]:
    """Read a capture: source, port, destination, port, payload."""
    with path.open("rb") as file:
        return [
            (unpack_address(each.source), each.source_port, unpack_address(each.destination), each.port, each.payload)
            for each in CaptureReader(file)
        ]


def tap(stack: Stack, what: str, *arguments: str) -> tuple[Running, Path]:
    """Start the command, which writes into a new file."""
    path = stack.directory / f"{what}.{len(stack.running)}.pcapng"
    return stack.operator("tap", what, "--write", str(path), *arguments), path


def test_writes_a_stream_and_ends_at_the_count(stack: Stack) -> None:
    """The datagrams of the exporters asked for are in the file with their sources; the count ends it with 0."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        command, path = tap(stack, "messages", "--count", "3", "--from", "192.0.2.0/24")
        ingest.wait_for_subscriber(TOPIC)
        ingest.publish([], 0)
        ingest.publish([b"other"], 0, source="198.51.100.1")
        ingest.publish([b"one", b"\0\n\xff"], 1)
        ingest.publish([b"", b"beyond the count"], 3)
        assert finish(command)[0] == 0, command.text
    assert captured(path) == [("192.0.2.7", 514, "127.0.0.1", 6667, payload) for payload in (b"one", b"\0\n\xff", b"")]
    assert f"3 datagrams in {path}" in command.text
    code, text = run(stack, "tap", "messages", "--write", str(path))
    assert (code, text) == (73, f"fanwire tap: {path} exists; name a new file for the capture\n")


def test_warns_when_nothing_matches(stack: Stack) -> None:
    """It warns that nothing has come, once while it waits and at the end; `--seconds` ends it, with 0."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        command, path = tap(stack, "messages", "--seconds", "3", "--from", "198.51.100.0/24")
        ingest.wait_for_subscriber(TOPIC)
        ingest.publish([], 0)
        ingest.publish([b"of another"], 0)
        code, text = finish(command)
    warning = "warning: no datagram of messages from 198.51.100.0/24 has come"
    assert (code, text.count(warning)) == (0, 2)
    assert text.endswith("; `fanwire streams` shows which streams flow\n")
    assert captured(path) == []


def test_a_file_that_takes_no_more(stack: Stack) -> None:
    """A full disk, or a limit of the file's length, ends it with 1 and one line; what was written can be read."""
    stack.start("broker")
    path = stack.directory / "short.pcapng"
    command = f"ulimit -f 2; exec {sys.executable} -m services.operator tap messages --write {path}"
    with PlayedService(stack.bus, "ingest.1") as ingest:
        tapping = stack.spawn("tap", ["bash", "-c", command])
        ingest.wait_for_subscriber(TOPIC)
        ingest.publish([bytes(900)] * 3, 0)
        assert finish(tapping)[0] == 1
    assert tapping.text.endswith(f"fanwire tap: {path}: File too large; the capture ends here\n")
    assert [payload for *_, payload in captured(path)] == [bytes(900)] * 2


def test_a_terminal_gets_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is for a pipe or a file."""
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    with ExitStack() as closing, pytest.raises(OperatorError, match="a capture is not for a terminal; name a file"):
        open_capture(STANDARD_OUTPUT, closing)


def test_writes_what_a_collector_should_get(stack: Stack) -> None:
    """For a collector it follows streams, prefixes and sampling of its entry, also when that changes meanwhile."""
    stack.start("broker")
    code, text = run(stack, "tap", "siem", "--write", "x.pcapng")
    assert (code, "no gateway tells who is registered; the streams are: messages" in text) == (69, True)
    with BusEnds(stack.bus) as bus, PlayedService(stack.bus, "ingest.1") as ingest:
        gateway = PlayedGateway(bus)
        wants: dict[str, Any] = {"streams": ("messages",), "address": "192.0.2.99"}
        command, path = tap(stack, "siem")
        gateway.announce(1, make_client("siem", 9514, prefixes=("192.0.2.0/24",), sample=2, **wants))
        ingest.wait_for_subscriber(TOPIC)
        ingest.publish([], 0)
        ingest.publish([b"other"], 0, source="198.51.100.1")
        ingest.publish([b"one", b"two", b"three"], 1)
        command.wait_for("tapping siem")
        wait_until(lambda: len(captured(path)) == 2, "one and three are written before the entry changes")
        gateway.change(2, joined=[make_client("siem", 9514, **wants)])
        totals = itertools.count(4)

        def is_followed() -> bool:  # the change and the datagrams come by different ways
            ingest.publish([b"all"], next(totals), source="198.51.100.1")
            return any(payload == b"all" for *_, payload in captured(path))

        wait_until(is_followed, "the changed entry is heeded")
        assert command.stop(signal.SIGINT) == 0
        assert captured(path)[:2] == [("192.0.2.7", 514, "192.0.2.99", 9514, each) for each in (b"one", b"three")]
        mistyped, _ = tap(stack, "sime")
        wait_unwanted(gateway.publisher, REGISTRY_TOPIC)
        gateway.announce(3, make_client("siem", 9514, **wants))
        code, text = finish(mistyped)
        assert (code, "no stream or collector 'sime' (did you mean 'siem'?)" in text) == (64, True)
