"""Offload as a process, between a bus that the test plays and the kernel's rules on a relay of its own."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from services.offload import service as module
from services.offload.channel import Answer, RequestKind
from services.offload.kernel_plan import NO_COPIES, KernelPlan
from services.offload.planning.applier_link import ANSWER_SECONDS, ApplierLink
from services.offload.planning.planner import Facts
from services.offload.planning.surroundings import Surroundings
from services.offload.service import TICK_SECONDS, OffloadService
from shared.bus.bodies.offload_messages import PATHS_TOPIC, CollectorPath, KernelCopies, OffloadPaths, OffloadReply
from shared.bus.messages import REGISTRY_TOPIC, Status, offload_topic, status_topic
from shared.bus.zmq_sockets import Subscriber
from shared.client import Client, Source
from shared.ledger.accounts import Accounts
from shared.process.lifecycle import UNAVAILABLE
from shared.settings.model import Settings
from shared.settings.tables import Bus
from tests.builders import BusEnds, PlayedGateway, accounts_when, make_client, take, wait_wanted
from tests.capture import Capture, Collector
from tests.openly import OpenStack
from tests.services.offload.planning.test_planner import client, plan
from tests.services.offload.site import EXPORTERS, OUT, PORT, RELAY, SIEMS, Listening, OffloadSite, exporters
from tests.stack import PATIENCE_SECONDS, Running, wait_until
from tests.traffic import pause

pytestmark = pytest.mark.usefixtures("lab")
SETTINGS = f"""
[[stream]]
name = "netflow"
listen = ["udp://0.0.0.0:{PORT}", "udp://[::]:{PORT}"]
[offload]
interfaces = ["in"]
"""


class PlayedSender:
    """A forwarder or transmitter that knows what it is told, and answers when it is to."""

    def __init__(self, bus: BusEnds, source: Source) -> None:
        name = "forwarder.1" if source == "relay" else "transmitter.1"
        self.publisher = bus.publisher(name)
        self.subscriber = bus.subscriber(offload_topic(source))
        self.told: dict[int, KernelCopies] = {}
        self.answering = True
        self._pending: list[KernelCopies] = []

    def turn(self) -> None:
        """Take what has come, and answer it."""
        while message := self.subscriber.receive():
            assert isinstance(message.body, KernelCopies)
            self.told[message.body.generation] = message.body
            self._pending.append(message.body)
        self.publisher.new_subscriptions()
        while self.answering and self._pending and self.publisher.wanted(self._pending[0].reply):
            body = self._pending.pop(0)
            self.publisher.publish(body.reply, OffloadReply(body.serial))

    def is_told(self) -> bool:
        """Take what has come; return whether that is a generation."""
        self.turn()
        return bool(self.told)

    def served(self, generation: int) -> set[str]:
        """The names of those whom a generation serves."""
        return {each.client.name for each in self.told[generation].served}


@dataclass
class Played:
    """Everything around offload."""

    stack: OpenStack
    site: OffloadSite
    bus: BusEnds
    gateway: PlayedGateway
    senders: dict[Source, PlayedSender]
    offload: Running
    reports: int = 0

    def report(self, **counters: int) -> None:
        """Report as a worker."""
        self.reports += 1  # as of marks that have come
        read = {"marks_read": self.reports}
        accounts = {"ingest": counters or {"mark_sockets": 2}, "stream/netflow": read}
        body = Status("ingest.1", 1, 0, self.reports, 0, 1, accounts)
        self.worker.publish(status_topic("ingest.1"), body)

    def __post_init__(self) -> None:
        self.worker = self.bus.publisher("ingest.1")
        wait_wanted(self.worker, status_topic("ingest.1"))

    def marked(self, listener: Listening, sock: socket.socket, version: int = 4) -> int:
        """Send a datagram, and return the generation that it comes up with."""
        for sender in self.senders.values():
            sender.turn()
        sock.sendto(b"probe", (RELAY[version], PORT))
        return listener.read(1)[0].mark >> 20

    def is_refused(self) -> bool:
        """Let worker and senders tell of themselves; return whether the kernel has refused a plan."""
        self.report()
        for sender in self.senders.values():
            sender.turn()
        return bool(self.offload.events("a plan of the kernel's rules was refused"))

    def wait_marked(self, listener: Listening, sock: socket.socket, names: set[str], version: int = 4) -> int:
        """Wait until the kernel serves these collectors; return the generation."""
        found = [0]

        def is_served() -> bool:
            self.report()
            found[0] = self.marked(listener, sock, version)
            return bool(found[0]) and self.senders["relay"].served(found[0]) == names

        wait_until(is_served, lambda: f"the kernel serves {names}: {self.offload.text}")
        return found[0]


@contextmanager
def played(open_stack: OpenStack, *arguments: str, more: str = "") -> Iterator[Played]:
    """Offload on a relay, with both senders."""
    open_stack.configure(SETTINGS + more)
    open_stack.start("broker")
    with OffloadSite() as site, BusEnds(open_stack.bus) as bus:
        with site.relay.entered():
            offload = open_stack.start("offload", *arguments)
        gateway = PlayedGateway(bus)
        senders: dict[Source, PlayedSender] = {source: PlayedSender(bus, source) for source in ("relay", "original")}
        around = Played(open_stack, site, bus, gateway, senders, offload)
        yield around
        around.offload.stop()


def told_paths(subscriber: Subscriber) -> list[CollectorPath]:
    """The next list of ways."""
    message = take(subscriber)
    assert isinstance(message.body, OffloadPaths)
    return message.body.paths


def serve_first(around: Played, opened: ExitStack) -> tuple[Listening, list[socket.socket], Collector]:
    """Let the kernel serve collector `first`; return it behind the listener and the exporters."""
    listener = opened.enter_context(Listening(around.site.relay, RELAY[4], PORT))
    socks = opened.enter_context(exporters(around.site))
    first = opened.enter_context(Collector(around.site.siem, SIEMS[4][0], 9000))
    around.report()
    around.gateway.announce(1, original("first", 0))
    around.wait_marked(listener, socks[0], {"first"})
    return listener, socks, first


def children(pid: int) -> list[int]:
    """The processes that a process has as children."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def original(name: str, number: int, version: int = 4, **more: object) -> Client:
    """A collector of copies with the exporter's address."""
    return make_client(
        name, 9000 + number, address=SIEMS[version][number], streams=("netflow",), source="original", **more
    )


def test_collectors_are_served_once_senders_know_it(open_stack: OpenStack) -> None:
    """Rules go in after each sender has answered, follow joins and leaves, and go with offload."""
    with played(open_stack) as around, ExitStack() as opened:
        site, senders = around.site, around.senders
        listener = opened.enter_context(Listening(site.relay, RELAY[4], PORT))
        socks = opened.enter_context(exporters(site))
        first = opened.enter_context(Collector(site.siem, SIEMS[4][0], 9000))
        second = opened.enter_context(Collector(site.siem, SIEMS[4][1], 9001))
        senders["original"].answering = False
        around.report()
        around.gateway.announce(1, original("first", 0))
        wait_until(senders["original"].is_told, "the transmitter is told")
        paths = around.bus.subscriber(PATHS_TOPIC)
        assert told_paths(paths) == [CollectorPath("first", "frames", "its sender is being told of it")]
        assert around.marked(listener, socks[0]) == 0
        senders["original"].answering = True
        generation = around.wait_marked(listener, socks[0], {"first"})
        wait_until(lambda: told_paths(paths) == [CollectorPath("first", "kernel")], "the way is told")
        (told,) = senders["relay"].told[generation].served
        assert (told.client.address, told.streams) == (SIEMS[4][0], ("netflow",))
        assert (senders["relay"].told[generation].registry, senders["relay"].told[generation].revision) == (
            around.gateway.publisher.boot,
            1,
        )
        came = len(list(first.take()))
        assert came >= 1

        relayed = make_client(
            "second", 9001, address=SIEMS[4][1], streams=("netflow",), prefixes=(EXPORTERS[4][1] + "/32",)
        )
        sending = opened.enter_context(site.relay.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sending.connect((SIEMS[4][1], 9001))
        around.gateway.change(2, [relayed])
        around.wait_marked(listener, socks[0], {"first", "second"})
        second.assert_quiet()
        assert around.marked(listener, socks[1])
        (copy,) = second.read(1)
        assert (copy.source, copy.source_port) == (OUT[4], sending.getsockname()[1])

        accounts = accounts_when(around.bus, "offload.1", lambda found: found.get("rules/second"))
        assert accounts["offload"]["collectors_served"] == 2
        assert accounts["rules/second"] == {"copied": 1}
        assert accounts["marks/netflow"]["marked"] >= accounts["rules/first"]["copied"] > 1

        sending.close()  # as of a forwarder that is restarted
        copied = accounts["rules/second"]["copied"]
        assert around.marked(listener, socks[1])
        accounts_when(around.bus, "offload.1", lambda found: found["rules/second"]["copied"] > copied)
        around.wait_marked(listener, socks[0], {"first", "second"})

        around.gateway.publisher.new_subscriptions()
        around.gateway.report(3)  # the change was lost
        wait_until(lambda: REGISTRY_TOPIC in around.gateway.publisher.new_subscriptions(), "the registry is asked for")
        around.gateway.announce(3, relayed)
        around.wait_marked(listener, socks[0], {"second"})
        first.read(1)
        first.assert_quiet(0.1)
        list(first.take())
        around.offload.stop()
        assert around.marked(listener, socks[0]) == 0


def test_copies_that_a_queue_drops_are_counted_by_link(open_stack: OpenStack) -> None:
    """The rules count each copy; how many of them did not come is what the queue says that it has dropped."""
    with played(open_stack) as around, ExitStack() as opened:
        _, socks, siem = serve_first(around, opened)
        accounts_when(around.bus, "offload.1", lambda found: "egress/out" in found)
        try:
            shape = ("root", "tbf", "rate", "1mbit", "burst", "2000", "limit", "4000")
            around.site.relay.run("tc", "qdisc", "replace", "dev", "out", *shape)
        except (AssertionError, FileNotFoundError) as error:
            pytest.skip(f"no traffic shaping here: {error}")
        came = len(list(siem.take()))
        for _ in range(100):
            socks[0].sendto(bytes(500), (RELAY[4], PORT))

        def is_settled(found: Accounts) -> bool:
            nonlocal came
            came += len(list(siem.take()))
            return found["rules/first"]["copied"] - came == found["egress/out"]["queue_drops"] > 0

        accounts = accounts_when(around.bus, "offload.1", is_settled)
        assert accounts["rules/first"]["copied"] > 100
        assert accounts["egress/out"]["link_drops"] == 0


def test_last_report_has_all_that_the_rules_have_copied(open_stack: OpenStack) -> None:
    """Copies between the last reading and the end of the rules are counted, too."""
    with played(open_stack) as around, ExitStack() as opened:
        _, socks, siem = serve_first(around, opened)
        reports = around.bus.subscriber(status_topic("offload.1"))
        take(reports)
        for _ in range(50):
            socks[0].sendto(b"late", (RELAY[4], PORT))
        around.offload.stop()
        told: dict[str, int] = {}

        def is_told() -> bool:
            while message := reports.receive():
                assert isinstance(message.body, Status)
                told.update(message.body.accounts["rules/first"])
            return told["copied"] >= 50

        came = len(list(siem.take()))
        wait_until(is_told, lambda: f"{came} copies are told: {told}")
        assert told["copied"] == came


def test_next_hop_that_moves_is_followed(open_stack: OpenStack) -> None:
    """With another link address of the collector's host, or of a router, the rules are others at once."""
    with played(open_stack) as around, ExitStack() as opened:
        site = around.site
        listener = opened.enter_context(Listening(site.relay, RELAY[4], PORT))
        socks = opened.enter_context(exporters(site))
        around.report()
        around.gateway.announce(1, original("first", 0))
        before = around.wait_marked(listener, socks[0], {"first"})
        with Capture(site.siem, "eth") as wire:
            site.siem.run("ip", "link", "set", "dev", "eth", "address", "02:00:00:00:77:01")
            site.relay.neighbour(SIEMS[4][0], "02:00:00:00:77:01", "out")
            wait_until(lambda: around.wait_marked(listener, socks[0], {"first"}) != before, "the rules are others")
            list(wire.take())
            assert around.marked(listener, socks[0]) != before
            assert {each.macs[1] for each in wire.read(1)} == {"02:00:00:00:77:01"}
        site.relay.run("ip", "link", "set", "dev", "out", "down")
        wait_until(lambda: around.marked(listener, socks[0]) == 0, "nobody is served by a link that is down")


def test_applier_that_stands_still_is_ended_with_its_rules(open_stack: OpenStack) -> None:
    """Rules that nobody can change would go on copying for collectors that have left: the planner ends it."""
    with played(open_stack) as around, ExitStack() as opened:
        listener, socks, siem = serve_first(around, opened)
        (applier,) = children(around.offload.process.pid)
        os.kill(applier, signal.SIGSTOP)
        around.gateway.change(2, left=["first"])
        around.offload.wait_for("the applier has ended, and its rules with it (TimeoutError); start offload again")
        wait_until(lambda: around.marked(listener, socks[0]) == 0, "the rules are gone")
        list(siem.take())
        siem.assert_quiet()


def test_halves_that_stand_still_together_go_on_with_their_rules(open_stack: OpenStack) -> None:
    """A machine that is paused while the planner waits for an answer ends no healthy applier."""
    with played(open_stack) as around, ExitStack() as opened:
        listener, socks, _ = serve_first(around, opened)
        planner, (applier,) = around.offload.process.pid, children(around.offload.process.pid)
        os.kill(applier, signal.SIGSTOP)
        pause(2 * TICK_SECONDS)  # the planner asks for the counters each second
        os.kill(planner, signal.SIGSTOP)
        pause(ANSWER_SECONDS)
        generation = around.marked(listener, socks[0])
        os.kill(planner, signal.SIGCONT)
        pause(0.2)
        os.kill(applier, signal.SIGCONT)
        accounts_when(around.bus, "offload.1", lambda told: told["offload"]["applier"])
        assert around.marked(listener, socks[0]) == generation > 0
        around.gateway.change(2, left=["first"])
        wait_until(lambda: around.marked(listener, socks[0]) == 0, "the rules follow the registry")
        assert not around.offload.events("the kernel makes no copies")


@pytest.mark.parametrize("required", [False, True])
def test_killed_applier_takes_its_rules_along(open_stack: OpenStack, required: bool) -> None:
    """The planner goes on without it and says so; where an applier is required it ends, for a supervisor's sake."""
    arguments = ("--require-privilege",) if required else ()
    with played(open_stack, *arguments) as around, ExitStack() as opened:
        listener, socks, siem = serve_first(around, opened)
        (applier,) = children(around.offload.process.pid)
        os.kill(applier, signal.SIGKILL)
        wait_until(lambda: around.marked(listener, socks[0]) == 0, "the rules are gone")
        list(siem.take())
        siem.assert_quiet()
        around.offload.wait_for("the applier has ended, and its rules with it (ClosedError); start offload again")
        if required:
            assert around.offload.process.wait(PATIENCE_SECONDS) == UNAVAILABLE
            return
        assert not around.offload.reload()["event"].startswith("not")
        accounts = accounts_when(around.bus, "offload.1", lambda told: not told["offload"]["applier"])
        assert accounts["offload"]["collectors_served"] == 0
        around.gateway.change(2, [original("second", 1)])
        paths = around.bus.subscriber(PATHS_TOPIC)
        reason = "the applier has ended, and its rules with it (ClosedError)"
        ways = [CollectorPath(name, "frames", reason) for name in ("first", "second")]
        wait_until(lambda: told_paths(paths) == ways, "the ways are told")
        assert around.marked(listener, socks[0]) == 0
        assert len(around.offload.events("the kernel makes no copies")) == 1


def test_stream_goes_up_again_once_a_sender_serves_a_collector(open_stack: OpenStack) -> None:
    """While the kernel serves all, its datagrams end there, counted; one that it does not serve has all go up."""
    with played(open_stack, more='unseen = ["netflow"]\n') as around, ExitStack() as opened:
        site = around.site
        listener = opened.enter_context(Listening(site.relay, RELAY[4], PORT))
        socks = opened.enter_context(exporters(site))
        siem = opened.enter_context(Collector(site.siem, SIEMS[4][0], 9000))
        around.report()
        around.gateway.announce(1, original("first", 0))

        def has_ended_in_the_kernel() -> bool:
            around.report()
            for sender in around.senders.values():
                sender.turn()
            socks[0].sendto(b"probe", (RELAY[4], PORT))
            list(listener.take())
            return bool(list(siem.take()))

        wait_until(has_ended_in_the_kernel, "the kernel copies")
        accounts = accounts_when(around.bus, "offload.1", lambda told: told.get("marks/netflow", {}).get("unseen"))
        assert accounts["marks/netflow"]["marked"] == 0
        listener.assert_quiet(0.1)
        around.gateway.change(2, [original("second", 1, catch_up=True)])

        def goes_up() -> bool:
            around.report()
            for sender in around.senders.values():
                sender.turn()
            socks[0].sendto(b"probe", (RELAY[4], PORT))
            return any(each.mark for each in listener.take())

        wait_until(goes_up, "it goes up, with a mark")
        assert siem.read(1)


def test_killed_planner_leaves_no_rules(open_stack: OpenStack) -> None:
    """With the planner the applier ends, and the rules with it; a new one takes over with other generations."""
    with played(open_stack) as around, ExitStack() as opened:
        site = around.site
        listener = opened.enter_context(Listening(site.relay, RELAY[6], PORT))
        socks = opened.enter_context(exporters(site, 6))
        siem = opened.enter_context(Collector(site.siem, SIEMS[6][0], 9000))
        around.report()
        around.gateway.announce(1, original("first", 0, 6))
        before = around.wait_marked(listener, socks[0], {"first"}, 6)
        around.offload.process.kill()
        around.offload.process.wait()
        wait_until(lambda: around.marked(listener, socks[0], 6) == 0, "the rules are gone")
        list(siem.take())
        siem.assert_quiet()
        site.table.replace(site.plan([]))  # as of a second fanwire on the host
        with site.relay.entered():
            around.offload = around.stack.start("offload")
        around.gateway.announce(2, original("first", 0, 6))
        wait_until(around.is_refused, "the table is found to be another's")
        owned = "table: Operation not permitted: the table fanwire belongs to another process, such as a second fanwire"
        path = CollectorPath("first", "frames", f"the rules with it were refused: {owned}")
        paths = around.bus.subscriber(PATHS_TOPIC)
        wait_until(lambda: (around.is_refused(), told_paths(paths) == [path])[1], lambda: f"the reason is told: {path}")
        site.connection.close()
        assert around.wait_marked(listener, socks[0], {"first"}, 6) != before
        assert siem.read(1)


class PlayedApplier(ApplierLink):
    """An applier that takes plans, or refuses those with copies."""

    def __init__(self) -> None:
        super().__init__(None, "")
        self.refusing = False
        self.plan: KernelPlan | None = None

    @property
    def ended(self) -> bool:
        """It goes on."""
        return False

    def ask(self, kind: RequestKind, plan: KernelPlan | None = None, _seconds: float = 0.0) -> Answer:
        """Take a plan, or refuse it."""
        if kind == "apply" and self.refusing and plan != NO_COPIES:
            return Answer(1, "refused")
        self.plan = plan if kind == "apply" else self.plan
        return Answer(1)


def test_who_has_left_is_served_no_more_though_the_plan_without_it_is_refused(tmp_path: Path) -> None:
    """Rules go where a refused plan would have changed whom they serve; else they stay."""
    applier = PlayedApplier()
    settings = Settings(bus=Bus(directory=str(tmp_path)))
    with OffloadService("offload.1", settings, applier, applier_required=False) as service:

        def hand_over(*names: str) -> set[str]:
            planned = plan(*(client(name) for name in names))
            service._handover.begin(planned, (1, 1))
            service._apply(planned)
            return {copy.name for copy in applier.plan.copies} if applier.plan else set()

        assert hand_over("a", "b") == {"a", "b"}
        applier.refusing = True
        assert hand_over("a", "b", "c") == {"a", "b"}
        assert hand_over("b", "c") == set()
        assert service._served == set()
        applier.refusing = False
        assert hand_over("b", "c") == {"b", "c"}


def test_a_planner_that_was_stopped_while_it_planned_plans_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rests for as long as planning has taken it, and not for ten times as long as it has stood still."""
    now = [100.0]

    def gather(_troubled: object) -> Facts:
        now[0] += 60.0
        return Facts({}, {}, lambda *_: "", {}, {})

    settings = Settings(bus=Bus(directory=str(tmp_path)))
    with OffloadService("offload.1", settings, PlayedApplier(), applier_required=False) as service:
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: 0.0))
        service._replica.version = 0
        service._plan(cast(Surroundings, SimpleNamespace(gather=gather)))
        assert not service._dirty
        assert service._plan_at == now[0] + module.PLAN_SECONDS


def test_a_plan_made_meanwhile_is_told_of_as_soon_as_the_one_before_is_in_the_kernel(tmp_path: Path) -> None:
    """No message and no other event has to come for that."""
    settings = Settings(bus=Bus(directory=str(tmp_path)))
    with OffloadService("offload.1", settings, PlayedApplier(), applier_required=False) as service:
        service._planned = before = plan(client("a"))
        service._hand_over()
        service._planned = after = plan(client("a"), client("b"))
        service._hand_over()
        live, pending = service._handover.live, service._handover.pending
        assert (live and live.planned, pending and pending.planned) == (before, after)
