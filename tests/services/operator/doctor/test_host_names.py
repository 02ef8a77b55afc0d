from collections.abc import Iterable

import pytest

from services.operator.doctor.host_names import MEND, check_host_names
from shared.net.host_lookups import Host
from shared.process.registry_client import Entry
from shared.settings.entries import Collector
from shared.settings.model import Settings

NAME = "siem.example.net"
SETTINGS = Settings(collectors=(Collector("siem", ("*",), NAME, 9), Collector("flows", ("*",), "192.0.2.7", 9)))
FOUND = Host(("192.0.2.9", "192.0.2.10"), settled=True)
SILENT = Host(trouble="Name or service not known", settled=True)


def entries(address: str) -> list[Entry]:
    """The registry's, with the collector at an address."""
    return [Entry("siem", address, 9, streams=("*",), source="relay", host=NAME)]


@pytest.mark.parametrize(
    ("host", "listed", "level", "why", "cure"),
    [
        (FOUND, entries("192.0.2.10"), "ok", f"{NAME} is 192.0.2.9, 192.0.2.10; copies go to 192.0.2.10", ""),
        (FOUND, None, "ok", f"{NAME} is 192.0.2.9, 192.0.2.10", ""),
        (
            FOUND,
            entries("192.0.2.8"),
            "warning",
            f"{NAME} is 192.0.2.9, 192.0.2.10; copies still go to 192.0.2.8",
            "wait for the next lookup",
        ),
        (
            FOUND,
            [],
            "error",
            f"{NAME} is 192.0.2.9, 192.0.2.10, but the gateway sends no copies there",
            "it refuses the address",
        ),
        (SILENT, entries("192.0.2.9"), "warning", "copies go to 192.0.2.9, its last address", "or mend the resolver"),
        (SILENT, [], "error", f"{NAME} has no address (Name or service not known); no copies are sent", MEND),
        (SILENT, None, "error", "no copies are sent", MEND),
        (Host(), [], "error", "no answer within 5 s", MEND),
    ],
)
def test_name_is_compared_with_the_registry(
    host: Host, listed: Iterable[Entry] | None, level: str, why: str, cure: str
) -> None:
    """One finding a name: whether it has an address, and whether copies go there."""
    (found,) = check_host_names(SETTINGS, {NAME: host}, listed)
    assert (found.level, found.subject) == (level, "siem")
    assert why in found.why
    assert cure in found.cure
