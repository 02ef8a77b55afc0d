"""Programs that tests start by a fork behave as those that are started by exec."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.network import Host
from tests.stack import Stack, warm_start

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
    """Nothing is forked where it would have another namespace, umask, locale, interpreter or checkout."""
    serves, environment = warm_start().serves, stack.environment
    assert serves(CONFIG, environment)
    assert not serves(CONFIG, environment | {"PYTHONIOENCODING": "ascii"})
    assert not serves(CONFIG, environment | {"LC_ALL": "C"})
    assert not serves(CONFIG, environment | {"PYTHONPATH": "/"})
    assert not serves(["/usr/bin/python3", *CONFIG[1:]], environment)
    assert not serves(["env", *CONFIG], environment)
    with Host() as elsewhere, elsewhere.entered():
        assert not serves(CONFIG, environment)
    before = os.umask(0o077)
    try:
        assert not serves(CONFIG, environment)
    finally:
        os.umask(before)
    assert serves(CONFIG, environment)
