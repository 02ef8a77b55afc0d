"""Questions to the journal, a portion at a time for each collector that catches up; and what its status tells."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from shared.bus.bodies.fields import REPLAY_PREFIX
from shared.bus.bodies.journal_messages import JOURNAL_TOPIC, MAX_WORKERS, JournalPortion, JournalRead, Replayed
from shared.bus.continuity import MAX_POSITIONS, Position, Worker
from shared.bus.messages import Envelope, Message, Status
from shared.bus.zmq_sockets import Publisher
from shared.client import Place
from shared.fanout.catch_up.copied_meanwhile import CopiedMeanwhile
from shared.fanout.catch_up.past_templates import PastTemplates
from shared.fanout.catch_up.pursuit import Pursuit, PursuitState
from shared.fanout.catch_up.window import Numbered, Window
from shared.ledger.accounts import is_origin, parse_origin
from shared.ledger.counters import DISK_ERROR, DISK_FULL, MISSED, REACHED
from shared.log import get_logger

PORTION_ROWS: Final = 1024
PORTION_PAYLOAD: Final = 1 << 18
"""The most asked of the journal at once. The next portion is asked for when half of it is left; for a collector that is
away, when nothing is left."""
ALL_ROWS, ALL_PAYLOAD = 256 * PORTION_ROWS, 256 * PORTION_PAYLOAD
"""The most asked for all that catch up: it waits in this process's memory, at most one and a half times as much."""
ANSWER_SECONDS: Final = 5.0
"""A question without an answer for so long is asked again."""
AGAIN_SECONDS: Final = 0.05
"""Time after which a journal that was at its end is asked again."""
REFUSED_SECONDS: Final = 1.0
"""Likewise after a refusal."""
SILENT_SECONDS: Final = 30.0
"""A journal that has given nothing for so long is not waited for: it is gone, or hangs, or refuses each question."""
ANSWERED_AT_ONCE: Final = 64
"""Questions that a journal lets wait: with more that catch up, each is given more time."""
ACCOUNT: Final = "journal/"
"""Beginning of the name of a stream's account."""
LOSSES: Final = (DISK_FULL, DISK_ERROR, MISSED)
"""Counters of datagrams that the journal lacks, and that it has passed over."""
MAX_ACCOUNTS: Final = MAX_POSITIONS + 1
"""Accounts of a stream that are known, as many as a journal tells at once: each start of a worker has one."""

log = get_logger()


@dataclass(slots=True)
class _Question:
    """A question to the journal for a pursuit, and what has come of the answer."""

    id: int
    until: float
    batches: list[Numbered] = field(default_factory=list)


@dataclass(slots=True, weakref_slot=True)
class Pursued:
    """A pursuit under way: its question, its allowance in datagrams, and the time before which it asks nothing."""

    name: str
    generation: int
    pursuit: Pursuit
    copied: CopiedMeanwhile = field(default_factory=CopiedMeanwhile)
    question: _Question | None = None
    allowance: float = 0.0
    ask_at: float = 0.0
    waited: float = 0.0
    """Seconds that questions have taken to which the journal gave nothing, since it has given something."""
    pace: float = 0.0
    """Datagrams a second that it may have at least."""
    twice_until_ns: int = 0
    """Of what was received before, another node may have sent copies already."""
    away: bool = False
    """True while the collector is not known to get anything: it is tried again at `try_at`."""
    try_at: float = 0.0
    last: list[Place] = field(default_factory=list)
    """The places at which the last steps began, which may still be found not to have arrived."""
    signs: int = 0
    unsent: Counter[str] = field(default_factory=Counter)
    """Counts of the collector's account before those steps (`shared.fanout.catch_up.absences`)."""
    templates: PastTemplates = field(default_factory=PastTemplates)

    def check(self, window: Window, followed: Mapping[Worker, Position], *, at_once: bool) -> PursuitState:
        """Return the state of the pursuit, as its own `check`; what it has to read again later is awaited again."""
        if (state := self.pursuit.check(window, followed, at_once=at_once)) is not PursuitState.READING:
            self.waited = 0.0
        return state


class JournalQuestions:
    """Asks on the bus; answers come on `topic`, which is this process's alone. `joined` as in `JournalRead`."""

    def __init__(
        self, publisher: Publisher, clock: Callable[[], float] = time.monotonic, *, joined: bool = False
    ) -> None:
        self.topic = f"{REPLAY_PREFIX}{publisher.sender}.{publisher.boot:x}/"
        self._publisher = publisher
        self._clock = clock
        self._joined = joined
        self._ids = itertools.count(1)
        self._asked: WeakValueDictionary[int, Pursued] = WeakValueDictionary()
        """By question: the pursuit that awaits the answer."""
        self.begin()

    def begin(self) -> None:
        """Consider the journal to be there now, as nobody has looked for it until now."""
        self._seen_at = self._clock()

    def look(self, now: float) -> bool:
        """Return whether a journal is there that can be asked."""
        if here := self._publisher.wanted(JOURNAL_TOPIC):
            self._seen_at = now
        return here

    def are_vain(self, pursued: Pursued, now: float, of: int = 1) -> bool:
        """Return whether nothing is to be awaited of the journal for one of some that catch up."""
        patience = SILENT_SECONDS * max(1.0, of / ANSWERED_AT_ONCE)
        return now >= self._seen_at + SILENT_SECONDS or pursued.waited >= patience

    def ask(self, pursued: Pursued, now: float, of: int = 1) -> None:
        """Ask for more, if it is time to, for one of some that catch up."""
        pursuit = pursued.pursuit
        if pursued.question:
            if now < pursued.question.until:
                return
            pursued.question = None
            pursued.waited += ANSWER_SECONDS
        most = max(1, min(PORTION_ROWS, ALL_ROWS // of)), max(1, min(PORTION_PAYLOAD, ALL_PAYLOAD // of))
        enough = 0 if pursued.away else most[0] // 2
        if pursuit.state is not PursuitState.READING or now < pursued.ask_at or pursuit.queued > enough:
            return
        number, since_ns = next(self._ids), max(1, pursuit.since_ns)
        positions = sorted(pursuit.positions(), key=lambda each: each.received_ns)[-MAX_WORKERS:]
        request = JournalRead(
            *(number, self.topic, pursuit.stream, since_ns, positions, *most), place=pursuit.reader, joined=self._joined
        )
        if self._publisher.publish(JOURNAL_TOPIC, request):
            pursued.question = _Question(number, now + ANSWER_SECONDS)
            self._asked[number] = pursued

    def handle(self, message: Message) -> bool:
        """Take what has come for those that have asked; return whether it is of the journal."""
        body = message.body
        if isinstance(body, Replayed):
            pursued = self._asked_by(body.read)
            if pursued and pursued.question and message.batch is not None:
                numbered = Numbered((body.worker, body.boot), body.sequence, body.total, message.batch)
                pursued.question.batches.append(numbered)
            return True
        if isinstance(body, JournalPortion):
            if pursued := self._asked_by(body.id):
                self._take_portion(pursued, body)
            self._asked.pop(body.id, None)
            return True
        return False

    def _asked_by(self, number: int) -> Pursued | None:
        """Return who awaits the answer to a question; None: nobody does any more."""
        pursued = self._asked.get(number)
        return pursued if pursued and pursued.question and pursued.question.id == number else None

    def _take_portion(self, pursued: Pursued, portion: JournalPortion) -> None:
        question, pursued.question = pursued.question, None
        now = self._clock()
        if portion.error:
            why = portion.message or portion.error
            log.warning("the journal can't be read", collector=pursued.name, stream=pursued.pursuit.stream, reason=why)
            pursued.ask_at = now + REFUSED_SECONDS
            pursued.waited += REFUSED_SECONDS
            # Of a stream that it could not follow at a reload, what the bus brings is all that there is.
            if portion.error == "unknown_stream":
                pursued.pursuit.note_portion(None, (), 0, at_end=True)
            return
        pursued.waited = 0.0
        if question is None or portion.batches != len(question.batches):
            pursued.ask_at = now + AGAIN_SECONDS  # the rest was lost on the way
            return
        pursued.pursuit.queue(question.batches)
        pursued.pursuit.note_portion(portion.place, portion.positions, portion.expired, at_end=portion.at_end)
        pursued.ask_at = now + AGAIN_SECONDS if portion.at_end else 0.0


class JournalReports:
    """The journal's word on each stream: what it has reached of each worker, and how much it has lost."""

    def __init__(self) -> None:
        self._lost: dict[str, Counter[str]] = {}
        """By stream and account: the datagrams that it could not write, or that the bus has lost on the way to it."""

    def read(self, envelope: Envelope, status: Status) -> Callable[[str], tuple[Hashable, dict[Worker, int]]]:
        """Return the arguments of `Window.confirm` by stream; a journal that has lost more counts as restarted."""
        reached: dict[str, dict[Worker, int]] = {}
        for name, account in status.accounts.items():
            if is_origin(name):
                worker, boot, stream = parse_origin(name)
                reached.setdefault(stream, {})[worker, boot] = account.get(REACHED, 0)
            else:
                stream = name.removeprefix(ACCOUNT)
            lost = self._lost.setdefault(stream, Counter())
            lost[name] = sum(account.get(cause, 0) for cause in LOSSES)
            if len(lost) > MAX_ACCOUNTS:
                del lost[next(iter(lost))]
        return lambda stream: ((envelope.boot, self._lost.get(stream, _NONE).total()), reached.get(stream, {}))


_NONE: Final = Counter[str]()
