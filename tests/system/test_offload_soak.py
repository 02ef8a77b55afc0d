"""Copies by the kernel beside ours under traffic: collectors that change, and faults two at a time.

`make soak` has 10,000 changes under 50,000 datagrams a second. FANWIRE_SOAK_CHANGES and FANWIRE_SOAK_RATE set other
figures, for a machine that can't bear them.
"""

import os
import random
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.services.offload.site import SIEMS, OffloadSite
from tests.stack import wait_until
from tests.system.offload_churn import AT_ONCE, STEADY, churn
from tests.traffic import pause

pytestmark = pytest.mark.usefixtures("lab")
CHANGES: Final = int(os.environ.get("FANWIRE_SOAK_CHANGES", "10000"))
RATE: Final = float(os.environ.get("FANWIRE_SOAK_RATE", "50000"))
CALM: Final = 1000.0
"""Datagrams a second that any machine takes."""
CHANGES_TO_A_PAIR: Final = 50


@pytest.mark.parametrize(
    ("changes", "rate"), [(48, 1000.0), pytest.param(CHANGES, RATE, marks=pytest.mark.soak)], ids=["some", "soak"]
)
def test_each_datagram_comes_once_under_traffic(open_stack: OpenStack, changes: int, rate: float) -> None:
    """Collectors that join, leave, move and change get each of their datagrams once, and each way keeps the order."""
    draw = random.Random(changes)
    with churn(open_stack, rate, draw) as site, BusEnds(open_stack.bus) as bus:
        accounts_when(bus, "offload.1", lambda told: told.get("rules/original4", {}).get("copied", 0) > 0)
        for _ in range(changes // AT_ONCE):
            site.change()
            site.look()
            pause(draw.choice((0, 0, 0.1, 0.4)))
        site.finish()
        print(f"{site.traffic.sent.sum()} datagrams; {site.owed} copies had to come, and have")
        read = accounts_when(
            bus, "ingest.1", lambda told: told["stream/netflow"]["received"] >= site.traffic.sent.sum()
        )
        assert not read["stream/netflow"].get("kernel_dropped")
        for name, (_, source) in STEADY.items():
            sender = "forwarder.1" if source == "relay" else "transmitter.1"
            came = site.frames.total(site.entries[name].place)
            account = accounts_when(
                bus,
                sender,
                lambda told, came=came, name=name: (  # type: ignore[misc]
                    told[f"collector/{name}"]["sent"] + told[f"collector/{name}"]["by_kernel"] == came
                ),
            )[f"collector/{name}"]
            assert account["by_kernel"] > came // 10
        assert open_stack.run("ledger")[0] == 0


class Faults:
    """Faults of services, rules and links on a relay; each ends with what mends it."""

    def __init__(self, stack: OpenStack, site: OffloadSite, draw: random.Random) -> None:
        self._stack, self._site, self._draw = stack, site, draw
        self._moved, self._mac = 0, site.siem_end.link_address
        for name in ("in", "out"):
            site.relay.sysctl(f"net.ipv6.conf.{name}.keep_addr_on_down", 1)

    def suffer(self) -> tuple[str, ...]:
        """Let two of them happen, one a moment after the other; return which."""
        services = ("offload", "gateway", "ingest", "forwarder", "transmitter", "broker")
        names = tuple(self._draw.sample((*services, "applier", "flush", "delete", "in", "out", "move"), 2))
        killed = []
        for name in names:
            if name in services:
                self._stack[name].stop(signal.SIGKILL)
                killed.append(name)
            elif name == "applier":
                self._kill_applier()
                killed += ["offload"] * ("offload" not in names)
            else:
                getattr(self, f"_{name}")()
            pause(self._draw.choice((0, 0.05, 0.3)))
        for name in ("in", "out"):
            self._site.relay.run("ip", "link", "set", "dev", name, "up")
        self._know_collectors()  # what was known by a link goes with it
        for name in killed:
            if self._stack[name].process.poll() is None:  # the planner, whose applier has been killed
                self._stack[name].stop()
            with self._site.relay.entered():
                self._stack.start(name, ready=False)
        for name in killed:
            self._stack[name].wait_for('"event": "ready"')
        return names

    def _kill_applier(self) -> None:
        pid = self._stack["offload"].process.pid
        for applier in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if self._alive("offload") else ():
            os.kill(int(applier), signal.SIGKILL)

    def _alive(self, name: str) -> bool:
        return self._stack[name].process.poll() is None

    def _flush(self) -> None:
        self._site.relay.run("nft", "flush", "ruleset")

    def _delete(self) -> None:
        with suppress(AssertionError):  # it is not another program's
            self._site.relay.run("nft", "delete", "table", "netdev", "fanwire")

    def _in(self) -> None:
        self._site.relay.run("ip", "link", "set", "dev", "in", "down")

    def _out(self) -> None:
        self._site.relay.run("ip", "link", "set", "dev", "out", "down")

    def _move(self) -> None:
        """Give the collectors' host another MAC address, as where a next hop is another router from now on."""
        self._moved += 1
        self._mac = f"02:00:00:00:77:{self._moved % 250:02x}"
        self._site.siem.run("ip", "link", "set", "dev", "eth", "address", self._mac)
        if self._site.relay.link("out")["operstate"] == "UP":
            self._know_collectors()

    def _know_collectors(self) -> None:
        for address in (*SIEMS[4], *SIEMS[6]):
            self._site.relay.neighbour(address, self._mac, "out")


@pytest.mark.parametrize(
    "pairs", [2, pytest.param(CHANGES // CHANGES_TO_A_PAIR, marks=pytest.mark.soak)], ids=["some", "soak"]
)
def test_two_faults_at_a_time_double_nothing(open_stack: OpenStack, pairs: int) -> None:
    """Services killed, rules removed, links down, a next hop that moves: no copy comes twice, and all go on again."""
    draw = random.Random(pairs)
    with churn(open_stack, CALM, draw) as site, BusEnds(open_stack.bus) as bus:
        faults = Faults(open_stack, site.site, draw)
        for _ in range(pairs):
            suffered = faults.suffer()
            wait_until(partial(site.goes_on, site.traffic.sent.copy()), f"all copies go on after {suffered}")
            accounts_when(bus, "offload.1", lambda told: told.get("rules/original4", {}).get("copied", 0) > 0)
            assert not site.frames.faults, (suffered, site.frames.faults[:9])
        site.traffic.stop()
        assert open_stack.run("ledger")[0] == 0
