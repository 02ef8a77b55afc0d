"""Health of collectors, for clients that list and watch: whole stacks, and collectors that fail in each way."""

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest

from shared.net.sockets import enlarge_receive_buffer
from tests.builders import BusEnds, accounts_when
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.services.gateway.talk import Talk, talk_to
from tests.stack import PATIENT, Stack, ask_json, sign_up, wait_until

SIEM: dict[str, Any] = {"op": "register", "name": "siem", "streams": ["messages"], "port": 9514}
NAME = "collector/siem"
SETTINGS = PATIENT + '[[stream]]\nname = "messages"\nlisten = ["udp://0.0.0.0:6667"]\n'


@contextmanager
def flood(host: Host | None = None, per_second: int = 100, relay: str = "127.0.0.1") -> Iterator[None]:
    """An exporter, on a host or here, that goes on sending at about a rate, to an address of its own host."""
    stopping = threading.Event()
    with host.entered() if host else nullcontext():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def send() -> None:
        while not stopping.wait(1 / per_second):
            sock.sendto(b"x" * 1000, (relay, 6667))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        sock.close()


def listen(port: int = 9514) -> socket.socket:
    """A collector's socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    enlarge_receive_buffer(sock, 16 << 20)
    sock.bind(("127.0.0.1", port))
    sock.settimeout(60)
    return sock


@contextmanager
def watching(**fields: Any) -> Iterator[tuple[Talk, dict[str, Any]]]:
    """A watcher, and the answer to its request."""
    watcher = talk_to()
    try:
        yield watcher, watcher.ask("watch", **fields)
    finally:
        watcher.close()


def read_health(watcher: Talk) -> dict[str, Any]:
    """The next line, which is about health."""
    event = watcher.read()
    assert event["event"] == "health", event
    return event


def assert_quiet(watcher: Talk, seconds: float) -> None:
    """Nothing more is told."""
    watcher.connection.settimeout(seconds)
    with pytest.raises(TimeoutError):
        watcher.read()


def listed(name: str = "siem") -> dict[str, Any]:
    """An entry as it is listed."""
    entry: dict[str, Any] = ask_json({"op": "list"})["clients"][name]
    return entry


def until(word: str, name: str = "siem") -> dict[str, Any]:
    """Wait until a collector has this word, and return its entry."""
    wait_until(lambda: listed(name)["health"] == word, f"{name} becomes {word}")
    return listed(name)


def test_closed_port_is_refusing_until_it_is_back(stack: Stack) -> None:
    """A watcher reads once that a collector refuses, and once that it is well again; the list counts meanwhile."""
    stack.configure(PATIENT)
    stack.start_all()
    with flood(), watching() as (watcher, snapshot):
        client = ask_json(SIEM)["client"]
        assert watcher.read()["event"] == "joined"
        event = read_health(watcher)
        while event["health"] == "ok":  # served before it was looked at
            event = read_health(watcher)
        revision = snapshot["revision"] + 1
        assert (event["health"], event["name"], event["revision"]) == ("refusing", "siem", revision)
        assert (event["generation"], event["lost"] > 0) == (client["generation"], True)
        before = listed()
        wait_until(lambda: listed()["lost"] > before["lost"] + 100, "the list counts on")
        after = listed()
        assert after["health"] == "refusing"
        assert after["health_since"] > before["health_since"]
        clients = stack.operator("clients")
        assert clients.process.wait(60) == 0
        assert "refusing for " in clients.text
        with listen():
            event = read_health(watcher)
            assert (event["health"], event["lost"] >= after["lost"]) == ("ok", True)
            assert listed()["health"] == "ok"
            assert_quiet(watcher, 1.5)
    assert ask_json({"op": "list"})["revision"] == revision


def test_nobody_flaps_while_it_refuses(stack: Stack) -> None:
    """A collector that is seldom sent anything stays `refusing` between refusals."""
    stack.configure(PATIENT)
    stack.start_all()
    ask_json(SIEM)
    with flood(per_second=1):
        until("refusing")
        with watching() as (watcher, _):
            assert_quiet(watcher, 4)


def test_health_outlives_a_restart_of_either_side(stack: Stack) -> None:
    """A gateway that is started anew hears of a refusing collector; so does it from a forwarder started anew."""
    stack.configure(PATIENT)
    stack.start_all()
    ask_json(SIEM)
    ask_json(SIEM | {"name": "well", "port": 9515})
    with flood(), listen(9515):
        until("refusing")
        until("ok", "well")
        before = ask_json({"op": "list"})
        stack["gateway"].stop(signal.SIGKILL)
        stack.start("gateway")
        until("refusing")
        until("ok", "well")
        with watching(revision=before["revision"], epoch=before["epoch"]) as (watcher, answer):
            assert "clients" not in answer
            event = read_health(watcher)  # at once, though it is no news
            assert (event["name"], event["health"]) == ("siem", "refusing")
            stack["forwarder"].stop(signal.SIGKILL)
            assert sorted((e["name"], e["health"]) for e in [read_health(watcher), read_health(watcher)]) == [
                ("siem", "waiting"),
                ("well", "waiting"),
            ]
            stack.start("forwarder")
            last: dict[str, str] = {}
            while last != {"siem": "refusing", "well": "ok"}:
                event = read_health(watcher)
                last[event["name"]] = event["health"]
            assert_quiet(watcher, 1.5)


def test_successor_does_not_inherit(stack: Stack) -> None:
    """One that takes a refusing collector's place, at another port, is well from the start."""
    stack.configure(PATIENT)
    stack.start_all()
    ask_json(SIEM)
    with flood(), listen(9515):
        until("refusing")
        client = ask_json(SIEM | {"port": 9515, "take_over": True})["client"]
        assert (client["health"], client["lost"]) == ("ok", 0)
        assert listed()["health"] == "ok"


def account_when(stack: Stack, condition: Callable[[dict[str, int]], object]) -> dict[str, int]:
    """The forwarder's account of the collector as soon as it meets a condition; it adds up."""
    with BusEnds(stack.bus) as ends:
        return accounts_when(ends, "forwarder.1", lambda found: condition(found[NAME]))[NAME]


def test_withheld_from_who_refuses(stack: Stack) -> None:
    """One that refuses is probed once a second, the rest is withheld; once it is back it gets everything."""
    stack.configure(PATIENT + "[forwarder]\nwithhold = true\n")
    stack.start_all()
    ask_json(SIEM)
    with flood():
        began = time.monotonic()
        first = account_when(stack, lambda found: found.get("withheld"))
        second = account_when(stack, lambda found: found["withheld"] > first["withheld"] + 200)
        assert 1 <= second["sent"] - first["sent"] <= time.monotonic() - began + 1
        assert second.get("dropped_refused") == first.get("dropped_refused")
        assert listed()["health"] == "refusing"
        with listen() as collector:
            until("ok")
            third = account_when(stack, lambda found: found["sent"] > second["sent"] + 50)
            last = account_when(stack, lambda found: found["sent"] > third["sent"] + 50)
            assert last["withheld"] == third["withheld"]
            assert len(collector.recv(2000)) == 1000
            ledger = stack.operator("ledger", "--json")
            assert ledger.process.wait(60) == 0, ledger.text
    assert json.loads(ledger.text)["balanced"]


@contextmanager
def beyond(stack: Stack, settings: str, *services: str) -> Iterator[tuple[Host, Host]]:
    """A relay with these services, and a collector's host at the other end of a link."""
    stack.configure(SETTINGS + settings)
    with ExitStack() as opened:
        relay, siem = opened.enter_context(Host()), opened.enter_context(Host())
        opened.enter_context(veth(End(relay, "up", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")))
        with relay.entered():
            for service in services:
                stack.start(service)
            yield relay, siem


def configured(source: str) -> str:
    """A collector of the settings, on the other host."""
    return f'[[collector]]\nname = "siem"\nstreams = ["*"]\naddress = "10.2.0.2"\nport = 9514\nsource = "{source}"\n'


def test_full_send_buffer_is_slow(stack: Stack) -> None:
    """Copies that the collector's next hop does not take fill its send buffer: `slow`, until it takes them again."""
    settings = configured("relay") + "[forwarder]\nsend_buffer = 4096\n"
    with beyond(stack, settings, "broker", "gateway", "forwarder", "ingest") as (relay, siem):
        siem.run("ip", "link", "set", "dev", "eth", "arp", "off")
        with flood(relay):
            assert until("slow")["lost"] > 0
            siem.run("ip", "link", "set", "dev", "eth", "arp", "on")
            until("refusing")  # nobody listens there, as its host can say again
        sock = siem.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock, flood(relay):
            sock.bind(("10.2.0.2", 9514))
            until("ok")


def break_neighbour(_relay: Host, siem: Host) -> Callable[[], None]:
    """The next hop does not answer."""
    siem.run("ip", "link", "set", "dev", "eth", "arp", "off")
    return lambda: (siem.run("ip", "link", "set", "dev", "eth", "arp", "on"), None)[1]


def break_route(relay: Host, _siem: Host) -> Callable[[], None]:
    """There is no route."""
    relay.run("ip", "route", "add", "blackhole", "10.2.0.2/32")
    return lambda: (relay.run("ip", "route", "del", "blackhole", "10.2.0.2/32"), None)[1]


def break_link(_relay: Host, siem: Host) -> Callable[[], None]:
    """The link has no carrier."""
    siem.run("ip", "link", "set", "dev", "eth", "down")
    return lambda: (siem.run("ip", "link", "set", "dev", "eth", "up"), None)[1]


@pytest.mark.parametrize("fail", [break_neighbour, break_route, break_link])
def test_no_way_for_copies_with_the_exporters_address(
    open_stack: OpenStack, fail: Callable[[Host, Host], Callable[[], None]]
) -> None:
    """Without a transmitter a collector waits, without a way it is unreachable, with both it is well."""
    with beyond(open_stack, configured("original"), "broker", "gateway", "ingest") as (relay, siem):
        until("waiting")
        mend = fail(relay, siem)
        open_stack.start("transmitter")
        with flood(relay, relay="10.2.0.1"):
            until("unreachable")
        with watching() as (watcher, _):
            assert_quiet(watcher, 1.5)
        mend()
        with flood(relay, relay="10.2.0.1"):
            until("ok")
        open_stack["transmitter"].stop()
        until("waiting")


@pytest.mark.parametrize(
    ("source", "stopped"),
    [
        ("relay", "forwarder"),
        ("original", "transmitter"),
        ("relay", "ingest.1"),
        ("original", "ingest.2"),
        ("relay", "broker"),
    ],
)
def test_a_service_that_hangs_makes_collectors_wait(open_stack: OpenStack, source: str, stopped: str) -> None:
    """The collectors of a service that stands still wait, as listed and watched, until it goes on."""
    stack = open_stack
    stack.configure(PATIENT)
    stack.start_all(ingest=2)
    stack.start("transmitter")
    sign_up(SIEM | {"source": source})
    sign_up(SIEM | {"name": "other", "port": 9515, "source": "original" if source == "relay" else "relay"})
    until("ok")
    until("ok", "other")
    with watching() as (watcher, _):
        stack[stopped].process.send_signal(signal.SIGSTOP)
        try:
            event = read_health(watcher)
            while event["name"] != "siem":
                event = read_health(watcher)
            assert event["health"] == "waiting"
            assert listed()["health"] == "waiting"
            if stopped in ("forwarder", "transmitter"):
                until("ok", "other")
                assert listed()["health"] == "waiting"
        finally:
            stack[stopped].process.send_signal(signal.SIGCONT)
        until("ok")
        until("ok", "other")


def test_the_first_word_is_right_where_sockets_run_out(stack: Stack) -> None:
    """Of collectors that the forwarder has no descriptor for, the answer says `unreachable`, and the log says why."""
    stack.configure(PATIENT)
    stack.start("broker")
    stack.start("gateway")
    stack.start("ingest")
    with interpreter(stack, "sh", "-c", 'ulimit -n 40; exec "$0" "$@"', sys.executable):
        stack.start("forwarder")
    sign_up(SIEM)  # the gateway has heard of the forwarder
    answers = {SIEM["name"]: "ok"}
    for number in range(30):
        client = ask_json(SIEM | {"name": f"c{number}", "port": 9600 + number})["client"]
        answers[client["name"]] = client["health"]
    assert set(answers.values()) == {"ok", "unreachable"}
    assert {name: entry["health"] for name, entry in ask_json({"op": "list"})["clients"].items()} == answers
    (said,) = {entry["event"] for entry in stack["forwarder"].log if entry.get("errno") == "EMFILE"}
    assert "no descriptor left" in said


@pytest.mark.parametrize("address", ["10.99.0.1", "fd00:99::1"])
def test_the_first_word_is_right_without_a_route(stack: Stack, address: str) -> None:
    """Of a collector that there is no route to, the answer says `unreachable`."""
    stack.configure(PATIENT + 'destinations = ["10.99.0.0/16", "fd00:99::/32"]\n')
    stack.start_all()
    assert ask_json(SIEM | {"address": address})["client"]["health"] == "unreachable"


@contextmanager
def interpreter(stack: Stack, *command: str) -> Iterator[None]:
    """Run programs that are started meanwhile by this."""
    before, stack.interpreter = stack.interpreter, list(command)
    yield
    stack.interpreter = before
