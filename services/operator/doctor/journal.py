"""The journal: whether it runs, writes, and since when it has something. No I/O."""

import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from shlex import quote

from shared.ledger.accounts import Accounts
from shared.ledger.counters import DAMAGED_BYTES, KEPT_BYTES, OLDEST, SET_ASIDE, WRITE_ERRNO
from shared.monitoring.finding import Finding, error, ok, warning
from shared.monitoring.journal import owed
from shared.settings.model import Settings

START = "`systemctl start fanwire-journal`, or `fanwire journal`"


def check_journal(accounts: Mapping[str, Accounts], settings: Settings) -> Iterator[Finding]:
    """Yield every finding about the journal; none where no stream is kept, nor was any."""
    kept = {
        name.removeprefix("journal/"): account
        for service, told in accounts.items() if service.startswith("journal.")
        for name, account in told.items() if name.startswith("journal/")
    }  # fmt: skip
    for stream in sorted({*settings.journaled} - kept.keys()):
        yield error("journal", "it is to be kept, and no journal on the bus keeps it", START, stream)
    for stream, account in sorted(kept.items()):
        yield _check_stream(stream, account, settings)
    for told in accounts.values():
        for each in owed(told):
            since = datetime.fromtimestamp(each.since)
            why = f"{each.datagrams:,} datagrams of {each.stream}, received since {since:%F %T}, are still owed to it"
            yield ok("journal", why, each.collector)


def _check_stream(stream: str, account: Mapping[str, int], settings: Settings) -> Finding:
    directory = settings.journal.path
    if number := account.get(WRITE_ERRNO, 0):
        cure = f"see `df {quote(str(directory))}`; lower [journal] bytes, or raise min_free; it goes on by itself"
        return error("journal", f"nothing is kept: {os.strerror(number)}", cure, stream)
    damaged, aside = account.get(DAMAGED_BYTES, 0), account.get(SET_ASIDE, 0)
    if damaged or aside:
        why = f"readers found {damaged} bytes damaged, and {aside} segments that can't be read"
        return warning("journal", why, "check the disk: `smartctl`, `dmesg`; remove the files that end in .bad", stream)
    size, oldest_ns = account.get(KEPT_BYTES, 0), account.get(OLDEST, 0)
    if not oldest_ns:
        return ok("journal", "nothing has come yet", stream)
    since = datetime.fromtimestamp(oldest_ns / 1e9)
    return ok(
        "journal", f"kept since {since:%F %T}: {size / 1e6:,.0f} of {settings.journal.bytes / 1e6:,.0f} MB", stream
    )
