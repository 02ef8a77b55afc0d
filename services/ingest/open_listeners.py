"""The open listeners of a worker: their sockets, what reads these, and what is left of listeners that are gone."""

import math
import selectors
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from services.ingest.batch_publisher import StreamFeed
from services.ingest.listeners import (
    StreamEndpoint,
    Upkeep,
    listeners_of,
    reopen,
    warn_of_small_buffers,
    with_addresses,
)
from services.ingest.packet_marks import MarkReader
from services.ingest.receiver import DatagramReceiver
from services.ingest.reuseport_sharing import Spreader, is_shareable
from services.ingest.tcp_connections import ExporterConnections
from shared.datagrams.mmsg import ReceiveArena
from shared.ledger.accounts import listener_account
from shared.log import get_logger
from shared.net.addresses import Endpoint, is_name
from shared.net.host_lookups import HostLookups
from shared.net.sockets import InheritedSocket, bound_endpoint, enlarge_receive_buffer, receive_buffer
from shared.settings.entries import Stream
from shared.settings.model import Settings

DRAIN_SECONDS: Final = 2.0
"""Time, after SIGTERM, for the datagrams that the kernel has queued."""

log = get_logger()


class OpenListeners:
    """Reads the listeners of streams; inherited ones only once `ready`: earlier datagrams would be dropped.

    `feeds` has the feed of each stream by its name.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        selector: selectors.BaseSelector,
        feeds: Mapping[str, StreamFeed],
        accounts: defaultdict[str, Counter[str]],
        ready: Callable[[], bool],
    ) -> None:
        self._name = name
        self._settings = settings
        self._selector = selector
        self._feeds = feeds
        self._accounts = accounts
        self._ready = ready
        self._arena = ReceiveArena()
        self._receivers: dict[socket.socket, DatagramReceiver] = {}
        self._leaving: list[DatagramReceiver] = []
        """Receivers whose listener is gone, until the datagrams that the kernel has queued are taken."""
        self._sockets: dict[StreamEndpoint, list[socket.socket]] = {}
        self._streams: dict[str, Stream] = {}
        self._lookups = HostLookups(math.inf)
        """Of the names of new listeners, while a reload waits for them."""
        self.connections = ExporterConnections(selector, settings.ingest)
        self._held_back: dict[socket.socket, Callable[[], object]] = {}
        """The functions that begin to read inherited sockets."""
        self._upkeep = Upkeep()
        self._spreader = Spreader(settings.ingest.spread)
        self._marks = MarkReader(settings.offload, accounts["ingest"])

    @property
    def endpoints(self) -> list[str]:
        """The endpoints that are listened at, as text."""
        return [str(endpoint) for _, endpoint in self._sockets]

    @property
    def leaving(self) -> bool:
        """Return whether `take_rest` has something to read."""
        return bool(self._leaving)

    @property
    def smallest_buffer(self) -> int:
        """Bytes of the smallest receive buffer; 0: there is none."""
        return min(map(receive_buffer, self._receivers), default=0)

    def are_names_known(self, settings: Settings) -> bool:
        """Look up the names of new listeners beside the loop; return whether that has ended."""
        new = listeners_of(self._name, settings.streams, self._settings).keys() - self._sockets.keys()
        self._lookups.follow({endpoint.host for _, endpoint in new if endpoint.host and is_name(endpoint.host)})
        self._lookups.tick()
        return self._lookups.settled

    def forget_names(self) -> None:
        """Look up no names any more."""
        self._lookups.follow(())

    def open(
        self, streams: Sequence[Stream], held: Sequence[socket.socket], make_feeds: Callable[[Sequence[Stream]], None]
    ) -> None:
        """Open exactly the listeners of these streams; leave unchanged ones alone. Makes feeds once nothing can fail.

        OperatorError, with nothing changed, when a listener can't be had.
        """
        wanted = with_addresses(listeners_of(self._name, streams, self._settings), self._lookups)
        listening, gone = reopen(wanted, self._sockets, held, self._settings)
        for sock in gone:
            self._see_off(sock)
        make_feeds(streams)
        changed = {stream.name for stream in streams if self._streams.get(stream.name) != stream}
        granted: dict[int, int] = {}
        for (name, endpoint), sockets in listening.items():
            for sock in sockets if name in changed else ():
                self._start(wanted[name, endpoint], endpoint, sock, granted)
        self._sockets, self._streams = listening, {stream.name: stream for stream in streams}
        warn_of_small_buffers(granted)
        every = [(stream.name, endpoint) for stream in streams for endpoint in stream.endpoints]
        if left := [str(listener[1]) for listener in every if listener not in wanted]:
            log.info("listeners that can't be shared are left to the first worker of this host", listen=left)
        self._spreader.renew()

    def _start(self, stream: Stream, endpoint: Endpoint, sock: socket.socket, granted: dict[int, int]) -> None:
        """Make a socket serve a stream's listener; note its receive buffer in `granted`, {asked: granted} in bytes."""
        account = self._accounts[listener_account(stream.name, str(bound_endpoint(endpoint.scheme, sock)))]
        feed = self._feeds[stream.name]
        if endpoint.scheme == "tcp":
            if self.connections.feed(sock) is not feed:
                self.connections.leave(sock)
                self._begin_with(sock, partial(self.connections.listen, sock, feed, account))
            return
        granted[stream.receive_buffer] = enlarge_receive_buffer(sock, stream.receive_buffer)
        answer = stream.reply.encode() if stream.reply else None
        if receiver := self._receivers.get(sock):
            receiver.assign_stream(feed, account, answer, trains=stream.trains)
            return
        receiver = self._receivers[sock] = DatagramReceiver(
            sock, feed, account, self._arena, answer, trains=stream.trains, marks=self._marks
        )
        self._spreader.add(sock)
        self._begin_with(sock, partial(self._selector.register, receiver, selectors.EVENT_READ))

    def _begin_with(self, sock: socket.socket, begin: Callable[[], object]) -> None:
        """Read a socket from now on, or once that may be."""
        if isinstance(sock, InheritedSocket) and not self._ready():
            self._held_back[sock] = begin
        else:
            begin()

    def begin_held_back(self) -> None:
        """Read inherited sockets from now on, if it is time."""
        if self._held_back and self._ready():
            for begin in self._held_back.values():
                begin()
            self._held_back = {}

    def _see_off(self, sock: socket.socket) -> None:
        """Take nothing new on a socket, and close it once its queue is read."""
        receiver = self._receivers.pop(sock, None)
        if receiver is None:
            self.connections.leave(sock)
            sock.close()
            return
        self._selector.unregister(receiver)
        self._spreader.remove(sock)
        receiver.refuse_input()
        self._leaving.append(receiver)

    def take_rest(self) -> None:
        """Read one turn's worth from sockets that are to be closed; close those that have nothing more."""
        for receiver in list(self._leaving):
            if not receiver.receive()[0]:
                receiver.finish()
                self._leaving.remove(receiver)

    def keep_up(self) -> None:
        """Do what is due each second.

        Paths that others have removed are bound again, and groups joined again whose interface is a new one. Datagrams
        are shared with the workers that there are now, and silent connections end.
        """
        for (name, endpoint), sockets in list(self._sockets.items()):
            for sock in list(sockets) if not is_shareable(endpoint) else ():
                if fresh := self._upkeep.renew(self._streams[name], endpoint, sock):
                    self._sockets[name, endpoint] = [fresh]
                    self._see_off(sock)
                    self._start(self._streams[name], endpoint, fresh, {})
        self._spreader.renew()
        self.connections.expire()

    def count(self) -> None:
        """Bring the accounts up to date with the kernel's drops, and the sockets that read marks."""
        for receiver in self._receivers.values():
            receiver.count_kernel_drops()
        self._marks.count_sockets(each.reads_marks for each in self._receivers.values())

    def drain(self) -> None:
        """Take no new datagrams, but all that the kernel has queued.

        An inherited socket is left as it is: it goes on receiving, and its queue is our successor's.
        """
        everyone = [*self._receivers.values(), *self._leaving]
        ours = [receiver for receiver in everyone if not receiver.inherited]
        for receiver in ours:
            receiver.refuse_input()
        deadline = time.monotonic() + DRAIN_SECONDS
        for receiver in everyone:
            while receiver in ours and receiver.receive()[0] and time.monotonic() < deadline:
                pass
            with suppress(KeyError):  # not read yet, or no more
                self._selector.unregister(receiver)
            receiver.finish()
        self._receivers, self._leaving = {}, []
        self.connections.close(deadline)

    def close(self) -> None:
        """Close the sockets of datagrams."""
        for receiver in (*self._receivers.values(), *self._leaving):
            receiver.close()
