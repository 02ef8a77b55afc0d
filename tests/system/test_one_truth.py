"""One account of what was lost: every view shows the same number, cause by cause."""

import json
import re
import socket
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from shared.ledger.equations import lost
from shared.losses import causes
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, wait_until

COLLECTORS = {
    "closed": ("127.0.0.1", "relay", "refused"),
    "nowhere": ("10.99.0.1", "relay", "not_connected"),
    "absent": ("10.2.0.9", "relay", "unreachable"),
    "silent hop": ("10.2.0.8", "original", "no_neighbour"),
    "no route": ("10.98.0.1", "original", "no_route"),
    "not let": ("192.0.2.7", "original", "destination_refused"),
}
"""The address of each, the source of its copies, and the cause that its losses have."""
SETTINGS = PATIENT + '[[stream]]\nname = "messages"\nlisten = ["udp://10.2.0.1:6667"]\n'


def entries() -> Iterator[str]:
    """The collectors, as settings."""
    for name, (address, source, _) in COLLECTORS.items():
        yield f'[[collector]]\nname = "{name}"\nstreams = ["*"]\naddress = "{address}"\n'
        yield f'port = 9599\nsource = "{source}"\n'


@contextmanager
def relay() -> Iterator[Host]:
    """A relay with a link on which nobody else answers."""
    with ExitStack() as opened:
        here, there = opened.enter_context(Host()), opened.enter_context(Host())
        opened.enter_context(veth(End(here, "up", "10.2.0.1/24"), End(there, "eth", "10.2.0.2/24")))
        with here.entered():
            yield here


def fetch(path: str) -> str:
    """The console's answer."""
    with urllib.request.urlopen(f"http://127.0.0.1:8080{path}", timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def in_metrics() -> dict[str, Counter[str]]:
    """Losses by collector and cause, as Prometheus reads them."""
    found: dict[str, Counter[str]] = {name: Counter() for name in COLLECTORS}
    for family in text_string_to_metric_families(fetch("/metrics")):
        for sample in family.samples:
            if sample.name == "fanwire_copies_lost_total" and sample.value:
                found[sample.labels["collector"]][sample.labels["cause"]] += int(sample.value)
    return found


def in_ledger(stack: OpenStack) -> tuple[dict[str, Counter[str]], dict[str, dict[str, int]]]:
    """Losses by collector and cause as `fanwire ledger` lists them, and the accounts that it prints."""
    ledger = stack.operator("ledger", "--json")
    assert ledger.process.wait(60) == 0, ledger.text
    told = json.loads(ledger.text)
    found: dict[str, Counter[str]] = {name: Counter() for name in COLLECTORS}
    for loss in told["losses"]:
        assert loss["place"] in ("way out", "network"), loss
        found[loss["of"]][loss["what"]] += loss["lost"]
    accounts = {
        name.removeprefix("collector/"): account
        for service in told["services"].values()
        for name, account in service.items()
        if name.startswith("collector/")
    }
    return found, accounts


def ended_losses(stack: OpenStack) -> Counter[tuple[str, str]]:
    """Losses by collector and cause, as the senders log their ends."""
    found: Counter[tuple[str, str]] = Counter()
    for name in ("forwarder", "transmitter"):
        for line in stack[name].events("loss ended"):
            found[line["of"], line["cause"]] += line["lost"]
    return found


def test_every_view_has_the_same_number(open_stack: OpenStack) -> None:
    """Copies that reach nobody, each for another cause, are one number in clients, ledger, doctor, metrics, log."""
    stack = open_stack
    stack.configure(SETTINGS + "".join(entries()))
    with relay():
        stack.start_all()
        stack.start("transmitter")
        stack.start("console")

        def listed() -> dict[str, Any]:
            return {name: entry["lost"] for name, entry in ask_json({"op": "list"})["clients"].items()}

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
            exporter.bind(("10.2.0.1", 0))

            def all_lose() -> bool:
                exporter.sendto(b"x" * 100, ("10.2.0.1", 6667))
                return all(listed().values())

            wait_until(all_lose, lambda: f"each collector loses something: {listed()}")
        wait_until(lambda: len(ended_losses(stack)) >= len(COLLECTORS), "no loss grows any more")
        ledger, accounts = in_ledger(stack)
        numbers = {name: lost(account) for name, account in accounts.items()}
        for name, (_, _, cause) in COLLECTORS.items():
            assert cause in causes(accounts[name]), (name, accounts[name])
        assert {name: dict(found) for name, found in ledger.items()} == {n: causes(a) for n, a in accounts.items()}
        wait_until(lambda: listed() == numbers, lambda: f"clients: {listed()}, ledger: {numbers}")
        wait_until(lambda: in_metrics() == ledger, lambda: f"metrics: {in_metrics()}, ledger: {ledger}")
        for name, number in numbers.items():
            detail = json.loads(fetch(f"/api/collectors/{name.replace(' ', '%20')}"))["row"]
            assert (detail["lost"], detail["causes"]) == (number, causes(accounts[name]))
        doctor = stack.operator("doctor", "--json")
        doctor.process.wait(60)
        said = {
            each["subject"]: int(re.findall(r"(\d+) lost since", each["why"])[0])
            for each in json.loads(doctor.text)["findings"]
            if each["name"] == "copies"
        }
        assert said == numbers
        logged = ended_losses(stack)
        assert {(name, cause): count for name, found in ledger.items() for cause, count in found.items()} == logged
        sick = {line["of"]: line["health"] for line in stack["gateway"].events("collector health changed")}
        assert (sick["closed"], sick["nowhere"]) == ("refusing", "unreachable")
        assert len(stack["forwarder"].events("loss began")) == len(stack["forwarder"].events("loss ended"))
