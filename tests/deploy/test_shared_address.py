"""The address of exporters among three relays, by real keepalived with the file of deploy/ha; the relays are played."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

import pytest

from tests.deploy.failover import HA, Segment, host_at, need_root
from tests.deploy.three_nodes import ADDRESS, NODES, shared_address
from tests.network import Host
from tests.openly import open_stack
from tests.stack import Running, wait_until

ROUNDS: Final = 2
"""Of equal relays two have taken the address at once in every fourth take-over, about."""
INTERVAL: Final = "advert_int 0.1", "advert_int 0.5"
"""The file's, and one by which a busy host does not let the second relay think that the first one is silent."""


class Played:
    """A relay: keepalived, and a file that makes the relay ready."""

    def __init__(self, host: Host, name: str, program: str, opened: ExitStack) -> None:
        stack = opened.enter_context(open_stack())
        self.host, self._ready = host, stack.directory / "ready"
        self.be_ready()
        check = stack.directory / "check"
        check.write_text(f"#!/bin/sh\n[ -e {self._ready} ]\n")
        check.chmod(0o755)
        (stack.directory / "keepalived.conf").write_text(
            shared_address(name).replace(str(HA / "fanwire-ready"), str(check)).replace(*INTERVAL)
        )
        command = [program, "-nlD", "-f", "keepalived.conf", "-p", "keepalived.pid", "-r", "vrrp.pid"]
        with host.entered():
            self.keepalived: Running = stack.spawn("keepalived", command)

    def be_ready(self, ready: bool = True) -> None:
        """Be ready, or not."""
        self._ready.touch() if ready else self._ready.unlink()

    def plug(self, state: str) -> None:
        """Plug its cable, `up`, or pull it, `down`."""
        self.host.run("ip", "link", "set", "eth0", state)

    @property
    def holds(self) -> bool:
        """True if it has the address."""
        return f" {ADDRESS}/" in self.host.run("ip", "-4", "address", "show", "dev", "eth0")

    @property
    def claims(self) -> int:
        """The number of times that it has taken the address."""
        return self.keepalived.text.count("Entering MASTER STATE")

    @property
    def preferred(self) -> bool:
        """True if keepalived has last found it ready."""
        told = self.keepalived.text
        return told.rfind("Script(ready) succeeded") > told.rfind("Script(ready) failed")


@pytest.fixture
def relays(lab: None) -> Iterator[list[Played]]:
    """Three relays, one of which has the address."""
    program = need_root("keepalived")
    with ExitStack() as opened:
        segment = Segment(opened)
        hosts = {name: opened.enter_context(host_at(segment, f"{address}/16")) for name, address in NODES.items()}
        made = [Played(host, name, program, opened) for name, host in hosts.items()]
        wait_until(lambda: all(each.preferred for each in made), "all are ready")
        yield made


def take_over(relays: list[Played], lose: Callable[[Played], object], gain: Callable[[Played], object]) -> None:
    """Let the holder lose the address: one of the others takes it, and keeps it when the first is as before."""
    wait_until(lambda: sum(each.holds for each in relays) == 1, "one has the address")
    holder = next(each for each in relays if each.holds)
    others = [each for each in relays if each is not holder]
    before = sum(each.claims for each in others)
    lose(holder)
    now: list[Played] = []

    def has_moved() -> bool:
        now[:] = [each for each in relays if each.holds]
        return len(now) == 1 and holder not in now

    wait_until(has_moved, "it moves")
    gain(holder)
    wait_until(lambda: holder.preferred, "the first is ready again")
    assert [each for each in relays if each.holds] == now
    assert sum(each.claims for each in others) == before + 1


def test_one_relay_takes_the_address_of_another(relays: list[Played]) -> None:
    """A holder that is unready or gone loses the address to one other, which keeps it. Of unready ones one has it."""
    for _ in range(ROUNDS):
        take_over(relays, lambda each: each.plug("down"), lambda each: each.plug("up"))
        take_over(relays, lambda each: each.be_ready(False), Played.be_ready)
    holder = next(each for each in relays if each.holds)
    for each in relays:
        each.be_ready(False)
    wait_until(lambda: not any(each.preferred for each in relays), "none is ready")
    assert sum(each.holds for each in relays) == 1
    for each in relays:
        if each is not holder:
            each.be_ready()
            break
    wait_until(lambda: each.holds and not holder.holds, "the only one that is ready has it")
