"""A node as it lives: it sends beats, hears those of the others, and tells the services of its host who serves."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from math import inf
from typing import Final

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from services.uplink.incoming.arrivals import Key
from services.uplink.nodes.beats import ROOT, State, beat_subject, unparse_beat
from services.uplink.nodes.cluster import SENDERS, Cluster
from services.uplink.nodes.membership import BEAT_SECONDS
from services.uplink.session import Ack, Session
from services.uplink.subjects import Origin, unparse_subject
from shared.bus.bodies.nodes_message import MOST_PENDING, NODES_TOPIC, NodeState
from shared.bus.messages import Envelope, Status, status_topic
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.ledger.counters import MESSAGES_UNREADABLE, NOT_AWAITED
from shared.log import get_logger
from shared.nats.connection import reason
from shared.nats.troubles import Troubles
from shared.settings.uplink import Uplink

LOOK_SECONDS: Final = 0.25
"""Time by which the silence of a node may be noticed late."""
TELL_SECONDS: Final = 1.0
HEAR_SECONDS: Final = 1.0
"""Time for which a new connection is in use, before this node may say that it has caught up."""
RING_SECONDS: Final = 2.5
"""Time for which senders here have kept what comes, before they may take over: others' last places are not older."""
PATIENCE_SECONDS: Final = 15.0
"""Time after which a node serves that does not learn what is still to come, or senders elsewhere do not come along.

So it does where messages to come have not become fewer for so long: JetStream needs up to ten seconds for the leader of
a stream.
"""
YIELD_SECONDS: Final = 0.25
"""Time for the others to leave off serving what is this node's from now on: what both send comes twice."""
PROBE: Final = "%nodes"
"""In place of a stream: no stream is called so."""

log = get_logger()
_read_ack: Final = msgspec.json.Decoder(Ack).decode


class Node:
    """One node of a cluster. `pending` returns the messages of other nodes that are still to come, as far as known.

    For `journaled` and `missing` see `Cluster`.
    """

    def __init__(
        self,
        uplink: Uplink,
        publisher: Publisher,
        subscriber: Subscriber,
        account: dict[str, int],
        pending: Callable[[], Mapping[str, int]],
        journaled: Container[str] = (),
        missing: Counter[str] | None = None,
    ) -> None:
        self.due_at = 0.0
        own = uplink.site, uplink.nodes, uplink.minority, publisher.sender, publisher.boot
        self._cluster = Cluster(*own, journaled=journaled, missing=missing)
        self._own = uplink.site
        self._publisher = publisher
        self._account = account
        self._pending = pending
        self._probe = unparse_subject(Origin(uplink.site, PROBE, publisher.sender))
        self._beat_due = asyncio.Event()
        self._connected_at = float("inf")
        """The time from which this connection is in use, and this node may serve."""
        self._told: tuple[object, ...] = ()
        self._yield_until = 0.0
        self._joining_at = float("inf")
        """The time at which the senders here were told that this node joins."""
        self._tell_at = 0.0
        self._fewest: dict[str, tuple[int, float]] = {}
        """By node: the fewest messages that were still to come while this one joins, and since when."""
        for service in SENDERS:
            subscriber.subscribe(status_topic(service)[:-1])

    def note_crossed(self, origin: Key, there: range, here: range) -> None:
        """Note a batch of another site that was published here, see `Crossings.note`."""
        self._cluster.note_published(origin, there, here)

    def note_status(self, envelope: Envelope, status: Status) -> None:
        """Note what a service reports, if it sends copies: the other nodes are to know at once."""
        if envelope.sender.partition(".")[0] in SENDERS and self._cluster.note_status(envelope, status):
            self._beat_due.set()

    @property
    def senders_ended(self) -> bool:
        """True once every sender of copies of this host has sent its last copy."""
        return self._cluster.senders_ended

    def keep_up(self, fresh: Iterable[str] = ()) -> None:
        """Do what is due; tell those who have just subscribed at once."""
        now = time.monotonic()
        self.due_at = now + LOOK_SECONDS
        members = self._cluster.members
        if self._cluster.holds or self._cluster.regains():
            self._connected_at, members.state = max(self._connected_at, now), "joining"
            self._fewest.clear()
        elif members.state == "joining" and self._has_caught_up(now):
            self._tell_at = 0.0
            self._tell("joining", now)
            members.state = "live"
            self._yield_until = now if self._cluster.serves_already else now + YIELD_SECONDS
            self._beat_due.set()
            log.info("this node serves collectors from now on", node=self._own)
            self._count_not_awaited()
        if any(NODES_TOPIC.startswith(prefix) for prefix in fresh):
            self._tell_at = 0.0
        if self._cluster.tells:
            self._tell(members.state if now >= self._yield_until else "joining", now)

    def _tell(self, state: NodeState, now: float) -> None:
        """Tell the services here of the nodes, if there is news, or it is time to."""
        told = self._cluster.nodes(state, self._pending())
        known = told.live, told.majority, told.serving
        if (now < self._tell_at and known == self._told) or not self._publisher.publish(NODES_TOPIC, told):
            return
        if known[:2] != self._told[:2]:
            (log.info if told.majority else log.warning)("nodes of the cluster", live=told.live, majority=told.majority)
        self._told, self._tell_at = known, now + TELL_SECONDS
        if self._cluster.senders_run:
            self._joining_at = min(self._joining_at, now)

    def _has_caught_up(self, now: float) -> bool:
        if now < self._connected_at + HEAR_SECONDS or not self._cluster.senders_run:
            return False
        if now < self._joining_at + RING_SECONDS and not self._cluster.serves_already:
            return False
        pending = self._pending()
        if self._still_come(pending, now):
            return False
        level = pending.keys() >= set(self._cluster.members.others) and self._cluster.follows
        return level or now >= self._connected_at + PATIENCE_SECONDS

    def _still_come(self, pending: Mapping[str, int], now: float) -> bool:
        """Return whether there are many messages of a node still to come, and they have become fewer lately."""
        for node, messages in pending.items():
            if messages < self._fewest.get(node, (inf, now))[0]:
                self._fewest[node] = messages, now
        return any(
            messages > MOST_PENDING and now < self._fewest[node][1] + PATIENCE_SECONDS
            for node, messages in pending.items()
        )

    def _count_not_awaited(self) -> None:
        left = {node: messages for node, messages in self._pending().items() if messages > MOST_PENDING}
        if left:
            self._account[NOT_AWAITED] += sum(left.values())
            told = "messages of other nodes do not become fewer: this node serves without them"
            log.warning(told, messages=left, cure="look at the NATS servers: a stream may have no leader")

    async def run(self, session: Session) -> None:
        """Send beats by this connection, and hear those of others, until it ends."""
        await session.client.subscribe(f"{ROOT}.*", cb=self._take)
        self._connected_at = time.monotonic()
        self._fewest.clear()
        try:
            while True:
                self._beat_due.clear()
                if self._cluster.tells:
                    await self.beat(session)
                if self._cluster.members.in_doubt:
                    await self._vote(session)
                self._tell_of_namesake(session.troubles)
                await session.wait(self._beat_due, BEAT_SECONDS)
        finally:
            self._connected_at = float("inf")

    def _tell_of_namesake(self, troubles: Troubles) -> None:
        if self._cluster.has_namesake:
            told = "collectors get each copy twice, and each of the two lacks what the other one receives"
            troubles.say(
                "node", f"another uplink is node {self._own}: {told}; set another [uplink] site on one of them"
            )
        else:
            troubles.end("node", "no other uplink has the name of this node any more")

    async def beat(self, session: Session, state: State | None = None) -> None:
        """Send a beat now, and return once it has left. It may not have arrived: nats-py writes its PING before it."""
        with suppress(NatsError, OSError):
            beat = self._cluster.beat(state)
            await session.client.publish(beat_subject(self._own), unparse_beat(beat))
            await session.client.flush()

    async def _vote(self, session: Session) -> None:
        """Ask JetStream to keep an empty message: only most of its servers together do."""
        with suppress(NatsError, OSError, TimeoutError, msgspec.MsgspecError):
            answer = await session.client.request(self._probe, b"", timeout=BEAT_SECONDS)
            if answer.data and _read_ack(answer.data).error is None:
                self._cluster.members.note_vote()

    async def _take(self, message: Msg) -> None:
        try:
            if self._cluster.take(message.subject, message.data):
                self.due_at = 0.0
        except ValueError as error:
            self._account[MESSAGES_UNREADABLE] += 1
            log.warning("a beat of another node is dropped", subject=message.subject, reason=reason(error)[:200])
