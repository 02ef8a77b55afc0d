"""Messages of other sites: pulled from JetStream by a durable consumer for each of them, and handed on in order."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from services.uplink.packs import Arrived, read_pack
from services.uplink.session import REQUEST_SECONDS, Session
from services.uplink.subjects import kept_stream, parse_subject, stream_subjects
from shared.bus.messages import MessageError
from shared.ledger.counters import LATE_MS, MESSAGES_UNREADABLE, WAITING_MESSAGES
from shared.log import get_logger
from shared.nats.connection import reason

PULLED: Final = 256
PULLED_BYTES: Final = (2 << 20, 8 << 20)
"""Messages, and the least and the most bytes, that are asked for at once: the most keep 50 MB/s going over 80 ms.

On a slow link it is what comes in `PULL_SECONDS`: a server closes the connection of who takes too long to read, and
sends again what is not acknowledged in time. The least has room for the largest message.
"""
PULL_SECONDS: Final = 3.0
EXPIRE_SECONDS: Final = 30
HEARTBEAT_SECONDS: Final = 5
"""After two heartbeats that did not come, messages are asked for anew."""
RETRY_SECONDS: Final = 1.0
PAUSE_SECONDS: Final = 0.25
ACK_WAIT_SECONDS: Final = 30.0
"""Time after which JetStream sends again what was not acknowledged; longer than a message waits for an earlier one."""
MAX_ACK_PENDING: Final = 2 * PULLED
NEXT: Final = "next"
HEARTBEAT: Final = "100"
LAST: Final = "Nats-Last-Consumer"
"""A heartbeat's header: the consumer's number of the last message that it has handed on."""
OVER: Final = ("404", "408")
"""Ends of a request in due time: there is nothing, or it has expired."""
USED_UP: Final = ("Batch Completed", "Message Size Exceeds MaxBytes")
"""Ends of a request whose messages, or bytes, are used up."""

log = get_logger()


class Receiver:
    """Takes the streams of one other site; `deliver` handles a message and returns once it may be acknowledged."""

    def __init__(
        self,
        site: str,
        streams: Sequence[str],
        account: Counter[str],
        opened: asyncio.Event,
        deliver: Callable[[Session, Arrived], Awaitable[None]],
        resumed: Counter[str],
        lag: Counter[str],
    ) -> None:
        self.site = site
        self.streams = streams
        self._account = account
        self._opened = opened
        """Set once what comes may be handed on."""
        self._deliver = deliver
        self._resumed = resumed
        """Kept also over a kill: the place in the stream from which a consumer that is just being made anew begins."""
        self._lag = lag
        self._left = self._came = 0
        self._read_up_to = 0
        """The number, in the stream, of the last message that was handled."""
        self._heard_at = 0.0
        self._lost = False
        self._asked = self._next = 0
        """The number of the last request; the consumer's number of what it hands on next."""

    async def run(self, session: Session) -> None:
        """Receive by this connection until it ends."""
        self._lag.pop(WAITING_MESSAGES, None)
        self._asked_anew = asyncio.Event()
        inbox = f"{session.inboxes}.from.{self.site}"
        await session.client.subscribe(f"{inbox}.*", cb=partial(self._take, session))
        while True:
            if await self._has_consumer(session):
                await self._opened.wait()
                await self._pull(session, inbox)
            await asyncio.sleep(RETRY_SECONDS)

    async def _has_consumer(self, session: Session) -> bool:
        """Return whether there is a consumer of these streams; make it, or change it, where that is needed."""
        manager, stream = session.client.jsm(timeout=REQUEST_SECONDS), kept_stream(self.site)
        wanted = sorted(stream_subjects(self.site, each) for each in self.streams)
        name = f"to-{session.uplink.site}"
        config = ConsumerConfig(
            name=name,
            durable_name=name,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_SECONDS,
            max_ack_pending=MAX_ACK_PENDING,
            # One alone is named in the subject of the request, so that permissions can keep a site to that stream.
            filter_subject=wanted[0] if len(wanted) == 1 else None,
            filter_subjects=wanted if len(wanted) > 1 else None,
        )
        what = f"site {self.site}"
        try:
            try:
                info = await manager.consumer_info(stream, name)
                filters = info.config.filter_subjects or [info.config.filter_subject or ""]
                if (info.num_ack_pending or info.num_waiting) and info.ack_floor:
                    # Messages that an earlier connection was handed come again after `ack_wait`, behind newer; and one
                    # whose end the server has not seen is handed more.
                    self._resumed[NEXT] = info.ack_floor.stream_seq + 1
                    await manager.delete_consumer(stream, name)
                    info = await manager.add_consumer(stream, self._from_start(config))
                    self._resumed[NEXT] = 0
                elif sorted(filters) != wanted:
                    info = await manager.add_consumer(
                        stream,
                        config.evolve(
                            deliver_policy=info.config.deliver_policy, opt_start_seq=info.config.opt_start_seq
                        ),
                    )
            except NotFoundError:
                last = (await manager.stream_info(stream)).state.last_seq
                if not self._resumed[NEXT] and self._read_up_to:
                    self._resumed[NEXT] = self._read_up_to + 1
                if self._resumed[NEXT] > last + 1:
                    self._resumed[NEXT] = 1  # the stream was made anew, too
                info = await manager.add_consumer(stream, self._from_start(config))
                self._resumed[NEXT] = 0
                log.info("made the consumer by which this site receives", stream=stream, consumer=name)
            self._next = (info.delivered.consumer_seq if info.delivered else 0) + 1
            self._lag[WAITING_MESSAGES] = info.num_pending or 0
        except NotFoundError:
            self._lag[WAITING_MESSAGES] = 0
            session.troubles.say(what, f"site {self.site} has no stream in JetStream yet: nothing comes from there")
            return False
        except (NatsError, OSError, TimeoutError) as error:
            session.troubles.say(what, f"can't receive from site {self.site}: {reason(error)}; it is tried again")
            return False
        session.troubles.end(what, f"site {self.site} can be received")
        return True

    def _from_start(self, config: ConsumerConfig) -> ConsumerConfig:
        """Return the settings of a consumer that begins with what comes from now on, or where one before it was."""
        if start := self._resumed[NEXT]:
            return config.evolve(deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start)
        return config.evolve(deliver_policy=DeliverPolicy.NEW)

    async def _pull(self, session: Session, inbox: str) -> None:
        """Ask for messages again and again; return when the consumer may be gone."""
        loop, name = asyncio.get_running_loop(), f"to-{session.uplink.site}"
        size, most = PULLED_BYTES
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{kept_stream(self.site)}.{name}"
        self._lost = False
        while not self._lost:
            self._left, self._heard_at = PULLED, loop.time()
            self._asked_anew.clear()
            self._asked += 1
            self._came = 0
            request = {
                "batch": PULLED,
                "max_bytes": size,
                "expires": EXPIRE_SECONDS * 10**9,
                "idle_heartbeat": HEARTBEAT_SECONDS * 10**9,
            }
            began = loop.time()
            await session.client.publish(subject, msgspec.json.encode(request), f"{inbox}.{self._asked}")
            while not self._asked_anew.is_set() and loop.time() < self._heard_at + 2 * HEARTBEAT_SECONDS:
                await session.wait(self._asked_anew, HEARTBEAT_SECONDS)
            rate = self._came / max(0.001, loop.time() - began)
            size = max(PULLED_BYTES[0], min(most, int(PULL_SECONDS * rate)))

    async def _take(self, session: Session, message: Msg) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if not message.reply:  # JetStream says something itself: what others say it hands on to be acknowledged
            headers = message.headers or {}
            status = headers.get("Status")
            # A status comes on the inbox of its request: that of an earlier one tells nothing any more.
            if message.subject.rpartition(".")[2] != str(self._asked):
                return
            if status == HEARTBEAT:
                if int(headers.get(LAST, 0)) >= self._next:  # nothing may follow that would tell
                    self._note_lost(session)
                return
            told = headers.get("Description", "")
            if status not in OVER and told not in USED_UP:
                self._lose(session, f"JetStream hands on nothing of site {self.site}: {told}")
            self._asked_anew.set()
            return
        about = message.metadata
        if about.sequence.consumer != self._next:  # what is missing would come after `ack_wait`, behind newer
            self._note_lost(session)
            return
        self._next = about.sequence.consumer + 1
        self._lag[WAITING_MESSAGES] = about.num_pending
        self._came += len(message.data)
        await self._read(session, message)
        self._read_up_to = about.sequence.stream
        self._heard_at = asyncio.get_running_loop().time()
        self._left -= 1
        if self._left <= 0:
            self._asked_anew.set()

    def _note_lost(self, session: Session) -> None:
        self._lose(session, f"messages of site {self.site} were lost on the way here: they are fetched again")
        self._asked_anew.set()

    def _lose(self, session: Session, told: str) -> None:
        """Look after the consumer before more is asked for."""
        self._lost = True
        session.troubles.say(f"site {self.site}", told)

    async def _read(self, session: Session, message: Msg) -> None:
        try:
            origin = parse_subject(message.subject)
            if origin.site != self.site or origin.stream not in self.streams:
                raise MessageError("malformed", "of another site or stream than was asked for")
            arrived = read_pack(origin, message.data, message.reply)
        except (MessageError, ValueError) as error:
            self._account[MESSAGES_UNREADABLE] += 1
            log.warning("a message of another site is dropped", site=self.site, reason=str(error)[:200])
            await session.acknowledge(message.reply, b"+TERM")
            return
        await self._deliver(session, arrived)
        newest = arrived.batches[-1].batch
        assert newest is not None
        self._lag[LATE_MS] = max(0, time.time_ns() - newest.received_ns) // 1_000_000
