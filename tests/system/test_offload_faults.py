"""Faults around copies by the kernel: each process killed, rules flushed, a next hop that moves, links that go."""

import itertools
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from services.offload.planning.mark_watch import UNREAD_SECONDS
from services.offload.planning.workers import SILENT_SECONDS
from shared.bus.messages import status_topic
from tests.builders import BusEnds, accounts_when
from tests.network import End, veth
from tests.openly import OpenStack
from tests.services.offload.site import PORT, RELAY, SIEMS
from tests.stack import wait_until
from tests.system.offload_relay import Counted, Exporting, Relay, relay
from tests.traffic import pause

pytestmark = pytest.mark.usefixtures("lab")
LATE_SECONDS = 5.0
"""Copies go on within one second, where the machine is not busy with other tests: see what the test prints."""
MOVED = "02:00:00:00:77:01"
NO_COPIES = "the kernel makes no copies"
REPORTS = 3 * math.ceil(SILENT_SECONDS + UNREAD_SECONDS)
"""Of another worker, each second: far more than pass before a worker is given up and its marks are missed."""
TAKES_MARKS = """
table netdev thief {
    chain in {
        type filter hook ingress device "in" priority 10
        meta mark set 0
    }
}
"""


class Fault:
    """A fault, and what the collector has got since then."""

    def __init__(self, exporting: Exporting, came: Counted, cause: Callable[[], float | None]) -> None:
        self._came = came
        self._first = exporting.sent
        began = time.monotonic()
        began = cause() or began  # a cause that keeps the way closed for a time returns its end
        at = exporting.sent
        wait_until(lambda: any(number > at for number in list(came.came)[-100:]), "copies go on")
        pause(0.5)
        times = [began, *(at for at in came.times if at > began)]
        self.silent_seconds = max(later - sooner for sooner, later in pairwise(times))
        self._stop = exporting.sent

    def lost(self, *, whole: bool = False) -> list[int]:
        """The numbers that have not come of those sent meanwhile; with `whole` of those alone that fit in a packet."""
        return [
            number
            for number in range(self._first, self._stop)
            if not self._came.came[number] and not (whole and number % 50 == 0)
        ]


def wait_for_all(site: Relay, faults: Mapping[str, Fault], *, whole: bool = False, lost_before: int = 0) -> None:
    """Wait until nothing is lost of what was sent during these faults, but for what the bus counts.

    `lost_before` is what it had counted when they began. With `whole`, nothing at all is lost of what fits in a packet.
    """

    def lost() -> dict[str, list[int]]:
        return {name: numbers for name, fault in faults.items() if (numbers := fault.lost(whole=whole))}

    def is_counted() -> bool:
        return not whole and sum(map(len, lost().values())) <= site.lost_on_bus() - lost_before

    wait_until(lambda: not lost() or is_counted(), lambda: f"nothing is lost, but {lost()}\n{site.explain()}")


def kill(site: Relay, name: str) -> None:
    """End a service at once, and start it anew a moment later."""
    site.stack[name].stop(signal.SIGKILL)
    pause(0.2)
    with site.site.relay.entered():
        site.stack.start(name, ready=False)


def flush(site: Relay) -> None:
    """Remove all rules, as another program would."""
    site.site.relay.run("nft", "flush", "ruleset")


def kill_applier(site: Relay) -> None:
    """End the half that has the capability."""
    pid = site.stack["offload"].process.pid
    (applier,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(applier), signal.SIGKILL)


def reports_of(bus: BusEnds, worker: str) -> Callable[[], int]:
    """Return how often a worker has reported since now."""
    subscriber, count = bus.subscriber(status_topic(worker)), 0

    def counted() -> int:
        nonlocal count
        while subscriber.receive():
            count += 1
        return count

    return counted


def test_a_worker_that_stands_still_is_not_taken_for_a_program_that_takes_marks_away(open_stack: OpenStack) -> None:
    """Exporters are pinned to it: nobody reads their marks, nor anything else of them. The kernel goes on copying."""
    with relay(open_stack, "original") as (site, _, came), ExitStack() as opened, BusEnds(open_stack.bus) as bus:
        with site.site.relay.entered():
            open_stack.start("ingest.2")
        site.register()
        exporter, sent = (
            opened.enter_context(site.site.exporter.socket(socket.AF_INET, socket.SOCK_DGRAM)),
            itertools.count(),
        )

        def export() -> int:
            return exporter.sendto(next(sent).to_bytes(4), (RELAY[4], PORT))

        wait_until(lambda: (export(), site.copied())[1] > 0, "the kernel copies")
        holders = {
            name: accounts_when(bus, name, lambda _: True)["stream/netflow"].get("received", 0)
            for name in ("ingest.1", "ingest.2")
        }
        holder, other = sorted(holders, key=lambda name: -holders[name])
        assert holders[other] == 0
        process = open_stack[holder.removesuffix(".1")].process
        process.send_signal(signal.SIGSTOP)
        opened.callback(process.send_signal, signal.SIGCONT)
        reports, offload = reports_of(bus, other), open_stack["offload"]
        wait_until(
            lambda: (export(), reports() > REPORTS)[1] or offload.events(NO_COPIES), lambda: f"{other} has reported"
        )
        assert not offload.events(NO_COPIES)
        copied = site.copied()
        wait_until(lambda: (export(), site.copied())[1] > copied, "the kernel goes on copying")
        process.send_signal(signal.SIGCONT)
        copies = next(sent)
        wait_until(lambda: len(came.came) == copies, lambda: f"{copies} copies come, not {len(came.came)}")
        assert came.came.total() == copies
        site.site.relay.run("nft", "-f", "-", text=TAKES_MARKS)
        wait_until(lambda: (export(), offload.events(NO_COPIES))[1], "marks that are taken away are noticed")
        assert "takes the marks of stream netflow away" in offload.events(NO_COPIES)[0]["reason"]
        site.site.relay.run("nft", "delete", "table", "netdev", "thief")


def test_faults_neither_double_nor_stop_copies(open_stack: OpenStack) -> None:
    """A datagram that fits in a packet comes once, whatever is killed; others are lost at most with their holder."""
    with relay(open_stack, "original") as (site, exporting, came), ExitStack() as opened:
        site.register()
        exporting.start()
        site.wait_for_rules()
        silent = {}

        def suffer(what: str, cause: Callable[[], float | None]) -> Fault:
            fault = Fault(exporting, came, cause)
            silent[what] = fault.silent_seconds
            return fault

        lost_before = site.lost_on_bus()
        flushed = suffer("flush ruleset", partial(flush, site))
        planner = suffer("planner", lambda: kill(site, "offload"))
        site.wait_for_rules()
        applier = suffer("applier", lambda: kill_applier(site))
        site.stack["offload"].stop()
        with site.site.relay.entered():
            site.stack.start("offload")
        site.wait_for_rules()
        wait_for_all(site, {"flush": flushed, "planner": planner, "applier": applier}, lost_before=lost_before)
        for name in ("gateway", "transmitter", "forwarder", "journal", "broker"):
            wait_for_all(site, {name: suffer(name, partial(kill, site, name))}, whole=True)
            site.wait_for_rules()
        suffer("ingest", lambda: kill(site, "ingest"))  # with what lay in its socket
        site.wait_for_rules()

        def move() -> None:
            site.site.siem.run("ip", "link", "set", "dev", "eth", "address", MOVED)
            site.site.relay.neighbour(SIEMS[4][0], MOVED, "out")

        suffer("next hop moves", move)
        site.wait_for_rules()

        def change_links() -> float:
            for name in ("out", "in"):
                site.site.relay.run("ip", "link", "set", "dev", name, "down")
                pause(0.3)
                site.site.relay.run("ip", "link", "set", "dev", name, "up")
            return time.monotonic()

        suffer("links down and up", change_links)
        site.wait_for_rules()
        for end, far in ((site.site.out, site.site.siem_end), (site.site.into, site.site.exporter_end)):

            def pull(end: End = end, far: End = far) -> float:
                end.remove()
                pause(0.3)
                opened.enter_context(veth(end, far))
                # An exporter whose question is lost while the cable comes up asks again after a second.
                site.site.exporter.neighbour(RELAY[4], site.site.into.link_address, "eth")
                return time.monotonic()

            suffer(f"interface {end.name} removed and made anew", pull)
            site.wait_for_rules()
        exporting.stop()
        twice = [number for number, count in came.came.items() if count > 1]
        assert not twice, f"{len(twice)} came twice, from {twice[0]} on"
        print({what: round(seconds, 3) for what, seconds in silent.items()})
        assert max(silent.values()) < LATE_SECONDS, silent
