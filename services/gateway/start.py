"""The gateway's start: makes its parts from settings, and runs the loop; or only checks that it could."""

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

from services.gateway.admission.readmission import Readmission, expel_loops
from services.gateway.configured_collectors import Configured, check_configured
from services.gateway.from_settings import check_cluster, destinations_of, opened_store, tls_context, tokens_of
from services.gateway.registry.changes import ignore, never_keep
from services.gateway.registry.reached_places import PastByName, Pasts
from services.gateway.registry.registry import Registry
from services.gateway.registry.store import Store
from services.gateway.server import Server
from services.gateway.transport.listeners import listening
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.zmq_sockets import Publisher, Subscriber, broker_is_up, new_context
from shared.net.sockets import try_endpoint
from shared.process.event_loop import run_loop
from shared.process.lifecycle import Lifecycle, worker_name
from shared.process.memory import Memory
from shared.process.tokens_file import read_tokens
from shared.serving_nodes import Owners
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners

if TYPE_CHECKING:
    from services.gateway.cluster.member import Member


def run_gateway(settings: Settings, lifecycle: Lifecycle) -> None:
    """Run the gateway until told to drain."""
    print("Starting server...", flush=True)  # as the documented server does
    bus = settings.bus
    declared = read_tokens(settings)
    tls = tls_context(settings, declared)
    link, name = open_link(bus, "gateway"), worker_name("gateway")
    memory = Memory(settings.gateway.memory, "[gateway] memory")
    mark = queue_limit(bus.high_water_mark, memory.ceiling)
    with (
        listening(settings.gateway.endpoints) as listeners,
        opened_store(settings, _boot_time) as store,
        new_context() as context,
        contextlib.closing(Publisher(context, bus.path, name, mark, link)) as publisher,
        contextlib.closing(Subscriber(context, bus.path, mark, link)) as subscriber,
    ):
        tokens = tokens_of(settings, declared, listeners)
        first_generation = max(store.generation + 1, time.time_ns() // 1000)
        preserve_seconds = settings.gateway.preserve_seconds
        member: Member | None = None

        def keep_pasts(changed: PastByName) -> None:
            (store if member is None else member).keep_pasts(changed)

        limits = settings.gateway.max_clients, settings.gateway.max_clients_per_holder
        pasts = Pasts(time.time, _boot_time, keep_pasts, *limits)
        pasts.journaled = frozenset(settings.journaled)
        pasts.restore(store.pasts)
        shared = bool(settings.uplink.registry)
        keep = never_keep if shared else store.keep
        registry = Registry(_boot_time, first_generation, keep, preserve_seconds, store.group_secret, pasts)
        registry.groups.owners = Owners.of(settings.uplink)
        if shared:
            member = _join(settings, registry, store, publisher.boot)
        registry.restore(store.entries, store.revision, store.withheld)
        own_listeners = FollowedListeners(settings.streams)
        destinations = destinations_of(settings, own_listeners)
        configured = Configured(settings, destinations, registry)
        registry.changes.make(partial(expel_loops, destinations, registry, configured.expelled), ignore)
        readmission = Readmission(registry)
        readmission.begin(tokens, destinations)
        server = Server(
            settings,
            lifecycle,
            store,
            registry,
            configured,
            own_listeners,
            destinations,
            tokens,
            readmission,
            store.epoch,
            publisher,
            subscriber,
            memory,
            _boot_time,
            member,
        )
        run_loop(server.run(listeners, tls))


def check_gateway(settings: Settings) -> None:
    """Raise what a gateway with these settings would raise here, and bind nothing for long; leave the registry alone.

    Where a broker runs, ports are not tried: its gateway has them.
    """
    declared, link = read_tokens(settings), open_link(settings.bus, "gateway")
    tls_context(settings, declared)
    check_cluster(settings)
    bind = partial(try_endpoint, made=settings.bus.path, port_too=not broker_is_up(settings.bus.path, link))
    with listening(settings.gateway.endpoints, bind) as listeners:
        tokens_of(settings, declared, listeners)
    check_configured(settings, destinations_of(settings, FollowedListeners(settings.streams)))


def _join(settings: Settings, registry: Registry, store: Store, boot: int) -> "Member":
    """Return this node's part in the registry that the settings share."""
    check_cluster(settings)
    from services.gateway.cluster.member import Member

    return Member(settings, registry, store, boot)


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
