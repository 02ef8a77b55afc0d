"""Flow of copies to each collector, by the senders' counts and the registry's word. No I/O."""

from collections.abc import Iterator, Mapping, Sequence
from shlex import quote
from typing import Final

from shared.ledger.accounts import Accounts
from shared.ledger.counters import DROPPED, PROHIBITED, REFUSALS, REFUSED, UNREACHABLES
from shared.losses import causes
from shared.monitoring.finding import Finding, error, ok, warning
from shared.process.registry_client import Entry

NOT_LET_OUT: Final = DROPPED + "eperm"
DENIED: Final = {
    NOT_LET_OUT: (
        "this host does not let copies out",
        "`nft list ruleset`: an OUTPUT or cgroup rule drops them; or a seccomp or BPF filter of the service does",
    ),
    PROHIBITED: (
        "a firewall rejects copies",
        "the collector's host, or a router on the way, answers `administratively prohibited`: open the port there",
    ),
    UNREACHABLES: (
        "copies are answered by ICMP errors: nobody has the address, a router has no route, or a firewall rejects them",
        "ping the collector; on its host and the routers: `nft list ruleset`, `ip route get ADDRESS`",
    ),
    **dict.fromkeys((REFUSALS, REFUSED), ("its port is closed", "start the collector, or correct the port")),
}
"""Counters that tell who denies copies, the surest first: their meaning, and the cure."""
GLOSSARY: Final = "see the cause in services/operator/README.md"


def check_copies(accounts: Mapping[str, Accounts], collectors: Sequence[Entry]) -> Iterator[Finding]:
    """Yield collectors that get nothing, or too little; `accounts` are those of each service that reports."""
    for each in collectors:
        if order := each.withheld:
            why = f"an admin withholds its copies{f': {order.reason}' if order.reason else ''}"
            yield warning("copies", why, f"`fanwire release {quote(each.name)}` lets them flow again", each.name)
    well = (None, "ok", "withheld", "elsewhere")
    troubled = {each.name: each.health for each in collectors if each.health not in well}
    waiting = [name for name, health in troubled.items() if health == "waiting"]
    for name in waiting:
        why = "its sender has not confirmed that copies flow, or is silent by now"
        yield error("copies", why, "see services and raw_sockets: start or restart what is missing there", name)
    found = [
        finding
        for service, kept in accounts.items()
        for name, account in kept.items()
        if name.startswith("collector/")
        for finding in _lost(service, name.removeprefix("collector/"), account, troubled)
    ]
    yield from found
    if not (waiting or found):
        why = (
            "copies flow, and none is known to be lost since its collector signed up"
            if accounts
            else "no service sends any yet"
        )
        yield ok("copies", why)


def _lost(service: str, name: str, account: Mapping[str, int], troubled: Mapping[str, object]) -> Iterator[Finding]:
    """Yield the losses of a collector: their causes, the meaning and the cure of the surest."""
    counts = causes(account)
    if not counts:
        return
    denied = next((counter for counter in DENIED if account.get(counter)), None)
    meaning, cure = DENIED[denied] if denied else ("", GLOSSARY)
    lost = ", ".join(f"{count} {cause}" for cause, count in counts.items())
    why = f"{meaning}{'; ' * bool(meaning)}{sum(counts.values())} lost since it signed up, as {service} counts: {lost}"
    lasts = denied and name in troubled
    yield (error if lasts else warning)("copies", why, cure, name)
