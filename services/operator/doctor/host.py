"""Treatment of datagrams by this host's kernel, whoever receives them. No I/O."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.monitoring.finding import Finding, ok, unseen, warning
from shared.settings.model import Settings

BACKLOG: Final = 10_000
"""The value of deploy/sysctl; the kernel's default, 1000, is one burst of an exporter."""
BACKLOG_NAME: Final = "net.core.netdev_max_backlog"
BUDGET_NAME: Final = "net.core.netdev_budget"
SQUEEZED_SHARE: Final = 0.001
"""Share of the packets of a CPU at which it may run out of its budget before that is reported."""
CONNTRACK_SHARE: Final = 0.8
RELEASED: Final = 1_735_689_600.0
"""The start of 2025: an earlier clock was never set."""
STRICT: Final = 1
"""rp_filter (ip-sysctl): 0 off, 1 strict, 2 loose; the larger of `all` and the interface's counts."""


@dataclass(frozen=True)
class Softnet:
    """The content of /proc/net/softnet_stat, all CPUs together, since boot."""

    processed: int
    dropped: int
    squeezed: int


@dataclass(frozen=True)
class ListeningSocket:
    """A UDP socket on a stream's port: bytes of receive buffer, and datagrams that the kernel has dropped there."""

    receive_buffer: int
    dropped: int


@dataclass(frozen=True)
class HostFacts:
    """Facts of the host; a missing sysctl or counter could not be seen."""

    sysctls: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    """Counters of UDP from /proc/net/snmp and snmp6, and IPReversePathFilter from netstat; since boot."""
    softnet: Softnet | None = None
    reverse_path: Mapping[str, int] = field(default_factory=dict)
    """rp_filter in effect, by interface that is up, without loopback."""
    listeners: Mapping[str, list[ListeningSocket]] = field(default_factory=dict)
    """By stream."""
    time: float = RELEASED
    synchronised: bool | None = None


def check_host(facts: HostFacts, settings: Settings) -> Iterator[Finding]:
    """Yield every finding about the host."""
    for stream in settings.streams:
        if not any(endpoint.scheme == "udp" for endpoint in stream.endpoints):
            continue
        listeners = facts.listeners.get(stream.name, [])
        yield _receive_buffer(facts, stream.name, stream.receive_buffer, listeners)
        yield _kernel_drops(stream.name, listeners)
    yield _send_buffer(facts, settings.forwarder.send_buffer)
    yield _backlog(facts)
    yield _budget(facts)
    yield from _udp_errors(facts.counters)
    yield from _reverse_path(facts)
    yield _conntrack(facts)
    yield _clock(facts)


def _sysctl(assignments: str) -> str:
    """Return the command that sets these, and where they have to stand for the next start."""
    return f"`sysctl -w {assignments}`, and the same in /etc/sysctl.d"


def _receive_buffer(facts: HostFacts, stream: str, asked: int, listeners: list[ListeningSocket]) -> Finding:
    name, cure = "receive_buffer", f"{_sysctl(f'net.core.rmem_max={asked}')}; then restart ingest"
    if listeners:
        has = min(listener.receive_buffer for listener in listeners)
        if has < asked:
            return warning(
                name, f"its listeners have {has} of the {asked} bytes asked for: bursts are dropped", cure, stream
            )
        return ok(name, f"its listeners have {has} bytes", stream)
    most = facts.sysctls.get("net.core.rmem_max")
    if most is None:
        return unseen(name, "net.core.rmem_max", stream)
    if most < asked:
        why = f"net.core.rmem_max allows {most} of {asked} bytes, unless ingest has CAP_NET_ADMIN: bursts are dropped"
        return warning(name, why, cure, stream)
    return ok(name, f"net.core.rmem_max allows the {asked} bytes it will ask for", stream)


def _kernel_drops(stream: str, listeners: list[ListeningSocket]) -> Finding:
    if not listeners:
        return ok("kernel_drops", "none of its listeners can be seen", stream)
    if dropped := sum(listener.dropped for listener in listeners):
        cure = "a larger [[stream]] receive_buffer, or a further ingest worker"
        return warning("kernel_drops", f"the kernel dropped {dropped} datagrams at its listeners", cure, stream)
    return ok("kernel_drops", "the kernel has dropped none at its listeners", stream)


def _send_buffer(facts: HostFacts, asked: int) -> Finding:
    most = facts.sysctls.get("net.core.wmem_max")
    if most is None:
        return unseen("send_buffer", "net.core.wmem_max")
    if most < asked:
        why = f"net.core.wmem_max allows {most} of {asked} bytes, unless the senders have CAP_NET_ADMIN"
        return warning(
            "send_buffer", why, f"{_sysctl(f'net.core.wmem_max={asked}')}; then restart forwarder and transmitter"
        )
    return ok("send_buffer", f"net.core.wmem_max allows the {asked} bytes asked for")


def _backlog(facts: HostFacts) -> Finding:
    size = facts.sysctls.get(BACKLOG_NAME)
    if size is None or facts.softnet is None:
        return unseen("backlog", BACKLOG_NAME)
    dropped = facts.softnet.dropped
    if dropped or size < BACKLOG:
        why = f"{BACKLOG_NAME} is {size}, and {dropped} packets were dropped there since boot"
        return warning("backlog", why, _sysctl(f"{BACKLOG_NAME}={max(BACKLOG, 2 * size if dropped else size)}"))
    return ok("backlog", f"{BACKLOG_NAME} is {size}, and nothing was dropped there since boot")


def _budget(facts: HostFacts) -> Finding:
    budget = facts.sysctls.get(BUDGET_NAME)
    if budget is None or facts.softnet is None:
        return unseen("budget", BUDGET_NAME)
    why = f"{BUDGET_NAME} is {budget}; it ran out {facts.softnet.squeezed} times in {facts.softnet.processed} packets"
    if facts.softnet.squeezed > facts.softnet.processed * SQUEEZED_SHARE:
        return warning("budget", why, _sysctl(f"{BUDGET_NAME}={2 * budget} net.core.netdev_budget_usecs=8000"))
    return ok("budget", why)


UDP_ERRORS: Final = (
    ("RcvbufErrors", "full receive buffers", "see receive_buffer; `ss -uamn` shows whose sockets drop"),
    ("InCsumErrors", "wrong checksums", "look for the exporter or card that damages them: `ethtool -S IFACE`"),
)


def _udp_errors(counters: Mapping[str, int]) -> Iterator[Finding]:
    if not counters:
        yield unseen("udp_errors", "the kernel's UDP counters")
        return
    clean = True
    for suffix, cause, cure in UDP_ERRORS:
        if lost := counters.get(f"Udp{suffix}", 0) + counters.get(f"Udp6{suffix}", 0):
            clean = False
            yield warning("udp_errors", f"this host dropped {lost} datagrams for {cause}, since boot", cure)
    if clean:
        yield ok("udp_errors", "no datagram was dropped for a full receive buffer or a wrong checksum since boot")


def _reverse_path(facts: HostFacts) -> Iterator[Finding]:
    strict = [interface for interface, mode in facts.reverse_path.items() if mode == STRICT]
    dropped = facts.counters.get("IPReversePathFilter", 0)
    said = f"; {dropped} packets were dropped by it since boot" if dropped else ""
    # With one interface every exporter that can be answered at all is answered by it.
    if not strict or (len(facts.reverse_path) == 1 and not dropped):
        yield ok(
            "reverse_path",
            f"no interface with strict rp_filter could drop an exporter's datagrams{said}",
        )
        return
    for interface in strict:
        why = f"rp_filter is strict: exporters whose answers would leave by another interface are dropped{said}"
        name = interface.replace(".", "/")  # in the spelling of sysctl(8)
        yield warning("reverse_path", why, _sysctl(f"net.ipv4.conf.{name}.rp_filter=2"), interface)


def _conntrack(facts: HostFacts) -> Finding:
    names = ("net.netfilter.nf_conntrack_count", "net.netfilter.nf_conntrack_max")
    count, most = (facts.sysctls.get(name, 0) for name in names)
    if not most:
        return ok("conntrack", "connection tracking is not in use")
    why = f"connection tracking has {count} of {most} entries; beyond that datagrams are dropped"
    if count > most * CONNTRACK_SHARE:
        return warning("conntrack", why, f"{_sysctl(f'{names[1]}={2 * most}')}, or `notrack` for telemetry in nftables")
    return ok("conntrack", why)


def _clock(facts: HostFacts) -> Finding:
    if facts.time < RELEASED:
        return warning("clock", "the clock was never set: times of receipt are wrong", "`timedatectl set-ntp true`")
    if facts.synchronised is None:
        return unseen("clock", "whether the clock is synchronised")
    if not facts.synchronised:
        why = "the clock is not synchronised: times of receipt drift"
        return warning("clock", why, "start chrony or systemd-timesyncd, `timedatectl set-ntp true`")
    return ok("clock", "the clock is set and synchronised")
