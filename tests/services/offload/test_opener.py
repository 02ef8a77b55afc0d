"""The two processes as they are started: their privileges, and what they say without them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.offload.unprivileged import adopt
from shared.process.lifecycle import NOT_PERMITTED
from tests.capabilities import NET_ADMIN
from tests.network import Host
from tests.openly import OpenStack
from tests.services.offload.test_service import SETTINGS
from tests.services.transmitter.test_opener import imported, modules_loaded_by
from tests.stack import CHECKOUT, PATIENCE_SECONDS, Running, wait_until

PACKAGE = CHECKOUT / "services/offload"
PRIVILEGED = {f"shared.process.{name}" for name in ("opener", "privileges")}


def status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def appliers(offload: Running) -> list[int]:
    """The processes that a planner has as children."""
    return [
        int(each)
        for each in Path(f"/proc/{offload.process.pid}/task/{offload.process.pid}/children").read_text().split()
    ]


def test_the_applier_has_one_capability_and_the_planner_none(open_stack: OpenStack) -> None:
    """Neither is root; who reads the bus holds no capability, and the other CAP_NET_ADMIN alone."""
    open_stack.configure(SETTINGS)
    open_stack.start("broker")
    with Host() as relay, relay.entered():
        offload = open_stack.start("offload")
    (applier,) = appliers(offload)
    planner, privileged = status(offload.process.pid), status(applier)
    for field in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(planner[field], 16) == 0
        assert int(privileged[field], 16) == NET_ADMIN
    if os.geteuid() == 0:
        assert int(privileged["CapBnd"], 16) == NET_ADMIN
        assert "0" not in planner["Uid"].split() + privileged["Uid"].split()
    assert planner["NoNewPrivs"] == privileged["NoNewPrivs"] == "1"
    if os.geteuid() == 0:  # others may not look into what holds a capability, proc(5)
        held = {str(each.readlink()) for each in Path(f"/proc/{applier}/fd").iterdir()}
        assert not any("bus" in each or each.startswith("anon_inode") for each in held)
    offload.stop()
    if os.geteuid() == 0:
        wait_until(lambda: not Path(f"/proc/{applier}/exe").exists(), "the applier has ended")


def test_idle_without_interfaces(open_stack: OpenStack) -> None:
    """Without `[offload] interfaces` there is no applier, no privilege and no word of it."""
    open_stack.start("broker")
    offload = open_stack.start("offload")
    assert appliers(offload) == []
    assert [each["event"] for each in offload.log] == ["ready"]


def test_without_privilege_it_says_what_is_missing(open_stack: OpenStack) -> None:
    """It stays up for honcho's sake, and ends with 77 where systemd asks it to."""
    open_stack.configure(SETTINGS)
    open_stack.start("broker")
    offload = open_stack.start_without_privilege("offload")
    (said,) = [each["event"] for each in offload.log if each["level"] == "warning"]
    assert said.startswith(
        "the kernel makes no copies, everything else works; CAP_NET_ADMIN is missing: let root start it"
    )
    asked = open_stack.start_without_privilege("offload", "--require-privilege", ready=False)
    assert asked.process.wait(PATIENCE_SECONDS) == NOT_PERMITTED


@pytest.mark.parametrize("text", ["", "x", "7", "-1:1", "1048577:1", "9" * 30 + ":1", "7:1:1"])
def test_only_the_opener_hands_a_channel_on(text: str) -> None:
    """A value that names no socket of the opener's ends the start."""
    with pytest.raises(PermissionError, match="--inherited is for the opener only, and does not name its socket"):
        adopt(text)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, pytest.raises(PermissionError):
        adopt(f"{os.dup(other.fileno())}:1")


@pytest.mark.parametrize("module", ["__init__", "__main__", "opener"])
def test_what_runs_with_all_privileges_imports_the_standard_library_alone(module: str) -> None:
    """No third-party code runs before the privileges are reduced to one."""
    ours = PRIVILEGED | {f"services.offload.{name}" for name in ("opener", "applying.applier", "unprivileged")}
    others = {
        name for name in imported(PACKAGE / f"{module}.py") if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert not others - ours
    assert modules_loaded_by("services.offload.opener") - sys.stdlib_module_names == {"services", "shared"}


def test_the_applier_loads_no_bus() -> None:
    """The process with the capability has no code to reach the bus, a route or a name server."""
    script = "import sys, services.offload.applying.applier; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"zmq", "numpy", "pyroute2", "shared.bus.zmq_sockets", "shared.net.netlink"}
