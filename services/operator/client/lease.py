"""Keeps one client signed up: registers, renews, and starts over when the gateway has gone away."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from services.operator.cli.output import say
from shared.net.addresses import SocketAddress
from shared.process.registry_client import Access, Entry, RefusedError, RegistryClient, UnreachableError

TTL_SECONDS: Final = 30.0
RENEW_SECONDS: Final = 10.0
"""Two renewals may be lost before the lease is."""
RETRY_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses between attempts to sign up again; the last repeats for ever."""
PASSING: Final = frozenset(
    {"address_taken", "name_taken", "no_transmitter", "registry_full", "too_slow", "unavailable"}
)
"""Refusals that pass: a gateway may keep the entry of the lost connection until its lease expires, and one that has
just started may not have seen the transmitter yet."""


class Lease:
    """An entry in the registry, for as long as `keep` is called."""

    def __init__(self, access: Access, answer_seconds: float, name: str, wishes: Mapping[str, Any]) -> None:
        """Connect, so that the family and address of the connection are known; `register` does the rest."""
        self._access = access
        self._answer_seconds = answer_seconds
        self._name = name
        self._wishes = {**wishes, "name": name, "ttl": TTL_SECONDS, "hold": True}
        self._registry: RegistryClient | None = RegistryClient(access, answer_seconds)
        self._generation: int | None = None
        self._attempts = 0
        self._due_at = 0.0
        self.prove: Callable[[], str | None] = lambda: None
        """Returns the nonce that has come to our address when the registry wants proof of it; None: none came."""

    @property
    def local(self) -> SocketAddress | None:
        """Our end of the connection; None on AF_UNIX, which has no address."""
        return self._registry.local if self._registry else None

    def fileno(self) -> int:
        """Return the connection's descriptor, for poll(2), -1 without one; call `heed` when it is readable."""
        return self._registry.fileno() if self._registry else -1

    @property
    def seconds_left(self) -> float:
        """Seconds until `keep` has something to do."""
        return max(0.0, self._due_at - time.monotonic())

    def register(self, **wishes: Any) -> Entry:
        """Sign up, with the additions in `wishes`; OperatorError when that is refused."""
        self._wishes |= wishes
        if self._registry is None:
            self._registry = RegistryClient(self._access, self._answer_seconds)
        entry = self._ask_for_entry(self._registry)
        self._generation, self._attempts = entry.generation, 0
        if "since" in self._wishes:
            self._wishes["since"] = "left"  # it has had the past, or has begun to
        self._due_at = time.monotonic() + RENEW_SECONDS
        return entry

    def _ask_for_entry(self, registry: RegistryClient) -> Entry:
        try:
            answer = registry.ask("register", **self._wishes)
        except RefusedError as refused:
            nonce = self.prove() if refused.error == "unproven_address" else None
            if nonce is None:
                raise
            answer = registry.ask("confirm", name=self._name, nonce=nonce)
        if "since" in self._wishes and answer.message:
            say(answer.message)
        return answer.entry()

    def heed(self) -> None:
        """Print the reason why the connection became readable, and sign up again."""
        assert self._registry
        self.lose(self._registry.told())

    def keep(self) -> None:
        """Renew or sign up again, whichever is due. RefusedError when the registry refuses for good."""
        if self.seconds_left:
            return
        if self._generation is not None:
            self._renew()
        else:
            self._register_again()

    def _renew(self) -> None:
        assert self._registry
        try:
            self._registry.ask("renew", name=self._name, generation=self._generation)
        except UnreachableError as error:
            self.lose(str(error))
        except RefusedError as error:
            self.lose(f"the lease was not renewed: {error}")
        else:
            self._due_at = time.monotonic() + RENEW_SECONDS

    def _register_again(self) -> None:
        try:
            entry = self.register()
        except UnreachableError:
            self._wait()
        except RefusedError as error:
            if error.error not in PASSING:
                raise
            self._wait()
        else:
            say(f"signed up again as {self._name}, generation {entry.generation}")

    def lose(self, reason: str) -> None:
        """Note that the entry is gone; `keep` will sign up again."""
        say(f"{reason}; signing up again")
        self._generation = None
        self._wait()

    def _wait(self) -> None:
        self._close()
        self._due_at = time.monotonic() + RETRY_SECONDS[min(self._attempts, len(RETRY_SECONDS) - 1)]
        self._attempts += 1

    def leave(self) -> None:
        """Remove our entry; if that is not possible any more, it goes with the connection."""
        try:
            if self._registry and self._generation is not None:
                self._registry.ask("leave", name=self._name, generation=self._generation)
        except (UnreachableError, RefusedError) as error:
            say(f"the entry could not be removed, and goes with its lease: {error}")
        finally:
            self._close()

    def _close(self) -> None:
        if self._registry:
            self._registry.close()
        self._registry = None
