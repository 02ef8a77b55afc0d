"""The copies that the kernel makes: whether offload runs, by which interfaces, and whom it serves. No I/O."""

from collections.abc import Collection, Iterator, Mapping

from shared.bus.bodies.offload_messages import CollectorPath
from shared.ledger.accounts import Accounts, egress_accounts
from shared.ledger.counters import APPLIER
from shared.monitoring.finding import Finding, ok, some, warning
from shared.net.netlink import Link, stacked
from shared.settings.model import Settings

NAME = "kernel_copies"


def check_kernel_copies(
    settings: Settings, accounts: Mapping[str, Accounts], paths: Mapping[str, CollectorPath]
) -> Iterator[Finding]:
    """Yield the findings where the settings name interfaces, and none elsewhere."""
    if not settings.offload.interfaces:
        return
    reported = [kept["offload"] for name, kept in accounts.items() if name.startswith("offload.") and "offload" in kept]
    if not reported:
        yield warning(NAME, "[offload] interfaces are set, and offload does not report", "start it; see its log")
        return
    if not any(own.get(APPLIER) for own in reported):
        yield warning(
            NAME, "offload has no process with CAP_NET_ADMIN: the kernel makes no copies", "its log has the cure"
        )
        return
    served = [path.name for path in paths.values() if path.way == "kernel"]
    yield ok(NAME, f"the kernel makes the copies of {some(served)}" if served else "the kernel makes no copies now")
    for name, dropped in _dropped(accounts).items():
        yield warning(
            NAME,
            f"{name} and its queues have dropped {dropped} packets since the kernel's copies leave by it: at most that "
            "many copies are lost there, and no collector's account has them",
            f"raise the limit of its queue, or send less by it; see `tc -s qdisc show dev {name}`",
        )
    for path in paths.values():
        if path.way != "kernel":
            yield ok(NAME, f"by {path.way}, not by the kernel: {path.reason}", path.name)


def check_interfaces(settings: Settings, links: Collection[Link]) -> Iterator[Finding]:
    """Yield a warning for each interface that is named beside one by which its datagrams arrive, too."""
    for name, other in stacked(links, settings.offload.interfaces).items():
        yield warning(
            NAME,
            f"what arrives by {name} arrives by {other}, too: the kernel copies it by {other} alone",
            f"take {name} or {other} out of [offload] interfaces",
            name,
        )


def _dropped(accounts: Mapping[str, Accounts]) -> dict[str, int]:
    """Return what was dropped where the kernel's copies leave, by link, where anything was."""
    counted = {name: sum(account.values()) for name, account in egress_accounts(accounts.values()).items()}
    return {name: count for name, count in counted.items() if count}
