"""Parts of the gateway, made from settings: tokens, TLS, destinations, and the registry's file."""

import ssl
from collections.abc import Callable, Iterable, Sequence

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.tokens import Tokens
from services.gateway.registry.store import Store
from services.gateway.transport.listeners import Listener, is_broadcast, is_local
from services.gateway.transport.tls import check_listener, make_context
from shared.bus.zmq_sockets import prepare_directory
from shared.nats.installed import check_installed
from shared.settings.entries import Token
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners


def check_cluster(settings: Settings) -> None:
    """Raise OperatorError unless this node can take part in the registry that the settings share."""
    if settings.uplink.registry:
        check_installed(settings.uplink)
        from shared.nats.access import check_access

        check_access(settings.uplink)


def tls_context(settings: Settings, declared: Sequence[Token]) -> ssl.SSLContext | None:
    """Return the context of TLS listeners; None: there are none."""
    secure = any(endpoint.scheme == "tls" for endpoint in settings.gateway.endpoints)
    return make_context(settings.gateway, declared) if secure else None


def tokens_of(settings: Settings, declared: Sequence[Token], listeners: Iterable[Listener]) -> Tokens:
    """Return the tokens, if these listeners may be used with them. OperatorError."""
    for listener in listeners:
        check_listener(listener, declared)
    return Tokens(declared, names_beyond_loopback=settings.gateway.names_beyond_loopback)


def opened_store(settings: Settings, clock: Callable[[], float]) -> Store:
    """Return the registry's file; one for each registry of a cluster, as this node has known it last."""
    path = settings.database
    if path is not None and settings.uplink.registry:
        path = path.with_stem(f"{path.stem}-{settings.uplink.registry}")
    if path is not None and path.parent == settings.bus.path:
        prepare_directory(path.parent)  # the broker may not have come yet
    return Store(path, clock)


def destinations_of(settings: Settings, listeners: FollowedListeners) -> Destinations:
    """Return the addresses that copies may go to."""
    return Destinations(
        [stream.name for stream in settings.streams],
        listeners,
        is_local,
        is_broadcast,
        settings.gateway.destinations,
    )
