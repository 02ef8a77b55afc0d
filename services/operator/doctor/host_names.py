"""Host names of the settings' collectors: whether they have addresses, and where the gateway sends copies for them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from shared.monitoring.finding import Finding, error, ok, warning
from shared.net import host_lookups
from shared.net.host_lookups import Host
from shared.process.registry_client import Entry
from shared.settings.model import Settings

PATIENCE_SECONDS: Final = 5.0
MEND: Final = "correct the name, or mend the resolver: `getent ahosts NAME` asks it as fanwire does"


def look_up(settings: Settings) -> dict[str, Host]:
    """Return the present addresses of each host name that the settings have."""
    return host_lookups.look_up((each.host for each in settings.collectors if each.host), PATIENCE_SECONDS)


def check_host_names(
    settings: Settings, hosts: Mapping[str, Host], entries: Iterable[Entry] | None
) -> Iterator[Finding]:
    """Yield a finding a name; `entries` are those of the registry, None where no gateway answers."""
    there = {entry.name: entry.address for entry in entries or () if entry.host}
    for collector in settings.collectors:
        if not collector.host:
            continue
        host, used, name = hosts[collector.host], there.get(collector.name), collector.name
        trouble = host.trouble or ("" if host.settled else f"no answer within {PATIENCE_SECONDS:.0f} s")
        found = f"{collector.host} is {', '.join(host.addresses)}"
        if trouble and used:
            why = f"{collector.host} has no answer ({trouble}); copies go to {used}, its last address"
            yield warning("host_name", why, MEND, name)
        elif trouble:
            yield error("host_name", f"{collector.host} has no address ({trouble}); no copies are sent", MEND, name)
        elif entries is None or used in host.addresses:
            yield ok("host_name", found + (f"; copies go to {used}" if used else ""), name)
        elif used:
            cure = f"wait for the next lookup, [gateway] resolve_seconds = {settings.gateway.resolve_seconds:g}"
            yield warning("host_name", f"{found}; copies still go to {used}", cure, name)
        else:
            why = f"{found}, but the gateway sends no copies there"
            yield error("host_name", why, "see the gateway's log: it refuses the address, or has other settings", name)
