"""The services: whether they run, report, and may do their work. No I/O."""

import errno
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.operator.doctor.copies import check_copies
from services.operator.doctor.journal import check_journal
from shared.ledger.accounts import Accounts
from shared.ledger.counters import FILES_RESTORED
from shared.monitoring.balance import Balance
from shared.monitoring.finding import Finding, error, ok, some, warning
from shared.process.registry_client import Entry
from shared.settings.model import Settings

SPARE_DESCRIPTORS: Final = 64
"""Descriptors that a service has open besides connections or collectors, rounded up."""
ONE_ONLY: Final = ("forwarder", "transmitter")
START: Final = "`systemctl start fanwire.target`, or `fanwire run`"
RESTART: Final = "restart it, or if `ps -eo pid,stat,args` shows T for it, `kill -CONT PID`; not running: " + START


@dataclass(frozen=True)
class RawSocketFacts:
    """The result of opening a raw socket as this user, and reasons for a failure."""

    failed: int = 0
    """An errno; 0: it succeeded."""
    in_bounds: bool = True
    """True if CAP_NET_RAW is in the bounding set: without it, no process started from here can have it."""
    no_new_privileges: bool = False
    unfit: str = ""
    """The reason why the transmitter can't become [transmitter] user, for root."""


@dataclass(frozen=True)
class ServiceFacts:
    """Facts of the services, seen and heard."""

    bus: str = ""
    """The fault of the bus directory, if any."""
    as_owner: str = ""
    """The command that runs this as the owner of the bus directory."""
    removed: Sequence[str] = ()
    """Files that running services hold open, and others have removed."""
    cleaned: bool = False
    """True if systemd-tmpfiles empties the bus directory, and nothing prevents that."""
    broker: bool | None = None
    """None: unknown."""
    gateway: str = ""
    """The reason why it does not answer, if it does not."""
    accounts: Mapping[str, Accounts] = field(default_factory=dict)
    """Accounts of each service that reported."""
    workers: Sequence[str] = ()
    """Ingest workers that live, whether they report or not."""
    descriptors: Mapping[str, int] = field(default_factory=dict)
    """Limit of open files, by service; "": the limit that this process hands on."""
    raw: RawSocketFacts = RawSocketFacts()


def check_services(facts: ServiceFacts, settings: Settings, collectors: Sequence[Entry]) -> Iterator[Finding]:
    """Yield every finding about the services."""
    directory = settings.bus.path
    if facts.bus:
        yield warning("bus", f"{directory}: {facts.bus}", f"run it as the services' user: `{facts.as_owner}`")
    elif settings.bus.connect:
        yield ok("bus", f"it is that of the broker at {settings.bus.connect}")
    else:
        yield ok("bus", f"{directory} is open to this user, or does not exist yet")
    yield _kept(facts, str(directory))
    yield _services(facts, settings.bus.connect)
    yield from _alone(facts)
    yield _gateway(facts)
    yield from check_copies(facts.accounts, collectors)
    if facts.broker:
        yield from check_journal(facts.accounts, settings)
    yield _raw_sockets(facts, [each.name for each in collectors if each.source == "original"])
    yield _descriptors(facts, "gateway", settings.gateway.max_connections, "[gateway] max_connections")
    yield _descriptors(facts, "forwarder", len(collectors), "the collectors that are signed up")


def senders_of_original(accounts: Mapping[str, Accounts]) -> list[str]:
    """Return the transmitters that have raw sockets."""
    return [name for name, kept in accounts.items() if kept.get("transmitter", {}).get("raw_sockets")]


def _kept(facts: ServiceFacts, directory: str) -> Finding:
    """Return whether the files of the bus stay in their place, as a finding."""
    name, cure = "bus_kept", "set [bus] directory to one under /run, or set XDG_RUNTIME_DIR; restart every service"
    if facts.removed:
        why = f"another program has removed {' and '.join(facts.removed)}: a second broker could take the bus"
        return error(name, f"{why}, and a restart of the gateway would lose the clients", cure)
    counts = {
        each: sum(kept.get(FILES_RESTORED, 0) for kept in facts.accounts[each].values()) for each in facts.accounts
    }
    if restored := {service: count for service, count in counts.items() if count}:
        said = ", ".join(f"{service} has made {count} anew" for service, count in restored.items())
        return warning(name, f"another program removes files of the bus or the registry: {said}", cure)
    if facts.cleaned:
        return warning(name, f"{directory}: systemd-tmpfiles removes files there that have not changed for days", cure)
    return ok(name, f"no program is known to clean {directory}")


def _services(facts: ServiceFacts, elsewhere: str) -> Finding:
    """Return whether all services report; `elsewhere` is the address of a broker on another host."""
    if facts.broker is None:
        return warning("services", "the bus can't be used from here, so no service can be heard", "see bus")
    if not facts.broker:
        why, cure = "no broker runs in the bus directory", START
        if elsewhere:
            why, cure = f"no broker answers at {elsewhere}", "start it there, and see [bus] listen of its settings"
        if facts.gateway:
            return warning("services", f"{why}, nor does the gateway answer", cure)
        return error("services", f"{why}, but a gateway answers: nothing is copied", f"{cure}; with the same settings?")
    if silent := Balance(dict(facts.accounts), facts.workers).silent():
        why = f"not heard on the bus: {', '.join(silent)}: not running, or stopped or stuck"
        return error("services", why, RESTART)
    return ok("services", f"heard on the bus: {', '.join(sorted(facts.accounts))}")


def _alone(facts: ServiceFacts) -> Iterator[Finding]:
    able = senders_of_original(facts.accounts)
    senders = [name for name in facts.accounts if not name.startswith("transmitter.") or name in able]
    running = Counter(name.partition(".")[0] for name in senders)
    several = [kind for kind in ONE_ONLY if running[kind] > 1]
    for kind in several:
        why = f"{running[kind]} of them run, and collectors get every copy from each"
        yield error("one_sender", why, "stop all but one", kind)
    if not several:
        yield ok("one_sender", "no copies are sent twice")


def _gateway(facts: ServiceFacts) -> Finding:
    if not facts.gateway:
        return ok("gateway", "the gateway answers")
    why = f"{facts.gateway}; only the collectors of the settings are checked"
    return (error if facts.broker else warning)("gateway", why, START)


def _raw_sockets(facts: ServiceFacts, originals: list[str]) -> Finding:
    name, subject = "raw_sockets", some(originals)
    if able := senders_of_original(facts.accounts):
        return ok(name, f"{', '.join(able)} has raw sockets, and no capability", subject)
    lacking = [service for service in facts.accounts if service.startswith("transmitter.")]
    why, cure = why_not_raw(facts.raw)
    if originals and facts.broker:
        without = "the transmitter runs without raw sockets" if lacking else "no transmitter reports"
        start = f"`systemctl restart fanwire-transmitter`; or {cure or '`fanwire transmitter`'}"
        return error(name, f"{without}: they get no copies", start, subject)
    if why:
        return warning(name, f'{why}: no `source = "original"`, no raw frames', cure, subject)
    return ok(name, "this user may open raw sockets", subject)


def why_not_raw(raw: RawSocketFacts) -> tuple[str, str]:
    """Return the reason why a transmitter started from here would have no raw sockets, and the cure; else nothing."""
    if raw.failed == errno.EACCES:
        return "a security module forbids raw sockets", "`aa-status` (AppArmor); `ausearch -m avc` (SELinux)"
    if raw.failed == errno.EAFNOSUPPORT:
        return (
            "the kernel has no AF_PACKET, or a unit's RestrictAddressFamilies= leaves it out",
            "`systemctl cat UNIT`",
        )
    if raw.failed and not raw.in_bounds:
        cure = "in a container: NET_RAW for it, and the image's python-net-raw, as in deploy/container/compose.yaml"
        return "CAP_NET_RAW is not in the bounding set of programs started from here", cure
    if raw.failed:
        cure = (
            "as root: `setpriv --reuid USER --regid GROUP --init-groups --inh-caps +net_raw --ambient-caps +net_raw "
            "fanwire transmitter`"
        )
        if raw.no_new_privileges:
            return (
                "this user lacks CAP_NET_RAW, and no_new_privs keeps sudo and setcap from giving it",
                f"allowPrivilegeEscalation: true, or NoNewPrivileges=no; {cure}",
            )
        return "this user lacks CAP_NET_RAW", cure
    if raw.unfit:
        return raw.unfit, "set [transmitter] user to one that can read the interpreter, such as Debian's python3"
    return "", ""


def _descriptors(facts: ServiceFacts, service: str, wanted: int, by: str) -> Finding:
    limits = [limit for name, limit in facts.descriptors.items() if name.partition(".")[0] == service]
    limit = min(limits, default=facts.descriptors.get("", 0))
    why = f"it may open {limit} files, and needs {wanted} for {by}"
    if limit < wanted + SPARE_DESCRIPTORS:
        enough = wanted + SPARE_DESCRIPTORS
        cure = f"`ulimit -Hn {enough}` as root, or LimitNOFILE={enough} in its unit"
        return warning("descriptors", f"{why}, and some more", cure, service)
    return ok("descriptors", why, service)
