"""Messages between processes on the bus, and messages of the kernel."""

import argparse
from collections import deque
from collections.abc import Callable
from typing import Final
from unittest import mock

import msgspec

import shared.net.netlink
from services.operator.commands import ledger
from services.operator.doctor.facts import by_service
from services.operator.doctor.services import ServiceFacts, check_services
from shared.bus.messages import MessageError, Status, decode
from shared.bus.status import Reports
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import group
from shared.monitoring.balance import Balance
from shared.net.netlink import Netlink
from shared.process.lifecycle import UNAVAILABLE, OperatorError
from shared.settings.model import Settings
from tests.fuzz.corpus import split_parts
from tests.fuzz.printing import printed
from tests.shared.net.test_netlink import PlayedKernel

MAX_PARTS: Final = 7
MAX_REPORTS: Final = 16
STATUS_PARTS: Final = 3


def bus_message(data: bytes) -> None:
    """A message is decoded, and a batch holds what its rows say, or it is a MessageError."""
    try:
        message = decode(split_parts(data, MAX_PARTS))
    except MessageError as error:
        assert error.cause
        return
    if message.batch is not None and len(message.batch):
        batch = Gathered([message.batch])
        assert sum(len(payload) for _, _, payload in message.batch.datagrams()) == int(batch.lengths.sum())
        assert group(batch.lengths, 1472)[0] == 0


def reports(data: bytes) -> None:
    """Services' reports, one message after the other, add up or not, and are printed as a table and as JSON."""
    balance, taken = Balance(), Reports()
    parts = split_parts(data, MAX_REPORTS * STATUS_PARTS)
    for at in range(0, len(parts), STATUS_PARTS):
        try:
            message = decode(parts[at : at + STATUS_PARTS])
        except MessageError:
            continue
        if isinstance(message.body, Status) and (report := taken.add(message.envelope, message.body)):
            balance.add_report(report.service, report.boot, float(at), report.accounts)
    facts = ServiceFacts(broker=True, accounts=by_service(taken.latest.values()))
    assert list(check_services(facts, Settings(), []))
    found = list(balance.discrepancies())
    assert not (balance.settled and any(" datagrams behind " in sentence for sentence in found))
    assert all(loss.lost > 0 for loss in balance.losses())
    with mock.patch.object(ledger, "_listen", return_value=balance):
        try:
            with printed():
                code = ledger.run(argparse.Namespace(json=False, seconds=0.0), Settings())
            with printed(escaped=False) as (as_json, _):
                ledger.run(argparse.Namespace(json=True, seconds=0.0), Settings())
        except OperatorError as error:
            assert error.exit_code == UNAVAILABLE
            return
    assert code == int(bool(found))
    assert msgspec.json.decode(as_json.getvalue())["services"] == balance.accounts


def netlink(data: bytes) -> None:
    """The netlink answer or event is one or none for any bytes of the kernel, and nothing is raised."""
    kernel = PlayedKernel()
    with mock.patch.object(shared.net.netlink, "_open", return_value=kernel):
        asks: tuple[Callable[[Netlink], object], ...] = (
            Netlink.links,
            lambda netlink: netlink.route("10.2.0.2"),
            lambda netlink: netlink.neighbour(2, "10.2.0.2"),
            lambda netlink: list(netlink.events()),
        )
        for ask in asks:
            kernel.says = deque([data])
            ask(Netlink())
