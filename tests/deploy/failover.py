"""Relays that stand in for each other, exporters and collectors that count.

A segment is hosts at a switch. Exporters send numbered datagrams at a steady rate, collectors note each number that
comes. So what a failover loses, doubles or brings out of order is known to the datagram.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from deploy.ha.cluster.traffic import (
    DISORDERED,
    READY,
    SILENCE_NS,
    WRONG_SOURCE,
    Counted,
    Sent,
    collect_command,
    send_command,
)
from tests.network import End, Host, veth
from tests.openly import OpenStack, open_stack
from tests.stack import CHECKOUT, Running, wait_until

HA: Final = CHECKOUT / "deploy" / "ha"


def need(program: str) -> str:
    """Return the path of a program, or skip the test by its name."""
    found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def need_root(program: str) -> str:
    """Likewise, of one that only root may start."""
    if os.geteuid():
        pytest.skip(f"{program} runs as root only")
    return need(program)


class Segment:
    """Hosts at one switch: their link is `eth0`."""

    def __init__(self, opened: ExitStack) -> None:
        self._switch = opened.enter_context(Host())
        bridge = End(self._switch, "bridge")
        bridge.make("bridge")
        self._switch.run("ip", "link", "set", "bridge", "up")
        self._ports = 0

    @contextmanager
    def joined(self, host: Host, addresses: str) -> Iterator[None]:
        """Connect a host, with these addresses."""
        self._ports += 1
        port = End(self._switch, f"port{self._ports}")
        with veth(End(host, "eth0", addresses), port):
            self._switch.run("ip", "link", "set", port.name, "master", "bridge")
            yield


@contextmanager
def host_at(segment: Segment, addresses: str) -> Iterator[Host]:
    """A host at a segment."""
    with Host() as host, segment.joined(host, addresses):
        yield host


@contextmanager
def exporters(host: Host, directory: Path, first: str, to: str, rate: int) -> Iterator[Sent]:
    """Send until the block ends; see `traffic.send_command`."""
    sent = Sent(directory / "sent", new=True)
    with host.entered():
        process = subprocess.Popen(send_command(sent.path, first, to, rate), cwd=CHECKOUT)
    try:
        yield sent
    finally:
        process.kill()
        process.wait()


@contextmanager
def collectors(
    host: Host, directory: Path, address: str, ports: Sequence[int], original: str = "-"
) -> Iterator[list[Counted]]:
    """Collect at these ports in one process; see `traffic.collect_command`."""
    found = [Counted(directory / f"came.{port}", new=True) for port in ports]
    places = [(each.path, port) for each, port in zip(found, ports, strict=True)]
    with host.entered():
        process = subprocess.Popen(collect_command(address, places, original), cwd=CHECKOUT)
    try:
        wait_until(lambda: all(each.state[READY] for each in found), "collectors are ready")
        yield found
    finally:
        process.kill()
        process.wait()


def figures(counted: Counted, sent: int, rate: int, first: int = 0) -> dict[str, float]:
    """Return lost datagrams, the seconds between the first and the last of them, those that came twice, and more."""
    lost = counted.lost(sent, first)
    return {
        "lost": len(lost),
        "gap": round((int(lost[-1]) - int(lost[0]) + 1) / rate, 3) if len(lost) else 0.0,
        "silence": round(int(counted.state[SILENCE_NS]) / 1e9, 3),
        "doubled": counted.doubled(),
        "disordered": int(counted.state[DISORDERED]),
        "wrong source": int(counted.state[WRONG_SOURCE]),
    }


class Relay:
    """A host with a relay and whatever stands beside it."""

    def __init__(self, host: Host, stack: OpenStack) -> None:
        self.host, self.stack = host, stack
        self.standby = stack.directory / "standby"
        """The file by which it is made to hand over."""

    def start(self, *names: str) -> None:
        """Start services."""
        with self.host.entered():
            for name in names:
                self.stack.start(name, ready=False)
        for running in [self.stack[name] for name in names]:
            running.wait_for('"event": "ready"')

    def spawn(self, name: str, *command: str) -> Running:
        """Start another program there."""
        with self.host.entered():
            return self.stack.spawn(name, list(command), FANWIRE_STANDBY=str(self.standby))

    def kill(self) -> None:
        """Kill all services at once, and nothing else."""
        for running in self.stack.running:
            if running.process.poll() is None and running.events("ready"):
                running.process.send_signal(signal.SIGKILL)

    def is_ready(self) -> bool:
        """Return whether the check of deploy/ha says so."""
        with self.host.entered():
            return subprocess.run([HA / "fanwire-ready"], stdout=subprocess.DEVNULL, check=False).returncode == 0


@contextmanager
def relay(segment: Segment, addresses: str, settings: str) -> Iterator[Relay]:
    """A relay at a segment."""
    with host_at(segment, addresses) as host, open_stack() as stack:
        stack.configure(settings)
        yield Relay(host, stack)
