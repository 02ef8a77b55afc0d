import json
import os
import shlex
import socket
import threading
from collections import Counter
from typing import Any

import pytest

from tests.network import End, Host, veth
from tests.openly import NOBODY, OpenStack
from tests.services.operator.played import PlayedGateway, finish, run
from tests.stack import PATIENT, Stack, wait_until

CHECKS = {
    *(
        "settings",
        "bus",
        "bus_kept",
        "listeners",
        "receiving",
        "services",
        "one_sender",
        "gateway",
        "copies",
        "raw_sockets",
        "descriptors",
    ),
    *("receive_buffer", "kernel_drops", "send_buffer", "backlog", "budget", "udp_errors"),
    *("reverse_path", "conntrack", "clock"),
    *(
        "loops",
        "doubles",
        "destinations",
        "route",
        "interface",
        "next_hop",
        "mtu",
        "egress_queue",
        "reverse_path_there",
        "cloud",
    ),
}
STRANGER = NOBODY - 1
"""A user who has no part in this: the bus of root is open to nobody's group."""


def doctor(stack: Stack, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run it; return its exit code and its findings."""
    code, text = run(stack, "doctor", "--json", *arguments)
    answer = json.loads(text)
    found: list[dict[str, Any]] = answer["findings"]
    for level in ("ok", "warning", "error"):
        assert answer[level] == sum(finding["level"] == level for finding in found)
    return code, found


def errors(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and subject of each error; everything that is not fine has a cure."""
    assert all(bool(finding["cure"]) == (finding["level"] != "ok") for finding in found)
    return [(finding["name"], finding["subject"]) for finding in found if finding["level"] == "error"]


def collector(name: str, address: str, port: int = 9514, source: str = "relay") -> str:
    """An entry of the settings."""
    return (
        f'[[collector]]\nname = "{name}"\nstreams = ["messages"]\naddress = "{address}"\nport = {port}\n'
        f'source = "{source}"\n'
    )


def test_what_a_service_would_refuse(stack: Stack) -> None:
    """Before the start, what a service would refuse is an error of that service, in its own words."""
    stack.configure('[console]\nlisten = ["http://192.0.2.1:8080"]\n')
    _, found = doctor(stack)
    (finding,) = [each for each in found if each["name"] == "settings"]
    assert (finding["level"], finding["subject"]) == ("error", "console")
    assert finding["cure"] == "see `fanwire config --check`"
    assert finding["why"].startswith(
        "at its start it would say: [console] listen: http://192.0.2.1:8080 is not loopback"
    )


def test_a_stack_that_runs(open_stack: OpenStack) -> None:
    """With everything running it ends with 0, lists every check, and sends nothing."""
    open_stack.configure(PATIENT)
    open_stack.start_all(ingest=2)
    open_stack.start("transmitter")
    collect = open_stack.operator("collect", "siem", "--stream", "messages", "--count", "2")
    collect.wait_for("collecting")
    code, found = doctor(open_stack)
    assert (code, errors(found)) == (0, [])
    assert {finding["name"] for finding in found} == CHECKS
    assert "no service would refuse them" in [finding["why"] for finding in found]
    assert "Got message" not in collect.text
    assert collect.process.poll() is None

    code, found = doctor(open_stack, "--probe", "messages")
    assert (code, errors(found)) == (0, [])
    told = {each["name"]: each["why"] for each in found if each["name"].startswith("probe_")}
    sent_from = told["probe_original"].split()[2]
    assert sent_from != "127.0.0.1"
    assert told["probe_original"] == f"sent from {sent_from} to 127.0.0.1 port 6667, its copy came from {sent_from}"
    assert told["probe_relay"].endswith("its copy came from 127.0.0.1")
    said = finish(collect)[1]
    assert said.count("fanwire: a probe of stream messages, to be ignored by others") == 2
    assert json.loads(run(open_stack, "clients", "--json")[1]) == {}


class Returning(threading.Thread):
    """A collector that sends all it gets to our listener: each payload a few times, where another relay never ends."""

    def __init__(self, address: str, listener: str) -> None:
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, 9514))
        self._listener = listener

    def run(self) -> None:
        """Send back what comes, until nothing is in it."""
        came: Counter[bytes] = Counter()
        while payload := self.socket.recv(65_536):
            came[payload] += 1
            if came[payload] <= 3:
                self.socket.sendto(payload, (self._listener, 6667))


@pytest.mark.parametrize("address", ["127.0.0.2", "::1"])
def test_the_probe_finds_who_sends_back_what_it_gets(open_stack: OpenStack, address: str) -> None:
    """A loop by way of a collector, which no check of addresses can see, shows in a probe that comes round again."""
    listener = "::1" if ":" in address else "127.0.0.1"
    host = f"[{listener}]" if ":" in listener else listener
    open_stack.configure(
        f'{PATIENT}[[stream]]\nname = "messages"\nlisten = ["udp://{host}:6667"]\n' + collector("other", address)
    )
    open_stack.start_all()
    open_stack.start("transmitter")
    returning = Returning(address, listener)
    with returning.socket:
        returning.start()
        code, found = doctor(open_stack, "--probe", "messages")
        assert (code, errors(found)) == (1, [("probe_relay", "messages"), ("probe_original", "messages")])
        assert all("came back again" in each["why"] for each in found if each["level"] == "error")
        returning.socket.sendto(b"", (address, 9514))
        returning.join(20)


def test_the_probe_by_ipv6_and_a_path(stack: Stack) -> None:
    """A stream on IPv6 alone and a gateway on AF_UNIX, which tells no address, are probed as well."""
    path = stack.directory / "gateway.sock"
    stream = '[[stream]]\nname = "six"\nlisten = ["udp://[::1]:7000"]\n'
    stack.configure(f'{PATIENT}listen = ["unix://{path}"]\n{stream}')
    stack.start_all()
    code, found = doctor(stack, "--probe", "six")
    assert (code, errors(found)) == (0, [])
    (relay,) = [finding["why"] for finding in found if finding["name"] == "probe_relay"]
    assert relay == "sent from ::1 to ::1 port 7000, its copy came from ::1"


def test_what_is_missing(stack: Stack) -> None:
    """A service that is not there is named, as is who gets nothing by that, and the probe tells where it was lost."""
    stack.configure(collector("flows", "127.0.0.1", source="original"))
    stack.start_all()
    for gone, others, where in (
        ("forwarder", (), "ingest received it, and no service had subscribed to the stream"),
        ("ingest.1", ("forwarder",), "ingest did not receive it"),
    ):
        stack[gone].stop()
        for other in others:
            stack.start(other)
        code, found = doctor(stack, "--probe", "messages")
        assert code == 1
        assert {("services", ""), ("raw_sockets", "flows"), ("probe_relay", "messages")} <= set(errors(found))
        (missing,) = [finding["why"] for finding in found if finding["name"] == "services"]
        assert missing == f"not heard on the bus: {gone.partition('.')[0]}: not running, or stopped or stuck"
        (lost,) = [finding["why"] for finding in found if finding["name"] == "probe_relay"]
        assert where in lost


def test_without_services(stack: Stack) -> None:
    """With nothing running it says so, checks the host and the collectors of the settings, and none of that is made."""
    stack.configure(collector("siem", "198.51.100.7") + collector("me", "127.0.0.1", 6667))
    code, found = doctor(stack)
    assert code == 1
    assert {finding["name"] for finding in found} == CHECKS
    assert errors(found) == [("settings", "gateway"), ("loops", "me"), ("route", "siem")]
    (gateway,) = [finding for finding in found if finding["name"] == "gateway"]
    assert "no gateway at tcp://127.0.0.1:5000 (Connection refused)" in gateway["why"]
    assert not stack.bus.exists()
    code, text = run(stack, "doctor")
    assert (code, text.splitlines()[-1].split(",")[0]) == (1, "errors: 3")
    rows = [line.split()[:3] for line in text.splitlines() if " error " in line]
    assert rows == [["settings", "error", "gateway"], ["loops", "error", "me"], ["route", "error", "siem"]]


def test_the_probe_without_services(stack: Stack) -> None:
    """A probe that nobody could take is an error that says so, not a crash."""
    code, found = doctor(stack, "--probe", "messages")
    assert (code, errors(found)) == (1, [("probe_relay", "messages")])


def test_collectors_that_get_nothing(open_stack: OpenStack) -> None:
    """No route, a destination that is refused, a next hop that is silent: each is an error that names the collector."""
    with Host() as relay, Host() as siem, veth(End(relay, "up", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")):
        open_stack.configure(
            PATIENT + '[transmitter]\ndestinations = ["10.2.0.0/30"]\n'
            + collector("fine", "10.2.0.2", source="original")
            + collector("refused", "10.2.0.77", source="original")
            + collector("nowhere", "198.51.100.7")
            + collector("silent", "10.2.0.99")
        )  # fmt: skip
        with relay.entered():
            open_stack.start_all()
            open_stack.start("transmitter")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
                exporter.sendto(b"for all", ("127.0.0.1", 6667))

            wait_until(
                lambda: "FAILED" in relay.run("ip", "neigh", "show", "10.2.0.99"),
                "the kernel has asked for the next hop",
            )
            code, found = doctor(open_stack)
    assert code == 1
    reached_by_nobody = {("destinations", "refused"), ("route", "nowhere"), ("next_hop", "silent")}
    # `copies` tells of the silent one too, as soon as its copies have waited in vain
    assert set(errors(found)) - {("copies", "silent")} == reached_by_nobody
    (there,) = [finding for finding in found if finding["name"] == "reverse_path_there"]
    assert (there["level"], there["subject"]) == ("warning", "fine, refused")
    assert "sysctl net.ipv4.conf.all.rp_filter" in there["cure"]


def test_a_gateway_that_lists_what_it_should_not(stack: Stack) -> None:
    """All entries of the registry are checked, however they got in: a loop, and two at one place."""
    with PlayedGateway() as gateway:
        entry = {"address": "127.0.0.1", "streams": ["*"], "source": "relay", "generation": 1, "health": "ok"}
        gateway.clients = {
            "name only": {"name": "name only", "address": "192.0.2.1", "port": 4},
            **{name: {**entry, "name": name, "port": port} for name, port in (("me", 6667), ("a", 9), ("b", 9))},
        }
        code, found = doctor(stack, "--gateway", gateway.endpoint)
    assert code == 1
    assert ("loops", "me") in errors(found)
    assert [each["subject"] for each in found if (each["name"], each["level"]) == ("doubles", "warning")] == ["b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root starts it as somebody else")
def test_a_plain_user(open_stack: OpenStack) -> None:
    """Somebody who may not enter the bus still sees the host, and is told as whom to ask."""
    open_stack.start_all()
    with open_stack._program("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"):
        command = [*open_stack.interpreter, "-m", "services.operator", "doctor", "--json"]
        code, text = finish(open_stack.spawn("doctor", command))
    found = json.loads(text)["findings"]
    assert (code, errors(found)) == (0, [])
    assert {finding["name"] for finding in found} == CHECKS
    (bus,) = [finding for finding in found if finding["name"] == "bus"]
    assert bus["level"] == "warning"
    become, owner, _program, *arguments = shlex.split(bus["cure"].split("`")[1])[1:]
    assert (become, owner, arguments[0]) == ("-u", open_stack.bus.owner(), "doctor")
    open_stack.configure("")
    _, text = finish(open_stack.operator(*arguments, "--json"))
    found = json.loads(text)["findings"]
    assert [finding["level"] for finding in found if finding["name"] in ("bus", "services")] == ["ok", "ok"]


def test_an_unknown_stream_is_wrong_usage(stack: Stack) -> None:
    """`--probe` of a stream that is not in the settings says which are."""
    code, text = run(stack, "doctor", "--probe", "nosuch")
    assert (code, text) == (64, "fanwire doctor: no stream 'nosuch'; the streams are: messages\n")
