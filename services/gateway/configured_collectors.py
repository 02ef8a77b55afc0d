"""The collectors of the settings in the registry; one named by host is at the address that its name has now."""

import contextlib
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from services.gateway.admission.decision import decide_configured
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.host_addresses import choose_address
from services.gateway.admission.ownership import find_doubles
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.entry import Origin
from services.gateway.registry.registry import Registry
from shared.client import Client
from shared.log import HOST_ANSWERED, HOST_MOVED, HOST_REFUSED, HOST_UNANSWERED, get_logger
from shared.net.host_lookups import HostLookups, look_up
from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.settings.entries import Collector
from shared.settings.model import Settings

PATIENCE_SECONDS: Final = 2.0
"""Time that a start, and `--check`, wait for the answers of all names together."""

log = get_logger()


class Configured:
    """Enters the collectors of the settings, and moves them with their host names. Nothing here waits for an answer.

    A name's address is refused where an address in the settings would be. The one before stays then, as it does while
    there is no answer; also over a restart, as the registry keeps it.
    """

    def __init__(self, settings: Settings, destinations: Destinations, registry: Registry) -> None:
        self._registry = registry
        self._lookups = HostLookups(settings.gateway.resolve_seconds)
        self._unanswered: set[str] = set()
        self._refused: dict[str, str] = {}
        """By collector: what was said of its host name."""
        self._seen: dict[str, frozenset[str]] = {}
        self._doubles: set[tuple[str, str]] = set()
        self._pending = False
        self.expelled: set[str] = set()
        """Names that were removed since their copies would have come back; each returns once they would not."""
        self._patient_until = time.monotonic() + PATIENCE_SECONDS
        self.apply(settings, destinations)

    @property
    def settled(self) -> bool:
        """True once each name has been looked up, or need not be waited for."""
        return self._lookups.settled or time.monotonic() >= self._patient_until

    def apply(self, settings: Settings, destinations: Destinations) -> None:
        """Make the collectors of these settings those of the registry.

        OperatorError, with nothing changed, when one of them can't be admitted; OSError when it can't be stored.
        """
        self._enter(_decide(settings, destinations), settings, destinations)
        self._settings, self._destinations, self._named = settings, destinations, list(_named(settings))
        self._lookups.follow(collector.host for collector in self._named)
        names = {collector.name for collector in self._named}
        self._refused = {name: why for name, why in self._refused.items() if name in names}
        self.expelled.clear()  # whose copies would come back still, is refused above

    def tick(self) -> bool:
        """Follow what was answered since the last call; return whether an address may have changed."""
        refused = {collector.host for collector in self._named if collector.name in self._refused}
        for host in self._lookups.tick():
            self._log_answer(host)
            addresses = frozenset(self._lookups[host].addresses)
            self._pending |= host in refused or addresses != self._seen.get(host)
            self._seen[host] = addresses
        back = [*self._returning()] if self.expelled else []
        if not self._pending and not back:
            return False
        present = [each for each in self._registry.entries() if each.origin is Origin.SETTINGS and not each.host]
        with contextlib.suppress(OSError):  # it can't be stored now, which the store has logged: at the next call
            unnamed = [client for collector, client in back if not collector.host]
            self._enter([*(entry.client for entry in present), *unnamed], self._settings, self._destinations)
            self._pending = False
            if back:
                names = [collector.name for collector, _ in back]
                self.expelled.difference_update(names)
                log.info(
                    "collector is back: its address is none of fanwire's own listeners any more", clients=names[:10]
                )
        return True

    def _returning(self) -> Iterator[tuple[Collector, Client]]:
        """Yield the collectors that were removed, and would be admitted now."""
        for collector in self._settings.collectors:
            if collector.name in self.expelled:
                found = self._lookups[collector.host].addresses
                with contextlib.suppress(ValueError, RequestError, OSError):
                    address = (
                        choose_address(collector, found, "", self._settings) if collector.host else collector.address
                    )
                    yield collector, _at(collector, address, self._destinations)

    def _enter(self, clients: list[Client], settings: Settings, destinations: Destinations) -> None:
        """Make exactly these, and those named by host, the collectors of the settings."""
        before, hosts = {}, {collector.name: collector.host for collector in _named(settings)}
        for collector in _named(settings):
            before[collector.name] = self._present(collector)
            if client := self._place(collector, before[collector.name], settings, destinations):
                clients.append(client)

        def done(_: None) -> None:
            for client in clients:
                if client.address != before.get(client.name, client.address):
                    was = before[client.name] or None
                    log.info(HOST_MOVED, of=client.name, host=hosts[client.name], address=client.address, before=was)
            self._warn_of_doubles()

        self._registry.changes.make(lambda: self._registry.configure(clients, hosts), done)

    def _warn_of_doubles(self) -> None:
        """Log the pairs that have come to get the same at one place: that is legal, and hardly meant."""
        doubles = find_doubles(self._registry)
        if fresh := sorted(doubles - self._doubles):
            log.warning(
                "collectors get the same datagrams at one address and port, where these arrive twice",
                pairs=fresh[:10],
                count=len(fresh),
                cure="give one of each pair another port, other streams or other exporters, or both of them one group",
            )
        self._doubles = doubles

    def _present(self, collector: Collector) -> str:
        """Return the address that the collector has by this host name."""
        entry = self._registry.find(collector.name)
        return entry.client.address if entry is not None and entry.host == collector.host else ""

    def _place(
        self, collector: Collector, present: str, settings: Settings, destinations: Destinations
    ) -> Client | None:
        """Return the entry at the address that the name has now; else at the present one, if that is allowed still."""
        try:
            found = self._lookups[collector.host].addresses
            address = choose_address(collector, found, present, settings)
            client = _at(collector, address, destinations) if address else None
        except (ValueError, RequestError, OSError) as refused:
            self._log_refused(collector, str(refused))
        else:
            self._refused.pop(collector.name, None)
            return client
        with contextlib.suppress(ValueError, RequestError, OSError):
            return _at(collector, present, destinations)
        return None

    def _log_refused(self, collector: Collector, why: str) -> None:
        if self._refused.get(collector.name) != why:
            self._refused[collector.name] = why
            found = self._lookups[collector.host].addresses
            log.error(HOST_REFUSED, of=collector.name, host=collector.host, addresses=found[:10], reason=why)

    def _log_answer(self, host: str) -> None:
        """Log the begin and the end of a time without an answer."""
        kept = {each.name: self._present(each) or None for each in self._named if each.host == host}
        if (trouble := self._lookups[host].trouble) and host not in self._unanswered:
            self._unanswered.add(host)
            log.warning(HOST_UNANSWERED, of=host, reason=trouble, kept=kept)
        elif not trouble and host in self._unanswered:
            self._unanswered.discard(host)
            log.info(HOST_ANSWERED, of=host)


def check_configured(settings: Settings, destinations: Destinations) -> None:
    """Raise OperatorError when a collector could not be admitted; a name without an answer may get one later."""
    _decide(settings, destinations)
    hosts = look_up((collector.host for collector in _named(settings)), PATIENCE_SECONDS)
    for collector in _named(settings):
        try:
            if address := choose_address(collector, hosts[collector.host].addresses, "", settings):
                _at(collector, address, destinations)
        except (ValueError, RequestError, OSError) as refused:
            why = f'[[collector]] "{collector.name}": host name {collector.host}: {refused}'
            raise OperatorError(BAD_SETTINGS, why) from None


def _decide(settings: Settings, destinations: Destinations) -> list[Client]:
    try:
        return decide_configured(destinations, settings.collectors)
    except ValueError as error:
        raise OperatorError(BAD_SETTINGS, str(error)) from None


def _named(settings: Settings) -> Iterator[Collector]:
    return (collector for collector in settings.collectors if collector.host)


def _at(collector: Collector, address: str, destinations: Destinations) -> Client:
    return destinations.resolve_configured(msgspec.structs.replace(collector, address=address))
