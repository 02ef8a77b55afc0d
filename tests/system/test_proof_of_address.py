"""Nobody aims copies at a host that did not ask for them."""

import json
import socket

import pytest

from shared.client import CHALLENGE_PREFIX
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, wait_until
from tests.system.test_source_preserving import Exporters
from tests.system.test_workers import reports
from tests.traffic import pause


def drain(receiver: socket.socket) -> list[bytes]:
    """All that has come."""
    received = []
    receiver.setblocking(False)
    while True:
        try:
            received.append(receiver.recv(65_536))
        except BlockingIOError:
            return received


@pytest.mark.parametrize("source", ["relay", "original"])
def test_nothing_but_challenges_until_it_is_proven(open_stack: OpenStack, source: str) -> None:
    """A client that registers another host's address gets it three short datagrams, and copies once it proves it."""
    open_stack.configure(PATIENT + '[[stream]]\nname = "messages"\nlisten = ["udp://10.2.0.1:6667"]\n')
    request = {"op": "register", "name": "c", "streams": ["*"], "port": 9000, "address": "10.2.0.2", "source": source}
    with (
        Host() as relay,
        Host() as victim,
        veth(End(relay, "eth", "10.2.0.1/24"), End(victim, "eth", "10.2.0.2/24")),
        victim.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        relay.entered(),
        Exporters(relay, [("10.2.0.1", 4000)], "10.2.0.1") as exporters,
    ):
        receiver.bind(("10.2.0.2", 9000))
        open_stack.start_all()
        open_stack.start("transmitter")
        for number in range(10):
            refused = ask_json(request | {"name": f"c{number}"})
            assert refused["error"] == "unproven_address"
            exporters.send(("10.2.0.1", 4000), b"not yet")
        receiver.settimeout(60)
        challenges = [receiver.recv(65_536) for _ in range(3)]
        pause(0.3)
        assert drain(receiver) == []
        assert all(each.startswith(CHALLENGE_PREFIX) and len(each) < 64 for each in challenges)
        assert ask_json({"op": "list"})["clients"] == {}
        nonce = challenges[0].removeprefix(CHALLENGE_PREFIX).decode()
        assert ask_json({"op": "confirm", "name": "c1", "nonce": nonce})["error"] == "unproven_address"
        granted = ask_json({"op": "confirm", "name": "c0", "nonce": nonce, "id": 5})
        assert (granted["ok"], granted["id"], granted["client"]["health"]) == (True, 5, "ok"), json.dumps(granted)
        exporters.send(("10.2.0.1", 4000), b"a copy")
        receiver.settimeout(60)
        assert receiver.recv(100) == b"a copy"
        # The same place for the same client needs no second proof.
        again = ask_json(request | {"name": "c0", "take_over": True})
        assert again["ok"], again
        assert drain(receiver) == []


def test_own_listener_is_a_loop(open_stack: OpenStack) -> None:
    """Our own listener is refused as a destination under every address of this host."""
    open_stack.configure('[[stream]]\nname = "messages"\nlisten = ["udp://[::]:6667"]\n')
    with (
        Host() as relay,
        Host() as other,
        veth(End(relay, "eth", "10.2.0.1/24"), End(other, "eth", "10.2.0.2/24")),
        relay.entered(),
    ):
        open_stack.start_all()
        request = {"op": "register", "name": "c", "streams": ["*"], "port": 6667}
        for address in ("127.0.0.1", "127.0.0.9", "::1", "10.2.0.1"):
            assert ask_json(request | {"address": address})["error"] == "loop", address
        broadcast = ask_json(request | {"address": "10.2.0.255", "port": 9})
        assert (broadcast["error"], "the address of one host" in broadcast["message"]) == ("bad_request", True)


def test_address_that_becomes_ours_is_a_loop(open_stack: OpenStack) -> None:
    """A collector at what becomes an address of this host is removed, and copies stop going round."""
    listening = '[[stream]]\nname = "messages"\nlisten = ["udp://[::]:6667"]\n'
    open_stack.configure(f'[gateway]\ndestinations = ["10.2.0.0/24"]\n{listening}')
    with (
        Host() as relay,
        Host() as other,
        veth(End(relay, "eth", "10.2.0.1/24"), End(other, "eth", "10.2.0.2/24")),
        relay.entered(),
        Exporters(relay, [("10.2.0.1", 4000)], "10.2.0.1") as exporters,
    ):
        open_stack.start_all()
        request = {"op": "register", "streams": ["*"], "port": 6667}
        for name, address in (("backup", "10.2.0.77"), ("siem", "10.2.0.2")):
            assert ask_json(request | {"name": name, "address": address})["ok"]
        relay.run("ip", "address", "add", "10.2.0.77/24", "dev", "eth")
        exporters.send(("10.2.0.1", 4000), b"round and round")
        wait_until(lambda: list(ask_json({"op": "list"})["clients"]) == ["siem"], "the loop is off the list")
        (said,) = open_stack["gateway"].events(
            "collector removed: its address is one of fanwire's own listeners (loop)"
        )
        assert said["clients"] == ["backup"]
        assert ask_json(request | {"name": "backup", "address": "10.2.0.77"})["error"] == "loop"
        assert received(open_stack) == received(open_stack), "it goes round still"


def received(stack: OpenStack) -> int:
    """Return the datagrams that ingest has received."""
    return reports(stack)["ingest.1"]["stream/messages"]["received"]
