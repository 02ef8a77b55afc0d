"""The state of everything in one word, with its reasons. No I/O."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from shared.monitoring.balance import Balance
from shared.monitoring.picture import RECENT_SECONDS, Collector, Level, RecentLoss, Service, Verdict

TROUBLES: Final[dict[str, Level]] = {
    "unreachable": "error",
    "refusing": "error",
    "waiting": "error",
    "slow": "warning",
}
"""Words of a collector's health that are a reason, gravest first."""


def judge(
    services: Iterable[Service],
    collectors: Iterable[Collector] | None,
    losses: Iterable[RecentLoss],
    discrepancies: Sequence[str],
    recent_seconds: float,
    asked_for: Sequence[str] = (),
) -> Verdict:
    """Return the verdict; `discrepancies` are those of the last comparison of all accounts.

    `recent_seconds` are what the losses' `recent` covers, `asked_for` the kinds of service that the settings ask for.
    """
    services, collectors = list(services), list(collectors or ())
    if not services:
        return Verdict("unknown", ("no service has reported yet",), tuple(Balance(asked_for=asked_for).silent()))
    reasons: list[tuple[Level, str]] = []
    heard = {each.name: {each.name.partition(".")[0]: each.account} for each in services if not each.silent}
    named = [each.name for each in services if each.silent]
    silent = Balance(heard, asked_for=asked_for).silent()
    missing = [kind for kind in silent if not any(name.startswith(f"{kind}.") for name in named)]
    if missing or named:
        reasons.append(("error", f"not heard on the bus: {', '.join(missing + named)}"))
    if discrepancies:
        reasons.append(("error", f"the accounts do not add up: {discrepancies[0]}"))
    for word, level in TROUBLES.items():
        if names := [each.client.name for each in collectors if each.health == word]:
            reasons.append((level, f"{word}: {_some(names)}"))
    places = Counter[str]()
    for loss in losses:
        places[loss.loss.place] += loss.recent
    if any(places.values()):
        lost = ", ".join(f"{count:,} ({place})" for place, count in places.items() if count)
        reasons.append(("warning", f"lost in the last {_lasting(recent_seconds)}: {lost}"))
    if names := [each.client.name for each in collectors if each.health == "withheld"]:
        reasons.append(("ok", f"withheld by an admin: {_some(names)}"))
    reasons.sort(key=lambda reason: reason[0] != "error")
    return Verdict(reasons[0][0] if reasons else "ok", tuple(text for _, text in reasons), tuple(missing))


def _lasting(seconds: float) -> str:
    return "five minutes" if seconds >= RECENT_SECONDS else f"{max(1.0, seconds):.0f} s"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
