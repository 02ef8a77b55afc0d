"""Accounts, and their names: read and made in pairs."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

Accounts = dict[str, dict[str, int]]
"""By account, by counter."""

ENDED: Final = "ended/"
EGRESS: Final = "egress/"
ENDED_NAME: Final = re.compile(r"ended/([0-9a-f]{1,16})/([^/]+)")
ARRIVING: Final = re.compile(r"arriving/([^/]+)/([^/]+)/([0-9a-f]{1,16})/([^/]+)")
OWED_NAME: Final = re.compile(r"owed/([^/]+)/(.+)", re.DOTALL)
ORIGIN: Final = re.compile(r"origin/([^/]+)/([0-9a-f]{1,16})/([^/]+)")


def new_accounts() -> defaultdict[str, Counter[str]]:
    """Return accounts that begin at zero when first named."""
    return defaultdict(Counter)


def listener_account(stream: str, endpoint: str) -> str:
    """Return the name of the account of one listener of a stream."""
    return f"listener/{stream}/{endpoint}"


def egress_accounts(services: Iterable[Accounts]) -> Accounts:
    """Return the accounts of links by which the kernel's copies leave, by the link's name."""
    named = [(name, account) for kept in services for name, account in kept.items()]
    return {name.removeprefix(EGRESS): account for name, account in named if name.startswith(EGRESS)}


def is_origin(name: str) -> bool:
    """Return whether an account's name is one that `parse_origin` reads."""
    return ORIGIN.fullmatch(name) is not None


def parse_origin(name: str) -> tuple[str, int, str]:
    """Return worker, boot id and stream of an origin account's name; `unparse_origin` is the way back."""
    found = ORIGIN.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not the name of an origin account")
    worker, boot, stream = found.groups()
    return worker, int(boot, 16), stream


def unparse_origin(worker: str, boot: int, stream: str) -> str:
    """Return the name of the account that follows a stream of a worker since its boot."""
    return f"origin/{worker}/{boot:x}/{stream}"


def parse_arriving(name: str) -> tuple[str, str, int, str] | None:
    """Return site, worker, boot id and stream of an account of another site's worker; None where it is another's."""
    found = ARRIVING.fullmatch(name)
    return (found[1], found[2], int(found[3], 16), found[4]) if found else None


def unparse_arriving(site: str, worker: str, boot: int, stream: str) -> str:
    """Return the name of the account that follows a stream of a worker at another site since its boot."""
    return f"arriving/{site}/{worker}/{boot:x}/{stream}"


def parse_owed(name: str) -> tuple[str, str] | None:
    """Return stream and collector of an account of what the past owes it; None where it is another's."""
    found = OWED_NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


def unparse_owed(stream: str, collector: str) -> str:
    """Return the name of the account of what waits in the journal of a stream for a collector."""
    return f"owed/{stream}/{collector}"
