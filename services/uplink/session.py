"""One connection to a NATS server, from its begin to its end. Another one begins with nothing of it.

nats-py could connect again by itself. But then it first sends what it had not yet sent, and so changes the order.
"""

import asyncio
import itertools
import re
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, Self

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from services.uplink.outgoing.outbox import Outbox
from services.uplink.server_checks import check_server, check_stream, wanted_stream
from services.uplink.subjects import kept_stream, site_subjects, unparse_subject
from shared.ledger.counters import MESSAGES_REFUSED, SERVER_FAULTS, SERVER_LIMIT, SERVER_REFUSED
from shared.log import get_logger
from shared.nats.connection import CarefulClient, ConnectError, close_connection, open_connection, reason
from shared.nats.tasks import end_tasks
from shared.nats.troubles import Troubles
from shared.net.addresses import Endpoint
from shared.settings.uplink import Uplink

PING_SECONDS: Final = 5
"""Between two questions whether the server is there; after three without an answer the connection ends."""
REQUEST_SECONDS: Final = 5.0
ACKNOWLEDGE_SECONDS: Final = 4.0
"""Time for JetStream to acknowledge a message; then all that is under way goes again."""
LOOK_SECONDS: Final = 0.25
STREAM_SECONDS: Final = 5.0
"""Between two attempts to find or to make this site's stream."""
ANSWERS_AWAITED: Final = 4
"""Answers that are known, for each message that may be under way: one that was sent again may have several to come."""
HEADERS: Final = 1024
"""Bytes that a server counts in a message beyond its content, at most. Above its limit it ends the connection."""
TOO_LARGE: Final = 10054
"""JetStream's error of a message above its stream's `max_msg_size` (nats-server, server/errors.json)."""
CONNECTION_ERRORS: Final = (NatsError, OSError, TimeoutError)
"""Errors of a connection; what nats-py tells beside these is from what it has called."""
NO_RESPONDERS: Final = "503"
FORBIDDEN: Final = re.compile(r"permissions violation for (publish|subscription) to \"?([^\"\s]+)", re.IGNORECASE)

log = get_logger()


class AckError(msgspec.Struct):
    """JetStream's reason to refuse a message."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Ack(msgspec.Struct):
    """JetStream's answer to a message that was published."""

    error: AckError | None = None
    duplicate: bool = False


_read_ack: Final = msgspec.json.Decoder(Ack).decode


class SessionError(Exception):
    """A connection can't be made, or can't be used."""


class Session:
    """A connection: it sends what the outbox has, and tells it what JetStream says."""

    def __init__(self, uplink: Uplink, outbox: Outbox, account: Counter[str], troubles: Troubles) -> None:
        self.client = CarefulClient()
        self.ended = asyncio.Event()
        self.wake = asyncio.Event()
        """Set it when the outbox may have something to send."""
        self.uplink = uplink
        self.troubles = troubles
        self.inboxes = f"_INBOX_{uplink.site}.{secrets.token_hex(8)}"
        """The beginning of subjects for answers: no other site may subscribe to them."""
        self._outbox = outbox
        self._account = account
        self._numbers: dict[str, str] = {}
        """The number of each message under way, by the token of its answer."""
        self._tokens = itertools.count()
        self._unheard = asyncio.Event()
        """Set when no stream takes what this site sends: it may have been deleted."""
        self._faults: set[str] = set()

    async def open(self, endpoint: Endpoint) -> Self:
        """Connect to a server. SessionError says why that failed."""
        try:
            await open_connection(self.client, self.uplink, endpoint, self._note_end, self._note_error, PING_SECONDS)
        except ConnectError as error:
            raise SessionError(str(error)) from None
        self._outbox.largest = self.client.max_payload - HEADERS
        version = self.client.connected_server_version
        self._account[SERVER_FAULTS] = 0
        for fault in check_server((version.major, version.minor, version.patch), self.client.max_payload):
            self._note_fault(fault)
        return self

    def _note_fault(self, fault: str) -> None:
        self._faults.add(fault)
        self._account[SERVER_FAULTS] = len(self._faults)
        self.troubles.say(f"fault {fault}", fault)

    async def run(self, *others: Callable[[Self], Coroutine[Any, Any, None]]) -> None:
        """Send, and do what the others do with this connection, until it ends."""
        work = [self._send(), self._look_after(), self._find_stream(), *(other(self) for other in others)]
        tasks = [asyncio.create_task(each) for each in work]
        end = asyncio.create_task(self._until_end())
        try:
            await asyncio.wait([*tasks, end], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not task.cancelled() and not self.ended.is_set():
                    task.result()  # a fault of ours shows
        except CONNECTION_ERRORS as error:
            raise SessionError(_fails(error)) from error
        finally:
            self._outbox.disconnect()
            await end_tasks([*tasks, end])
            await self.close()

    async def close(self) -> None:
        """End the connection."""
        await close_connection(self.client)

    async def acknowledge(self, reply: str, word: bytes = b"+ACK") -> None:
        """Tell JetStream that a message needs not come again; if it does not get that, it sends it again."""
        with suppress(NatsError, OSError):
            await self.client.publish(reply, word)

    @staticmethod
    async def wait(event: asyncio.Event, seconds: float) -> None:
        """Wait for an event, up to a time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()

    async def _note_end(self) -> None:
        self.ended.set()

    async def _note_error(self, error: Exception) -> None:
        if found := FORBIDDEN.search(str(error)):
            what, subject = found.groups()
            if what == "publish" and subject.lower().startswith(site_subjects("")[:-2]):
                self._account[MESSAGES_REFUSED] += max(1, self._outbox.drop_subject(subject, SERVER_REFUSED))
                self.wake.set()
            self.troubles.say(
                f"permission {subject}",
                f"the NATS server does not let site {self.uplink.site} {_VERBS[what]} {subject}: check its permissions",
            )
        elif not isinstance(error, CONNECTION_ERRORS):
            log.error("the uplink has failed to handle a message; please report this fault", exc_info=error)
        elif not self.ended.is_set():
            self.troubles.say("connection", _fails(error))

    async def _send(self) -> None:
        """Send what waits, as far as it may be under way."""
        await self.client.subscribe(f"{self.inboxes}.ack.*", cb=self._note_ack)
        self._outbox.connect()
        while True:
            while pack := self._outbox.next():
                if len(pack.payload) > self._outbox.largest:
                    self._outbox.drop(pack.number, SERVER_LIMIT)
                    told = f"a message of {len(pack.payload)} bytes is above the NATS server's max_payload: dropped"
                    self.troubles.say("max_payload", f"{told}; set max_payload: 1MB")
                    continue
                token = f"{next(self._tokens):x}"
                self._numbers[token] = pack.number
                if len(self._numbers) > ANSWERS_AWAITED * self.uplink.in_flight:
                    del self._numbers[next(iter(self._numbers))]
                try:
                    await self.client.publish(
                        unparse_subject(pack.origin),
                        pack.payload,
                        f"{self.inboxes}.ack.{token}",
                        {"Nats-Msg-Id": pack.number},
                    )
                except (NatsError, OSError):
                    self.ended.set()
                    return
            self.wake.clear()
            if pause := self._outbox.pause_left():
                await self.wait(self.wake, pause)
            else:
                await self.wake.wait()

    async def _look_after(self) -> None:
        """Send again what is not acknowledged in time; note that the connection is closed before nats-py tells."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self.client.is_closed:  # it tells after its farewell, which by TLS takes 30 s where nobody answers
                self.ended.set()
            self.wake.set()
            if self._outbox.overdue(ACKNOWLEDGE_SECONDS):
                told = f"JetStream has not acknowledged a message within {ACKNOWLEDGE_SECONDS:g} s; is its disk full?"
                self._fail(told)

    async def _note_ack(self, message: Msg) -> None:
        number = self._numbers.pop(message.subject.rpartition(".")[2], None)
        if number is None:
            return
        if (message.headers or {}).get("Status") == NO_RESPONDERS:
            subjects = site_subjects(self.uplink.site)
            self._unheard.set()
            self._fail(f"no stream of JetStream takes {subjects}: it is missing, has no leader, or JetStream is off")
            return
        try:
            ack = _read_ack(message.data)
        except msgspec.MsgspecError:
            ack = Ack(AckError(description="an answer that can't be read"))
        if ack.error is None:
            self._outbox.acknowledge(number)
            if self._outbox.waiting:
                self.wake.set()
            self.troubles.end("JetStream", "JetStream acknowledges again")
        elif ack.error.err_code == TOO_LARGE:
            self._account[MESSAGES_REFUSED] += 1
            self._outbox.drop(number, SERVER_LIMIT)
            self.troubles.say("max_payload", f"JetStream drops a message that is too large: {ack.error.description}")
        else:
            self._account[MESSAGES_REFUSED] += 1
            self._fail(f"JetStream refuses what this site sends: {ack.error.description}; it is tried again")

    def _fail(self, told: str) -> None:
        if self._outbox.fail():
            self.troubles.say("JetStream", told)

    async def _find_stream(self) -> None:
        """Find this site's stream, or make it, also again where it was deleted; say what is wrong with it."""
        manager, name = self.client.jsm(timeout=REQUEST_SECONDS), kept_stream(self.uplink.site)
        while self.uplink.send or self.uplink.nodes:
            try:
                try:
                    found = (await manager.stream_info(name)).config
                except NotFoundError:
                    if not self.uplink.create:
                        raise SessionError(f"there is no stream {name} in JetStream; make it, or set create") from None
                    found = (await manager.add_stream(wanted_stream(self.uplink))).config
                    log.info("made the stream of this site in JetStream", stream=name, replicas=self.uplink.replicas)
                self.troubles.end("stream", "the stream of this site is there")
                for fault in check_stream(found, self.uplink):
                    self._note_fault(fault)
            except (NatsError, OSError, TimeoutError, SessionError) as error:
                told = str(error) if isinstance(error, SessionError) else f"can't find or make {name}: {reason(error)}"
                self.troubles.say("stream", told)
            else:
                self._unheard.clear()
                await self._unheard.wait()
            await asyncio.sleep(STREAM_SECONDS)
        await self._until_end()

    async def _until_end(self) -> None:
        await self.ended.wait()


def _fails(error: Exception) -> str:
    return f"the connection to the NATS server fails: {reason(error)}"


_VERBS: Final = {"publish": "publish to", "subscription": "subscribe to"}
