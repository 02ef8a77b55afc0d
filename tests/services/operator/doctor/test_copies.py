import socket
from contextlib import ExitStack

import msgspec
import pytest

from services.operator.doctor.copies import check_copies
from shared.client import Withheld
from shared.monitoring.finding import Finding
from shared.process.registry_client import Entry
from tests.network import End, Host, veth
from tests.refusing import refused
from tests.services.operator.played import run
from tests.stack import PATIENT, Stack, ask_json, wait_until


def entry(health: str) -> Entry:
    """A collector that does as this word says."""
    return Entry("siem", "10.2.0.2", 9514, streams=("messages",), source="relay", health=health)


@pytest.mark.parametrize(
    ("counters", "health", "level", "why", "cure"),
    [
        ({"dropped_eperm": 60}, "unreachable", "error", "does not let copies out", "OUTPUT"),
        ({"dropped_eperm": 60, "sent": 9}, "ok", "warning", "does not let copies out", "seccomp"),
        (
            {"prohibited": 7, "unreachables": 8, "dropped_not_connected": 3},
            "unreachable",
            "error",
            "rejects",
            "open the",
        ),
        ({"prohibited": 7, "unreachables": 7}, "ok", "warning", "a firewall rejects copies", "open the port"),
        ({"unreachables": 7}, "unreachable", "error", "or a firewall rejects them", "ping the collector"),
        (
            {"dropped_queue_full": 7},
            "slow",
            "warning",
            "7 lost since it signed up, as forwarder.1 counts: 7 queue_full",
            "see the cause in services/operator/README.md",
        ),
        ({"refusals": 4, "dropped_refused": 1}, "refusing", "error", "port is closed; 5 lost", "start the collector"),
    ],
)
def test_copies_that_are_denied_have_their_cure(
    counters: dict[str, int], health: str, level: str, why: str, cure: str
) -> None:
    """A refusal by this host or a firewall is told as that: an error while it lasts, a warning once it is over."""
    (found,) = check_copies({"forwarder.1": {"collector/siem": counters}}, [entry(health)])
    assert (found.name, found.level, found.subject) == ("copies", level, "siem")
    assert why in found.why
    assert cure in found.cure


def test_withheld_copies_are_said_to_be() -> None:
    """A collector whose copies an admin withholds is a warning with the reason, and no fault of any service."""
    held = msgspec.structs.replace(entry("withheld"), withheld=Withheld("ops", 1.0, "too slow"))
    found = list(check_copies({"forwarder.1": {"collector/siem": {"withheld_by_admin": 9}}}, [held]))
    assert [(each.level, each.subject) for each in found] == [("warning", "siem"), ("ok", "")]
    assert found[0].why == "an admin withholds its copies: too slow"
    assert found[0].cure == "`fanwire release siem` lets them flow again"


def found_of(stack: Stack, name: str) -> list[Finding]:
    """Return doctor's findings under a name."""
    found = msgspec.json.decode(run(stack, "doctor", "--json")[1])["findings"]
    return [each for each in msgspec.convert(found, list[Finding]) if each.name == name]


def flood_until_unreachable(stack: Stack) -> None:
    """Send to the stream until the collector is known to be unreachable."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:

        def reached() -> bool:
            exporter.sendto(b"x", ("127.0.0.1", 6667))
            return bool(ask_json({"op": "list"})["clients"]["siem"]["health"] == "unreachable")

        wait_until(reached, "the collector is unreachable")


def test_a_filter_on_this_host_is_found(stack: Stack) -> None:
    """Doctor says that this host refuses copies, and where to look, when the kernel refuses each with EPERM."""
    stack.configure(PATIENT)
    for name in ("broker", "gateway", "ingest"):
        stack.start(name)
    before, stack.interpreter = stack.interpreter, refused("sendmmsg=EPERM,sendmsg=EPERM")
    stack.start("forwarder")
    stack.interpreter = before
    ask_json({"op": "register", "name": "siem", "streams": ["messages"], "port": 9514})
    flood_until_unreachable(stack)
    (found,) = found_of(stack, "copies")
    assert (found.level, found.subject) == ("error", "siem")
    assert "this host does not let copies out" in found.why
    assert "nft list ruleset" in found.cure


def test_a_firewall_and_an_mtu_that_is_not_known_are_found(stack: Stack) -> None:
    """Doctor says that a router rejects copies, and that the MTU behind it is not known, until it is set."""
    stack.configure(PATIENT + 'destinations = ["fd00:3::/64"]\n')
    with ExitStack() as opened:
        relay, router = opened.enter_context(Host()), opened.enter_context(Host())
        opened.enter_context(veth(End(relay, "up", "fd00:2::1/64"), End(router, "down", "fd00:2::2/64")))
        router.forward()
        relay.route("fd00:3::/64", "fd00:2::2")
        router.run("ip", "-6", "route", "add", "prohibit", "fd00:3::1")
        with relay.entered():
            stack.start_all()
            siem = {"op": "register", "name": "siem", "streams": ["messages"], "port": 9514, "address": "fd00:3::1"}
            ask_json(siem)
            flood_until_unreachable(stack)
            (found,) = found_of(stack, "copies")
            assert (found.level, "a firewall rejects copies" in found.why) == ("error", True)
            (mtu,) = found_of(stack, "mtu")
            assert (mtu.level, mtu.subject) == ("warning", "siem")
            command = mtu.cure.partition("set the MTU: `")[2].partition("`")[0]
            relay.run(*command.split())
            (mtu,) = found_of(stack, "mtu")
            assert "the MTU of the way behind" not in mtu.why
