from collections import Counter
from typing import Any

import msgspec
import pytest

from shared.bus.bodies.exporters_message import Exporters
from shared.bus.bodies.health_message import Health, Troubled
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.bus.messages import Body, Message, RegistrySnapshot, Status
from shared.client import Client, Withheld
from shared.ledger.accounts import Accounts, unparse_origin
from shared.losses import PLACES, kind_of
from shared.monitoring.observer import FORGET_SECONDS, SILENT_SECONDS, Observer
from shared.monitoring.picture import RECENT_SECONDS, Collector, Picture
from shared.net.addresses import pack_address
from shared.serving_nodes import owner_of
from tests.builders import make_envelope

SIEM = Client("siem", streams=("syslog",), generation=7, address="192.0.2.1", port=514, prefixes=("10.0.0.0/8",))
OTHER = Client("other", streams=("*",), generation=8, address="192.0.2.2", port=514)


class Told:
    """An observer, and what is told to it in time."""

    def __init__(self, *asked_for: str) -> None:
        self.observer = Observer(asked_for)
        self.now = 1000.0
        self._reports = 0

    def tell(self, sender: str, body: Body, boot: int = 1) -> None:
        """Hand a message in."""
        self.observer.note(Message("", make_envelope(sender=sender, boot=boot), body), self.now)

    def status(self, service: str, accounts: Accounts, boot: int = 1, *, ended: bool = False) -> None:
        """Hand a report in, as if it had just come."""
        self._reports += 1
        self.tell(service, Status(service, 42, 10**18, self._reports, 0, 1, accounts, ended=ended), boot)
        self.observer._told[service].report = _at(self.observer._told[service].report, self.now)

    def picture(self, seconds: float = 0.0) -> Picture:
        """The picture after so many seconds."""
        self.now += seconds
        return self.observer.picture(self.now)

    def everyone(self, **siem: int) -> None:
        """All that is needed reports, and the collector has this account."""
        published = siem.get("sent", 0)
        stream = {"stream/syslog": {"received": published, "published": published, "bytes": 100 * published}}
        origin = {unparse_origin("ingest.1", 1, "syslog"): {"taken": published, "reached": published}}
        self.status("ingest.1", stream)
        self.status("broker.1", {})
        self.status("gateway.1", {})
        self.status("forwarder.1", {**origin, "collector/siem": siem})


def _at(report: Any, now: float) -> Any:
    return type(report)(**{name: getattr(report, name) for name in report.__slots__} | {"received_at": now})


def collector(picture: Picture, name: str = "siem") -> Collector:
    """The row of a collector."""
    assert picture.collectors is not None
    (found,) = [each for each in picture.collectors if each.client.name == name]
    return found


def test_nothing_reported_is_unknown() -> None:
    """Before anything is told, nothing is 0: streams, collectors, exporters and the verdict are unknown."""
    told = Told()
    picture = told.picture()
    assert (picture.collectors, picture.exporters, picture.balanced) == (None, None, None)
    assert picture.verdict.level == "unknown"
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM]))
    siem = collector(told.picture())
    assert (siem.sent, siem.lost, siem.rate, siem.health) == (None, None, None, "unknown")
    (stream,) = told.picture().streams
    assert (stream.name, stream.received, stream.takers) == ("syslog", None, ("siem",))


def test_a_lost_change_of_the_registry_shows_by_the_gateways_revision() -> None:
    """The registry is asked for anew where the gateway is further than what has come of it, though all is quiet."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM]))
    for revision, stale in ((1, False), (2, True)):
        told.status("gateway.1", {"gateway": {"revision": revision}})
        assert told.observer.stale == stale


def test_rates_losses_and_health() -> None:
    """Two reports make a rate; losses have causes and what of them is recent; a trouble has its start."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM, OTHER]))
    told.everyone(sent=100, refusals=3, expected=100, offered=100)
    told.tell("forwarder.1", Health("relay", 1, 0, 1, []))
    first = collector(told.picture())
    assert (first.sent, first.rate, first.lost, first.recent, first.health) == (100, None, 3, 0, "ok")
    told.now += 2
    told.everyone(sent=300, refusals=9, dropped_refused=1, expected=300, offered=300)
    told.tell("forwarder.1", Health("relay", 2, 0, 1, [Troubled("siem", 7, "refusing", 500, 10)]))
    picture = told.picture()
    siem = collector(picture)
    assert (siem.rate, siem.lost, siem.lost_rate, siem.recent) == (100.0, 10, 3.5, 7)
    assert (siem.causes, siem.health, siem.since) == ({"refused": 10}, "refusing", 1001.5)
    assert collector(picture, "other").lost is None
    assert {(each.loss.place, each.loss.lost, each.recent) for each in picture.losses} == {
        ("network", 9, 6),
        ("way out", 1, 1),
    }
    assert picture.verdict.level == "error"
    assert "refusing: siem" in picture.verdict.reasons
    assert "lost in the last 2 s: 1 (way out), 6 (network)" in picture.verdict.reasons
    (stream,) = picture.streams
    assert (stream.rate, stream.byte_rate, stream.workers[0].name) == (100.0, 10_000.0, "ingest.1")


def test_a_report_for_somebody_else_hides_no_rate() -> None:
    """A service also reports when another command subscribes: rates are then those since the second before."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM]))
    rates = []
    for seconds, sent in ((0.0, 0), (1.0, 100), (0.02, 102), (0.23, 125), (0.75, 200)):
        told.now += seconds
        told.everyone(sent=sent)
        rates.append(told.picture().streams[0].rate)
    assert rates == [None, *(pytest.approx(100.0) for _ in range(4))]


def test_a_row_and_the_losses_agree_on_what_is_recent() -> None:
    """A loss of a collector that signs up while all is watched is recent, in its row and by cause."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, []))
    told.everyone()
    told.picture()
    told.now += RECENT_SECONDS
    told.tell("gateway.1", RegistrySnapshot(2, 0, 1, [SIEM]))
    told.everyone(sent=80, refusals=73, expected=80, offered=80)
    told.picture()
    told.everyone(sent=100, refusals=90, expected=100, offered=100)
    picture = told.picture()
    assert [collector(picture).recent] == [each.recent for each in picture.losses] == [90]
    assert "lost in the last five minutes: 90 (network)" in picture.verdict.reasons


def recent(picture: Picture) -> dict[tuple[str, str], tuple[int, int]]:
    """Losses, and what of them is recent, by place and unit or cause."""
    found = {(each.loss.place, each.loss.what): (each.loss.lost, each.recent) for each in picture.losses}
    assert len(found) == len(picture.losses)
    return found


def test_starts_of_a_worker_are_one_loss_and_only_what_grew_is_recent() -> None:
    """Losses on the bus from two starts of a worker are one row; a start that is forgotten makes nothing recent."""
    told, bus = Told(), ("bus", "datagrams of ingest.1")
    for boots, expected in (
        ({1: 10, 2: 900}, (910, 0)),
        ({1: 10, 2: 905}, (915, 5)),
        ({2: 905}, (905, 5)),
        ({2: 905, 3: 7}, (912, 12)),
    ):
        accounts = {unparse_origin("ingest.1", boot, "syslog"): {"missed": missed} for boot, missed in boots.items()}
        told.status("forwarder.1", accounts)
        assert recent(told.picture(1.0))[bus] == expected
    for _ in range(62):
        told.status("forwarder.1", accounts)
        found = recent(told.picture(5.0))
    assert found[bus] == (912, 0)


def test_what_the_kernel_had_dropped_is_not_lost_upstream_anew() -> None:
    """Gaps that turn out to be the kernel's are taken off, whatever came before; a worker's new start begins anew."""
    told, upstream = Told(), ("upstream", "datagrams")
    for boot, missed, dropped, lost, new in (
        (1, 500, 0, 500, 0),
        (1, 500, 10, 490, 0),
        (1, 510, 10, 500, 0),
        (1, 512, 10, 502, 2),
        (1, 512, 999, 0, 0),
        (1, 1503, 999, 504, 4),
        (2, 3, 0, 3, 3),
    ):
        told.status("ingest.1", {"stream/flows": {"exporter_missed": missed, "kernel_dropped": dropped}}, boot)
        assert recent(told.picture(1.0)).get(upstream, (0, 0)) == (lost, new)


def test_units_of_gaps_keep_what_was_recent() -> None:
    """Flows that are missing are no new loss when the kernel drops the first datagram."""
    told = Told()
    for dropped in (0, 1):
        told.status("ingest.1", {"stream/flows": {"exporter_missed_flows": 500, "kernel_dropped": dropped}})
        found = recent(told.picture(1.0))
    assert found == {("upstream", "flows"): (500, 0), ("kernel", "datagrams"): (1, 1)}


def test_a_service_that_goes_silent_and_comes_back() -> None:
    """A service that stops to report is silent and its numbers unknown; a new start of it has no rate at first."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM]))
    told.everyone(sent=5)
    assert told.picture().verdict.level in ("ok", "error")
    picture = told.picture(SILENT_SECONDS + 0.1)
    assert [each.name for each in picture.services if each.silent] == [each.name for each in picture.services]
    assert collector(picture).sent is None
    assert "not heard on the bus: broker.1, forwarder.1, gateway.1, ingest.1" in picture.verdict.reasons[0]
    assert told.picture(2 * SILENT_SECONDS).balanced is None
    told.status("forwarder.1", {"collector/siem": {"sent": 1}}, boot=2)
    siem = collector(told.picture())
    assert (siem.sent, siem.rate) == (1, None)
    assert [each.name for each in told.picture(FORGET_SECONDS - 1).services] == ["forwarder.1", "ingest.1"]


@pytest.mark.parametrize("name", ["ingest.2", "uplink.1"])
def test_a_service_that_was_killed_is_missed_until_it_is_back(name: str) -> None:
    """One of several workers, or an uplink, is not forgotten, however long it is away, unless it has told its end."""
    told = Told()
    for ended in (False, True, False):
        told.status(name, {}, ended=ended)
        told.now += 2 * FORGET_SECONDS
        told.everyone()
        assert [each.name for each in told.picture().services if each.silent] == [name] * (not ended)
        assert (f"not heard on the bus: {name}" in told.picture().verdict.reasons) == (not ended)


def test_a_service_that_settings_ask_for_is_missed_for_as_long_as_it_is_away() -> None:
    """Its silence is an error, also when it has been forgotten, and nothing is said of the balance meanwhile."""
    told = Told("journal")
    told.everyone()
    told.status("journal.1", {})
    assert told.picture().verdict.level == "ok"
    for passed in range(int(FORGET_SECONDS) + 2):
        told.everyone()
        picture = told.picture(1.0)
        if passed > SILENT_SECONDS:
            assert "not heard on the bus: journal" in picture.verdict.reasons[0]
    assert (picture.verdict.missing, picture.balanced) == (("journal",), None)
    assert "journal.1" not in [each.name for each in picture.services]
    told.status("journal.1", {})
    assert told.picture().verdict.level == "ok"


def test_the_row_of_a_collector_has_the_account_of_its_present_sender() -> None:
    """The account that its former sender still has for some seconds is not taken for it."""
    told = Told()
    for revision, source, sent in ((1, "original", 900), (2, "relay", 5)):
        told.tell("gateway.1", RegistrySnapshot(revision, 0, 1, [msgspec.structs.replace(SIEM, source=source)]))
        told.everyone(sent=5)
        told.status("transmitter.1", {"collector/siem": {"sent": 900}})
        siem = collector(told.picture())
        assert (siem.sender, siem.sent) == ("transmitter.1" if source == "original" else "forwarder.1", sent)


def test_the_accounts_are_compared_in_rounds() -> None:
    """A comparison that comes out even says so; an equation that does not hold is told, until it does."""
    told = Told()
    for held in (0, 0, 3, 3, 3, 0, 0, 0):
        for _ in range(5):
            told.now += 1
            told.everyone(sent=10, expected=10 + held, offered=10 + held)
            picture = told.picture()
        if held == 0 and told.now < 1011:
            assert picture.balanced is not False
    assert picture.balanced is True
    assert picture.discrepancies == ()


def test_a_discrepancy_is_in_the_verdict() -> None:
    """An equation that does not hold makes the verdict an error that names it."""
    told = Told()
    for _ in range(12):
        told.now += 1
        told.everyone(sent=10, expected=13, offered=13)
        picture = told.picture()
    assert picture.balanced is False
    assert any("the accounts do not add up: forwarder.1: collector/siem" in each for each in picture.verdict.reasons)


def test_exporters_with_share_and_takers() -> None:
    """Exporters are those of the last seconds, the busiest first, with share, and with who takes what they send."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM]))
    ten, far = pack_address("10.1.2.3"), pack_address("192.0.2.9")
    for number in range(2):
        most = [(ten, 40, 4000), (far, 10, 100)]
        told.tell("ingest.1", Exporters("syslog", 1.0, 100, 2, 2, most, [(ten, 5 + number)]))
    first, second = told.picture().exporters or ()
    assert (first.address, first.rate, first.byte_rate, first.share, first.takers) == ("10.1.2.3", 80, 8000, 0.8, 1)
    assert (first.missed, second.missed) == (6, 0)
    assert (second.address, second.takers, second.workers) == ("192.0.2.9", 0, ("ingest.1",))
    assert told.picture().streams[0].exporters == 2
    told.tell("ingest.1", Exporters("syslog", 1.0, 0, 1, 0, []))  # they send every other second
    assert told.picture().streams[0].exporters == 2
    assert told.picture(SILENT_SECONDS + 1).exporters is None


@pytest.mark.parametrize(
    ("cause", "kind"), [("kernel_dropped", "overflow"), ("withheld", "policy"), ("x", "unreachable")]
)
def test_kinds_of_causes(cause: str, kind: str) -> None:
    """Overflow, what settings say, and what can't be reached are told apart."""
    assert kind_of(cause) == kind
    assert PLACES[0] == "upstream"


def test_a_collector_that_catches_up_is_owed_some_of_the_past() -> None:
    """Its row has what it is owed by stream, and how long that takes at the pace since the last report."""
    told = Told()
    told.tell("gateway.1", RegistrySnapshot(1, 0, 1, [SIEM, OTHER]))
    for seconds, owed in ((0.0, 900), (2.0, 700)):
        told.now += seconds
        past = {"owed/syslog/siem": {"owed": owed, "owed_from_ns": 5 * 10**9}, "owed/flows/other": {"owed": 3}}
        told.status("forwarder.1", {"collector/siem": {"sent": 5}, "collector/other": {}, **past})
    told.status(
        "journal.1", {"journal": {"kept_limit_bytes": 9}, "journal/syslog": {"kept_bytes": 3, "oldest_ns": 10**9}}
    )
    picture = told.picture()
    (row,) = collector(picture).owed
    assert (row.stream, row.datagrams, row.since, row.level_in) == ("syslog", 700, 5.0, 7.0)
    assert [(each.stream, each.level_in) for each in collector(picture, "other").owed] == [("flows", None)]
    (kept,) = picture.kept
    assert (kept.stream, kept.size, kept.limit, kept.since, kept.until) == ("syslog", 3, 9, 1.0, None)


def test_withheld_collector_is_no_trouble() -> None:
    """It is told apart, whatever its sender reports of it, and what it does not get is no loss."""
    told = Told()
    for revision, withheld in ((1, None), (2, Withheld("ops", 1.0)), (3, None)):
        client = msgspec.structs.replace(SIEM, withheld=withheld)
        told.tell("gateway.1", RegistrySnapshot(revision, 0, 1, [client]))
        told.tell("forwarder.1", Health("relay", revision, 0, 1, [Troubled("siem", 7, "refusing", 0, 0)]))
        told.everyone(expected=14, offered=14, sent=5, withheld_by_admin=9)
        found = told.picture(1.0)
        siem = collector(found)
        assert (siem.health, siem.withheld, siem.lost) == ("withheld" if withheld else "refusing", 9, 0)
        reasons = ("withheld by an admin: siem",) if withheld else ("refusing: siem",)
        assert (found.verdict.level, found.verdict.reasons) == ("ok" if withheld else "error", reasons)


def test_nodes_and_how_many_each_serves() -> None:
    """While an uplink reports, a node's picture has the nodes that it tells of, and whom each serves; others' none."""
    told = Told()
    told.everyone(expected=0)
    clients = [msgspec.structs.replace(SIEM, name=f"c{number}", generation=number + 1) for number in range(20)]
    told.tell(
        "gateway.1",
        RegistrySnapshot(1, 0, 1, [*clients, msgspec.structs.replace(SIEM, name="no collector", streams=())]),
    )
    assert (told.picture().nodes, told.picture().served) == (None, {})
    nodes = Nodes(True, [Node("a", "live", 0), Node("b", "live", 300), Node("c", "silent")], ("a", "b"))
    told.tell("uplink.1", nodes)
    assert told.picture().nodes is None
    told.status("uplink.1", {})
    found = told.picture()
    assert found.nodes == nodes
    assert found.served == Counter(owner_of(each.name, ["a", "b"]) for each in clients)
    assert sum(each.health == "elsewhere" for each in found.collectors or ()) == found.served["b"] > 0
    told.tell("uplink.1", msgspec.structs.replace(nodes, majority=False, serving=()))
    assert told.picture().served == {"": 20}
