"""Services that run only where the settings ask for them. No I/O."""

from collections.abc import Callable, Iterator
from typing import Final

from shared.settings.model import Settings

OPT_IN: Final[dict[str, Callable[[Settings], object]]] = {
    "journal": lambda settings: any(stream.journal for stream in settings.streams),
    "offload": lambda settings: settings.offload.interfaces,
    "uplink": lambda settings: settings.uplink.servers,
}
"""Services, and what asks for each."""


def asked_for(settings: Settings) -> Iterator[str]:
    """Yield the services that the settings ask for."""
    yield from (service for service, asks in OPT_IN.items() if asks(settings))
