"""The check by which relays hand over to each other, with a real relay."""

import shutil
import signal
import time

import pytest

from tests.deploy.failover import HA
from tests.stack import PATIENT, Running, Stack, wait_until


def check(stack: Stack) -> Running:
    """Begin to ask whether the relay is ready."""
    return stack.spawn("check", [str(HA / "fanwire-ready")], FANWIRE_STANDBY=str(stack.directory / "standby"))


def is_ready(stack: Stack) -> bool:
    """Return whether the relay is ready, by an answer that has come."""
    return check(stack).process.wait(60) == 0


def is_ready_through_a_restart(stack: Stack) -> bool:
    """Return whether the relay was never unready while its console was killed and started again."""
    stack["console"].stop(signal.SIGKILL)
    asked = check(stack)
    time.sleep(0.8)  # the start of an interpreter takes longer than that of a test's fork
    stack.start("console")
    return asked.process.wait(60) == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_a_restart_of_the_console_is_no_trouble_of_the_relay(stack: Stack) -> None:
    """While the console is away and the gateway is there, the check waits for it; a relay that is dead is unready."""
    stack.configure(PATIENT)
    stack.start_all()
    stack.start("console")
    wait_until(lambda: is_ready(stack), "the relay is ready")
    assert any(is_ready_through_a_restart(stack) for _ in range(5))  # a busy machine may take longer than it waits
    (stack.directory / "standby").touch()
    assert not is_ready(stack)
    (stack.directory / "standby").unlink()
    for name in ("console", "gateway"):
        stack[name].stop(signal.SIGKILL)
    dead = check(stack)
    assert dead.process.wait(60) == 1
    assert "connect" in dead.text
