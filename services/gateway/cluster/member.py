"""Membership of the cluster: the connection of this node, its session, and the records that it writes."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from nats.aio.client import Client

from services.gateway.cluster.bucket_log import BucketLog, LogError, OvertakenError, Write
from services.gateway.cluster.changes import ClusterChanges
from services.gateway.cluster.keys import META, SESSION
from services.gateway.cluster.records import PAST_SECONDS, Left, ListIdentity, Session, encode, key_of
from services.gateway.cluster.replica import Replica
from services.gateway.cluster.sessions import SESSION_SECONDS, Sessions
from services.gateway.counters import (
    REGISTRY_CONNECTED,
    REGISTRY_DAMAGED,
    REGISTRY_OVERTAKEN,
    REGISTRY_UNAVAILABLE,
    SESSIONS_LIVE,
)
from services.gateway.fault_guard import surviving
from services.gateway.registry.reached_places import PastByName
from services.gateway.registry.registry import Registry
from services.gateway.registry.store import Store
from shared.log import get_logger
from shared.nats.connection import CarefulClient, ConnectError, close_connection, open_connection, reason, rotated
from shared.nats.tasks import CLOSING_SECONDS, end_tasks
from shared.nats.troubles import Troubles
from shared.net.addresses import Endpoint
from shared.process.lifecycle import OperatorError
from shared.settings.model import Settings

BEAT_SECONDS: Final = 1.0
"""Time between two records of the session."""
AGAIN_BEATS: Final = 10
"""Beats within which each place that was refused is tried again."""
LOOK_SECONDS: Final = 5.0
"""Time between looks whether the log still has what this node has: what was purged by hand, no record tells of."""
SURE_SECONDS: Final = 0.05
"""The shortest time between two, however many renewals wait for one."""
SESSION_TTL_SECONDS: Final = 3600
END_SECONDS: Final = 1.0
ENDED_TTL_SECONDS: Final = 86_400
REACH_SECONDS: Final = 2.0
PING_SECONDS: Final = 2
RECONNECT_SECONDS: Final = (0.1, 2.0)
FAILURES: Final = 3
"""Failures to write the session, after which another server is tried."""
LOST: Final = "the registry of the cluster has lost what it had"
ANEW_SECONDS: Final = 43_200.0
"""Time away after which the whole log is read: marks of what has gone may have gone too."""

log = get_logger()


class Member:
    """The gateway's part in the cluster. `begin` it in the loop, and `end` it there."""

    def __init__(self, settings: Settings, registry: Registry, store: Store, boot: int) -> None:
        uplink = self._uplink = settings.uplink
        self.sessions = Sessions(uplink.site, boot)
        self.synced = False
        """True once the log has been read to its end."""
        self.changed: Callable[[], None] = lambda: None
        registry.node, registry.boot = uplink.site, boot
        self.replica = Replica(registry, self.sessions, store, time.monotonic, self._note_record)
        self.replica.overwritten = self._restore_soon
        self._restoring = False
        limits = settings.gateway.max_clients, settings.gateway.max_clients_per_holder
        self.changes = ClusterChanges(self.replica, *limits)
        registry.changes = self.changes
        self._troubles = Troubles()
        self._pasts: dict[str, Write] = {}
        self._refused: dict[str, Write] = {}
        """Places that the server did not take, or later ones in their stead."""
        self._past_wanted = asyncio.Event()
        self._created = ""
        self._older = False
        """True if the log had lost what this node had read, when it was written last."""
        self._left_at = self._wrote_at = -ANEW_SECONDS
        self._look_at = 0.0
        self._count = 0
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Connect, and take part from now on."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._stay_connected()), loop.create_task(self.changes.run())]

    def check(self) -> None:
        """Raise what one of the tasks has failed with: a fault of ours shows."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def end(self) -> None:
        """End this node's session, so that others need not wait for that, and the connection."""
        self._ending, bucket = True, self.changes.log
        with suppress(LogError, TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                while bucket is not None and self.changes.available.is_set() and self.sessions.member:
                    with suppress(OvertakenError):  # by the last record of the session itself
                        await self._write_session(bucket, self._session(live=False), self.sessions.position)
        await end_tasks(self._tasks, CLOSING_SECONDS)

    def accounts(self) -> dict[str, int]:
        """Return the counters of the cluster's registry."""
        return {
            REGISTRY_CONNECTED: int(self.changes.available.is_set()),
            REGISTRY_DAMAGED: self.replica.damaged,
            REGISTRY_OVERTAKEN: self.changes.overtaken,
            REGISTRY_UNAVAILABLE: self.changes.refused,
            SESSIONS_LIVE: len(self.sessions.live()),
        }

    def keep_pasts(self, changed: PastByName) -> None:
        """Write the places that names have reached, some time soon."""
        for name, past in changed.items():
            record = Left(name=name, past=past)
            some = self._refused if name in self._refused else self._pasts
            some[name] = Write(key_of(record), encode(record), PAST_SECONDS)
        self._past_wanted.set()

    def _note_record(self) -> None:
        self.changes.note_position()
        self.changed()

    async def _stay_connected(self) -> None:
        """Connect to one server after the other; use each as long as it lasts."""
        shortest, longest = RECONNECT_SECONDS
        pause = shortest
        for endpoint in rotated(self._uplink):
            began = time.monotonic()
            with surviving("a fault has ended this node's part in the cluster"):  # the last list still serves
                await self._use(endpoint)
            pause = shortest if time.monotonic() - began > longest else min(longest, 2 * pause)
            await asyncio.sleep(pause)

    async def _use(self, endpoint: Endpoint) -> None:
        """Take part by one server, as long as the connection lasts."""
        client, ended = CarefulClient(), asyncio.Event()
        try:
            await open_connection(client, self._uplink, endpoint, _setting(ended), self._note_error, PING_SECONDS)
            try:
                await self._take_part(client, ended)
            finally:
                self._leave()
                await close_connection(client)
            self._troubles.say(f"registry {endpoint}", f"the connection to {endpoint} has ended; trying again")
        except (ConnectError, OperatorError, LogError) as error:
            self._troubles.say(f"registry {endpoint}", f"{error}; trying again")

    def _leave(self) -> None:
        """Note that nothing is heard any more."""
        if self.synced:
            self._left_at = time.monotonic()
        self.synced = False
        self.changes.log = None
        self.changes.lose()

    async def _note_error(self, error: Exception) -> None:
        self._troubles.say("registry connection", f"the connection to the NATS server fails: {reason(error)}")

    async def _take_part(self, client: Client, ended: asyncio.Event) -> None:
        """Follow the log and write to it, until the connection ends or fails. LogError."""
        bucket = BucketLog(client, self._uplink.registry, f"_INBOX_{self._uplink.site}.{secrets.token_hex(8)}")
        last = await bucket.open(self._uplink.replicas, create=self._uplink.create)
        for fault in bucket.faults:
            self._troubles.say(f"fault {fault}", fault)
        long_away = time.monotonic() > self._left_at + ANEW_SECONDS
        older = self._older or last < self.replica.position
        lost = self._created not in ("", bucket.created) or (self._created != "" and older)
        if lost:
            log.error("the bucket of the cluster's registry was lost, or is an older one: this node adds what it has")
            self.replica.epoch = ""  # or the list would seem to be the one that watchers know
        anew = lost or long_away or not self._created
        self._created, self._older = bucket.created, False
        self.replica.begin(anew=anew, restoring=lost)
        if lost:
            self._restore_soon()
        caught_up = asyncio.Event()
        follow = bucket.follow(self.replica.position, self.replica.receive, caught_up.set)
        tasks = [
            asyncio.create_task(each) for each in (follow, self._write(bucket, caught_up), self._write_pasts(bucket))
        ]
        tasks.append(asyncio.create_task(_wait(ended)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end_tasks(tasks)

    async def _write(self, bucket: BucketLog, caught_up: asyncio.Event) -> None:
        await caught_up.wait()
        self.replica.caught_up()
        self.sessions.hear_anew(time.monotonic())
        await self._identify(bucket)
        self.synced = True
        self.changes.log = bucket
        await self._keep_session(bucket)

    async def _identify(self, bucket: BucketLog) -> None:
        """Write the identity of the list, if something else stands in its place, or nothing."""
        if (position := self.replica.identity_due) is not None:
            epoch, secret = self.replica.epoch or secrets.token_urlsafe(12), self.replica.registry.groups.secret
            with suppress(OvertakenError):
                await bucket.write(
                    [Write(META, encode(ListIdentity(epoch=epoch, group_secret=secret)))], position, META
                )

    def _restore_soon(self) -> None:
        """Write anew what the log has not, unless that waits already."""
        if not self._restoring:
            self._restoring = True
            self.changes.make(self.replica.restore, self._note_restored)

    def _note_restored(self, _: None) -> None:
        self._restoring = False

    async def _keep_session(self, bucket: BucketLog) -> None:
        """Write this node's session each second, and at once where somebody waits for that."""
        failures = 0
        while not self._ending:
            began = time.monotonic()
            if self.changes.shrunk:
                self.changes.shrunk, self._older = False, True
                raise LogError(LOST)
            if self._count and (usurper := self.sessions.usurper) and began < usurper.heard_at + SESSION_SECONDS:
                self.changes.lose()
                self._troubles.say("node", f"another gateway is node {self.sessions.own}: set another [uplink] site")
                await asyncio.sleep(BEAT_SECONDS)
                continue
            self._troubles.end("node", "no other gateway has the name of this node any more")
            waiting = self.changes.waiting()
            try:
                await self._write_session(bucket, self._session(live=True), self.sessions.position)
            except (OvertakenError, LogError) as error:
                failures += 1
                if isinstance(error, LogError):
                    self.changes.lose()
                    self._troubles.say("registry session", f"{error}; nothing can be registered here meanwhile")
                    if failures >= FAILURES or self._older:
                        raise
                await asyncio.sleep(SURE_SECONDS)
                continue
            failures = 0
            self._wrote_at = time.monotonic()
            self._note_available()
            self.changes.call(waiting)
            await self._end_overdue(bucket)
            await self._identify(bucket)
            await self._look(bucket)
            await asyncio.sleep(SURE_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, began + BEAT_SECONDS - time.monotonic())):
                    await self.changes.wanted.wait()
        await asyncio.Event().wait()  # until this task is cancelled

    async def _look(self, bucket: BucketLog) -> None:
        """Find out whether the log has lost an entry or an order. Which one is left to chance: in time it is any."""
        if time.monotonic() < self._look_at or self._restoring:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        if key := self.replica.choose_key():
            with suppress(LogError):  # the next look may be answered
                self.changes.shrunk |= not await bucket.has(key)

    def _session(self, *, live: bool) -> Session:
        """Return the next record of this node's session."""
        self._count += 1
        own, last = self.sessions, self.replica.registry
        return Session(
            node=own.own,
            boot=own.boot,
            count=self._count,
            live=live,
            revision=last.revision,
            generation=last.generation,
        )

    async def _write_session(self, bucket: BucketLog, record: Session, expected: int) -> None:
        """Write a session's record and wait until it has come back. LogError; OvertakenError."""
        key = SESSION + record.node
        ttl = SESSION_TTL_SECONDS if record.live else ENDED_TTL_SECONDS
        try:
            position = await bucket.write([Write(key, encode(record), ttl)], expected, key)
        except OvertakenError as error:
            own, ends_at = record.boot == self.sessions.boot, self._wrote_at + SESSION_TTL_SECONDS / 2
            if own and 0 <= error.position < expected and time.monotonic() < ends_at:  # it can't have ended by itself
                self._older = True
                raise LogError(LOST) from None
            if error.position == 0:
                self.sessions.forget(record.node)
            else:
                await self.changes.reach(error.position, REACH_SECONDS)
            raise
        if not await self.changes.reach(position, REACH_SECONDS):
            raise LogError("the registry of the cluster does not come back from the NATS server")

    def _note_available(self) -> None:
        self._troubles.end("registry", "the cluster's registry can be written again")
        if not self.changes.available.is_set():
            for entry in self.replica.registry.entries():  # nobody could renew one
                self.replica.registry.leases.begin(entry)
            log.info("takes part in the cluster's registry", node=self.sessions.own, live=self.sessions.live())
            self.changes.available.set()
            self.changes.wake.set()

    async def _end_overdue(self, bucket: BucketLog) -> None:
        """End the sessions of nodes that have not written for too long."""
        for known in self.sessions.overdue(time.monotonic()):
            record = known.record
            ended = Session(node=record.node, boot=record.boot, count=record.count, live=False)
            with suppress(OvertakenError, LogError):
                await self._write_session(bucket, ended, known.position)
                log.warning("a node has gone: its clients' leases are measured by another one", node=record.node)

    async def _write_pasts(self, bucket: BucketLog) -> None:
        """Write what is new first, and between that each second some of what was refused."""
        again_at, refused = 0.0, 0
        while True:
            self._past_wanted.clear()
            if self._pasts:
                await self._write_past(bucket, self._pasts)
            elif self._refused and time.monotonic() >= again_at:
                refused += not await self._write_past(bucket, self._refused)
                if refused * AGAIN_BEATS >= len(self._refused):
                    again_at, refused = time.monotonic() + BEAT_SECONDS, 0
            else:
                if not self._refused:
                    self._troubles.end("places", "places that collectors have reached are all kept again")
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_SECONDS if self._refused else None):
                        await self._past_wanted.wait()

    async def _write_past(self, bucket: BucketLog, some: dict[str, Write]) -> bool:
        """Write the first of some places; return whether it was not refused."""
        name, write = next(iter(some.items()))
        try:
            await bucket.put(write)
        except LogError as error:  # where the connection fails, the session ends it
            self._troubles.say("places", f"{error}: places that collectors have reached are not kept")
            self._refused[name] = some.pop(name)  # behind the others
            return False
        if some[name] is write:
            del some[name]
        return True


def _setting(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def set_it() -> None:
        event.set()

    return set_it


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
