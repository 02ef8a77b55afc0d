"""The copies that the kernel makes: whether offload runs, and whom it serves. No I/O."""

from collections.abc import Iterator, Mapping

from shared.bus.bodies.offload_messages import CollectorPath
from shared.ledger.accounts import Accounts
from shared.ledger.counters import APPLIER
from shared.monitoring.finding import Finding, ok, some, warning
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
    for path in paths.values():
        if path.way != "kernel":
            yield ok(NAME, f"by {path.way}, not by the kernel: {path.reason}", path.name)
