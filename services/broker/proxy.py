"""XSUB to XPUB in ZeroMQ's own loop (`zmq_proxy_steerable`), with its statistics; with keys, in a loop of our own."""

import math
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import zmq

from services.broker.bus_directory import ENDPOINTS, LOCK, BusDirectory
from services.broker.curve_auth import CurveAuth
from services.broker.filtering_proxy import KEPT_BACK, STATISTICS, FilteringProxy, Socket
from services.broker.ipc_peers import bind_tcp, let_in, refuse_strangers
from services.broker.stalled_subscribers import StalledSubscribers
from shared.bus.endpoint import DIRECT, BusLink, ipc_endpoint, queue_limit
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import (
    HELLO_TOPIC,
    Publisher,
    broker_is_up,
    check_directory,
    configure,
    new_context,
)
from shared.ledger.counters import FILES_RESTORED, SUBSCRIBERS_CUT
from shared.log import get_logger
from shared.net.addresses import Endpoint
from shared.process.lifecycle import Lifecycle, Manager, Watchdog
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.tables import Bus

QUIET_SECONDS: Final = 0.3
DRAIN_SECONDS: Final = 2.0
"""After SIGTERM the rest of the stack still flushes: pass messages until none come for a while, or this long."""
HELD_SECONDS: Final = 0.005
INCOMING_SHARE: Final = 2
"""A publisher's queue is one part in this many of a subscriber's: the rest waits at the publisher, which counts it."""
CUT_OFF_MS: Final = 250
"""Time for which a subscriber's queue outlives its connection."""

log = get_logger()

Passing = Callable[[Socket, Socket, Socket], None]
"""Passes messages between publishers and subscribers until the third socket says `TERMINATE`; it counts from zero."""


def check_broker(bus: Bus) -> None:
    """Raise what a broker of this bus would raise here, and bind nothing for long; where one runs, try no port."""
    if bus.path.exists():
        check_directory(bus.path)
    if bus.key_directory:
        CurveAuth(bus.key_directory)
    for side in ENDPOINTS if not broker_is_up(bus.path) else ():
        with new_context() as context, context.socket(zmq.XPUB) as sock:
            bind_tcp(sock, bus.endpoints, side)


class Proxy:
    """Owns the bus directory and all endpoints; a second broker on the same directory is refused.

    A group, if given, may enter the directory and connect. With a directory of keys, every connection needs one.
    """

    def __init__(
        self,
        directory: Path,
        high_water_mark: int,
        group: int | None = None,
        listen: Sequence[Endpoint] = (),
        keys: Path | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._directory = directory
        self._memory = memory or Memory()
        self._mark = queue_limit(high_water_mark, self._memory.ceiling)
        """Messages that each queue may hold."""
        ports = frozenset(endpoint.port + 1 for endpoint in listen)
        self._stalled = StalledSubscribers(self._memory, directory / "subscribe", ports, self._hold)
        self._held = self._ending = self._unbound = False
        self._restored = 0
        """Files that others have removed and that were made anew."""
        self._passed = Counter[str]()
        """The statistics from the last time the loop was left."""
        self._group = group
        self._listen = listen
        self._auth = CurveAuth(keys) if keys else None
        self._filter = FilteringProxy()

    def __enter__(self) -> Self:
        self._files = BusDirectory(self._directory)
        self._context = new_context()
        publishers = configure(self._context.socket(zmq.XSUB), max(1, self._mark // INCOMING_SHARE))
        subscribers = configure(self._context.socket(zmq.XPUB), self._mark)
        subscribers.set(zmq.LINGER, CUT_OFF_MS)
        # Every subscription goes on to the publishers, repeated ones too: so they see a late subscriber. So does every
        # unsubscription, since our XSUB counts both and would not know when the last one leaves. No XPUB_NODROP here:
        # one stalled subscriber would hold up the rest.
        subscribers.set(zmq.XPUB_VERBOSER, 1)
        link, passing = DIRECT, _pass_messages
        if self._auth is not None:
            self._auth.start(self._context)
            self._auth.require_keys(publishers, subscribers)
            link, passing = BusLink(keys=self._auth.keys), self._filter.pass_messages
        try:
            for sock, side in ((publishers, "publish"), (subscribers, "subscribe")):
                refuse_strangers(sock, self._directory, self._group)
                sock.bind(ipc_endpoint(self._directory, side))
                bind_tcp(sock, self._listen, side)
        except BaseException:
            for sock in (publishers, subscribers):
                sock.close()
            self._end()
            raise
        self._let_in()
        self._control = self._context.socket(zmq.PAIR)
        self._control.bind("inproc://control")
        steering = self._context.socket(zmq.PAIR)
        steering.connect("inproc://control")
        self._thread = threading.Thread(target=self._pass, args=(passing, publishers, subscribers, steering))
        self._thread.start()
        self._hello = configure(self._context.socket(zmq.SUB), 1)
        link.connect(self._hello, self._directory, "subscribe")
        self._hello.subscribe(HELLO_TOPIC)
        self._publisher = Publisher(self._context, self._directory, "broker.1", self._mark, link)
        return self

    def _pass(self, passing: Passing, publishers: Socket, subscribers: Socket, steering: Socket) -> None:
        """Pass messages until the end, except while they are held."""
        while not self._ending:
            if self._unbound:
                self._bind_anew(publishers, subscribers)
            passing(publishers, subscribers, steering)
            while self._held and not self._ending:
                for sock in (publishers, subscribers):
                    sock.get(zmq.EVENTS)  # libzmq releases ended connections in calls like this
                time.sleep(HELD_SECONDS)
        for sock in (publishers, subscribers, steering):
            sock.close()

    def _bind_anew(self, publishers: Socket, subscribers: Socket) -> None:
        """Bind again where a socket file is gone. Connections stay: only who comes later needs the file."""
        self._unbound = False
        try:
            for sock, side in ((publishers, "publish"), (subscribers, "subscribe")):
                if not (self._directory / side).exists():
                    sock.bind(ipc_endpoint(self._directory, side))
            self._let_in()
        except OSError as error:  # the next look tries again
            log.error(
                "the bus can't be bound anew; the broker tries again each second",
                directory=str(self._directory),
                reason=error.strerror,
            )

    def _let_in(self) -> None:
        if self._group is not None:
            let_in(self._group, self._directory, *(self._directory / endpoint for endpoint in ENDPOINTS))

    def _hold(self, held: bool) -> None:
        """Stop passing messages, or go on: meanwhile they wait at their publishers."""
        if held:
            self._control.send(b"PAUSE")
            self._passed = self.statistics()  # these stay true as long as it is held
            self._held = True
            self._control.send(b"TERMINATE")
        else:
            self._held = False

    def _restore_files(self) -> None:
        """Make anew what others have removed from the directory. OperatorError when another broker has it by now."""
        missing = self._files.missing()
        if self._held or not missing:
            return
        if LOCK in missing:
            self._files.take_again()
        log.warning(
            "another program has removed files of the bus: they were made anew",
            directory=str(self._directory),
            files=missing,
        )
        self._restored += len(missing)
        self._unbound = True
        self._hold(True)  # the thread that passes messages binds before it goes on
        self._hold(False)

    def statistics(self) -> Counter[str]:
        """Count the traffic so far, by direction, in parts and bytes."""
        statistics = Counter(self._passed)
        if not self._held:
            self._control.send(b"STATISTICS")
            answer: list[bytes] = []
            while len(answer) < len(STATISTICS):  # libzmq answers other orders too, with an empty message
                answer = self._control.recv_multipart()
            named = zip(STATISTICS + KEPT_BACK, answer, strict=False)
            statistics.update({name: struct.unpack("=Q", part)[0] for name, part in named})
        return statistics

    def supervise(self, lifecycle: Lifecycle, reload: Reload) -> None:
        """Report, and watch over memory, until told to drain; then wait until the rest of the stack is silent."""
        watchdog, manager = Watchdog(), Manager()
        reporter = Reporter(self._publisher, self._memory)
        poller = zmq.Poller()
        poller.register(lifecycle.fileno(), zmq.POLLIN)
        poller.register(self._publisher.socket, zmq.POLLIN)
        for monitor in self._auth.monitors if self._auth else ():
            poller.register(monitor, zmq.POLLIN)
        while not lifecycle.draining:
            left_ms = math.ceil(1000 * max(0.0, reporter.due_at - time.monotonic()))
            ready = poller.poll(min(self._stalled.relieve_memory(), left_ms))
            if not ready and time.monotonic() < reporter.due_at:
                continue
            if (lifecycle.fileno(), zmq.POLLIN) in ready:
                lifecycle.heed()
                reload.check()
            if self._auth is not None:
                self._auth.count_failed_handshakes()
            if reporter.asked_for(self._publisher.new_subscriptions()) or time.monotonic() >= reporter.due_at:
                self._restore_files()
                self._report(reporter)
                watchdog.feed()
                manager.check()
        self._drain()

    def _report(self, reporter: Reporter) -> None:
        statistics = self.statistics()  # always, even if no one listens: an answer shows that messages are passed
        statistics[SUBSCRIBERS_CUT] = self._stalled.cut
        statistics[FILES_RESTORED] = self._restored
        if self._auth is not None:
            statistics += self._auth.counters + self._filter.counters
        reporter.report(lambda: {"broker": statistics})

    def _drain(self) -> None:
        self._held = False
        deadline = time.monotonic() + DRAIN_SECONDS
        before = -1
        while (now := self.statistics()["from_publishers"]) != before and time.monotonic() < deadline:
            before = now
            time.sleep(QUIET_SECONDS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        self._control.send(b"TERMINATE")
        self._thread.join()
        for closable in (self._publisher, self._hello, self._control):
            closable.close()
        self._end()

    def _end(self) -> None:
        if self._auth is not None:
            self._auth.stop()
        self._context.term()
        self._files.close()


def _pass_messages(publishers: Socket, subscribers: Socket, steering: Socket) -> None:
    zmq.proxy_steerable(publishers, subscribers, None, steering)
