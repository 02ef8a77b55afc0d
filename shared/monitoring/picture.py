"""The picture of the whole stack at one moment: hops, rates, losses and verdicts, as values. No I/O.

`shared.monitoring.observer` makes it. None stands for what nothing has reported: a view shows it as unknown, not as 0.
Rates are per second. Counts are since the service was started, or since the collector signed up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from shared.bus.bodies.nodes_message import Nodes
from shared.client import Client
from shared.ledger.accounts import Accounts
from shared.losses import Loss
from shared.monitoring.journal import KeptStream, Owed

Level = Literal["ok", "warning", "error", "unknown"]
Word = Literal["ok", "waiting", "unreachable", "refusing", "slow", "withheld", "elsewhere", "unknown"]
NO_TROUBLE: Final = frozenset({"ok", "withheld", "elsewhere", "unknown"})
"""Words of collectors for which there is nothing to do here: an admin withholds copies on purpose, and a collector that
is elsewhere is served by another node."""
RECENT_SECONDS: Final = 300.0
"""Time that `recent` counts cover."""


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """A worker's part of a stream."""

    name: str
    received: int
    rate: float | None
    account: dict[str, int]
    causes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream's datagrams as they came in, all workers together."""

    name: str
    received: int | None
    rate: float | None
    byte_rate: float | None
    published: int | None
    untaken: int | None
    """Datagrams dropped since nobody wants the stream."""
    kernel_dropped: int | None
    lost: int | None
    lost_rate: float | None
    causes: dict[str, int]
    takers: tuple[str, ...]
    """Names of the collectors that want it."""
    workers: tuple[WorkerShare, ...]
    exporters: int | None
    """Exporters that sent to it in one of the last seconds; at least so many, where only a sample is looked at."""


class Collector(msgspec.Struct, frozen=True, gc=False):
    """A collector: where it is, how it does, and its account; a struct, since thousands may be made each second."""

    client: Client
    health: Word
    since: float | None
    """The start of its health on the observer's clock; None: before the observer's time."""
    sender: str | None
    """The service that reports its account."""
    sent: int | None
    bytes: int | None
    rate: float | None
    """Copies a second, by us and by the kernel; of bytes only those that we sent are known."""
    byte_rate: float | None
    expected: int | None
    kept_back: int | None
    """Datagrams filtered, sampled out, or given to another member of its group: as it asked for."""
    withheld: int | None
    """Datagrams not sent because an admin withholds them."""
    by_kernel: int | None
    """Datagrams of which the kernel had sent the copy."""
    templates: int | None
    """Datagrams with templates of flow exporters that were sent besides."""
    held: int | None
    lost: int | None
    lost_rate: float | None
    causes: dict[str, int]
    """`lost` by cause."""
    recent: int | None
    """Lost in the last `RECENT_SECONDS`."""
    owed: tuple[Owed, ...] = ()
    """By stream: the past that it has still to get, while it catches up."""


@dataclass(frozen=True, slots=True)
class Exporter:
    """An exporter, in the last seconds, all of its ports together."""

    address: str
    rate: float
    byte_rate: float
    share: float
    """Part of all datagrams of its streams, 0 to 1."""
    streams: tuple[str, ...]
    workers: tuple[str, ...]
    takers: int
    """Collectors that its datagrams go to, before sampling and sharing."""
    by_stream: dict[str, float]
    """`rate` by stream."""
    missed: int | None = None
    """Gaps in its own numbers, in their unit, since its workers follow it; None: no stream of its has a protocol."""


@dataclass(frozen=True, slots=True)
class Service:
    """A process that reports, or did until lately."""

    name: str
    pid: int
    started: float
    """Unix time."""
    heard_at: float
    """The observer's clock."""
    silent: bool
    memory: int | None
    memory_most: int | None
    memory_ceiling: int | None
    discrepancies: int
    missed: int | None
    """Datagrams that never came by the bus; None: it takes none."""
    account: dict[str, int]
    """The service's own account."""
    release: str = ""
    """The version of its program; nothing where it does not tell."""


@dataclass(frozen=True, slots=True)
class RecentLoss:
    """A loss, and how much of it came in the last `RECENT_SECONDS`, or since the observer began."""

    loss: Loss
    recent: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of everything in a word, with the reasons, gravest first."""

    level: Level = "unknown"
    reasons: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """Kinds of service of which none reports, and workers that do not, though they have to."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything, as of `at` on the observer's clock."""

    at: float
    verdict: Verdict
    balanced: bool | None
    """True if the last comparison of all accounts came out even; None: there was none yet."""
    discrepancies: tuple[str, ...]
    streams: tuple[Stream, ...] = ()
    collectors: tuple[Collector, ...] | None = None
    exporters: tuple[Exporter, ...] | None = None
    """Those that sent most, up to a thousand a worker and stream; None: no worker tells yet."""
    services: tuple[Service, ...] = ()
    losses: tuple[RecentLoss, ...] = field(default=())
    kept: tuple[KeptStream, ...] = ()
    """Streams that a journal which reports keeps, or has kept."""
    egress: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By interface by which the kernel's copies leave: what was dropped there, of any traffic."""
    recent_seconds: float = RECENT_SECONDS
    """Time that `recent` counts cover: less, where the observer has not been there for so long."""
    nodes: Nodes | None = None
    """The nodes of the cluster; None: this host is none, or its uplink does not report."""
    served: Mapping[str, int] = field(default_factory=dict)
    """Collectors by the node that serves them; "": nobody does."""
    offload: Accounts = field(default_factory=dict)
    """The accounts of offload; none: it does not report."""
    uplink: Accounts = field(default_factory=dict)
    """The accounts of the uplink; likewise."""
