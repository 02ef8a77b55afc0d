import errno
from dataclasses import replace
from typing import Any

import pytest

from services.operator.doctor.services import RawSocketFacts, ServiceFacts, check_services, why_not_raw
from shared.ledger.accounts import Accounts
from shared.monitoring.finding import Finding, some
from shared.process.registry_client import Entry
from shared.settings.model import Settings
from shared.settings.tables import Bus

RAW: Accounts = {"transmitter": {"raw_sockets": 24}}
HEARD: dict[str, Accounts] = {"broker.1": {}, "gateway.1": {}, "ingest.1": {}, "forwarder.1": {}, "transmitter.1": RAW}
FINE = ServiceFacts(broker=True, accounts=HEARD, descriptors={"": 64, "gateway.1": 4160, "forwarder.1": 66})
ORIGINAL = Entry("flows", "10.2.0.2", 9995, streams=("messages",), source="original", health="ok")
RELAY = Entry("siem", "10.2.0.2", 9514, streams=("messages",), source="relay", health="ok")
DENIED = RawSocketFacts(errno.EPERM)


HERE = Settings()
ELSEWHERE = Settings(bus=Bus(connect="tcp://192.0.2.10:5800", keys="/etc/fanwire/keys"))


def check(facts: ServiceFacts, *collectors: Entry, settings: Settings = HERE) -> list[Finding]:
    """Return the findings."""
    return list(check_services(facts, settings, collectors))


def heard(**changes: Accounts | None) -> dict[str, Accounts]:
    """Return the services that report, with changes; None: one does not."""
    accounts = {**HEARD, **{f"{name}.1": kept for name, kept in changes.items()}}
    return {name: kept for name, kept in accounts.items() if kept is not None}


def test_services_that_are_fine() -> None:
    """With everyone there, and raw sockets, nothing needs a cure, whatever this user could do."""
    found = check(replace(FINE, raw=DENIED), ORIGINAL, RELAY)
    assert {finding.level for finding in found} == {"ok"}
    assert {finding.name for finding in found} == {
        "bus", "bus_kept", "services", "one_sender", "gateway", "copies", "raw_sockets", "descriptors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name", "level", "why"),
    [
        ({"bus": "owned by another user", "broker": None}, "bus", "warning", "owned by another user"),
        ({"broker": None, "bus": "closed"}, "services", "warning", "can't be used from here"),
        ({"broker": False, "gateway": "refused"}, "services", "warning", "nor does the gateway"),
        ({"broker": False, "gateway": "refused"}, "gateway", "warning", "only the collectors of the settings"),
        ({"removed": ["/tmp/f/lock"]}, "bus_kept", "error", "another program has removed /tmp/f/lock"),
        ({"cleaned": True}, "bus_kept", "warning", "systemd-tmpfiles removes"),
        ({"broker": False}, "services", "error", "nothing is copied"),
        ({"gateway": "refused"}, "gateway", "error", "refused"),
        ({"accounts": heard(ingest=None, forwarder=None)}, "services", "error", "not heard on the bus: ingest, forw"),
        ({"accounts": {**HEARD, "forwarder.2": {}}}, "one_sender", "error", "2 of them"),
        ({"accounts": {**HEARD, "transmitter.1 (process 7)": RAW}}, "one_sender", "error", "2 of them"),
        ({"accounts": heard(forwarder={"collector/siem": {"dropped_refused": 2}})}, "copies", "warning", "2 refused"),
        (
            {"accounts": heard(forwarder={"collector/siem": {"dropped_eperm": 3}})},
            "copies",
            "warning",
            "let copies out",
        ),
        ({"accounts": heard(transmitter={})}, "raw_sockets", "error", "runs without raw sockets"),
        ({"accounts": heard(transmitter=None), "raw": DENIED}, "raw_sockets", "error", "no transmitter reports"),
        ({"accounts": {}, "broker": None, "raw": DENIED}, "raw_sockets", "warning", "lacks CAP_NET_RAW"),
        ({"descriptors": {"": 4159, "forwarder.1": 66}}, "descriptors", "warning", "4159 files"),
        ({"descriptors": {"": 4160, "forwarder.1": 65}}, "descriptors", "warning", "65 files"),
    ],
)
def test_what_needs_a_cure(changes: dict[str, Any], name: str, level: str, why: str) -> None:
    """Each trouble with the services is told at its level, with a cure."""
    found = [each for each in check(replace(FINE, **changes), ORIGINAL, RELAY) if each.name == name]
    (trouble,) = [each for each in found if each.level != "ok"]
    assert trouble.level == level
    assert why in trouble.why
    assert trouble.cure


def test_a_second_transmitter_without_raw_sockets_sends_nothing_twice() -> None:
    """Of several transmitters only those that can send count."""
    assert all(each.level == "ok" for each in check(replace(FINE, accounts={**HEARD, "transmitter.2": {}})))


def test_without_anybody_who_asks_for_it_raw_sockets_are_no_error() -> None:
    """A transmitter without raw sockets is fine where nobody needs one and this user could start one."""
    (found,) = [each for each in check(replace(FINE, accounts=heard(transmitter={})), RELAY) if "raw" in each.name]
    assert (found.level, found.why) == ("ok", "this user may open raw sockets")


def test_a_collector_whose_copies_nobody_vouches_for() -> None:
    """One whose health is `waiting` is named."""
    waiting = Entry("late", "10.2.0.2", 9, streams=("messages",), source="relay", health="waiting")
    (found,) = [each for each in check(FINE, waiting) if each.level == "error"]
    assert (found.name, found.subject) == ("copies", "late")


@pytest.mark.parametrize(
    ("raw", "why", "cure"),
    [
        (RawSocketFacts(), "", ""),
        (DENIED, "this user lacks", "setpriv --reuid USER --regid GROUP "),
        (RawSocketFacts(errno.EPERM, no_new_privileges=True), "no_new_privs", "allowPrivilegeEscalation"),
        (RawSocketFacts(errno.EPERM, in_bounds=False), "not in the bounding set", "python-net-raw"),
        (RawSocketFacts(errno.EACCES), "security module", "aa-status"),
        (RawSocketFacts(errno.EAFNOSUPPORT), "AF_PACKET", "systemctl cat"),
        (RawSocketFacts(unfit="nobody can't read python"), "can't read python", "[transmitter] user"),
    ],
)
def test_why_there_are_no_raw_sockets(raw: RawSocketFacts, why: str, cure: str) -> None:
    """Each reason for which the kernel refuses them has a sentence and a cure of its own."""
    found = why_not_raw(raw)
    assert (why in found[0], cure in found[1], bool(found[0])) == (True, True, bool(why))


def test_many_names_are_cut() -> None:
    """A thousand collectors don't make a cell of the table a page."""
    assert some(f"c{number}" for number in range(1000)) == "c0, c1, c2, c3, c4 and 995 more"


def test_a_broker_on_another_host() -> None:
    """With `[bus] connect` the findings name that broker, and where to start it, instead of a directory."""
    found = {each.name: each for each in check(FINE, RELAY, settings=ELSEWHERE)}
    assert (found["bus"].level, found["bus"].why) == ("ok", "it is that of the broker at tcp://192.0.2.10:5800")
    silent = replace(FINE, broker=False, accounts={})
    found = {each.name: each for each in check(silent, RELAY, settings=ELSEWHERE)}
    assert (
        found["services"].why == "no broker answers at tcp://192.0.2.10:5800, but a gateway answers: nothing is copied"
    )
    assert found["services"].cure.startswith("start it there, and see [bus] listen of its settings")
