import json
import signal
import time
from contextlib import ExitStack
from datetime import datetime

import pytest

from shared.ledger.accounts import Accounts, unparse_origin
from tests.openly import OpenStack
from tests.services.operator.commands.running.test_status import JOURNALED
from tests.services.operator.played import PlayedService, finish, run
from tests.stack import Running, Stack

ORIGIN = unparse_origin("ingest.1", 1, "messages")
WORKER: Accounts = {"stream/messages": {"received": 12, "bytes": 99, "published": 9, "dropped_no_subscriber": 3}}
FORWARDER: Accounts = {
    ORIGIN: {"baseline": 2, "taken": 4, "missed": 1, "dropped_unserved": 2, "reached": 9},
    "collector/[siem]": {"expected": 12, "offered": 9, "missed": 1, "sent": 2, "filtered": 3, "dropped_refused": 1}
    | {"by_kernel": 2, "held": 1, "dropped_unserved": 2},
}


def play(stack: Stack, ledger: Running, **accounts: Accounts) -> tuple[int, str]:
    """Report for these services, and a gateway, until the ledger has ended."""
    accounts = {"gateway": {}, **accounts}
    with ExitStack() as closing:
        services = [closing.enter_context(PlayedService(stack.bus, f"{name}.1")) for name in accounts]
        for service in services:
            service.wait_for_subscriber("status/")
        while ledger.process.poll() is None:
            for service, account in zip(services, accounts.values(), strict=True):
                service.report(account)
            time.sleep(0.2)
    return finish(ledger)


def test_balanced_accounts(stack: Stack) -> None:
    """The command prints the accounts and `balanced`, and ends with 0, when everything adds up."""
    stack.start("broker")
    code, text = play(stack, stack.operator("ledger"), ingest=WORKER, forwarder=FORWARDER)
    assert (code, text.splitlines()[-1]) == (0, "balanced")
    collector, *losses = [line.split() for line in text.splitlines() if "[siem]" in line]
    assert [each[4:] for each in losses] == [["1", "refused"], ["2", "unserved"]]
    expected, *outcomes = map(int, collector[2:14])
    assert (expected, outcomes) == (12, [2, 2, 3, 0, 0, 1, 0, 0, 1, 0, 0])
    assert collector[14:] == ["refused", "1,", "unserved", "2", "4"]
    assert expected == sum(outcomes) + 1 + 2  # a row adds up by what is printed
    assert "no_subscriber 3" in text
    assert not [title for title in ("Journal", "Owed", "Sending", "Kernel", "Egress") if title in text]


def test_the_journal_and_what_it_owes(stack: Stack) -> None:
    """Of a kept stream it tells from when to when, and of a collector that catches up how much and since when."""
    stack.start("broker")
    account = {"expected": 9, "offered": 9, "sent": 2, "deferred": 3, "left_behind": 3, "dropped_expired_unread": 1}
    forwarder = {ORIGIN: FORWARDER[ORIGIN], "collector/siem": account}
    forwarder["owed/messages/siem"] = {"owed": 3, "owed_from_ns": 1_795_000_000_000_000_000}
    kept = {"taken": 4, "written": 4, "kept_bytes": 5 << 20, "oldest_ns": 1_795_000_000_000_000_000}
    accounts = {"journal": {"kept_limit_bytes": 9 << 20}, "journal/messages": kept | {"newest_ns": 0}}
    code, text = play(stack, stack.operator("ledger"), ingest=WORKER, forwarder=forwarder, journal=accounts)
    assert (code, text.splitlines()[-1]) == (0, "balanced")
    at = f"{datetime.fromtimestamp(1_795_000_000):%F %T}".split()
    rows = [line.split() for line in text.splitlines()]
    assert ["journal.1", "messages", "4", "4", "0", "0", "0", "5", *at] in rows
    assert ["forwarder.1", "siem", "messages", "3", *at] in rows
    collector = next(row for row in rows if row[:2] == ["forwarder.1", "siem"] and len(row) > 7)
    assert collector[12:] == ["3", "3", "expired_unread", "1", "1"]


def test_what_the_kernel_has_copied(stack: Stack) -> None:
    """It tells of each collector what rules have copied, of each stream what they have marked, and of egress drops."""
    stack.start("broker")
    offload = {"offload": {"applier": 1}, "rules/siem": {"copied": 7}, "marks/messages": {"marked": 4, "unseen": 3}}
    offload["egress/eth0"] = {"queue_drops": 2, "link_drops": 1}
    ledger = stack.operator("ledger")
    code, text = play(stack, ledger, ingest=WORKER, forwarder=FORWARDER, offload=offload)
    assert (code, text.splitlines()[-1]) == (0, "balanced")
    rows = [line.split() for line in text.splitlines()]
    assert ["offload.1", "siem", "7"] in rows
    assert ["offload.1", "messages", "4", "3"] in rows
    assert ["offload.1", "eth0", "2", "1"] in rows


def test_what_other_sites_are_sent(stack: Stack) -> None:
    """Of each stream it tells what was taken, acknowledged, waits or was dropped, by cause: a row adds up."""
    stack.start("broker")
    sending = {"taken": 9, "acknowledged": 4, "held": 2, "dropped_server_slow": 2, "dropped_memory": 1}
    uplink = {"uplink": {"connected": 1}, "sending/messages": sending}
    code, text = play(stack, stack.operator("ledger"), ingest=WORKER, forwarder=FORWARDER, uplink=uplink)
    assert (code, text.splitlines()[-1]) == (0, "balanced")
    rows = [line.split() for line in text.splitlines()]
    assert ["uplink.1", "messages", "9", "4", "2", "memory", "1,", "server_slow", "2"] in rows


def test_discrepancies_within_and_between_services(stack: Stack) -> None:
    """A collector that does not add up and a forwarder that stays behind are each named, and it ends with 1."""
    stack.start("broker")
    forwarder = {ORIGIN: {"baseline": 2, "taken": 4, "reached": 6}, "collector/siem": {"expected": 1}}
    ledger = stack.operator("ledger", "--json", "--seconds", "2.5")
    code, text = play(stack, ledger, ingest=WORKER, forwarder=forwarder)
    answer = json.loads(text)
    assert code == 1
    assert not answer["balanced"]
    assert answer["discrepancies"] == [
        "forwarder.1: collector/siem: expected is 1, its parts add up to 0",
        "forwarder is 3 datagrams behind ingest.1 (boot 1) on stream messages",
    ]
    assert answer["services"]["ingest.1"] == WORKER


def test_two_consumers(stack: Stack) -> None:
    """The accounts of forwarder and transmitter are told apart, and only the one that is behind is named."""
    stack.start("broker")
    transmitter = {
        ORIGIN: {"baseline": 4, "taken": 1, "reached": 5},
        "collector/siem": {"expected": 1, "offered": 1, "sent": 1},
    }
    ledger = stack.operator("ledger", "--seconds", "2.5")
    code, text = play(stack, ledger, ingest=WORKER, forwarder=FORWARDER, transmitter=transmitter)
    assert code == 1
    assert text.splitlines()[-1] == "transmitter is 4 datagrams behind ingest.1 (boot 1) on stream messages"
    rows = [line.split() for line in text.splitlines()]
    assert ["forwarder.1", "ingest.1", "1", "messages", "4", "1", "2"] in rows
    assert ["transmitter.1", "ingest.1", "1", "messages", "1", "0", "0"] in rows
    assert [row[:4] for row in rows if "siem" in row] == [["transmitter.1", "siem", "1", "1"]]


def test_falsified_account_is_found(stack: Stack) -> None:
    """A worker whose listeners brought more than its stream says is named, and so is what it found by itself before."""
    stack.start("broker")
    worker = {
        **WORKER,
        "listener/messages/udp://127.0.0.1:6667": {"received": 13, "bytes": 99},
        "ingest": {"discrepancies": 2},
    }
    code, text = play(stack, stack.operator("ledger"), ingest=worker, forwarder=FORWARDER)
    assert code == 1
    assert text.splitlines()[-2:] == [
        "ingest.1: stream/messages: received is 12, its parts add up to 13",
        "ingest.1: has found 2 discrepancies in its accounts since it was started; see its log",
    ]
    assert ["ingest.1", "messages", "udp://127.0.0.1:6667", "13", "99", "0"] in [
        line.split() for line in text.splitlines()
    ]


def test_names_the_service_that_does_not_report(stack: Stack) -> None:
    """It ends with 69 and says who was not heard, with a broker and nobody else, or of what the settings ask for."""
    stack.start("broker")
    code, text = run(stack, "ledger", "--seconds", "0.5")
    assert (code, text.count("\n")) == (69, 1)
    assert "ingest and forwarder did not report" in text
    stack.configure(JOURNALED)
    code, text = play(stack, stack.operator("ledger", "--seconds", "2.5"), ingest=WORKER, forwarder=FORWARDER)
    assert (code, text.count("\n")) == (69, 1)
    assert text.startswith("fanwire ledger: journal did not report")


def test_names_a_transmitter_that_is_on_the_bus_and_silent(stack: Stack) -> None:
    """One that the gateway sees on the bus, and that does not report, is named; so is a gateway that does not."""
    stack.start("broker")
    gateway = {"gateway": {"senders_original": 1}}
    ledger = stack.operator("ledger", "--seconds", "2.5")
    code, text = play(stack, ledger, ingest=WORKER, forwarder=FORWARDER, gateway=gateway)
    assert (code, text.count("\n")) == (69, 1)
    assert "transmitter did not report within 2.5 s" in text
    assert "balanced" not in text


@pytest.mark.parametrize("stopped", ["forwarder", "transmitter", "gateway", "ingest.2", "broker"])
def test_names_a_service_that_hangs(open_stack: OpenStack, stopped: str) -> None:
    """The ledger ends with 69 and names a service that stands still, and doctor finds it, with what to do."""
    stack = open_stack
    stack.start_all(ingest=2)
    stack.start("transmitter")
    stack[stopped].process.send_signal(signal.SIGSTOP)
    try:
        ledger = stack.operator("ledger")  # it listens for seconds, and so does doctor
        _, found = run(stack, "doctor", "--json")
        assert (ledger.process.wait(60), ledger.text.count("\n")) == (69, 1)
        assert stopped in ledger.text.partition(" did not report")[0]
    finally:
        stack[stopped].process.send_signal(signal.SIGCONT)
    (services,) = [each for each in json.loads(found)["findings"] if each["name"] == "services"]
    assert services["level"] == "error"
    assert stopped in services["why"]
    assert "kill -CONT" in services["cure"]


def test_a_worker_that_has_ended_is_not_silent(stack: Stack) -> None:
    """One of several workers that was killed, its lock still there, is told as gone, and the rest balances."""
    stack.start_all(ingest=2)
    stack["ingest.2"].stop(signal.SIGKILL)
    assert (stack.bus / "pool.2.lock").exists()
    code, text = run(stack, "ledger")
    assert (code, text.splitlines()[-1]) == (0, "balanced")


def test_all_workers_that_hang_are_told_as_their_kind(stack: Stack) -> None:
    """The ledger ends with 69 and names ingest where the only worker stands still."""
    stack.start_all()
    stack["ingest.1"].process.send_signal(signal.SIGSTOP)
    try:
        code, text = run(stack, "ledger", "--seconds", "2.5")
    finally:
        stack["ingest.1"].process.send_signal(signal.SIGCONT)
    assert (code, "ingest did not report" in text) == (69, True)
