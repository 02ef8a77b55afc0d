import shutil
import subprocess
from pathlib import Path

import pytest

from tests.services.operator.commands.captures.test_tap import captured, tap
from tests.stack import PATIENT, Running, Stack
from tests.traffic import exporters, payload

COUNT, EXPORTERS = 60, 3


def finished(*running: Running) -> None:
    """Wait for commands to end well."""
    for each in running:
        assert each.process.wait(60) == 0, each.text


def test_what_is_tapped_can_be_played_again(stack: Stack) -> None:
    """A capture of a stream has what came, in its order; played, it comes again byte for byte; tshark shows it."""
    stack.configure(PATIENT)
    stack.start_all()
    first, original = tap(stack, "messages", "--count", str(COUNT))
    first.wait_for("tapping messages")
    sent = []
    with exporters(EXPORTERS, 6667) as sockets:
        for number in range(COUNT):
            sock = sockets[number % EXPORTERS]
            sent.append((*sock.getsockname(), "127.0.0.1", 6667, payload(number % EXPORTERS, number, 9000)))
            sock.send(sent[-1][-1])
    finished(first)
    assert captured(original) == sent
    again, second = tap(stack, "messages", "--count", str(COUNT))
    collected = stack.directory / "collected.pcapng"
    collector = stack.operator(
        *("collect", "siem", "--stream", "messages", "--write", str(collected), "--count", str(COUNT))
    )
    again.wait_for("tapping messages")
    collector.wait_for("collecting messages")
    finished(stack.operator("play", str(original), "--stream", "messages", "--speed", "100"), again, collector)
    assert captured(second) == sent
    came = captured(collected)
    assert sorted(each[-1] for each in came) == sorted(each[-1] for each in sent)  # in order by exporter alone
    assert {each[0] for each in came} == {"127.0.0.1"}  # the relay's own address
    _assert_shown(original, sorted({each[0] for each in sent}))


def _assert_shown(path: Path, addresses: list[str]) -> None:
    """Look at the exporters by tshark, or tcpdump."""
    if shutil.which("tshark"):
        command = ["tshark", "-r", str(path), "-T", "fields", "-e", "ip.src"]
    elif shutil.which("tcpdump"):
        command = ["tcpdump", "-nr", str(path)]
    else:
        pytest.skip("there is no tshark or tcpdump")
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [address for address in addresses if address not in shown] == []
