"""Pictures for tests of the console, made of what is told to an observer."""

from shared.bus.bodies.exporters_message import Exporters
from shared.bus.bodies.health_message import Health, Troubled
from shared.bus.messages import Message, RegistrySnapshot, Status
from shared.client import Client
from shared.ledger.accounts import Accounts
from shared.monitoring.observer import Observer
from shared.monitoring.picture import Picture
from shared.net.addresses import pack_address
from tests.builders import make_envelope

HOSTILE = '<img src=x onerror=alert(1)>"\\\n\x1b[2J'
"""A name that a client may choose."""


def client(name: str, generation: int = 1, **terms: object) -> Client:
    """A collector of the stream syslog."""
    fields: dict[str, object] = {"streams": ("syslog",), "address": "192.0.2.1", "port": 514, **terms}
    return Client(name, generation=generation, **fields)  # type: ignore[arg-type]


def observe(clients: list[Client], accounts: dict[str, Accounts], *, reports: int = 1) -> Observer:
    """An observer that was told of these clients, and as often of these accounts, as if a second had passed."""
    observer = Observer()
    observer.note(Message("", make_envelope(sender="gateway.1"), RegistrySnapshot(1, 0, 1, clients)), 0.0)
    for number in range(reports):
        for service, kept in accounts.items():
            status = Status(service, 42, 10**18, number, 0, 1, kept)
            observer.note(Message("", make_envelope(sender=service), status), float(number))
    return observer


def busy(now: float | None = None) -> Picture:
    """A stack with a hostile name, a refusing collector, and three exporters."""
    siem, hostile = client("siem"), client(HOSTILE, 2)
    observer = observe(
        [siem, hostile],
        {
            "ingest.1": {"stream/syslog": {"received": 900, "published": 890, "bytes": 9000, "dropped_bus_full": 10}},
            "forwarder.1": {
                "forwarder": {"bus_missed": 4},
                "collector/siem": {
                    "expected": 890,
                    "offered": 890,
                    "sent": 890,
                    "templates": 3,
                    "templates_sent": 3,
                    "refusals": 7,
                    "bytes": 9000,
                },
                f"collector/{HOSTILE}": {"expected": 890, "offered": 890, "sent": 880, "dropped_refused": 10},
                f"owed/syslog/{HOSTILE}": {"owed": 5, "owed_from_ns": 7 * 10**9},
            },
            "journal.1": {
                "journal": {"kept_limit_bytes": 99},
                "journal/syslog": {"taken": 890, "written": 880, "dropped_disk_full": 10, "oldest_ns": 10**18},
            },
            "uplink.1": {"uplink": {"connected": 1}, "sending/flows": {"taken": 3, "acknowledged": 3}},
            "broker.1": {},
            "gateway.1": {"gateway": {"memory": 5, "memory_most": 6, "memory_ceiling": 7}},
        },
    )
    at = max(told.report.received_at for told in observer._told.values())
    sick = Health("relay", 1, 0, 1, [Troubled("siem", 1, "refusing", 2000, 7)])
    observer.note(Message("", make_envelope(sender="forwarder.1"), sick), at)
    most = [(pack_address(f"10.0.0.{number}"), 10 * number, 1000) for number in (3, 2, 1)]
    told = Exporters("syslog", 1.0, 60, 1, 3, most)
    observer.note(Message("", make_envelope(sender="ingest.1"), told), at)
    return observer.picture(at if now is None else now)
