"""The cluster as a node tells of it: to the others by beats, and to the services here by a bus message. No I/O."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from math import inf
from typing import Final

import msgspec

from services.uplink.incoming.arrivals import Key
from services.uplink.nodes.beats import MAX_ORIGINS, Beat, Reached, parse_beat
from services.uplink.nodes.beats import State as BeatState
from services.uplink.nodes.crossings import Crossings
from services.uplink.nodes.membership import SILENT_SECONDS, Membership
from shared.bus.bodies.nodes_message import MAX_NODE_PLACES, Node, Nodes, NodeState
from shared.bus.messages import Envelope, Status
from shared.bus.pieces import Assembler
from shared.client import Place, Source
from shared.ledger.accounts import is_origin, parse_origin
from shared.ledger.counters import BASELINE, REACHED, REVISION, UNSERVED
from shared.serving_nodes import Minority, nodes_serving

SENDERS: Final[dict[str, Source]] = {"forwarder": "relay", "transmitter": "original"}
HEARD_SECONDS: Final = 3.0
"""A sender that has not reported for so long does not run; nor does one without a registry."""
TOLD_NS: Final = 1_000_000_000
"""Time by which a node may have got further than it has told."""
SETTLE_SECONDS: Final = 1.5
"""Time for the others to tell whether they are in the majority too, once this node is again: a beat or two of each."""
ALONE_NS: Final = 5_000_000_000
"""A sender that was started this long before the uplink was not started with it."""
ALONE_REPORTS: Final = 5
"""Reports that it has sent by then: the clock alone may have been set between the two starts."""


class Cluster:
    """A node among the others. `sender` and `boot` are those under which this uplink publishes.

    Streams that are `journaled` can be read from any place. What is `missing` is kept over a kill.
    """

    def __init__(
        self,
        own: str,
        nodes: tuple[str, ...],
        minority: Minority,
        sender: str,
        boot: int,
        clock: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
        *,
        journaled: Container[str] = (),
        missing: Counter[str] | None = None,
    ) -> None:
        self.members = Membership(own, nodes, clock)
        self._minority = minority
        self._serving: tuple[str, ...] | None = None
        self._settled_at = -SETTLE_SECONDS
        self._missed_before: int | None = None
        """The sum of what others had told of missing this node, when it lost the majority; None: it has it."""
        self._sender = sender
        self._boot = boot
        self._clock = clock
        self._time_ns = time_ns
        self._began, self._began_ns = clock(), time_ns()
        self._numbers = itertools.count(1)
        self._journaled = journaled
        self._crossings: dict[str, Crossings] = {}
        self._statuses: dict[Source, Assembler[Status]] = {source: Assembler() for source in SENDERS.values()}
        self._reports = 0
        self._reached: dict[Source, list[Reached]] = {}
        self._begun: dict[Source, dict[tuple[str, int, str], int]] = {}
        """By worker, boot and stream: the count on this bus from which on a sender here has had all."""
        self._reported_at: dict[Source, float] = {}
        self._ended: set[Source] = set()
        self._senders_began_ns: dict[Source, int] = {}
        self._first_reports: dict[Source, tuple[int, int]] = {}
        """By source: the boot of its sender, and the number of the first report that was heard of that."""
        self._heard_ns: dict[str, int] = {}
        self._before: dict[str, dict[Key, int]] = {}
        """By node: where it was when it was found to have been started."""
        self._growing: dict[Key, int] = {}
        """By origin here that has sent anything since: where it began to. A node that tells nothing of it lacks all."""
        self._awaited: set[Key] = set()
        """Origins of which senders elsewhere have had more since their last report, and nothing has come here."""
        self._missing: Counter[str] = Counter() if missing is None else missing
        """By node: the last time, in ns since 1970, at which this one served without it. It may live, and serve too."""
        self._missing_until: dict[str, float] = {}
        self._missed_by: dict[str, int] = {}
        """By node: the same time of this node, as it told last."""
        self._missed: Counter[str] = Counter()
        """By node: grows whenever it tells of another one: later, or earlier where its clock was set back."""
        self._namesake_at = -inf
        """The last time at which another uplink was heard under this node's name."""

    def note_published(self, origin: Key, there: range, here: range) -> None:
        """Note a batch of another site that was published here, see `Crossings.note`."""
        crossings = self._crossings.get(origin.stream)
        if crossings is None:
            journaled = origin.stream in self._journaled
            crossings = self._crossings[origin.stream] = Crossings(self._clock, journaled=journaled)
        crossings.note(origin, there, here)
        self._awaited.discard(origin)

    def note_status(self, envelope: Envelope, status: Status) -> bool:
        """Note how far a sender of copies with a registry has got; return whether that is complete now."""
        service = envelope.sender.partition(".")[0]
        source = SENDERS[service]
        if self._first_reports.get(source, (None, 0))[0] != envelope.boot:
            self._first_reports[source] = envelope.boot, status.report
        pieces = self._statuses[source].add((envelope.boot, status.report), status)
        if pieces is None or not any(REVISION in piece.accounts.get(service, {}) for piece in pieces):
            return False
        accounts = [account for piece in pieces for account in piece.accounts.items()]
        origins = {parse_origin(name): account for name, account in accounts if is_origin(name)}
        reached = [each for origin, account in origins.items() for each in self._reached_by(*origin, account[REACHED])]
        before = _totals(self._reached.get(source, ()))
        for each in reached:
            if each.site == self.members.own and each.total > before.get(each.key, each.total):
                self._growing.pop(each.key, None)  # to the end: those that have sent nothing for longest go first
                self._growing[each.key] = origins[each.worker, each.boot, each.stream].get(BASELINE, 0)
        while len(self._growing) > MAX_ORIGINS:
            del self._growing[next(iter(self._growing))]
        self._reached[source] = reached[-MAX_ORIGINS:]
        self._begun[source] = {
            origin: account.get(BASELINE, 0) + account.get(UNSERVED, 0) for origin, account in origins.items()
        }
        self._reports += 1
        self._reported_at[source], self._senders_began_ns[source] = self._clock(), status.started_ns
        (self._ended.add if status.ended else self._ended.discard)(source)
        return True

    def _reached_by(self, worker: str, boot: int, stream: str, total: int) -> Iterator[Reached]:
        """Yield where a sender is that has had so much of a worker of this bus."""
        if worker != self._sender:
            yield Reached(self.members.own, worker, boot, stream, total)
        elif boot == self._boot and stream in self._crossings:
            for origin, count in self._crossings[stream].origins_at(total).items():
                yield Reached(*origin, count)

    @property
    def senders_run(self) -> bool:
        """True if any sender of copies has reported lately."""
        return any(at > self._clock() - HEARD_SECONDS for at in self._reported_at.values())

    @property
    def senders_ended(self) -> bool:
        """True if every sender of copies that was heard has sent its last copy."""
        return set(self._reported_at) <= self._ended

    @property
    def serves_already(self) -> bool:
        """True if the uplink alone was restarted: the senders run, and serve collectors still."""
        return any(
            began < self._began_ns - ALONE_NS and self._first_reports[source][1] > ALONE_REPORTS
            for source, began in self._senders_began_ns.items()
        )

    @property
    def has_namesake(self) -> bool:
        """True if another uplink has this node's name. The one before this one may be heard for a moment."""
        return self._namesake_at > max(self._clock(), self._began + 2 * SILENT_SECONDS) - SILENT_SECONDS

    @property
    def holds(self) -> bool:
        """True if this node may serve none, as it is not in the majority."""
        return self._minority == "hold" and not self.members.majority

    def regains(self) -> bool:
        """Return whether this node has just come back to a majority that has served without it meanwhile.

        Beats tell that: while JetStream alone stands for the majority, they are awaited for a moment.
        """
        if not self.members.majority:
            if self._missed_before is None:
                self._missed_before = self._missed.total()
                self._awaited.clear()
            return False
        if self._missed_before is None:
            return False
        replaced = self._missed.total() > self._missed_before
        if replaced or self.members.hears_most or self._clock() >= self._settled_at:
            self._missed_before = None
        return replaced

    @property
    def tells(self) -> bool:
        """True if anybody is told of this node: while its uplink is restarted, it is not missed for a moment."""
        if self.members.state == "live" or self._clock() >= self._began + SILENT_SECONDS:
            return True
        return self.senders_run and not self.serves_already and self.members.hears_most

    @property
    def follows(self) -> bool:
        """True if all that senders of other live nodes have had came here too, and senders here have all behind it."""
        beats = [beat for beat in map(self.members.beat, self.members.live) if beat]
        return not (beats and self._awaited) and all(
            self._follows(beat.node, source, each) for beat in beats for source, each in beat.reached.items()
        )

    def _has_any(self, reached: Reached) -> bool:
        crossings = self._crossings.get(reached.stream)
        return reached.site == self.members.own or (crossings is not None and crossings.knows(reached.key))

    def _follows(self, node: str, source: Source, reached: list[Reached]) -> bool:
        known = [each for each in reached if each.site != self.members.own and each.stream in self._crossings]
        begun = self._begun.get(source, {})
        return all(self._crossings[each.stream].has(each.key, each.total) for each in known) and all(
            place.total >= begun.get((place.worker, place.boot, place.stream), 0)
            for place in self._places(node, reached, {})
        )

    def take(self, subject: str, payload: bytes) -> bool:
        """Note a beat that has come; return whether the nodes have changed by it. ValueError when it is none."""
        beat = parse_beat(subject, payload)
        live, before = self.members.live, self.members.beat(beat.node)
        if beat.node == self.members.own and beat.boot != self._boot:
            self._namesake_at = self._clock()
        if not self.members.note(beat):
            return False
        if before and before.boot == beat.boot:
            grown = {
                each for source, some in beat.reached.items() for each in {*some} - {*before.reached.get(source, ())}
            }
            self._awaited |= {each.key for each in grown if each.total and not self._has_any(each)}
            if len(self._awaited) > MAX_ORIGINS:
                self._awaited.clear()
        elif before or (beat.state == "joining" and self.members.state == "live"):
            self._before[beat.node] = self._places_before(beat, before)
        self._heard_ns[beat.node] = self._time_ns()
        told, known = beat.missed.get(self.members.own, 0), self._missed_by.get(beat.node)
        # A first time from before this one began is of no interest. Later ones are compared by the clock of that node.
        self._missed[beat.node] += told > self._began_ns if known is None else told not in (0, known)
        self._missed_by[beat.node] = told
        return self.members.live != live

    def _places_before(self, beat: Beat, before: Beat | None) -> dict[Key, int]:
        """Return where a new start of a node is, by its first beat: where senders here are, as it owes nothing else.

        One that serves already, as it was parted, is where its last start was by the beat `before`.
        """
        here = _totals(*self._reached.values())
        if beat.node not in beat.serving:
            return here
        last = {**self._before.get(beat.node, {}), **(_totals(*before.reached.values()) if before else {})}
        return {key: last[key] for key in here if key in last}

    def beat(self, state: BeatState | None = None) -> Beat:
        """Return the next beat of this node. In the minority it is joining: others are to hand nothing over to it.

        So it is until `regains` has found out whether they have served without it.
        """
        own, number = self.members, next(self._numbers)
        state = state or (own.state if self._missed_before is None else "joining")
        missing, serving = {**self._missing}, self._serving or ()
        return Beat(own.own, self._boot, number, state, self._reports, self._reached, missing, serving)

    def nodes(self, state: NodeState, pending: Mapping[str, int]) -> Nodes:
        """Return what the services here are told, this node first, in a state; `pending`: messages to come, by node."""
        own = Node(self.members.own, state, 0)
        others = (self._node(name, pending.get(name, 0)) for name in self.members.others)
        told = Nodes(self.members.majority, [own, *others])
        if not told.majority:
            self._settled_at = self._clock() + SETTLE_SECONDS
        serving = self._serving
        if state == "live" and self.members.own not in (serving or ()):
            serving = None  # it has caught up; or was parted meanwhile, and serves as at a start
        if serving is None or not told.majority or state != "live" or self._clock() >= self._settled_at:
            self._serving = serving = nodes_serving(told, self._minority, serving)
        if state == "live" and self.members.own in serving:
            self._note_missing(serving)
        return msgspec.structs.replace(told, serving=serving)

    def _note_missing(self, serving: tuple[str, ...]) -> None:
        """Note the nodes that this one serves without, also for a moment after: until its senders leave off."""
        now = self._clock()
        for name in self.members.others:
            if name not in serving and self.members.state_of(name) != "left":
                self._missing_until[name] = now + TOLD_NS / 1e9
            if now < self._missing_until.get(name, 0.0):
                self._missing[name] = self._time_ns()

    def _node(self, name: str, pending: int) -> Node:
        state, since = self.members.state_of(name), self.members.seconds_since(name)
        beat = self.members.beat(name)
        if beat is None or since is None:
            return Node(name, state, pending=pending)
        places = {
            source: list(self._places(name, reached, self._growing))[-MAX_NODE_PLACES:]
            for source, reached in beat.reached.items()
        }
        further_ns = 0 if state == "left" else TOLD_NS
        until_ns, missed = self._heard_ns[name] + further_ns, self._missed[name]
        return Node(name, state, int(since * 1000), pending, until_ns, places, missed, beat.serving)

    def _places(self, node: str, reached: list[Reached], begun: Mapping[Key, int]) -> Iterator[Place]:
        """Yield where another node's sender is in what the workers of this bus have published."""
        totals = {**begun, **self._before.get(node, {}), **_totals(reached)}
        for key, total in totals.items():
            if key.site == self.members.own:
                yield Place(key.stream, key.worker, key.boot, 0, total)
        for stream, crossings in self._crossings.items():
            here, lacked = crossings.here_at(totals), crossings.lacked(totals)
            yield Place(stream, self._sender, self._boot, 0, here, lacked=lacked)


def _totals(*reached: Iterable[Reached]) -> dict[Key, int]:
    return {each.key: each.total for each in itertools.chain(*reached)}
