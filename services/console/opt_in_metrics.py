"""Metrics of what runs only where the settings ask for it: journal, offload, uplink and the cluster. No I/O."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shared.bus.bodies.nodes_message import Nodes, NodeState
from shared.ledger import counters
from shared.ledger.accounts import Accounts
from shared.losses import cause_of, causes
from shared.monitoring.journal import KeptStream
from shared.monitoring.picture import Picture

UPLINK_CAUSES: Final = tuple(
    cause_of(counter)
    for counter in (
        *(counters.SERVER_AWAY, counters.SERVER_SLOW, counters.SERVER_REFUSED, counters.SERVER_LIMIT),
        *(counters.TOO_MANY_WORKERS, counters.NO_MEMORY, counters.MISSED, counters.UNSERVED, counters.UNSURE),
        *(counters.STOPPED, counters.NOT_JOURNALED, counters.EXPIRED_UNREAD),
    )
)
"""Causes that are told as 0 from the beginning, as those of collectors are."""


def opt_in_metrics(picture: Picture) -> Iterator[Metric]:
    """Yield the metrics of what reports of these services; the others have no series."""
    yield from _journal(picture.kept)
    yield _egress(picture.egress)
    yield from _offload(picture.offload)
    yield from _uplink(picture.uplink)
    if picture.nodes:
        yield from _nodes(picture.nodes)


def _of(accounts: Accounts, kind: str) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Yield the accounts of a kind, each with its name behind the slash."""
    yield from ((name.partition("/")[2], account) for name, account in accounts.items() if name.startswith(f"{kind}/"))


def _offload(accounts: Accounts) -> Iterator[Metric]:
    copied = CounterMetricFamily(
        "fanwire_kernel_copies",
        "Copies that the kernel's rules have counted, seen by a sender or not. A train of datagrams counts once.",
        labels=["collector"],
    )
    unseen = CounterMetricFamily(
        "fanwire_kernel_datagrams_unseen",
        "Datagrams that ended in the kernel, copied for all; ingest never received them.",
        labels=["stream"],
    )
    for name, account in _of(accounts, "rules"):
        copied.add_metric([name], account.get(counters.COPIED, 0))
    for name, account in _of(accounts, "marks"):
        unseen.add_metric([name], account.get(counters.UNSEEN, 0))
    yield from (copied, unseen)


def _uplink(accounts: Accounts) -> Iterator[Metric]:
    connected = GaugeMetricFamily("fanwire_uplink_connected", "1 while there is a connection to a NATS server.")
    acknowledged = CounterMetricFamily(
        "fanwire_uplink_datagrams_acknowledged", "Datagrams that JetStream has said it keeps.", labels=["stream"]
    )
    lost = CounterMetricFamily(
        "fanwire_uplink_datagrams_lost",
        "Datagrams that did not get to JetStream, by cause.",
        labels=["stream", "cause"],
    )
    held = GaugeMetricFamily(
        "fanwire_uplink_queue_datagrams", "Datagrams that wait for JetStream, in the journal too.", labels=["stream"]
    )
    waiting = GaugeMetricFamily(
        "fanwire_site_waiting_messages", "Messages of another site that waited when the last one came.", labels=["site"]
    )
    late = GaugeMetricFamily(
        "fanwire_site_late_seconds",
        "Time from receipt at the other site, by its clock, until the last datagrams were here.",
        labels=["site"],
    )
    if (own := accounts.get("uplink", {}).get(counters.CONNECTED)) is not None:
        connected.add_metric([], own)
    for stream, account in _of(accounts, "sending"):
        acknowledged.add_metric([stream], account.get(counters.ACKNOWLEDGED, 0))
        held.add_metric([stream], account.get(counters.HELD, 0))
        for cause, count in ({**dict.fromkeys(UPLINK_CAUSES, 0), **causes(account)}).items():
            lost.add_metric([stream, cause], count)
    for site, account in _of(accounts, "receiving"):
        waiting.add_metric([site], account.get(counters.WAITING_MESSAGES, 0))
        late.add_metric([site], account.get(counters.LATE_MS, 0) / 1000)
    yield from (connected, acknowledged, lost, held, waiting, late)


def _egress(egress: Mapping[str, Mapping[str, int]]) -> Metric:
    dropped = CounterMetricFamily(
        "fanwire_egress_drops",
        "Packets of any traffic dropped on the way out, where and since the kernel's copies leave.",
        labels=["interface", "place"],
    )
    for name, account in egress.items():
        for place, counter in (("queue", counters.QUEUE_DROPS), ("link", counters.LINK_DROPS)):
            dropped.add_metric([name, place], account.get(counter, 0))
    return dropped


def _journal(kept: Iterable[KeptStream]) -> Iterator[Metric]:
    label = ["stream"]
    written = CounterMetricFamily(
        "fanwire_journal_datagrams_written", "Datagrams written to the journal.", labels=label
    )
    dropped = CounterMetricFamily(
        "fanwire_journal_datagrams_dropped",
        "Datagrams that the journal could not write, by cause; their copies are not affected.",
        labels=["stream", "cause"],
    )
    expired = CounterMetricFamily(
        "fanwire_journal_datagrams_expired", "Datagrams that retention has removed.", labels=label
    )
    read = CounterMetricFamily("fanwire_journal_datagrams_read", "Datagrams read again.", labels=label)
    size = GaugeMetricFamily("fanwire_journal_bytes", "Bytes that the journal's segments take.", labels=label)
    oldest = GaugeMetricFamily(
        "fanwire_journal_oldest_timestamp_seconds", "The time since which there is something.", labels=label
    )
    newest = GaugeMetricFamily(
        "fanwire_journal_newest_timestamp_seconds", "The time of the last datagram written.", labels=label
    )
    limit = GaugeMetricFamily("fanwire_journal_limit_bytes", "Bytes that all streams may take together.", labels=[])
    failing = GaugeMetricFamily("fanwire_journal_failing", "1 if the last write has failed.", labels=label)
    for each in kept:
        account = each.account
        written.add_metric([each.stream], account.get(counters.WRITTEN, 0))
        for cause in (counters.DISK_FULL, counters.DISK_ERROR):
            dropped.add_metric([each.stream, cause_of(cause)], account.get(cause, 0))
        expired.add_metric([each.stream], account.get(counters.EXPIRED, 0))
        read.add_metric([each.stream], account.get(counters.READ, 0))
        size.add_metric([each.stream], each.size)
        for metric, at in ((oldest, each.since), (newest, each.until)):
            if at is not None:
                metric.add_metric([each.stream], at)
        if each.limit and not limit.samples:
            limit.add_metric([], each.limit)
        failing.add_metric([each.stream], float(account.get(counters.WRITE_ERRNO, 0) > 0))
    yield from (written, dropped, expired, read, size, limit, oldest, newest, failing)


def _nodes(nodes: Nodes) -> Iterator[Metric]:
    state = GaugeMetricFamily("fanwire_node_state", "1 for the node's present state.", labels=["node", "state"])
    silent = GaugeMetricFamily("fanwire_node_silent_seconds", "Time since the node was heard.", labels=["node"])
    waiting = GaugeMetricFamily(
        "fanwire_node_waiting_messages", "Messages of the node that are still to come.", labels=["node"]
    )
    for node in nodes.nodes:
        for word in get_args(NodeState):
            state.add_metric([node.name, word], word == node.state)
        if node.age_ms >= 0:
            silent.add_metric([node.name], node.age_ms / 1000)
        waiting.add_metric([node.name], node.pending)
    yield from (state, silent, waiting)
    yield GaugeMetricFamily("fanwire_nodes_majority", "1 if this node is of the majority.", nodes.majority)
