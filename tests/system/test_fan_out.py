"""Datagrams in, a copy to every collector: with programs nobody here wrote, and byte for byte under load."""

import json
import shutil
import subprocess
from contextlib import ExitStack

import pytest

from tests.stack import PATIENT, Stack, sign_up, wait_until
from tests.traffic import CheckingCollector, exporters, open_receiver, pause, payload

IN_FLIGHT_SHARE = 3
"""The sender keeps a third of the smallest receive buffer in flight, so that no buffer anywhere overflows."""


def need(program: str) -> str:
    """Path of a program, or skip by name."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def test_logger_reaches_collectors_signed_up_with_nc(stack: Stack) -> None:
    """Messages of `logger` reach two collectors signed up with `nc`; a third that does not run disturbs nobody."""
    logger, netcat = need("logger"), need("nc")
    stack.configure(PATIENT)
    stack.start_all()
    for number, name in enumerate(("siem", "archive", "absent")):
        request = json.dumps({"op": "register", "name": name, "streams": ["messages"], "port": 9514 + number})
        answer = subprocess.run(
            [netcat, "-q1", "127.0.0.1", "5000"], input=request + "\n", capture_output=True, text=True, check=True
        )
        assert json.loads(answer.stdout)["client"]["health"] == "ok"
    collectors = [stack.spawn(f"nc{port}", [netcat, "-l", "-u", "127.0.0.1", str(port)]) for port in (9514, 9515)]
    pause(0.5)
    for number in range(20):
        subprocess.run([logger, "-d", "-n", "127.0.0.1", "-P", "6667", f"disk {number} is full"], check=True)
        pause(0.01)
    for collector in collectors:
        collector.wait_for("disk 19 is full")
        assert all(f"disk {number} is full" in collector.text for number in range(20))
    ledger = stack.operator("ledger", "--json")
    assert ledger.process.wait(60) == 0
    forwarder = json.loads(ledger.text)["services"]["forwarder.1"]
    assert forwarder["collector/siem"]["sent"] == forwarder["collector/archive"]["sent"] == 20
    absent = forwarder["collector/absent"]
    assert absent["expected"] == 20
    assert absent["refusals"] > 0


def await_all(collectors: list[CheckingCollector], count: int) -> None:
    """Wait until each collector has so many."""
    wait_until(lambda: all(each.received >= count for each in collectors), f"{count} datagrams at every collector")


@pytest.mark.parametrize("datagrams", [10_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_every_byte_reaches_every_collector(stack: Stack, datagrams: int) -> None:
    """Mixed sizes from many exporters, IPv4 and IPv6, two workers, four collectors: every copy equal and in order."""
    stack.configure(f'{PATIENT}[[stream]]\nname = "mixed"\nlisten = ["udp://127.0.0.1:7000", "udp://[::1]:7000"]\n')
    stack.start_all(ingest=2)
    probe, buffer = open_receiver("127.0.0.1", 0, 1 << 25)
    probe.close()
    with ExitStack() as cleanup:
        collectors = []
        for number, address in enumerate(("127.0.0.1", "127.0.0.1", "::1", "127.0.0.1")):
            collectors.append(CheckingCollector(stack, address, 9100 + number))
            request = {"name": f"c{number}", "streams": ["mixed"], "port": 9100 + number}
            assert sign_up({**request, "address": address})["address"] == address
        sources = cleanup.enter_context(exporters(8, 7000))
        sources += cleanup.enter_context(exporters(4, 7000, "::1"))
        in_flight = 0
        for number in range(datagrams):
            exporter = number % len(sources)
            body = payload(exporter, number // len(sources))
            sources[exporter].send(body)
            in_flight += len(body) + len(body) // 4 + 2048
            if in_flight > buffer // IN_FLIGHT_SHARE or number == datagrams - 1:
                await_all(collectors, number + 1)
                in_flight = 0
        assert [each.wrong for each in collectors] == [0] * 4
        ledger = stack.operator("ledger", "--json")
        assert ledger.process.wait(60) == 0, ledger.text
        assert max(stack[f"ingest.{number}"].resident_mb("VmHWM") for number in (1, 2)) < 300
    services = json.loads(ledger.text)["services"]
    received = [services[f"ingest.{number}"]["stream/mixed"]["received"] for number in (1, 2)]
    assert sum(received) == datagrams
    assert all(received)
    for number in range(4):
        account = services["forwarder.1"][f"collector/c{number}"]
        dropped = sum(count for name, count in account.items() if name.startswith("dropped_"))
        assert account["sent"] + dropped + account.get("missed", 0) == datagrams
        assert account["sent"] == collectors[number].received
