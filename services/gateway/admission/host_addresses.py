"""The address to which copies for a host name go, of those that the name has. No I/O."""

import ipaddress
from collections.abc import Sequence

from shared.settings.entries import Collector
from shared.settings.model import Settings


def choose_address(collector: Collector, found: Sequence[str], present: str, settings: Settings) -> str:
    """Return the address, of those found, best first: the present one as long as the name has it, or has no answer.

    Source-preserving copies need an address of their exporters' family. ValueError when there is none.
    """
    if not found:
        return present
    fit = found
    if collector.source == "original":
        family = "IPv4" if _gets_ipv4(collector, settings) else "IPv6"
        fit = [each for each in found if (":" in each) == (family == "IPv6")]
        if not fit:
            raise ValueError(f'it has no {family} address, and with source "original" its exporters\' family is needed')
    return present if present in fit else fit[0]


def _gets_ipv4(collector: Collector, settings: Settings) -> bool:
    """Return whether a datagram for the collector may have an IPv4 source: by its prefixes, else by listeners."""
    if collector.prefixes:
        return any(ipaddress.ip_network(prefix).version == 4 for prefix in collector.prefixes)
    streams = [stream for stream in settings.streams if collector.wants(stream.name)]
    hosts = [endpoint.host for stream in streams for endpoint in stream.endpoints]
    return any(":" not in host or host == "::" for host in hosts)  # [::] is dual-stack
