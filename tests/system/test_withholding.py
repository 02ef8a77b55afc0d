"""Copies that an admin withholds, counted by the test: each datagram sent has arrived, or counts as withheld."""

import json
import signal
import socket
from contextlib import ExitStack, closing

from shared.ledger.accounts import Accounts
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, sign_up, wait_until
from tests.system.test_restarts import Numbered, Sink, ledger_losses

SOURCES = {"plain": ("relay", 9514), "kept": ("original", 9515), "others": ("relay", 9516)}
"""Collectors by name; the first is one of the settings, the last is never withheld."""
WITHHELD = ("plain", "kept")
SETTINGS = PATIENT + '[[collector]]\nname = "plain"\nstreams = ["messages"]\naddress = "127.0.0.1"\nport = 9514\n'


def register(name: str) -> None:
    """Sign up, as a collector does at each of its starts."""
    source, port = SOURCES[name]
    sign_up({"name": name, "streams": ["messages"], "port": port, "source": source, "take_over": True})


def test_withheld_copies_are_counted_and_come_again(open_stack: OpenStack) -> None:
    """Neither a kill of the gateway nor a new sign-up ends an order; release does, and nothing is lost by either."""
    open_stack.configure(SETTINGS)
    open_stack.start_all()
    open_stack.start("transmitter")
    load = Numbered()
    with ExitStack() as opened:
        sinks = {name: opened.enter_context(closing(Sink(port))) for name, (_, port) in SOURCES.items()}
        for sink in sinks.values():
            sink.start()
        for name in ("kept", "others"):
            register(name)
        watcher = opened.enter_context(socket.create_connection(("127.0.0.1", 5000)))
        watcher.sendall(b'{"op":"watch"}\n')
        told = opened.enter_context(watcher.makefile("rb"))
        told.readline()
        load.start()
        wait_until(lambda: all(len(sink.numbers) > 500 for sink in sinks.values()), "copies flow")
        for name in WITHHELD:
            assert open_stack.run("withhold", name, "--reason", "maintenance")[0] == 0
        changes = [json.loads(told.readline()) for _ in WITHHELD]
        assert [(each["event"], each["client"]["withheld"]["reason"]) for each in changes] == [
            ("changed", "maintenance")
        ] * 2
        arrived = dict[str, int]()

        def others_get_copies(sends: int) -> None:
            sent, others = load.sent, len(sinks["others"].numbers)
            wait_until(lambda: load.sent > sent + sends, "more is sent meanwhile")
            wait_until(lambda: len(sinks["others"].numbers) > others + sends // 2, "others get their copies")

        def at_rest() -> bool:
            arrived.update({name: len(sinks[name].numbers) for name in WITHHELD})
            others_get_copies(200)
            return arrived == {name: len(sinks[name].numbers) for name in WITHHELD}

        def goes_on() -> None:
            others_get_copies(1000)
            assert {name: len(sinks[name].numbers) for name in WITHHELD} == arrived

        wait_until(at_rest, "what had left before the answer has arrived")

        goes_on()
        open_stack["gateway"].stop(signal.SIGKILL)
        open_stack.start("gateway")
        register("kept")
        goes_on()
        listed = ask_json({"op": "list"})["clients"]
        assert {name: listed[name]["health"] for name in SOURCES} == dict.fromkeys(WITHHELD, "withheld") | {
            "others": "ok"
        }
        code, text, _ = open_stack.run("clients")
        assert (code, text.count("maintenance")) == (0, 2)
        for name in WITHHELD:
            assert open_stack.run("release", name)[0] == 0
        wait_until(
            lambda: all(len(sinks[name].numbers) > arrived[name] + 500 for name in WITHHELD), "copies flow again"
        )
        load.stop()
        sent = load.sent
        wait_until(lambda: all(sent - 1 in sink.numbers[-64:] for sink in sinks.values()), "the last one has come")

        def complete(sender: str) -> Accounts:
            names = [name for name, (source, _) in SOURCES.items() if (source == "relay") == (sender == "forwarder")]
            with BusEnds(open_stack.bus) as bus:
                return accounts_when(
                    bus,
                    f"{sender}.1",
                    lambda found: all(found.get(f"collector/{name}", {}).get("expected") == sent for name in names),
                )

        accounts = {**complete("forwarder"), **complete("transmitter")}
        assert ledger_losses(open_stack) == []
    for name, sink in sinks.items():
        account = accounts[f"collector/{name}"]
        assert account["sent"] == len(sink.numbers), name
        assert sent == len(sink.numbers) + account.get("withheld_by_admin", 0), name
        assert (account.get("withheld_by_admin", 0) > 2000) == (name in WITHHELD)
    logged = [line["client"] for line in open_stack["gateway"].events("copies released by an admin")]
    assert logged == list(WITHHELD)
