"""The uplink, where settings switch it on: heard, connected, and nothing lost on the way to other sites. No I/O."""

from collections.abc import Iterator, Mapping
from typing import Final

from shared.ledger.accounts import Accounts
from shared.ledger.counters import CONNECTED, HELD, LATE_MS, SERVER_FAULTS, WAITING_MESSAGES
from shared.ledger.equations import dropped
from shared.losses import causes
from shared.monitoring.finding import Finding, error, ok, warning
from shared.settings.model import Settings

NAME: Final = "uplink"
SLOW: Final = "see whether it falls; else the link is too slow, or the senders of copies here are"
LATE_SECONDS: Final = 10.0
LOG: Final = "see the uplink's log: it says what is wrong, and where"


def _lag(site: str, account: Mapping[str, int]) -> Finding:
    """Return how far this host is behind another site."""
    late, waiting = account.get(LATE_MS, 0) / 1000, account.get(WAITING_MESSAGES, 0)
    told = f"site {site}: the last datagrams came {late:.1f} s late, and {waiting} messages waited in JetStream"
    if waiting and late > LATE_SECONDS:
        return warning(NAME, told, SLOW, site)
    return ok(NAME, told)


def check_uplink(accounts: Mapping[str, Accounts], settings: Settings) -> Iterator[Finding]:
    """Yield every finding about it; none where there are no servers."""
    if not settings.uplink.servers:
        return
    if settings.uplink.registry:
        yield from _check_registry(accounts)
    found = [kept for name, kept in accounts.items() if name.startswith("uplink.")]
    if not found:
        cure = "`systemctl enable --now fanwire-uplink`, or `fanwire run`"
        yield error(NAME, "not heard on the bus: nothing goes to other sites, and nothing comes from there", cure)
        return
    (kept, *_) = found
    own = kept.get("uplink", {})
    waiting = sum(account.get(HELD, 0) for name, account in kept.items() if name.startswith("sending/"))
    if not own.get(CONNECTED):
        yield error(NAME, f"no connection to a NATS server; {waiting} datagrams wait for one", LOG)
    elif faults := own.get(SERVER_FAULTS, 0):
        yield warning(NAME, f"{faults} faults of the NATS server or of this site's stream there", LOG)
    else:
        yield ok(NAME, f"connected to a NATS server; {waiting} datagrams wait for it")
    for name, account in sorted(kept.items()):
        if name.startswith("receiving/"):
            yield _lag(name.partition("/")[2], account)
        if name.startswith("sending/") and (lost := dropped(account)):
            told = ", ".join(f"{count} {cause}" for cause, count in causes(account).items())
            yield warning(NAME, f"{lost} datagrams did not get to JetStream: {told}", LOG, name.partition("/")[2])


def _check_registry(accounts: Mapping[str, Accounts]) -> Iterator[Finding]:
    """Yield the finding about the registry that this node shares with others."""
    own = next((kept["gateway"] for name, kept in accounts.items() if name.startswith("gateway.")), {})
    if not own.get("registry_connected"):
        told = "this node can't change the registry of the cluster: no quorum, or no connection"
        yield error(NAME, told, "see the gateway's log; `register` and `renew` are refused meanwhile")
    else:
        yield ok(NAME, f"shares its registry: {own.get('sessions_live', 0)} nodes take part")
    if damaged := own.get("registry_damaged", 0):
        told = f"{damaged} records of the cluster's registry are damaged, or nobody's of ours"
        yield warning(NAME, told, "let only gateways write to its bucket")
