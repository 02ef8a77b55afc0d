"""The programs that the gateway's README shows as examples of a collector, taken from there and run."""

import json
import re
import socket
import subprocess
import sys
import time
from typing import Final

import pytest

from tests.documents import block
from tests.stack import PATIENT, Running, Stack, ask, ask_json, wait_until
from tests.system.test_fan_out import need

PROGRAMS: Final = {
    "bash": block("services/gateway/README.md", "collector-in-bash"),
    "python": block("services/gateway/README.md", "collector-in-python"),
    "go": block("services/gateway/README.md", "collector-in-go"),
}
TTL_SECONDS: Final = 3
"""Instead of the 30 shown; the programs renew at a third of it."""


def start(stack: Stack, language: str, program: str) -> Running:
    """Run one of them as its reader would."""
    source = stack.directory / f"collector.{language}"
    source.write_text(program)
    if language == "go":
        built = stack.directory / "collector"
        offline = {"CGO_ENABLED": "0", "GOCACHE": str(stack.directory / "go"), "GOFLAGS": "-mod=mod", "GOPROXY": "off"}
        command = [need("go"), "build", "-o", str(built), str(source)]
        subprocess.run(command, env=stack.environment | offline, cwd=stack.directory, check=True, timeout=100)
        return stack.spawn(language, [str(built)])
    if language == "bash":
        need("nc")
    return stack.spawn(language, [sys.executable if language == "python" else need(language), str(source)])


def changes() -> list[str]:
    """The words for all changes of the list so far."""
    first = {"op": "watch", "revision": 0, "epoch": ask_json({"op": "list"})["epoch"]}
    lines = map(json.loads, ask(json.dumps(first).encode() + b"\n").splitlines())
    return [line["event"] for line in lines if line.get("event", "health") != "health"]


@pytest.mark.parametrize("language", PROGRAMS)
def test_collector_does_what_it_has_to(stack: Stack, language: str) -> None:
    """Each says why it is refused, gets copies, renews, so also after its first ttl, and leaves when told to end."""
    program, count = re.subn(r"(?i)\b(ttl *= *)30\b", rf"\g<1>{TTL_SECONDS}", PROGRAMS[language])
    assert count == 1
    stack.configure(PATIENT)
    stack.start_all()
    refused = start(stack, language, program.replace('"messages"', '"nowhere"'))
    refused.wait_for("there is no stream 'nowhere'")
    if language != "go":  # that one goes on trying
        wait_until(lambda: refused.process.poll() is not None, "one that is refused ends")
        assert refused.process.returncode == 1
    refused.process.kill()
    refused.process.wait()

    collector = start(stack, language, program)
    wait_until(lambda: changes(), "it signs up")
    signed_up = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:

        def arrives(text: str) -> bool:
            exporter.sendto(f"{text}\n".encode(), ("127.0.0.1", 6667))
            return text in collector.text

        wait_until(lambda: arrives("early"), "it gets copies")
        time.sleep(max(0.0, signed_up + TTL_SECONDS * 1.2 - time.monotonic()))
        wait_until(lambda: arrives("late"), "it still gets copies")
    assert changes() == ["joined"]
    collector.stop()
    wait_until(lambda: changes() == ["joined", "left"], f"it leaves: {changes()}")


def test_watcher_goes_on_where_it_was(stack: Stack) -> None:
    """A watcher gets the list once, then each change once and in order, also over a restart of the gateway."""
    stack.start("broker")
    stack.start("gateway")
    watcher = start(stack, "python", block("services/gateway/README.md", "watcher"))
    watcher.wait_for("'clients': {}")
    ask_json({"op": "register", "name": "before"})
    watcher.wait_for("'name': 'before'")
    stack["gateway"].stop()
    stack.start("gateway")
    generation = ask_json({"op": "register", "name": "after"})["client"]["generation"]
    ask_json({"op": "leave", "name": "after", "generation": generation})
    watcher.wait_for("'event': 'left'")
    assert watcher.text.count("'clients'") == 1
    events = re.findall(r"'event': '(\w+)', 'revision': (\d+)", watcher.text)
    assert events == [("joined", "1"), ("joined", "2"), ("left", "3")]
