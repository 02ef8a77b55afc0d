"""systemd kills what is alive but gets nowhere: only a loop that turns says that it does."""

import os
import signal
import socket
import sys

import pytest

from tests.stack import PATIENCE_SECONDS, Stack, wait_until

STUCK = """
import signal, sys, time
from services.{module} import main
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1000))
sys.exit(main({arguments}))
"""
"""The loop's thread is held up by a signal, as by a call that never returns; other threads of the process go on."""
SECOND_STEP = "transmitter.unprivileged", ["--inherited", "none:it takes none for this"]


@pytest.mark.parametrize("name", ["gateway", "forwarder", "transmitter"])
def test_a_loop_that_is_stuck_is_not_fed(stack: Stack, name: str) -> None:
    """While its loop turns a service feeds the watchdog, idle or not; once that is stuck it does not."""
    stack.start("broker")
    powerless = ["setpriv", "--no-new-privs", *(["--bounding-set=-all"] if os.geteuid() == 0 else [])]
    module, arguments = (f"{name}.__main__", []) if name != "transmitter" else SECOND_STEP
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(stack.directory / "notify"))
        manager.settimeout(PATIENCE_SECONDS)
        asked = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000"}
        script = STUCK.format(module=module, arguments=arguments)
        running = stack.spawn(name, [*powerless, sys.executable, "-c", script], **asked)
        for _ in range(3):
            wait_until(lambda: manager.recv(100) == b"WATCHDOG=1", "it is fed")
        running.process.send_signal(signal.SIGUSR1)
        manager.settimeout(1.5)  # a turn comes at least each second
        with pytest.raises(TimeoutError):
            wait_until(lambda: not manager.recv(100), "it is fed no more")
        running.process.kill()
