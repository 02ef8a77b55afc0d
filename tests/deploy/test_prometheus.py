"""Debian's Prometheus beside a running stack: each panel of the dashboard has data, each alert fires and resolves."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from shared.bus.bodies.nodes_message import NODES_TOPIC, Node, Nodes
from shared.bus.messages import Body, Status, status_topic
from shared.ledger.accounts import Accounts
from shared.ledger.counters import DROPPED
from tests.builders import BusEnds
from tests.deploy.test_monitoring import CONFIG, DASHBOARD, RULES
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, wait_until

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(PROMETHEUS is None, reason="Debian's package prometheus is not installed"),
]
RELAY, SIEM = "10.2.0.1", "10.2.0.2"
PATIENCE: Final = "queue_seconds = 8"
SETTINGS: Final = f"""high_water_mark = 64
{PATIENT}destinations = ["10.2.0.0/24"]
[forwarder]
{PATIENCE}
[[stream]]
name = "messages"
listen = ["udp://{RELAY}:6667", "tcp://{RELAY}:6667"]
[[stream]]
name = "narrow"
listen = ["udp://{RELAY}:6668"]
receive_buffer = 8192
[[stream]]
name = "flows"
listen = ["udp://{RELAY}:2055"]
protocol = "netflow"
"""
MESSAGES, NARROW = (RELAY, 6667), (RELAY, 6668)
LATE: Final = """import runpy, time
now = time.time
time.time = lambda: now() - 60
runpy.run_module("services.console", run_name="__main__", alter_sys=True)
"""
"""The console, with a clock that is a minute behind."""
PAUSE: Final = 0.3
"""Seconds between looks at Prometheus, and between acts of a fault."""
Act = Callable[[], None]


@dataclass
class Site:
    """A relay with Prometheus, a collectors' host behind a link, and the exporter's socket."""

    stack: OpenStack
    relay: Host
    siem: Host
    exporter: socket.socket

    def query(self, path: str, **fields: str) -> Any:
        """Prometheus's answer."""
        address = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(fields)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        alerts = self.query("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    def await_alert(self, alert: str, act: Act, *, fires: bool) -> float:
        """Act until an alert fires, or does no more; return the seconds that took."""
        began = time.monotonic()

        def reached() -> bool:
            act()
            time.sleep(PAUSE)
            return (alert in self.firing()) == fires

        wait_until(reached, lambda: f"{alert} fires: {fires}; those that fire: {self.firing()}")
        return time.monotonic() - began

    def send(self, count: int = 1, size: int = 100, to: tuple[str, int] = MESSAGES, pause: float = 0.0) -> None:
        """Send datagrams."""
        for _ in range(count):
            self.exporter.sendto(bytes(size), to)
            if pause:
                time.sleep(pause)

    def collect(self, name: str, port: int) -> None:
        """Sign up a collector on the other host."""
        asked = {"op": "register", "name": name, "streams": ["*"], "address": SIEM, "port": port}
        assert ask_json(asked)["ok"]

    def leave(self, name: str) -> None:
        """Remove a collector."""
        generation = ask_json({"op": "list"})["clients"][name]["generation"]
        assert ask_json({"op": "leave", "name": name, "generation": generation})["ok"]

    @contextmanager
    def collector(self, name: str) -> Iterator[None]:
        """A collector on the other host that is there, signed up for everything."""
        with self.siem.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
            there.bind((SIEM, 9514))
            self.collect(name, 9514)
            yield
            self.leave(name)

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """Let a service stand still."""
        self.stack[name].process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.stack[name].process.send_signal(signal.SIGCONT)


Fault = Callable[[Site], Iterator[Act]]
"""Makes a fault until it is left; yields what has to go on meanwhile."""


def console_down(site: Site) -> Iterator[Act]:
    """Nobody answers."""
    site.stack["console"].stop()
    yield site.send
    site.stack.start("console")


def service_gone(site: Site) -> Iterator[Act]:
    """The forwarder is killed."""
    site.stack["forwarder"].stop(signal.SIGKILL)
    yield site.send
    site.stack.start("forwarder")


def kernel_drops(site: Site) -> Iterator[Act]:
    """More comes than fits, while the worker reads nothing."""

    def act() -> None:
        with site.stopped("ingest.1"):
            site.send(200, 1000, NARROW)

    yield act


def ingest_loss(site: Site) -> Iterator[Act]:
    """A message comes by TCP that no datagram can carry."""

    def act() -> None:
        with socket.create_connection(MESSAGES, 20) as exporter, suppress(ConnectionError):
            exporter.sendall(b"70000 <34>" + b"x" * 70_000)

    yield act


def bus_loss(site: Site) -> Iterator[Act]:
    """The forwarder stands still for as long as the broker's queue to it takes to be full."""

    def act() -> None:
        with site.stopped("forwarder"):
            site.send(1500, 100, pause=0.0005)

    with site.collector("waits"):
        yield act


def closed_port(site: Site) -> Iterator[Act]:
    """The collector's program has ended."""
    site.collect("closed", 9599)
    yield site.send
    with site.siem.socket(socket.AF_INET, socket.SOCK_DGRAM) as back:
        back.bind((SIEM, 9599))
        site.send(10, pause=0.2)
        site.leave("closed")


def slow_link(site: Site) -> Iterator[Act]:
    """The link to the collector takes less than it wants; the collector is there."""
    limits = ["tbf", "rate", "500kbit", "burst", "5000", "limit", "10000000"]
    site.relay.run("tc", "qdisc", "replace", "dev", "siem", "root", *limits)
    with site.collector("slow"):
        yield lambda: site.send(25_000, 4)
        site.relay.run("tc", "qdisc", "delete", "dev", "siem", "root")
        wait_until(lambda: ask_json({"op": "list"})["clients"]["slow"]["health"] == "ok", "it keeps up")


def memory_high(site: Site) -> Iterator[Act]:
    """Copies that wait for a collector fill most of the room that the forwarder has."""
    ceiling, began = 1 << 26, 0.0

    def restart(forwarder: str) -> None:
        site.stack["forwarder"].stop()
        site.stack.configure(SETTINGS.replace(PATIENCE, forwarder))
        nonlocal began
        began = time.time()
        site.stack.start("forwarder")

    def taken() -> int:
        new = f"on (service) fanwire_service_start_timestamp_seconds >= {began:.3f}"
        found = site.query("query", query=f'fanwire_service_memory_bytes{{service="forwarder.1"}} and {new}')["result"]
        return int(found[0]["value"][1]) if found else ceiling

    restart(PATIENCE)  # it still has what the faults before have made it take
    wait_until(lambda: taken() < 0.75 * ceiling, lambda: f"it takes little: {taken()}")
    # Copies that wait take a little less than they count. At 7 / 8 of the ceiling half of them goes, and is back soon.
    waiting = int(0.87 * ceiling) - taken()
    restart(f"queue_seconds = 60\nmemory = {ceiling}\nheld_memory = {waiting}\nqueue_bytes = {waiting}")
    with contextmanager(slow_link)(site):
        yield lambda: site.send(5000, 1400)
    restart(PATIENCE)


def told(service: str, accounts: Accounts, *more: tuple[str, Body]) -> Fault:
    """A fault that a service tells of, which the test plays: each report says one more of each loss."""

    def make(site: Site) -> Iterator[Act]:
        with BusEnds(site.stack.bus) as bus:
            publisher, report = bus.publisher(service), 0

            def act() -> None:
                nonlocal report
                report += 1
                grown = {
                    name: {counter: report if counter.startswith(DROPPED) else count for counter, count in each.items()}
                    for name, each in accounts.items()
                }
                publisher.publish(status_topic(service), Status(service, 1, 1, report, 0, 1, grown))
                for topic, body in more:
                    publisher.publish(topic, body)

            yield act

    return make


NOT_KEPT: Final[Accounts] = {"journal": {}, "journal/messages": {"taken": 0, "dropped_disk_full": 0}}
NOT_SENT: Final[Accounts] = {"uplink": {"connected": 1}, "sending/messages": {"taken": 0, "dropped_server_away": 0}}
PARTED: Final = NODES_TOPIC, Nodes(False, [Node("a", "live", 0), Node("b", "silent", 9000)])
TOO_LITTLE: Final[Accounts] = {"forwarder": {}, "collector/x": {"expected": 5, "offered": 5, "sent": 4}}


KEPT: Final[Accounts] = {
    "journal": {"kept_limit_bytes": 9},
    "journal/messages": {"write_errno": 5, "kept_bytes": 1, "oldest_ns": 1},
}
CATCHES_UP: Final[Accounts] = {
    "forwarder": {},
    "collector/siem": {},
    "owed/messages/siem": {"owed": 1, "owed_from_ns": 1},
}
BY_KERNEL: Final[Accounts] = {
    "rules/siem": {"copied": 1},
    "marks/messages": {"unseen": 1},
    "egress/siem": {"link_drops": 1},
}
OF_A_SITE: Final[Accounts] = {**NOT_SENT, "receiving/bonn": {"waiting_messages": 1, "late_ms": 1}}
BY_CHOICE: Final = (
    told("journal.1", KEPT),
    told("forwarder.9", CATCHES_UP),
    told("offload.1", BY_KERNEL),
    told("uplink.1", OF_A_SITE, PARTED),
)
"""Reports of services that this stack does not have, for the panels of folded rows."""


def nobody_takes(site: Site) -> Iterator[Act]:
    """A stream that nobody has signed up for."""
    yield site.send
    with site.collector("takes"):
        site.await_alert("FanwireNobodyTakes", site.send, fires=False)


def clock_apart(site: Site) -> Iterator[Act]:
    """The console's clock is a minute behind."""
    site.stack["console"].stop()
    late = site.stack.spawn("late", [*site.stack.interpreter, "-c", LATE], HONCHO_PROCESS_NAME="console.1")
    late.wait_for("ready")
    yield site.send
    late.stop()
    site.stack.start("console")


FAULTS: Final[dict[str, Fault]] = {
    "FanwireConsoleDown": console_down,
    "FanwireServiceGone": service_gone,
    "FanwireKernelDrops": kernel_drops,
    "FanwireIngestLoss": ingest_loss,
    "FanwireBusLoss": bus_loss,
    "FanwireCopiesLost": closed_port,
    "FanwireCollectorDown": closed_port,
    "FanwireQueueHigh": slow_link,
    "FanwireCollectorSlow": slow_link,
    "FanwireMemoryHigh": memory_high,
    "FanwireNobodyTakes": nobody_takes,
    "FanwireClockApart": clock_apart,
    # Last, those that are played: whoever has told of them is missed afterwards.
    "FanwireJournalLoss": told("journal.1", NOT_KEPT),
    "FanwireUplinkDown": told("uplink.1", {"uplink": {"connected": 0}}),
    "FanwireUplinkLoss": told("uplink.1", NOT_SENT),
    "FanwireNodeSilent": told("uplink.1", {"uplink": {"connected": 1}}, PARTED),
    "FanwireMinority": told("uplink.1", {"uplink": {"connected": 1}}, PARTED),
    "FanwireDiscrepancy": told("forwarder.9", TOO_LITTLE),
}


@contextmanager
def site_with_prometheus(stack: OpenStack, directory: Path) -> Iterator[Site]:
    """All services but the transmitter, and Prometheus with rules and intervals of seconds."""
    rules, config = directory / RULES.name, directory / CONFIG.name
    rules.write_text(re.sub(r"\[\d+m\]", "[8s]", re.sub(r"for: \w+", "for: 2s", RULES.read_text())))
    config.write_text(re.sub(r"interval: \d+s", "interval: 1s", CONFIG.read_text()))
    stack.configure(SETTINGS)
    stack.by_exec = True  # their memory is looked at, and a fork has that of all programs
    with ExitStack() as opened:
        relay, siem = opened.enter_context(Host()), opened.enter_context(Host())
        opened.enter_context(veth(End(relay, "siem", f"{RELAY}/24"), End(siem, "eth", f"{SIEM}/24")))
        opened.enter_context(relay.entered())
        relay.assert_no_default_route()
        stack.start_all()
        stack.start("console")
        options = ["--web.listen-address=127.0.0.1:9090", f"--storage.tsdb.path={directory / 'data'}"]
        prometheus = stack.spawn("prometheus", [str(PROMETHEUS), f"--config.file={config}", *options])
        prometheus.wait_for("Server is ready")
        exporter = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        exporter.bind((RELAY, 0))
        yield Site(stack, relay, siem, exporter)


def test_panels_have_data_and_alerts_fire_while_their_fault_lasts(open_stack: OpenStack, tmp_path: Path) -> None:
    """No panel's query is empty, and each alert of the rules fires for its fault, made for real, and for no longer."""
    assert FAULTS.keys() == set(re.findall("alert: (.*)", RULES.read_text()))
    with site_with_prometheus(open_stack, tmp_path) as site:
        with site.collector("siem"):
            assert ask_json({"op": "withhold", "name": "siem"})["ok"]
            check_panels(site, site.send, folded=False)
            check_metrics()
            assert ask_json({"op": "release", "name": "siem"})["ok"]
        for alert, make in FAULTS.items():
            site.await_alert(alert, lambda: None, fires=False)
            with contextmanager(make)(site) as act:
                fired = site.await_alert(alert, act, fires=True)
            resolved = site.await_alert(alert, site.send, fires=False)
            print(f"{alert}: fired after {fired:.1f} s, resolved {resolved:.1f} s after the fault")
        with site.collector("siem"), ExitStack() as opened:
            acts = [site.send, *(opened.enter_context(contextmanager(tell)(site)) for tell in BY_CHOICE)]
            check_panels(site, lambda: [act() for act in acts], folded=True)


def check_panels(site: Site, act: Callable[[], object], *, folded: bool) -> None:
    """Wait until every query of the panels, in folded rows or in others, returns data while this goes on."""
    rows = json.loads(DASHBOARD.read_text())["panels"]
    panels = [panel for row in rows for panel in row.get("panels", [])] if folded else rows
    asked = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]
    assert len(asked) > 15

    def empty() -> list[str]:
        act()
        queries = [
            (title, query.replace("$instance", ".*").replace("$__rate_interval", "8s")) for title, query in asked
        ]
        return [title for title, query in queries if not site.query("query", query=query)["result"]]

    wait_until(lambda: not empty(), lambda: f"panels have data: {empty()}")


def check_metrics() -> None:
    """Assert that promtool finds nothing in what the console prints."""
    for path in ("metrics", "metrics/exporters"):
        with urllib.request.urlopen(f"http://127.0.0.1:8080/{path}", timeout=30) as answer:
            done = subprocess.run(
                ["promtool", "check", "metrics"], input=answer.read(), capture_output=True, check=False
            )
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")
