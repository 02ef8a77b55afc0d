import errno
import grp
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.broker.ipc_peers import let_in, transmitters_group
from shared.bus.messages import Datagrams, datagrams_topic
from shared.bus.zmq_sockets import broker_is_up
from tests.builders import BusEnds, kill_all, make_batch, take, wait_wanted
from tests.openly import program_for_all
from tests.refusing import refused
from tests.stack import Stack

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a service that becomes another user")


@pytest.mark.parametrize("error", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_lock_that_cannot_be_had_is_no_other_broker(stack: Stack, error: str) -> None:
    """The broker exits with 73, and says why and the cure, where the file system or a sandbox refuses flock(2)."""
    stack.interpreter = refused(f"flock={error}")
    broker = stack.start("broker", ready=False)
    assert broker.process.wait(60) == 73
    assert (
        f"lock can't be locked: {os.strerror(getattr(errno, error))}; set a [bus] directory on a local" in broker.text
    )
    assert "another broker" not in broker.text


def test_second_broker_on_the_same_directory_is_refused(stack: Stack) -> None:
    """A second broker exits with 73 and says what to do; whoever comes still finds the first one, and each other."""
    first = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        early = bus.publisher("ingest.1")
        second = stack.start("broker", ready=False)
        assert second.process.wait(60) == 73
        assert "another broker runs on" in second.text
        assert first.process.poll() is None
        late, subscriber = bus.publisher("ingest.2"), bus.subscriber("datagrams/")
        for publisher in (early, late):
            wait_wanted(publisher, datagrams_topic("messages"))
            publisher.publish(datagrams_topic("messages"), Datagrams("messages", 0), make_batch([b"x"]))
        assert {take(subscriber).envelope.sender for _ in range(2)} == {"ingest.1", "ingest.2"}


def test_broker_leaves_nothing_behind(stack: Stack) -> None:
    """SIGTERM ends it with 0 and takes its socket files away; its directory is closed to others."""
    broker = stack.start("broker")
    assert not stack.bus.stat().st_mode & 0o027
    assert broker.stop(signal.SIGTERM) == 0
    assert [path.name for path in stack.bus.iterdir()] == ["lock"]


def test_broker_starts_again_after_being_killed(stack: Stack) -> None:
    """Socket files that a killed broker left do not keep the next one from starting."""
    stack.start("broker").stop(signal.SIGKILL)
    assert (stack.bus / "publish").is_socket()
    stack.start("broker")


def test_directory_that_cannot_be_made_is_one_line(stack: Stack) -> None:
    """A bus directory that can't be had ends the broker with 73 and one line that names it."""
    stack.bus.write_text("in the way")
    broker = stack.start("broker", ready=False)
    assert broker.process.wait(60) == 73
    assert len(broker.text.splitlines()) == 1
    assert str(stack.bus) in broker.text


@contextmanager
def acting_as(user: str) -> Iterator[None]:
    """Act with the rights of this user, and no more."""
    entry = pwd.getpwnam(user)
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(entry.pw_gid)
    os.seteuid(entry.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@pytest.fixture
def public(stack: Stack) -> Iterator[Path]:
    """A bus directory in a place that every user can get to."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        stack.bus = Path(directory) / "bus"
        yield stack.bus
        kill_all(stack)


@AS_ROOT
def test_user_of_the_transmitter_reaches_the_bus_of_root(stack: Stack, public: Path) -> None:
    """With a broker that root started, the user that the transmitter becomes can connect, and no other can."""
    stack.configure('[transmitter]\nuser = "nobody"\n')
    stack.start("broker")
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    assert (public.stat().st_mode & 0o777, public.group()) == (0o750, group)
    for name in ("publish", "subscribe"):
        assert ((public / name).stat().st_mode & 0o777, (public / name).group()) == (0o770, group)
    with acting_as("nobody"):
        assert broker_is_up(public)
    with acting_as("daemon"):
        assert not broker_is_up(public)


STRANGER = """
import sys, zmq
context = zmq.Context()
ears, mouth = context.socket(zmq.SUB), context.socket(zmq.XPUB)
ears.subscribe("")
ears.connect(f"ipc://{sys.argv[1]}/subscribe")
mouth.connect(f"ipc://{sys.argv[1]}/publish")
print("subscribed to" if mouth.poll(2000) else "nothing", flush=True)
context.destroy(linger=0)
"""
"""Connects to both sides, and hears that somebody subscribes: the broker itself does."""


@AS_ROOT
@pytest.mark.parametrize(
    ("user", "open_to_all", "outcome"),
    [("daemon", False, "nothing"), ("daemon", True, "nothing"), ("nobody", False, "subscribed to")],
)
def test_other_users_cannot_connect(stack: Stack, public: Path, user: str, open_to_all: bool, outcome: str) -> None:
    """A process of another user can't connect, not even where the modes would let it; the transmitter's can."""
    interpreter, program = program_for_all()
    stack.configure('[transmitter]\nuser = "nobody"\n')
    broker = stack.start("broker")
    for path in (public, public / "publish", public / "subscribe"):
        path.chmod(0o777 if open_to_all else path.stat().st_mode & 0o777)
    entry = pwd.getpwnam(user)
    become = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", "--", interpreter]
    stranger = subprocess.run(
        [*become, "-c", STRANGER, str(public)],
        env={"PYTHONPATH": str(program)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (stranger.stdout.strip(), stranger.stderr) == (outcome, "")
    assert broker.process.poll() is None


@AS_ROOT
def test_user_of_the_transmitter_that_does_not_exist_is_said(stack: Stack) -> None:
    """One line names the setting when that user does not exist, and the bus is root's alone."""
    stack.configure('[transmitter]\nuser = "no-such-user"\n')
    broker = stack.start("broker")
    (warning,) = [line for line in broker.text.splitlines() if '"warning"' in line]
    assert "set [transmitter] user" in warning
    assert "no-such-user" in warning
    assert stack.bus.stat().st_mode & 0o777 == 0o700


@AS_ROOT
def test_broker_that_is_not_root_lets_nobody_in() -> None:
    """Only root's broker has a transmitter that becomes another user."""
    assert transmitters_group("nobody") == pwd.getpwnam("nobody").pw_gid
    with acting_as("nobody"):
        assert transmitters_group("nobody") is None


def test_group_that_a_user_namespace_lacks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything stays as it is, in silence, where the kernel knows no such group."""

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "chown", refuse)
    tmp_path.chmod(0o700)
    (tmp_path / "publish").touch(0o600)
    let_in(65534, tmp_path, tmp_path / "publish")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path, tmp_path / "publish")] == [0o700, 0o600]


STUCK = """
import sys, time
from services.broker import proxy, __main__
passing = proxy._pass_messages
proxy._pass_messages = lambda *sockets: (time.sleep({stuck}), passing(*sockets))
sys.exit(__main__.main([]))
"""


@pytest.mark.parametrize("stuck", [0, 1000])
def test_watchdog_is_fed_while_messages_are_passed(stack: Stack, stuck: int) -> None:
    """The broker feeds the watchdog while the loop that passes messages answers; when that is stuck it does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(stack.directory / "notify"))
        manager.settimeout(60)
        asked = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000"}
        stack.spawn("broker", [sys.executable, "-c", STUCK.format(stuck=stuck)], **asked)
        assert manager.recv(100) == b"READY=1"
        if stuck:
            manager.settimeout(1.5)  # it asks each second
            with pytest.raises(TimeoutError):
                manager.recv(100)
        else:
            assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    kill_all(stack)
