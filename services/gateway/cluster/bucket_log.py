"""The bucket in JetStream, as a log: found or made, followed record by record, and written on a condition.

The client's own key-value functions are not used. They can't renew a time to live, and take the mark of an expired key
for a value. Here every value is written as the message that it is.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from services.gateway.cluster.keys import LISTED, stream_name, subject_of
from shared.nats.connection import reason

REQUEST_SECONDS: Final = 2.0
HEARTBEAT_SECONDS: Final = 0.5
SILENT_SECONDS: Final = 2.0
"""Time without a heartbeat after which the server that followed the log for us is taken to be gone."""
FORGET_SECONDS: Final = 30
LARGEST_BATCH: Final = 500
"""Records written together: JetStream takes a thousand."""
NANO: Final = 1_000_000_000
WRONG_POSITION: Final = (10071, 10164)
"""JetStream's errors where the last position is another one than expected (nats-server, server/errors.json)."""
NOT_FOUND: Final = 10059


class OvertakenError(Exception):
    """Another record has come first; the last one under these keys is at `position`."""

    def __init__(self, position: int) -> None:
        super().__init__(f"another record is at position {position}")
        self.position = position


class LogError(Exception):
    """The log can't be read or written now. What was written may be there, or come to be there."""


class _Fault(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _State(msgspec.Struct, frozen=True):
    first_seq: int = 0
    last_seq: int = 0
    subjects: dict[str, int] = {}


class _Config(msgspec.Struct, frozen=True):
    num_replicas: int = 1
    max_msgs_per_subject: int = -1
    allow_msg_ttl: bool = False
    allow_atomic: bool = False
    storage: str = "file"
    discard: str = "old"
    max_age: int = 0
    max_msgs: int = -1
    max_bytes: int = -1


class _Answer(msgspec.Struct, frozen=True):
    """JetStream's answer to a request, or to a record."""

    error: _Fault | None = None
    seq: int = 0
    state: _State = _State()
    config: _Config = _Config()
    created: str = ""
    num_pending: int = 0


_read: Final = msgspec.json.Decoder(_Answer).decode


@dataclass(frozen=True, slots=True)
class Write:
    """A record to be written under a key, to be dropped by the server after a time (0: never)."""

    key: str
    data: bytes
    ttl_seconds: int = 0


class BucketLog:
    """One connection's way to the bucket of `registry`."""

    def __init__(self, client: Client, registry: str, inboxes: str) -> None:
        self._client = client
        self._registry = registry
        self._inboxes = inboxes
        self.stream = stream_name(registry)
        self.created = ""
        """The time at which the bucket was made: another one has another log."""
        self.faults: list[str] = []

    async def open(self, replicas: int, *, create: bool) -> int:
        """Find the bucket, or make it; return the position of its last record. LogError."""
        found = await self._ask(f"STREAM.INFO.{self.stream}")
        if found.error is not None and found.error.err_code == NOT_FOUND:
            if not create:
                raise LogError(f"there is no bucket {self.stream} in JetStream; make it, or set create")
            found = await self._ask(f"STREAM.CREATE.{self.stream}", self._wanted(replicas))
        if found.error is not None:
            raise LogError(f"can't find or make {self.stream}: {found.error.description}")
        self.created = found.created
        self.faults = list(_check(found.config, self.stream, replicas))
        return found.state.last_seq

    async def has(self, key: str) -> bool:
        """Return whether there is a record under a key, or the server can't tell. LogError without an answer."""
        subject = subject_of(self._registry, key)
        found = await self._ask(f"STREAM.INFO.{self.stream}", {"subjects_filter": subject})
        return found.error is not None or subject in found.state.subjects

    def _wanted(self, replicas: int) -> dict[str, object]:
        return {
            "name": self.stream,
            "subjects": [subject_of(self._registry, ">")],
            "storage": "file",
            "num_replicas": replicas,
            "max_msgs_per_subject": 1,
            "discard": "new",
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_direct": True,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            "max_bytes": -1,
            "max_age": 0,
            "duplicate_window": 2 * 60 * NANO,
        }

    async def follow(
        self, after: int, take: Callable[[int, str, bytes, float], None], caught_up: Callable[[], None]
    ) -> None:
        """Hand each record behind a position to `take`, in order; LogError once they do not come any more.

        `take` gets its position, key, content, and the Unix time at which it was stored. `caught_up` is called once
        those that there are now have come.
        """
        inbox = f"{self._inboxes}.log.{secrets.token_hex(6)}"
        queue: asyncio.Queue[Msg] = asyncio.Queue()
        try:
            subscription = await self._client.subscribe(inbox, cb=queue.put)
        except NatsError as error:
            raise LogError(f"{self.stream} can't be followed: {reason(error)}") from None
        try:
            made = await self._ask(f"CONSUMER.CREATE.{self.stream}", self._consumer(inbox, after))
            if made.error is not None:
                raise LogError(f"can't follow {self.stream}: {made.error.description}")
            pending, delivered = made.num_pending, 0
            if not pending:
                caught_up()
            prefix = subject_of(self._registry, "")
            while True:
                try:
                    async with asyncio.timeout(SILENT_SECONDS):
                        message = await queue.get()
                except TimeoutError:
                    raise LogError(f"{self.stream} can't be followed: no server sends it any more") from None
                if not message.reply or not message.reply.startswith("$JS.ACK."):
                    last = (message.headers or {}).get("Nats-Last-Consumer")
                    if last is not None and int(last) != delivered:
                        raise LogError(f"a record of {self.stream} was lost on the way; it is read again")
                    if delivered < pending:  # some have ended meanwhile: it sends this only when it has no more
                        pending = delivered
                        caught_up()
                    continue
                about = message.metadata
                if about.sequence.consumer != delivered + 1:
                    raise LogError(f"a record of {self.stream} was lost on the way; it is read again")
                delivered += 1
                key = message.subject.removeprefix(prefix)  # what a consumer has handed on here has another subject
                take(about.sequence.stream, key, message.data, about.timestamp.timestamp())
                if delivered == pending:
                    caught_up()
        finally:
            with suppress(NatsError):
                await subscription.unsubscribe()

    def _consumer(self, inbox: str, after: int) -> dict[str, object]:
        config: dict[str, object] = {
            "deliver_subject": inbox,
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "idle_heartbeat": int(HEARTBEAT_SECONDS * NANO),
            "inactive_threshold": FORGET_SECONDS * NANO,
            "mem_storage": True,
            "num_replicas": 1,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after + 1,
        }
        return {"stream_name": self.stream, "config": config}

    async def write(self, writes: Sequence[Write], expected: int, keys: str = LISTED) -> int:
        """Write records together, if the last one under `keys` is at position `expected`; return the last one's.

        OvertakenError, and nothing is written; LogError where that is not known.
        """
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(expected),
            "Nats-Expected-Last-Subject-Sequence-Subject": subject_of(self._registry, keys),
        }
        batch = secrets.token_hex(12)
        try:
            for number, write in enumerate(writes, 1):
                if write.ttl_seconds:
                    headers["Nats-TTL"] = f"{write.ttl_seconds}s"
                if len(writes) > 1:
                    headers |= {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
                subject = subject_of(self._registry, write.key)
                if number < len(writes):
                    await self._client.publish(subject, write.data, headers=headers)
                    headers = {}
                    continue
                if len(writes) > 1:
                    headers["Nats-Batch-Commit"] = "1"
                answered = await self._client.request(subject, write.data, REQUEST_SECONDS, headers=headers)
            answer = _read(answered.data)
        except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise LogError(f"{self.stream} can't be written: {reason(error)}") from None
        if answer.error is None:
            return answer.seq
        if answer.error.err_code in WRONG_POSITION:
            raise OvertakenError(_position_in(answer.error.description))
        raise LogError(f"{self.stream} can't be written: {answer.error.description}")

    async def put(self, write: Write) -> None:
        """Write a record whatever is there. LogError."""
        try:
            headers = {"Nats-TTL": f"{write.ttl_seconds}s"} if write.ttl_seconds else None
            subject = subject_of(self._registry, write.key)
            answer = _read((await self._client.request(subject, write.data, REQUEST_SECONDS, headers=headers)).data)
        except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise LogError(f"{self.stream} can't be written: {reason(error)}") from None
        if answer.error is not None:
            raise LogError(f"{self.stream} can't be written: {answer.error.description}")

    async def _ask(self, what: str, body: dict[str, object] | None = None) -> _Answer:
        try:
            data = json.dumps(body).encode() if body else b""
            return _read((await self._client.request(f"$JS.API.{what}", data, REQUEST_SECONDS)).data)
        except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise LogError(f"JetStream does not answer about {self.stream}: {reason(error)}") from None


def _position_in(description: str) -> int:
    """Return the last position that JetStream's refusal tells; -1 where it tells none."""
    last = description.rpartition(" ")[2]
    return int(last) if last.isdecimal() else -1


def _check(found: _Config, stream: str, replicas: int) -> list[str]:
    faults = []
    if found.num_replicas < replicas:
        faults.append(f"bucket {stream} has {found.num_replicas} replicas, and [uplink] replicas says {replicas}")
    if found.storage != "file":
        faults.append(f"bucket {stream} is kept in memory alone: it is lost when its servers restart")
    if found.max_msgs_per_subject != 1 or not found.allow_msg_ttl or not found.allow_atomic:
        faults.append(f"bucket {stream} needs history 1, allow_msg_ttl and allow_atomic; make it anew")
    if found.max_age > 0 or (found.discard == "old" and max(found.max_msgs, found.max_bytes) > 0):
        faults.append(f"bucket {stream} drops entries that are old: let it have no max_age, and discard: new")
    return faults
