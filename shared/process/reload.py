"""Reload by SIGHUP: streams, collectors and tokens are read again, other settings stay as they were at the start.

If the new settings can't be used, or the service can't follow them, the old ones stay and one line says so.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from shared.log import get_logger
from shared.process.lifecycle import Lifecycle, OperatorError
from shared.settings.entries import Collector, Stream, Token
from shared.settings.explain import SettingsError
from shared.settings.file import differing
from shared.settings.model import Settings

RELOADED: Final = frozenset({"stream", "collector", "token"})
"""The keys that are read again."""

log = get_logger()


class Reload:
    """Hands a service the settings that it is to follow from now on.

    `follow` raises OperatorError when it can't, and then has changed nothing. None: the service uses none of them.
    `prepared` begins what takes long, such as lookups of names, and returns whether it has ended; it is asked at each
    `check` until then.
    """

    def __init__(
        self,
        service: str,
        lifecycle: Lifecycle,
        settings: Settings,
        follow: Callable[[Settings], None] | None = None,
        prepared: Callable[[Settings], bool] = lambda _: True,
    ) -> None:
        self._service = service
        self._lifecycle = lifecycle
        self._settings = settings
        self._follow = follow
        self._prepared = prepared
        self._fresh: Settings | None = None

    @property
    def preparing(self) -> bool:
        """Return whether settings wait until they can be followed: call `check` soon again."""
        return self._fresh is not None

    def check(self) -> None:
        """Reload if SIGHUP has come; call it after each turn of the service's loop."""
        try:
            if self._fresh is None and self._lifecycle.reload_wanted and self._lifecycle.read is not None:
                # Before reading: a later SIGHUP asks for a newer state of the file.
                self._lifecycle.reload_wanted = False
                self._fresh = self._lifecycle.read()
            if self._fresh is not None and self._prepared(self._fresh):
                fresh, self._fresh = self._fresh, None
                self._adopt(fresh)
        except (SettingsError, OperatorError) as error:
            log.error(f"not reloaded, the old settings stay: {error}", service=self._service, answer=True)

    def _adopt(self, fresh: Settings) -> None:
        before = self._settings
        again = {"streams": fresh.streams, "collectors": fresh.collectors, "tokens": fresh.tokens}
        settings = msgspec.structs.replace(before, **again)
        if self._follow:
            self._follow(settings)
            self._settings = settings
        if restart := [key for key in differing(before, fresh) if key not in RELOADED]:
            event = "these settings have changed too, but need a restart"
            log.warning(event, service=self._service, settings=restart, answer=True)
        if self._follow:
            changed = [*_changed("stream", before.streams, settings.streams)]
            changed += _changed("collector", before.collectors, settings.collectors)
            changed += _changed("token", before.tokens, settings.tokens)
            log.info("reloaded", service=self._service, changed=changed)
        else:
            log.info("nothing to reload: this service uses no streams and no collectors", service=self._service)


def _changed(
    kind: str, before: Sequence[Stream | Collector | Token], now: Sequence[Stream | Collector | Token]
) -> Iterator[str]:
    """Name the entries that are new, gone, or different."""
    was, became = ({entry.name: entry for entry in entries} for entries in (before, now))
    names = dict.fromkeys([*was, *became])
    return (f"{kind} {name}" for name in names if was.get(name) != became.get(name))
