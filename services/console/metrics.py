"""Metrics for Prometheus: of the picture as it is when asked for, so that series of what has gone are gone too.

Labels come from the settings and the registry: stream, worker, collector, cause. Exporters have metrics of their own,
since addresses are what there may be any number of.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector as Source

from services.console.opt_in_metrics import opt_in_metrics
from shared.client import MOST_WAITING
from shared.ledger import counters
from shared.ledger.equations import is_loss
from shared.losses import cause_of
from shared.monitoring.picture import Collector, Picture, Service, Stream, Word

MAX_COLLECTORS: Final = 2000
"""Collectors that have series; `fanwire_collectors_not_shown` tells of more."""
HEALTHS: Final = tuple(word for word in get_args(Word) if word != "unknown")
COLLECTOR_CAUSES: Final = tuple(
    dict.fromkeys(cause_of(counter) for counter in counters.COLLECTOR_COUNTERS if is_loss(counter))
)
"""Causes that are told as 0 from the beginning: a rate would miss the first loss of a series that appears with it."""
STREAM_CAUSES: Final = tuple(
    cause_of(counter)
    for counter in (
        counters.KERNEL_DROPPED,
        counters.BUS_FULL,
        counters.NO_MEMORY,
        counters.OVERSIZED,
        counters.CUT_OFF,
    )
)

UNITS: Final = {
    "datagrams": counters.EXPORTER_MISSED,
    "flows": counters.EXPORTER_MISSED_FLOWS,
    "records": counters.EXPORTER_MISSED_RECORDS,
}
"""Units of what exporters number."""


def render(metrics: Iterable[Metric], accept: str, rendered: dict[str, bytes] | None = None) -> tuple[bytes, str]:
    """Return metrics in the format that was asked for, text or OpenMetrics, and its content type.

    `rendered` has the texts of these metrics that are known already, by format, and keeps this one.
    """
    # Names are written as they are: by `dots` the library would double each underscore.
    encoder, content_type = choose_encoder(accept.replace("escaping=dots", "escaping=underscores"))
    kind, known = content_type.partition(";")[0], {} if rendered is None else rendered
    if kind not in known:
        known[kind] = encoder(_Given(metrics))
    return known[kind], content_type


class _Given(Source):
    """Metrics that are made already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._metrics


def stack_metrics(picture: Picture, clock: float, version: str) -> Iterator[Metric]:
    """Yield every metric but those of exporters. `clock` is what to add to the picture's times for Unix time."""
    yield InfoMetricFamily("fanwire_build", "The version of the console.", {"version": version})
    yield GaugeMetricFamily("fanwire_console_timestamp_seconds", "The clock of this host.", picture.at + clock)
    yield from _streams(picture.streams)
    yield from _collectors(picture.collectors, clock)
    yield from _services(picture.services, picture.verdict.missing)
    yield from _verdict(picture)
    yield from opt_in_metrics(picture)


def _streams(streams: Iterable[Stream]) -> Iterator[Metric]:
    received = CounterMetricFamily(
        "fanwire_datagrams_received", "Datagrams taken from sockets.", labels=["stream", "worker"]
    )
    size = CounterMetricFamily(
        "fanwire_received_bytes", "Payload bytes of datagrams taken from sockets.", labels=["stream", "worker"]
    )
    published = CounterMetricFamily(
        "fanwire_datagrams_published", "Datagrams handed to the bus.", labels=["stream", "worker"]
    )
    untaken = CounterMetricFamily(
        "fanwire_datagrams_untaken", "Datagrams that nobody wanted.", labels=["stream", "worker"]
    )
    lost = CounterMetricFamily(
        "fanwire_datagrams_lost",
        "Datagrams lost before or in ingest, by cause; kernel_dropped ones were never received.",
        labels=["stream", "worker", "cause"],
    )
    upstream = CounterMetricFamily(
        "fanwire_exporter_missed",
        "Gaps in exporters' own numbers, in their unit; of datagrams also those that the kernel dropped.",
        labels=["stream", "worker", "unit"],
    )
    takers = GaugeMetricFamily("fanwire_stream_collectors", "Collectors that want the stream.", labels=["stream"])
    for stream in streams:
        takers.add_metric([stream.name], len(stream.takers))
        for worker in stream.workers:
            labels = [stream.name, worker.name]
            received.add_metric(labels, worker.received)
            size.add_metric(labels, worker.account.get(counters.BYTES, 0))
            published.add_metric(labels, worker.account.get(counters.PUBLISHED, 0))
            untaken.add_metric(labels, worker.account.get(counters.NO_SUBSCRIBER, 0))
            for cause, count in ({**dict.fromkeys(STREAM_CAUSES, 0), **worker.causes}).items():
                lost.add_metric([*labels, cause], count)
            for unit, counter in UNITS.items() if counters.EXPORTERS in worker.account else ():
                upstream.add_metric([*labels, unit], worker.account.get(counter, 0))
    yield from (received, size, published, untaken, lost, upstream, takers)


def _collectors(collectors: tuple[Collector, ...] | None, clock: float) -> Iterator[Metric]:
    if collectors is None:
        return
    label = ["collector"]
    sent = CounterMetricFamily(
        "fanwire_copies_sent", "Copies that the kernel took. It is not known whether they arrived.", labels=label
    )
    lost = CounterMetricFamily(
        "fanwire_copies_lost",
        "Copies known to have reached nobody, by cause. Some of them count as sent too: refused and unreachable.",
        labels=["collector", "cause"],
    )
    kept_back = CounterMetricFamily(
        "fanwire_copies_kept_back", "Datagrams filtered, sampled out, or given to another of the group.", labels=label
    )
    withheld = CounterMetricFamily(
        "fanwire_copies_withheld", "Datagrams not sent because an admin withholds them.", labels=label
    )
    by_kernel = CounterMetricFamily(
        "fanwire_copies_by_kernel", "Copies that the kernel sent by rules of offload.", labels=label
    )
    templates = CounterMetricFamily(
        "fanwire_templates_sent", "Datagrams with templates of flow exporters that were sent besides.", labels=label
    )
    size = CounterMetricFamily("fanwire_sent_bytes", "Payload bytes of copies sent.", labels=label)
    held = GaugeMetricFamily("fanwire_collector_queue_datagrams", "Copies that wait.", labels=label)
    most_held = GaugeMetricFamily(
        "fanwire_collector_queue_limit_datagrams", "Copies that may wait, however small.", labels=label
    )
    health = GaugeMetricFamily("fanwire_collector_health", "1 for the present health.", labels=["collector", "health"])
    behind = GaugeMetricFamily(
        "fanwire_collector_behind_datagrams",
        "Datagrams of the past that it has still to get, while it catches up.",
        labels=["collector", "stream"],
    )
    reached = GaugeMetricFamily(
        "fanwire_collector_reached_timestamp_seconds",
        "The time of the last datagram that it got, while it catches up.",
        labels=["collector", "stream"],
    )
    since = GaugeMetricFamily(
        "fanwire_collector_health_since_timestamp_seconds", "The start of the present health.", labels=label
    )
    for collector in collectors[:MAX_COLLECTORS]:
        name = collector.client.name
        for word in HEALTHS if collector.health != "unknown" else ():
            health.add_metric([name, word], float(collector.health == word))
        if collector.since is not None:
            since.add_metric([name], collector.since + clock)
        if collector.sent is None:
            continue
        sent.add_metric([name], collector.sent)
        size.add_metric([name], collector.bytes or 0)
        kept_back.add_metric([name], collector.kept_back or 0)
        withheld.add_metric([name], collector.withheld or 0)
        by_kernel.add_metric([name], collector.by_kernel or 0)
        templates.add_metric([name], collector.templates or 0)
        held.add_metric([name], collector.held or 0)
        for owed in collector.owed:
            behind.add_metric([name, owed.stream], owed.datagrams)
            reached.add_metric([name, owed.stream], owed.since)
        most_held.add_metric([name], MOST_WAITING[collector.client.source])
        for cause, count in ({**dict.fromkeys(COLLECTOR_CAUSES, 0), **collector.causes}).items():
            lost.add_metric([name, cause], count)
    yield from (sent, lost, kept_back, withheld, by_kernel, templates, size, held, most_held, health, since)
    yield from (behind, reached)
    yield GaugeMetricFamily("fanwire_collectors", "Collectors that are signed up.", len(collectors))
    yield GaugeMetricFamily(
        "fanwire_collectors_not_shown",
        f"Collectors without series here: beyond {MAX_COLLECTORS}.",
        max(0, len(collectors) - MAX_COLLECTORS),
    )


def _services(services: Sequence[Service], missing: Iterable[str]) -> Iterator[Metric]:
    label = ["service"]
    up = GaugeMetricFamily(
        "fanwire_service_up",
        "1 if the service reports; 0 for two minutes after its last report, or while none of a kind reports.",
        labels=label,
    )
    started = GaugeMetricFamily("fanwire_service_start_timestamp_seconds", "The start of the service.", labels=label)
    memory = GaugeMetricFamily("fanwire_service_memory_bytes", "Memory that the service takes.", labels=label)
    ceiling = GaugeMetricFamily("fanwire_service_memory_limit_bytes", "Memory that the service may take.", labels=label)
    wrong = CounterMetricFamily("fanwire_discrepancies", "Equations that a service found not to hold.", labels=label)
    missed = CounterMetricFamily(
        "fanwire_bus_missed_datagrams", "Datagrams published that never came, by consumer.", labels=label
    )
    for each in services:
        up.add_metric([each.name], float(not each.silent))
        started.add_metric([each.name], each.started)
        wrong.add_metric([each.name], each.discrepancies)
        if each.missed is not None:
            missed.add_metric([each.name], each.missed)
        if each.memory is not None and each.memory_ceiling is not None:
            memory.add_metric([each.name], each.memory)
            ceiling.add_metric([each.name], each.memory_ceiling)
    for name in {*missing} - {each.name for each in services}:
        up.add_metric([name], 0.0)
    yield from (up, started, memory, ceiling, wrong, missed)


def _verdict(picture: Picture) -> Iterator[Metric]:
    if picture.balanced is not None:
        yield GaugeMetricFamily(
            "fanwire_ledger_balanced", "1 if the accounts of all services add up.", picture.balanced
        )
    if picture.exporters is not None:
        yield GaugeMetricFamily("fanwire_exporters", "Exporters of the last seconds.", len(picture.exporters))
        untaken = sum(exporter.takers == 0 for exporter in picture.exporters)
        yield GaugeMetricFamily("fanwire_exporters_untaken", "Exporters whose datagrams nobody gets.", untaken)


def exporter_metrics(picture: Picture, top: int) -> Iterator[Metric]:
    """Yield the rates of the busiest exporters, by address."""
    label, exporters = ["exporter"], picture.exporters or ()
    rate = GaugeMetricFamily(
        "fanwire_exporter_datagrams_per_second", "Datagrams a second, over ten seconds.", labels=label
    )
    size = GaugeMetricFamily("fanwire_exporter_bytes_per_second", "Payload bytes a second.", labels=label)
    takers = GaugeMetricFamily(
        "fanwire_exporter_collectors", "Collectors that the exporter's datagrams go to.", labels=label
    )
    for exporter in exporters[:top]:
        rate.add_metric([exporter.address], round(exporter.rate, 3))
        size.add_metric([exporter.address], round(exporter.byte_rate, 3))
        takers.add_metric([exporter.address], exporter.takers)
    yield from (rate, size, takers)
    yield GaugeMetricFamily(
        "fanwire_exporters_not_shown", f"Exporters beyond the {top} asked for.", max(0, len(exporters) - top)
    )
