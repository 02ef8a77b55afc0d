import errno
import fcntl
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from services.operator.doctor.listening import ListeningFacts, PathSeen, check_listening
from shared.ledger.accounts import Accounts
from shared.monitoring.finding import Finding
from shared.settings.entries import Stream
from shared.settings.model import Settings
from tests.network import End, Host, veth
from tests.refusing import refused
from tests.services.operator.doctor.test_command import doctor, errors
from tests.stack import Stack, wait_until

LISTEN = ("udp://239.1.1.1%eth0:5514", "udp://192.0.2.1:6667", "unixgram:///run/a.sock")
SETTINGS = Settings(streams=(Stream(name="s", listen=LISTEN),))
FINE = ListeningFacts({LISTEN[2]: PathSeen(True, 0o666)}, {LISTEN[0]: True})
AT = "listener/s/udp://192.0.2.1:6667"


def check(facts: ListeningFacts, **account: int) -> list[Finding]:
    """Return the findings, with this account of a listener."""
    accounts: dict[str, Accounts] = {"ingest.1": {AT: account}, "forwarder.1": {}}
    return list(check_listening(facts, accounts, SETTINGS))


def test_listeners_that_are_fine() -> None:
    """With everything in place there is nothing to cure; without ingest nobody listens, which others tell."""
    assert [(each.name, each.level) for each in check(FINE)] == [("listeners", "ok"), ("receiving", "ok")]
    gone = ListeningFacts({LISTEN[2]: PathSeen(False)}, {LISTEN[0]: False})
    assert [each.level for each in check_listening(gone, {"forwarder.1": {}}, SETTINGS)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("facts", "account", "name", "level", "why"),
    [
        ({"paths": {LISTEN[2]: PathSeen(False)}}, {}, "listeners", "error", "there is no socket"),
        ({"paths": {LISTEN[2]: PathSeen(True, 0o755)}}, {}, "listeners", "warning", "its mode is 0755"),
        ({"paths": {LISTEN[2]: PathSeen(True, 0o666, "/run")}}, {}, "listeners", "warning", "may not enter /run"),
        ({"groups": {LISTEN[0]: False}}, {}, "listeners", "error", "has not joined the group"),
        ({"unassigned": {LISTEN[1]: "192.0.2.1"}}, {}, "listeners", "error", "no interface of this host has 192.0.2.1"),
        ({}, {"receive_errno": errno.ENOSYS, "receive_errors": 600}, "receiving", "error", "(ENOSYS), 600 times"),
        ({}, {"receive_errors": 2}, "receiving", "warning", "2 receive calls"),
    ],
)
def test_what_needs_a_cure(facts: dict[str, Any], account: dict[str, int], name: str, level: str, why: str) -> None:
    """Each listener that can't receive is told at its level, with a cure, and of its stream."""
    (trouble,) = [each for each in check(ListeningFacts(**facts), **account) if each.level != "ok"]
    assert (trouble.name, trouble.level, trouble.subject) == (name, level, "s")
    assert why in trouble.why
    assert trouble.cure


def test_worker_of_another_bus() -> None:
    """Its process and its bus are named, with the cure."""
    told = "the ingest worker with pid 7, of the bus in /run/x,"
    (trouble,) = [each for each in check(ListeningFacts(shared={LISTEN[1]: told})) if each.level != "ok"]
    assert trouble.why == f"{LISTEN[1]}: {told} listens there too: each gets a part of the datagrams"
    assert trouble.cure == "stop that one, or give one of them another port"


def configure(stack: Stack, *listen: str) -> None:
    """Settings with one stream."""
    quoted = ", ".join(f'"{each}"' for each in listen)
    stack.configure(f'[[stream]]\nname = "s"\nlisten = [{quoted}]\n')


def troubles(stack: Stack, name: str) -> list[str]:
    """Return the reasons in the findings of that name that are not fine."""
    return [each["why"] for each in doctor(stack)[1] if each["name"] == name and each["level"] != "ok"]


def test_receiving_that_fails_is_found_while_it_lasts(stack: Stack) -> None:
    """A worker that receives nothing for a refused system call is an error; the next one is not."""
    configure(stack, "udp://127.0.0.1:6667")
    for name in ("broker", "gateway", "forwarder"):
        stack.start(name)
    before, stack.interpreter = stack.interpreter, refused("recvmmsg=ENOSYS,recvmsg=ENOSYS")
    worker = stack.start("ingest")
    stack.interpreter = before
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"lost", ("127.0.0.1", 6667))
    wait_until(lambda: worker.events("can't receive at a listener; see `fanwire doctor`"), "it fails")
    code, found = doctor(stack)
    assert (code, errors(found)) == (1, [("receiving", "s")])
    assert "Function not implemented (ENOSYS)" in next(each["why"] for each in found if each["name"] == "receiving")
    worker.stop()
    stack.start("ingest")
    assert troubles(stack, "receiving") == []


def test_paths_are_found_as_they_are(stack: Stack, tmp_path: Path) -> None:
    """A path closed to others is found, in its directory or by its mode, and one that is gone, while that lasts."""
    path = Path("/tmp", f"fanwire-doctor-{os.getpid()}.sock")
    configure(stack, f"unixgram://{path}")
    stack.start_all()
    assert troubles(stack, "listeners") == []
    path.chmod(0o755)
    assert troubles(stack, "listeners") == [
        f"unixgram://{path}: its mode is 0755: datagrams of other users are refused"
    ]
    stack["ingest.1"].stop()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    configure(stack, f"unixgram://{closed}/in.sock")
    stack.start("ingest.1")
    (why,) = troubles(stack, "listeners")
    assert "other users may not enter" in why
    (closed / "in.sock").unlink()
    closed.rename(tmp_path / "elsewhere")  # so that it can't be made anew
    assert "there is no socket" in troubles(stack, "listeners")[0]


def test_addresses_are_found_as_they_are(stack: Stack) -> None:
    """A group on an interface that went, and an address that the host no longer has, are errors while that lasts."""
    with Host() as relay, Host() as exporter:
        near, far = End(relay, "mc0", "10.21.0.1/24"), End(exporter, "up0", "10.21.0.2/24")
        configure(stack, "udp://239.1.1.2%mc0:5514", "udp://10.21.0.1:6667")
        with veth(near, far), relay.entered():
            stack.start_all()
            assert troubles(stack, "listeners") == []
        with relay.entered():
            first, second = troubles(stack, "listeners")
            assert "239.1.1.2%mc0:5514: this host has not joined the group" in first
            assert "no interface of this host has 10.21.0.1" in second
        with veth(near, far), relay.entered():
            wait_until(
                lambda: stack["ingest.1"].events("joined the multicast group again: its interface is a new one"),
                "it joins again",
            )
            assert troubles(stack, "listeners") == []


def test_a_bus_that_others_clean(stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bus directory that systemd-tmpfiles empties is a warning unless it is locked; files removed are an error."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemd-tmpfiles").write_text("#!/bin/sh\n")
    (tools / "systemd-tmpfiles").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    stack.bus = Path(f"/tmp/fanwire-doctor-bus-{os.getpid()}")
    stack.configure("")
    try:
        stack.bus.mkdir(0o700)
        descriptor = os.open(stack.bus, os.O_RDONLY)
        (why,) = troubles(stack, "bus_kept")
        assert "systemd-tmpfiles removes" in why
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        assert troubles(stack, "bus_kept") == []
        os.close(descriptor)
        stack.start_all()
        assert troubles(stack, "bus_kept") == []
        stack["broker"].process.send_signal(signal.SIGSTOP)
        (stack.bus / "lock").unlink()
        (why,) = troubles(stack, "bus_kept")
        assert f"another program has removed {stack.bus}/lock" in why
        stack["broker"].process.send_signal(signal.SIGCONT)
        (stack.bus / "registry.sqlite").unlink()
        wait_until(lambda: (stack.bus / "lock").exists() and (stack.bus / "registry.sqlite").exists(), "made anew")
        (why,) = troubles(stack, "bus_kept")
        assert "broker.1 has made 1 anew, gateway.1 has made 1 anew" in why
    finally:
        for running in reversed(stack.running):
            if running.process.poll() is None:
                running.stop()
        for left in stack.bus.iterdir():
            left.unlink()
        stack.bus.rmdir()


def test_without_netlink_the_rest_is_told(stack: Stack) -> None:
    """A warning says that the network can't be seen where AF_NETLINK is refused, and everything else is checked."""
    stack.start_all()
    command = [*refused("socket:0:16=EAFNOSUPPORT"), "-m", "services.operator", "doctor"]
    running = stack.spawn("doctor", command)
    assert running.process.wait(60) == 0, running.text
    assert "(AF_NETLINK is refused) can't be seen from here" in running.text
    assert "receive buffer" in running.text
