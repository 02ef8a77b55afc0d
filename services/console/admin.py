"""Changes that an admin asks for on the page. They go to the gateway with the admin's token, which decides on them.

What waits for an answer does so in a thread of its own, which does not keep the console from ending.
"""

import time
from collections.abc import Callable
from typing import Any, Final

from services.console.bus_watch import PICTURE_SECONDS, Watch
from services.console.guard import Holder
from shared.bus.status import INTERVAL_SECONDS
from shared.client import Source
from shared.log import PROBED_BY_ADMIN, REMOVED_BY_ADMIN, get_logger
from shared.monitoring.balance import ORIGINAL_SENDERS
from shared.monitoring.finding import Finding
from shared.monitoring.probe import Ledger, probe
from shared.process.event_loop import in_daemon_thread
from shared.process.lifecycle import UNAVAILABLE, OperatorError
from shared.process.registry_client import Access, RefusedError, RegistryClient
from shared.settings.entries import Stream
from shared.settings.model import Settings

ANSWER_SECONDS: Final = 5.0
REPORTED_SECONDS: Final = INTERVAL_SECONDS + PICTURE_SECONDS + 0.3
"""Within which every service has reported anew, and the watch has noticed."""
MAX_NAME_SHOWN: Final = 100

Said = tuple[int, str]
"""The status of an answer, and its sentence."""

log = get_logger()


class Admin:
    """Removes, withholds and releases clients, and sends probes; every answer is a sentence."""

    def __init__(self, watch: Watch, settings: Settings) -> None:
        self.settings = settings
        self._watch = watch
        self._probing = False

    async def remove(self, holder: Holder, name: str, generation: int) -> Said:
        """Remove a client, unless it has signed up anew since it was seen."""
        said = await self._ask(holder, f"{name} has been removed", "leave", name=name, generation=generation)
        if said[0] == 200:
            log.info(REMOVED_BY_ADMIN, client=name, by=holder.name)
        return said

    async def withhold(self, holder: Holder, name: str, reason: str) -> Said:
        """Stop the copies to a collector; the gateway logs it."""
        return await self._ask(holder, f"{name} gets no copies now", "withhold", name=name, reason=reason)

    async def release(self, holder: Holder, name: str) -> Said:
        """Let a collector have its copies again; the gateway logs it."""
        return await self._ask(holder, f"{name} gets its copies again", "release", name=name)

    async def _ask(self, holder: Holder, done: str, op: str, **fields: Any) -> Said:
        """Ask the gateway to do something; `done` is the sentence if it does."""

        def ask() -> None:
            with self._open_registry(holder) as registry:
                registry.ask(op, **fields)

        try:
            await in_daemon_thread(ask)
        except RefusedError as refused:
            return 409, str(refused)
        except OperatorError as error:
            return 503, str(error)
        return 200, done

    async def probe(self, holder: Holder, name: str) -> Said:
        """Send a probe to a stream, for copies with each source that this host can send; say how it went."""
        stream = next((each for each in self.settings.streams if each.name == name), None)
        if stream is None:
            return 404, f"no stream {name[:MAX_NAME_SHOWN]!r} in the settings of this host"
        if self._probing:
            return 409, "another probe is under way; wait some seconds"
        log.info(PROBED_BY_ADMIN, stream=name, by=holder.name)
        self._probing = True
        try:
            found = [await in_daemon_thread(self._probe_of(holder, stream, source)) for source in self._sources()]
        finally:
            self._probing = False
        return 200, "\n".join(f"{each.level}: {each.why}" + (f"; {each.cure}" if each.cure else "") for each in found)

    def _sources(self) -> tuple[Source, ...]:
        accounts = [each.account for each in self._watch.current().services if each.name.startswith("gateway.")]
        return ("relay", "original") if any(each.get(ORIGINAL_SENDERS) for each in accounts) else ("relay",)

    def _probe_of(self, holder: Holder, stream: Stream, source: Source) -> Callable[[], Finding]:
        takers = [each for each in self._watch.observer.clients.values() if each.wants(stream.name)]
        neighbours = list(dict.fromkeys(each.address for each in takers))

        def read_ledger() -> Ledger:
            time.sleep(REPORTED_SECONDS)
            return self._watch.observer.accounts

        return lambda: probe(lambda: self._open_registry(holder), stream, source, read_ledger, neighbours)

    def _open_registry(self, holder: Holder) -> RegistryClient:
        endpoint = self.settings.gateway.near
        if endpoint is None:
            raise OperatorError(
                UNAVAILABLE,
                "the console asks the gateway on this host only; add tcp://127.0.0.1:5000 to [gateway] listen",
            )
        patience = ANSWER_SECONDS + self.settings.gateway.serve_seconds
        return RegistryClient(Access(endpoint, token=holder.secret), patience)
