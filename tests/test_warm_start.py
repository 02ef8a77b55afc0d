"""Programs that tests start by a fork behave as those that are started by exec."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.network import Host
from tests.openly import OpenStack
from tests.stack import CHECKOUT, Running, Stack, find_warm_start, wait_until
from tests.warm_start import INHERITED, PROGRAMS, WarmStart

NAMESPACE = Path("/proc/thread-self/ns/net")
CONFIG = [sys.executable, "-m", "services.operator", "config"]


@pytest.mark.parametrize("by_exec", [False, True])
def test_a_command_has_its_own_surroundings(stack: Stack, by_exec: bool) -> None:
    """Arguments, settings of the environment, output and exit code are those of the command, either way."""
    stack.by_exec = by_exec
    said = stack.spawn("config", CONFIG, FANWIRE_GATEWAY__SERVE_SECONDS="7")
    assert said.process.wait(60) == 0
    assert "serve_seconds = 7" in said.text
    wrong = stack.spawn("wrong", [*CONFIG, "--colour"])
    assert wrong.process.wait(60) == 64
    assert "--colour" in wrong.text


@pytest.mark.parametrize("by_exec", [False, True])
def test_a_signal_is_told_as_popen_tells_it(stack: Stack, by_exec: bool) -> None:
    """A service that is killed has minus the signal's number as its exit code; it runs until then."""
    stack.by_exec = by_exec
    broker = stack.start("broker")
    assert broker.process.poll() is None
    assert Path(f"/proc/{broker.process.pid}/cwd").readlink() == stack.directory
    assert broker.stop(signal.SIGKILL) == -signal.SIGKILL


def test_other_surroundings_are_left_to_exec(stack: Stack) -> None:
    """Nothing is forked where it would have another umask, locale, interpreter or checkout."""
    environment = stack.environment
    assert find_warm_start(CONFIG, environment)
    assert not find_warm_start(CONFIG, environment | {"PYTHONIOENCODING": "ascii"})
    assert not find_warm_start(CONFIG, environment | {"LC_ALL": "C"})
    assert not find_warm_start(CONFIG, environment | {"PYTHONPATH": "/"})
    assert not find_warm_start(["/usr/bin/python3", *CONFIG[1:]], environment)
    assert not find_warm_start(["env", *CONFIG], environment)
    before = os.umask(0o077)
    try:
        assert not find_warm_start(CONFIG, environment)
    finally:
        os.umask(before)
    assert find_warm_start(CONFIG, environment)


def test_all_workers_of_a_run_ask_one_process(stack: Stack) -> None:
    """Another worker finds the process that forks, and begins no second one."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    first, another = find_warm_start(command, stack.environment), WarmStart(sys.executable, str(CHECKOUT), PROGRAMS)
    assert first
    waiting, end = os.pipe()
    started = [each.start(command, stack.environment, stack.directory, [waiting] * 3) for each in (first, another)]
    parents = {Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2].split()[1] for each in started}
    os.close(waiting)
    os.close(end)
    assert [each.wait(60) for each in started] == [0, 0]
    assert len(parents) == 1


def test_a_service_is_on_the_host_where_it_is_started(stack: Stack) -> None:
    """Its network namespace is that of the thread that starts it."""
    with Host() as elsewhere, elsewhere.entered():
        assert find_warm_start(CONFIG, stack.environment)
        here = NAMESPACE.readlink()
        broker = stack.start("broker")
    assert Path(f"/proc/{broker.process.pid}/ns/net").readlink() == here != NAMESPACE.readlink()


@pytest.mark.parametrize("name", ["broker", "offload", "transmitter"])
def test_a_service_has_the_rights_that_an_exec_leaves_it(open_stack: OpenStack, name: str) -> None:
    """User, capabilities, signals, directory and descriptors are the same either way, also after the opener's exec."""
    forked, executed = (rights(started) for started in either_way(open_stack, name))
    assert forked == executed


def test_a_command_asks_services_either_way(stack: Stack) -> None:
    """Services that a command asks answer it the same, whether they are forked or executed."""
    stack.configure('[gateway]\nlisten = ["tls://127.0.0.1:5001"]\n[transmitter]\nuser = "nobody there"\n')
    answers = [stack.run("config", "--check") for stack.by_exec in (False, True)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 78
    assert "gateway: " in answers[0][1]


def either_way(stack: OpenStack, name: str) -> Iterator[Running]:
    """Start a service by a fork, then by exec."""
    if name != "broker":
        stack.start("broker")
    for stack.by_exec in (False, True):
        yield (service := stack.start(name))
        assert service.stop() == 0


def rights(service: Running) -> dict[str, Any]:
    """Return what a process was given, by proc(5)."""
    of = Path(f"/proc/{service.process.pid}")
    status = dict(line.split(":", 1) for line in (of / "status").read_text().splitlines())
    seen: list[list[str]] = []

    def settled() -> bool:
        with suppress(FileNotFoundError):
            seen.append(sorted(re.sub("[0-9]+", "", str(entry.readlink())) for entry in (of / "fd").iterdir()))
        return len(seen) > 20 and seen[-20:] == seen[-1:] * 20

    if not os.geteuid():  # others may not look at a transmitter's
        wait_until(settled, lambda: f"descriptors come and go: {seen[-20:]}")
    return {
        "descriptors": seen[-1:],
        "owner": of.stat().st_uid,  # root's if it is not dumpable
        **{name: status[name] for name in (*INHERITED, "CapInh", "CapAmb")},
        "caught": int(status["SigCgt"], 16) & ~(3 << 31),  # 32 and 33 are the C library's, for threads: nptl(7)
    }
