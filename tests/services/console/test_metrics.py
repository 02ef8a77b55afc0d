import shutil
import subprocess
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from services.console.metrics import MAX_COLLECTORS, exporter_metrics, render, stack_metrics
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.bus.messages import Message
from shared.client import MOST_WAITING
from shared.ledger.counters import COLLECTOR_COUNTERS
from shared.ledger.equations import is_loss
from shared.losses import cause_of, causes
from tests.builders import make_envelope
from tests.services.console.told import HOSTILE, busy, client, observe

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Given(Collector):
    """Metrics that are made already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        """Return them."""
        return self._metrics


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric by the values of their labels, in the order of the labels' names."""
    return {
        tuple(sample.labels[label] for label in sorted(sample.labels)): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == name
    }


def test_losses_are_those_of_the_account() -> None:
    """Each cause of the account is a series with its number, and every known cause has one from the beginning."""
    text = render(stack_metrics(busy(), 0.0, "1"), "")[0].decode()
    lost = samples(text, "fanwire_copies_lost_total")
    assert lost["refused", "siem"] == sum(causes({"refusals": 7}).values())
    assert lost["refused", HOSTILE] == 10
    named = {cause_of(counter) for counter in COLLECTOR_COUNTERS if is_loss(counter)}
    assert {cause for cause, collector in lost if collector == "siem"} == named
    assert lost["unserved", "siem"] == lost["no_route", "siem"] == 0  # what a restart of a sender costs comes at once
    assert samples(text, "fanwire_datagrams_lost_total")["bus_full", "syslog", "ingest.1"] == 10
    assert samples(text, "fanwire_collector_health")["siem", "refusing"] == 1
    assert samples(text, "fanwire_collector_health")["siem", "ok"] == 0
    assert samples(text, "fanwire_collector_queue_limit_datagrams")["siem",] == MOST_WAITING["relay"]
    assert samples(text, "fanwire_templates_sent_total")["siem",] == 3
    assert samples(text, "fanwire_exporters")[()] == 3


def test_what_the_bus_lost_is_the_services_own_count() -> None:
    """Services that take datagrams tell it from 0 on, and others have no series."""
    text = render(stack_metrics(busy(), 0.0, "1"), "")[0].decode()
    assert samples(text, "fanwire_bus_missed_datagrams_total") == {("forwarder.1",): 4}


def test_both_formats_are_read_back() -> None:
    """OpenMetrics is for those that ask for it, text for others; both are read whole, hostile names too."""
    picture = busy()
    text, kind = render(stack_metrics(picture, 0.0, "1"), "")
    assert kind.startswith("text/plain")
    opened, kind = render(stack_metrics(picture, 0.0, "1"), OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    named = {
        sample.labels.get("collector")
        for family in parse_openmetrics(opened.decode())  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.name == "fanwire_copies_sent_total"
    }
    assert named == {"siem", HOSTILE}
    assert (HOSTILE,) in samples(text.decode(), "fanwire_copies_sent_total")


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_the_text_says_what_the_library_would_say(accept: str) -> None:
    """It is what prometheus_client itself writes of the metrics, byte for byte."""
    picture = replace(busy(), balanced=True, nodes=Nodes(True, [Node("a", "live", 1500)]))
    metrics = [*stack_metrics(picture, 0.5, "1"), *exporter_metrics(picture, 2)]
    registry = CollectorRegistry()
    registry.register(Given(metrics))
    encoder, content_type = choose_encoder(accept)
    assert render(metrics, accept) == (encoder(registry), content_type)


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_names_are_the_same_whatever_escaping_is_asked_for(kind: str) -> None:
    """Names need no escaping: with `dots` no underscore is doubled, and what is shared with other scrapes is theirs."""
    metrics = [*stack_metrics(busy(), 0.0, "1")]
    plain = render(metrics, f"{kind};version=1.0.0")
    assert render(metrics, f"{kind};version=1.0.0;escaping=dots;q=0.5") == plain


def test_what_was_rendered_is_not_rendered_again() -> None:
    """A second scrape of the same metrics in the same format makes none of them; each format has its own."""
    rendered: dict[str, bytes] = {}
    first = render(stack_metrics(busy(), 0.0, "1"), "", rendered)
    assert render(iter(()), "", rendered) == first
    assert render(stack_metrics(busy(), 0.0, "1"), OPENMETRICS, rendered)[0].endswith(b"# EOF\n")
    assert render(iter(()), "", rendered) == first
    assert len(rendered) == 2


def test_the_past_that_is_owed_has_series_while_it_is() -> None:
    """A collector that catches up has its datagrams and the time that it has reached, by stream; others have none."""
    told = {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in stack_metrics(busy(), 0.0, "1")
        if "behind" in family.name or "reached" in family.name or "limit_bytes" in family.name
    }
    labels = {"collector": HOSTILE, "stream": "syslog"}
    assert told["fanwire_collector_behind_datagrams"] == [(labels, 5)]
    assert told["fanwire_collector_reached_timestamp_seconds"] == [(labels, 7.0)]
    assert told["fanwire_journal_limit_bytes"] == [({}, 99)]


def test_drops_where_copies_of_the_kernel_leave_are_told_by_interface() -> None:
    """The queues of an interface and the interface itself each have a series."""
    picture = replace(busy(), egress={"eth1": {"queue_drops": 7, "link_drops": 2}})
    text = render(stack_metrics(picture, 0.0, "1"), "")[0].decode()
    assert samples(text, "fanwire_egress_drops_total") == {("eth1", "queue"): 7, ("eth1", "link"): 2}


def test_the_uplink_and_what_waits_for_it() -> None:
    """Its connection, what JetStream has, what waits, losses by cause, and how late other sites come, have series."""
    sending = {"taken": 9, "acknowledged": 4, "held": 3, "dropped_server_away": 2}
    receiving = {"waiting_messages": 8, "late_ms": 1500}
    uplink = {"uplink": {"connected": 0}, "sending/flows": sending, "receiving/bonn": receiving}
    text = render(stack_metrics(observe([], {"uplink.1": uplink}).picture(0.0), 0.0, "1"), "")[0].decode()
    assert samples(text, "fanwire_uplink_connected") == {(): 0}
    assert samples(text, "fanwire_uplink_datagrams_acknowledged_total") == {("flows",): 4}
    assert samples(text, "fanwire_uplink_queue_datagrams") == {("flows",): 3}
    lost = samples(text, "fanwire_uplink_datagrams_lost_total")
    assert (lost["server_away", "flows"], lost["server_slow", "flows"], sum(lost.values())) == (2, 0, 2)
    assert samples(text, "fanwire_site_waiting_messages") == {("bonn",): 8}
    assert samples(text, "fanwire_site_late_seconds") == {("bonn",): 1.5}


def test_what_only_the_kernel_has_seen() -> None:
    """Copies by rules, and datagrams that ended in the kernel, are counted though ingest and senders know nothing."""
    offload = {"rules/siem": {"copied": 70}, "marks/netflow": {"marked": 1, "unseen": 35}}
    text = render(stack_metrics(observe([], {"offload.1": offload}).picture(0.0), 0.0, "1"), "")[0].decode()
    assert samples(text, "fanwire_kernel_copies_total") == {("siem",): 70}
    assert samples(text, "fanwire_kernel_datagrams_unseen_total") == {("netflow",): 35}


def test_gaps_of_exporters_by_unit() -> None:
    """A stream with a protocol has each unit, from 0 on; others have none."""
    streams = {"stream/syslog": {"received": 1}, "stream/flows": {"exporters": 1, "exporter_missed_records": 6}}
    text = render(stack_metrics(observe([], {"ingest.1": streams}).picture(0.0), 0.0, "1"), "")[0].decode()
    gaps = samples(text, "fanwire_exporter_missed_total")
    assert gaps == {("flows", unit, "ingest.1"): 6 * (unit == "records") for unit in ("datagrams", "flows", "records")}


def test_nothing_is_told_of_what_is_not_known() -> None:
    """There are no series, rather than zeros, where nobody has reported."""
    text = render(stack_metrics(observe([client("siem")], {}).picture(0.0), 0.0, "1"), "")[0].decode()
    assert samples(text, "fanwire_copies_sent_total") == {}
    assert samples(text, "fanwire_collectors") == {(): 1}
    assert "fanwire_exporters " not in text


def test_what_does_not_report_has_a_series_for_as_long() -> None:
    """Kinds of service of which none reports have a 0, however long ago the last one did; others have none."""
    text = render(stack_metrics(busy(), 0.0, "1"), "")[0].decode()
    assert set(samples(text, "fanwire_service_up").values()) == {1}
    text = render(stack_metrics(observe([], {"ingest.1": {}}).picture(0.0), 0.0, "1"), "")[0].decode()
    up = samples(text, "fanwire_service_up")
    assert (up["ingest.1",], up["forwarder",], "ingest" in {name for (name,) in up}) == (1, 0, False)
    text = render(stack_metrics(observe([], {}).picture(0.0), 0.0, "1"), "")[0].decode()
    assert ("ingest",) in samples(text, "fanwire_service_up")


def test_nodes_have_series_while_the_uplink_tells_of_them() -> None:
    """Each node of a cluster has its state, how long it is silent and what is still to come; a host of its own none."""
    nodes = Nodes(True, [Node("a", "live", 0), Node("b", "silent", 2500, 7), Node("c", "silent")], ("a",))
    for tells in (True, False):
        observer = observe([], {"uplink.1": {}} if tells else {})
        observer.note(Message("", make_envelope(sender="uplink.1"), nodes), 0.0)
        text = render(stack_metrics(observer.picture(0.0), 0.0, "1"), "")[0].decode()
        assert samples(text, "fanwire_node_silent_seconds") == ({("b",): 2.5, ("a",): 0.0} if tells else {})
        assert samples(text, "fanwire_node_waiting_messages").get(("b",)) == (7 if tells else None)
        assert samples(text, "fanwire_node_state").get(("b", "silent")) == (1 if tells else None)
        assert samples(text, "fanwire_nodes_majority") == ({(): 1.0} if tells else {})


def test_series_are_bounded_and_it_is_told() -> None:
    """Collectors beyond the limit have no series, and a metric says how many."""
    clients = [client(f"c{number}", number) for number in range(MAX_COLLECTORS + 5)]
    text = render(stack_metrics(observe(clients, {}).picture(0.0), 0.0, "1"), "")[0].decode()
    assert samples(text, "fanwire_collectors_not_shown") == {(): 5}


def test_exporters_by_address_and_as_many_as_asked_for() -> None:
    """The busiest exporters come first, by address alone, and what is left out is counted."""
    text = render(exporter_metrics(busy(), 2), "")[0].decode()
    assert samples(text, "fanwire_exporter_datagrams_per_second") == {("10.0.0.3",): 30, ("10.0.0.2",): 20}
    assert samples(text, "fanwire_exporters_not_shown") == {(): 1}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus is not installed")
def test_promtool_finds_nothing() -> None:
    """Prometheus's own check of names, units and help texts is content."""
    for metrics in (stack_metrics(busy(), 0.0, "1"), exporter_metrics(busy(), 2)):
        text = render(metrics, "")[0]
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")
