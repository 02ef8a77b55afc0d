"""The console's loop: HTTP and the bus in one thread, and an end within two seconds however many pages are open."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvicorn

from services.console.admin import Admin
from services.console.app import Console
from services.console.bus_watch import Watch
from services.console.connections import OpenConnections, Server
from services.console.guard import LOOPBACK, Guard, by_digest
from services.console.one_datagram import Sampler
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.zmq_sockets import Publisher, Subscriber, broker_is_up, new_context
from shared.net.addresses import Endpoint
from shared.net.port_holders import explain_bind
from shared.net.sockets import (
    Bind,
    bind_endpoint,
    close_listener,
    prepare_listener,
    try_endpoint,
)
from shared.process.installed_version import release
from shared.process.lifecycle import BAD_SETTINGS, FAILED, Lifecycle, OperatorError, Readiness, worker_name
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.process.tokens_file import read_tokens
from shared.settings.model import Settings
from shared.settings.opt_in import asked_for

GRACE_SECONDS: Final = 1
"""Time for answers under way at the end; the streams of pages end at once."""
BACKLOG: Final = 128


def run_console(settings: Settings, lifecycle: Lifecycle) -> None:
    """Run the console until told to drain."""
    bus, name = settings.bus, worker_name("console")
    link = open_link(bus, "console")
    memory = Memory(settings.console.memory, "[console] memory")
    mark = queue_limit(bus.high_water_mark, memory.ceiling)
    with contextlib.ExitStack() as closing:
        listeners = [(endpoint, sock) for endpoint in settings.console.endpoints for sock in _bind(endpoint)]
        for _, sock in listeners:
            closing.callback(close_listener, sock)
        context = closing.enter_context(new_context())
        publisher = closing.enter_context(contextlib.closing(Publisher(context, bus.path, name, mark, link)))
        subscriber = closing.enter_context(contextlib.closing(Subscriber(context, bus.path, mark, link)))
        watch = Watch(subscriber, publisher, memory, asked_for(settings))
        console = Console(watch, Sampler(context, bus, link), Admin(watch, settings), release())
        asyncio.run(_serve(settings, lifecycle, listeners, watch, console))


def check_console(settings: Settings) -> None:
    """Raise what a console with these settings would raise here, and bind nothing for long.

    Where a broker runs, ports are not tried: its console has them.
    """
    read_tokens(settings)
    port_too = not broker_is_up(settings.bus.path, open_link(settings.bus, "console"))
    with contextlib.ExitStack() as closing:
        for endpoint in settings.console.endpoints:
            _config(Guard(_refuse, None, dict, remote=False), settings, endpoint)
            for sock in _bind(endpoint, partial(try_endpoint, made=settings.bus.path, port_too=port_too)):
                closing.enter_context(sock)


async def _refuse(*_: object) -> None:
    """Answer nothing: the application of a server that is not to serve."""


async def _serve(
    settings: Settings,
    lifecycle: Lifecycle,
    listeners: Sequence[tuple[Endpoint, socket.socket]],
    watch: Watch,
    console: Console,
) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    tokens = {"now": by_digest(read_tokens(settings))}

    def apply_settings(fresh: Settings) -> None:
        declared = by_digest(read_tokens(fresh))
        _renew_certificate(settings, [server.config.ssl for server, _ in servers if server.config.ssl])
        tokens["now"] = declared
        console.admin.settings = fresh
        watch.observer.asked_for = tuple(asked_for(fresh))

    reload = Reload("console.1", lifecycle, settings, apply_settings)

    def heed() -> None:
        lifecycle.heed()
        reload.check()
        if lifecycle.draining:
            stopped.set()

    loop.add_reader(lifecycle.fileno(), heed)
    loop.add_reader(watch.fileno(), watch.take)
    app, connections = console.application(), OpenConnections(watch.counters)
    servers: list[tuple[Server, socket.socket]] = []
    for endpoint, sock in listeners:
        remote = endpoint.scheme == "https"
        guard = Guard(app, _hosts(settings, endpoint, sock), lambda: tokens["now"], remote=remote)
        servers.append((Server(_config(guard, settings, endpoint), connections), sock))
    running = [asyncio.create_task(server.serve([sock])) for server, sock in servers]
    readiness = Readiness(
        "console.1", settings.bus, lambda: watch.is_ready() and all(server.started for server, _ in servers)
    )
    try:
        await watch.run(readiness, stopped, listen=list(settings.console.listen))
    finally:
        loop.remove_reader(lifecycle.fileno())
        loop.remove_reader(watch.fileno())
        for server, _ in servers:
            server.end()
        await asyncio.gather(*running)


def _config(app: Guard, settings: Settings, endpoint: Endpoint) -> uvicorn.Config:
    secure: dict[str, Any] = {}
    if endpoint.scheme == "https":
        secure = dict(zip(("ssl_certfile", "ssl_keyfile"), _certificate(settings), strict=True))
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        **secure,
    )
    try:
        config.load()
    except OSError as error:
        raise _unusable(error) from None
    return config


def _certificate(settings: Settings) -> tuple[Path, Path]:
    """Return the gateway's certificate and its key, which browsers are shown too."""
    gateway = settings.gateway
    return Path(os.path.expandvars(gateway.certificate)), Path(os.path.expandvars(gateway.key))


def _renew_certificate(settings: Settings, contexts: Sequence[ssl.SSLContext]) -> None:
    """Show the present content of the files at handshakes from now on; OperatorError, with nothing changed."""
    if not contexts:
        return
    try:
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), *contexts):  # files that do not fit change nothing
            context.load_cert_chain(*_certificate(settings))
    except OSError as error:
        raise _unusable(error) from None


def _unusable(error: OSError) -> OperatorError:
    return OperatorError(BAD_SETTINGS, f"[gateway] certificate and key, for [console]: {error}")


def _bind(endpoint: Endpoint, bind: Bind = bind_endpoint) -> list[socket.socket]:
    """Return sockets bound to every address of an endpoint. OperatorError where that can't be, or must not."""
    if endpoint.scheme == "http" and not endpoint.is_loopback:
        raise OperatorError(
            BAD_SETTINGS,
            f"[console] listen: {endpoint} is not loopback; use https://, with the gateway's certificate and tokens",
        )
    try:
        sockets = bind(endpoint, prepare_listener, path_mode=0o660)
        for sock in sockets:
            sock.listen(BACKLOG)  # before the next is bound: by SO_REUSEADDR two can bind one port, not listen
    except OSError as error:
        raise OperatorError(FAILED, f"{endpoint}: {explain_bind(error, endpoint, '[console] listen')}") from None
    return sockets


def _hosts(settings: Settings, endpoint: Endpoint, sock: socket.socket) -> list[str] | None:
    """Return the names by which browsers may call a listener; None: any, since a proxy calls it."""
    named = [name.lower() for name in settings.console.hosts]
    if sock.family == socket.AF_UNIX:
        return named or None
    address = str(sock.getsockname()[0])
    shown = f"[{address}]" if ":" in address else address
    return [*named, shown, endpoint.host.lower(), *(LOOPBACK if endpoint.is_loopback else ())]
