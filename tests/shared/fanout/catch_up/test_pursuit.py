"""A model of workers, journal and bus: whatever happens to them, a collector gets each datagram once and in order."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.bus.bodies.journal_messages import JournalPlace, WorkerPosition
from shared.bus.continuity import Continuity, Position, Worker
from shared.client import Place
from shared.fanout.catch_up.pursuit import PATIENCE_SECONDS, STRAY_SECONDS, Pursuit, PursuitState
from shared.fanout.catch_up.window import SECONDS, Numbered, Window
from tests.builders import make_batch, make_envelope

TOPIC = "datagrams/messages/"
Row = tuple[Worker, int]
"""A datagram: its worker, and its number there."""


@dataclass
class World:
    """Workers that publish, what the journal and the sender have taken of it, and a collector that catches up."""

    random: Random
    now: float = 0.0
    published: dict[Worker, int] = field(default_factory=dict)
    journal: list[Numbered] = field(default_factory=list)
    journal_boot: int = 1
    journal_up: bool = True
    on_the_way: list[Numbered] = field(default_factory=list)
    """Published, and still to come to the sender."""
    live: Continuity = field(default_factory=Continuity)
    window: Window = field(init=False)
    pursuit: Pursuit = field(default_factory=lambda: Pursuit("messages", 1, Counter()))
    owed_from: dict[Worker, int] = field(default_factory=dict)
    told: dict[Worker, int] = field(default_factory=dict)
    """The count of each worker that the journal's answers have reached."""
    got: list[Row] = field(default_factory=list)
    lost: set[Row] = field(default_factory=set)
    missing: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    discovered: int = 0
    excused: int = 0

    def __post_init__(self) -> None:
        self.workers: list[Worker] = []
        self.start_worker("ingest.1")
        self.start_worker("ingest.2")
        self.window = Window(lambda: self.now)

    def start_worker(self, name: str) -> None:
        """Let a worker begin, in place of one of its name."""
        self.workers = [each for each in self.workers if each[0] != name]
        boot = len(self.published) + 1
        self.workers.append((name, boot))
        self.published[name, boot] = 0

    @property
    def followed(self) -> dict[Worker, Position]:
        """The sender's positions."""
        return {origin[:2]: position for origin, position in self.live.positions.items()}

    def publish(self, *, lost: bool = False) -> None:
        """Let a worker publish a batch; the bus may lose it on the way to the sender."""
        worker = self.random.choice(self.workers)
        count, total = self.random.randint(1, 9), self.published[worker]
        batch = make_batch([f"{number}".encode() for number in range(total, total + count)])
        numbered = Numbered(worker, 0, total, batch)
        self.published[worker] += count
        if self.journal_up:
            self.journal.append(numbered)
        if not lost:
            self.on_the_way.append(numbered)
        if lost and (not self.journal_up or self.pursuit.state is PursuitState.LIVE):
            self.lost.update((worker, number) for number in range(total, total + count))

    def deliver(self, most: int) -> None:
        """Let some of what was published come to the sender."""
        for _ in range(min(most, len(self.on_the_way))):
            numbered = self.on_the_way.pop(0)
            name, boot = numbered.worker
            known = self.followed.get(numbered.worker)
            before = known.reached if known else numbered.total
            envelope = make_envelope(10**9 + numbered.total, numbered.total, boot=boot, sender=name)
            assert self.live.observe(TOPIC, envelope, len(numbered.batch)) is not None
            if self.pursuit.state is PursuitState.LIVE:  # what was lost before it is a loss of live copies
                first = before if known else 0
                self.lost.update((numbered.worker, number) for number in range(first, numbered.total))
                self.receive(numbered.worker, numbered.total, numbered.end)
            else:
                had = self.pursuit.passed_before(numbered.worker, before, self.followed[numbered.worker].reached)
                self.excused += had
                self.window.add(numbered)

    def receive(self, worker: Worker, start: int, stop: int) -> None:
        """Let the collector get datagrams."""
        self.got += [(worker, number) for number in range(start, stop)]

    def tell_heads(self) -> None:
        """Let the sender hear what the journal has."""
        if self.journal_up:
            reached: Counter[Worker] = Counter()
            for numbered in self.journal:
                reached[numbered.worker] = max(reached[numbered.worker], numbered.end)
            self.window.confirm(self.journal_boot, reached)

    def read(self) -> None:
        """Let the journal answer a question with a portion, whole or not."""
        if not self.journal_up or self.pursuit.queued or self.pursuit.state is not PursuitState.READING:
            return
        positions = {(each.worker, each.boot): each for each in self.pursuit.positions()}
        due = [each for each in self.journal if each.worker not in positions or each.end > positions[each.worker].total]
        portion = due[: self.random.randint(1, 6)]
        moved = dict(positions)
        for each in portion:
            moved[each.worker] = WorkerPosition(*each.worker, 1, each.end, 0)
            self.told[each.worker] = max(self.told.get(each.worker, 0), each.end)
        self.pursuit.queue(portion)
        self.pursuit.note_portion(None, moved.values(), 0, at_end=len(portion) == len(due))

    def step(self) -> None:
        """Let the collector get something."""
        if self.pursuit.state is PursuitState.LIVE:
            return
        for _ in range(self.random.randint(1, 4)):
            step = self.pursuit.next_step(self.window, self.followed, self.random.randint(1, 7))
            if step is None:
                break
            self.perform(step)
        for step in self.pursuit.give_up(self.window, self.followed):
            self.perform(step)
        self.pursuit.check(self.window, self.followed)

    def perform(self, step: object) -> None:
        """Take a step."""
        self.missing += step.missing  # type: ignore[attr-defined]
        self.discovered += step.discovered  # type: ignore[attr-defined]
        self.pursuit.advance(step)  # type: ignore[arg-type]
        batch = step.batch  # type: ignore[attr-defined]
        if batch is not None:
            first = step.stop - len(batch)  # type: ignore[attr-defined]
            numbers = [int(payload) for _, _, payload in batch.datagrams()]
            assert numbers == list(range(first, step.stop))  # type: ignore[attr-defined]
            self.receive(step.numbered.worker, first, step.stop)  # type: ignore[attr-defined]

    def check_account(self) -> None:
        """Assert that what the collector is owed is what it got, what is missing, and what is deferred."""
        if self.pursuit.state is not PursuitState.LIVE:
            counted = self.pursuit._counted
            came = sum(each.reached - counted.get(worker, each.baseline) for worker, each in self.followed.items())
            expected = came + self.discovered - self.excused
            assert expected == len(self.got) + self.missing + self.pursuit.deferred(self.followed)

    def restart_sender(self) -> None:
        """Kill the sender; its successor has the counts that were kept, and has lost what is on the way."""
        for numbered in self.on_the_way:
            in_journal = any(each.worker == numbered.worker and each.total == numbered.total for each in self.journal)
            if not in_journal:
                self.lost.update((numbered.worker, number) for number in range(numbered.total, numbered.end))
        self.on_the_way = []
        self.window = Window(lambda: self.now)
        self.pursuit = Pursuit("messages", 0, Counter(self.counts), lambda: self.now)
        self.counts = self.pursuit._counts


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
@example(5682)  # of a new worker the journal alone has had the beginning, after it was asked
@example(101227)  # of a worker that has ended nothing came live, and the journal had more after it was asked
@example(3056492)  # what the journal has missed came live, and what followed did not
def test_each_datagram_comes_once_and_in_order_whatever_happens(seed: int) -> None:
    """Workers, journal and sender are killed, the bus loses and delays: all that anybody has comes, and once."""
    world = World(Random(seed))
    for _ in range(world.random.randint(0, 30)):
        world.publish()
    world.pursuit = Pursuit("messages", 1, world.counts, lambda: world.now)
    if world.random.random() < 0.5:  # it was served so far
        world.pursuit = Pursuit("messages", 1, Counter(), lambda: world.now)
        world.deliver(10**6)
        world.counts.clear()
        world.pursuit = Pursuit("messages", 1, world.counts, lambda: world.now)
        world.window = Window(lambda: world.now)
        here = [Place("messages", *worker, 0, each.reached) for worker, each in world.followed.items()]
        world.pursuit.begin(here, world.followed)
        world.owed_from = {worker: each.reached for worker, each in world.followed.items()}
    killed = down = 0
    for _ in range(world.random.randint(20, 150)):
        match world.random.randint(0, 19):
            case 0 | 1 | 2 | 3 | 4 | 5:
                world.publish(lost=world.random.random() < 0.05)
            case 6 | 7 | 8:
                world.deliver(world.random.randint(1, 8))
            case 9 | 10 | 11 | 12:
                world.read()
            case 13 | 14 | 15:
                world.step()
            case 16:
                world.tell_heads()
                world.now += world.random.choice((0.01, SECONDS / 2))
            case 17:
                world.start_worker(world.random.choice(("ingest.1", "ingest.2", "ingest.3")))
            case 18 if killed < 2 and world.pursuit.state is not PursuitState.LIVE:
                killed += 1
                world.restart_sender()
            case 19 if world.journal_up and down < 2:
                world.tell_heads()
                world.journal_up = False
                down += 1
        world.check_account()
        if not world.journal_up and world.random.random() < 0.3:
            world.journal_up, world.journal_boot = True, world.journal_boot + 1
            world.tell_heads()
    world.journal_up = True
    world.journal_boot += 1
    for _ in range(2000):
        if world.pursuit.state is PursuitState.LIVE:
            break
        world.deliver(100)
        world.tell_heads()
        world.read()
        world.step()
        world.now += STRAY_SECONDS if world.pursuit.state is PursuitState.WINDOW else PATIENCE_SECONDS / 4
    assert world.pursuit.state is PursuitState.LIVE
    for _ in range(5):
        world.publish()
    world.deliver(10**6)

    assert len(set(world.got)) == len(world.got), "twice"
    unexplained = 0
    for worker, count in world.published.items():
        numbers = [number for each, number in world.got if each == worker]
        assert numbers == sorted(numbers)
        unknown = min(numbers, default=count) if killed or down else 0  # nobody knows what came before
        first = world.owed_from.get(worker, unknown)
        # A worker's last datagrams are not missed if the bus loses them, nor is a worker of which it loses all, unless
        # the journal had begun to tell of it.
        heard = max(world.told[worker], world.window.heads.get(worker, 0)) if worker in world.told else 0
        known = world.followed[worker].reached if worker in world.followed else heard
        owed = {(worker, number) for number in range(first, known)}
        unexplained += len(owed - set(world.got) - world.lost)
    assert unexplained <= world.missing
    assert not unexplained or (killed and down), "one fault at a time loses nothing"


def test_what_the_journal_gets_of_a_worker_that_never_came_live_is_had_too() -> None:
    """The bus loses all of it on its way here, and the worker ends: the journal's report tells that there is more."""
    worker, now = ("ingest.1", 7), 0.0
    window, pursuit = Window(lambda: now), Pursuit("messages", 1, Counter(), lambda: now)
    numbered = [Numbered(worker, number, number, make_batch([b"x"])) for number in range(9)]
    for kept in range(1, 9):
        pursuit.queue(numbered[:kept])
        pursuit.note_portion(None, (), 0, at_end=True)
        while step := pursuit.next_step(window, {}, 9):
            pursuit.advance(step)
        assert pursuit.check(window, {}) is PursuitState.WINDOW
        window.confirm(1, {worker: kept + 1})
        assert pursuit.check(window, {}) is PursuitState.READING
    pursuit.note_portion(None, (), 0, at_end=True)  # it has told of more than it can give
    pursuit.check(window, {})
    now += STRAY_SECONDS
    assert pursuit.check(window, {}) is PursuitState.LIVE
    assert pursuit.totals == {worker: 8}


def test_without_a_journal_the_window_has_all_that_can_be_had() -> None:
    """Datagrams on both sides of a hole in the window are had in order, and the holes are counted."""
    worker, now = ("ingest.1", 7), 0.0
    window = Window(lambda: now, journaled=False)
    for total in (0, 10, 30, 40):  # twenty were missed in between
        window.add(
            Numbered(worker, 0, total, make_batch([f"{number}".encode() for number in range(total, total + 10)]))
        )
    followed = {worker: Position(0, 0, 60)}  # and ten at the end
    pursuit = Pursuit("messages", 1, Counter(), lambda: now)
    pursuit.by_window = True
    pursuit.begin([Place("messages", *worker, 0, 5)], followed)
    got, missing = [], 0
    while pursuit.check(window, followed, at_once=True) is not PursuitState.LIVE:
        steps = pursuit.give_up(window, followed, at_once=True)
        while step := steps.pop(0) if steps else pursuit.next_step(window, followed, 7):
            pursuit.advance(step)
            missing += step.missing
            got += [int(payload) for *_, payload in step.batch.datagrams()] if step.batch else []
        now += STRAY_SECONDS
    assert (got, missing) == ([*range(5, 20), *range(30, 50)], 20)


def test_a_worker_of_which_a_dead_node_told_nothing_is_owed_from_its_first_datagram() -> None:
    """A collector was taken over: of a worker whose place its last node did not tell it gets all that is there."""
    told, untold = ("ingest.1", 7), ("ingest.2", 8)
    window = Window(lambda: 0.0, journaled=False)
    for worker in (told, untold):
        window.add(Numbered(worker, 0, 0, make_batch([b"datagram"] * 10)))
    followed = {told: Position(0, 0, 10), untold: Position(0, 0, 10)}
    pursuit = Pursuit("messages", 1, Counter(), lambda: 0.0)
    pursuit.by_window = True
    pursuit.begin([Place("messages", *told, 0, 4)], followed)
    pursuit.check(window, followed, at_once=True)
    discovered = Counter[Worker]()
    while step := pursuit.next_step(window, followed, 7):
        pursuit.advance(step)
        discovered[step.numbered.worker] += step.discovered
    assert discovered == {told: 6, untold: 10}


def test_a_worker_that_the_journal_did_not_tell_of_is_asked_for() -> None:
    """The journal took it for an older one, as its clock was set back: it is named, and all is searched, once.

    Before that the journal is read on, as the worker may have begun since its last answer.
    """
    pursuit, window = Pursuit("messages", 7, Counter()), Window()
    at_end = JournalPlace(9, 100), [WorkerPosition("ingest.1", 1, 3, 30, 99)], 0
    pursuit.note_portion(*at_end, at_end=True)
    came = {("ingest.1", 2): Position(1, 10, 50)}
    assert pursuit.check(window, came) is PursuitState.READING
    assert (pursuit.reader, len(pursuit.positions())) == (JournalPlace(9, 100), 1)
    pursuit.note_portion(*at_end, at_end=True)
    assert pursuit.check(window, came) is PursuitState.READING
    assert pursuit.reader is None
    assert WorkerPosition("ingest.1", 2, 0, 10, 7) in pursuit.positions()
    pursuit.note_portion(JournalPlace(9, 100), pursuit.positions(), 0, at_end=True)
    pursuit.check(window, came)
    assert pursuit.reader == JournalPlace(9, 100)


def test_a_worker_that_comes_while_the_window_is_read_owes_nothing_of_before() -> None:
    """Without a journal: a worker is heard for the first time when it has published already, which others have sent."""
    first, later = ("ingest.1", 7), ("ingest.2", 8)
    window = Window(lambda: 0.0, journaled=False)
    window.add(Numbered(first, 0, 0, make_batch([b"datagram"] * 10)))
    followed = {first: Position(0, 0, 10)}
    pursuit = Pursuit("messages", 1, Counter(), lambda: 0.0)
    pursuit.by_window = True
    pursuit.begin([Place("messages", *first, 0, 4)], followed)
    assert pursuit.check(window, followed, at_once=True) is PursuitState.WINDOW
    followed[later] = Position(0, 5000, 5000)
    window.add(Numbered(later, 0, 5000, make_batch([b"datagram"] * 10)))
    followed[later].reached += 10
    sent = missing = discovered = 0
    while step := pursuit.next_step(window, followed, 100):
        pursuit.advance(step)
        sent, missing = sent + len(step.batch or ()), missing + step.missing
        discovered += step.discovered
    assert (sent, missing, discovered) == (16, 0, 6)
    assert pursuit.check(window, followed, at_once=True) is PursuitState.LIVE


def test_what_is_read_again_is_not_taken_for_expired_twice() -> None:
    """A portion told of removed datagrams, and is taken back: what is missing later has its own cause."""
    pursuit, worker, window = Pursuit("messages", 1, Counter()), ("ingest.1", 1), Window()
    pursuit.begin([Place("messages", *worker, 0, 0, 1)], {})
    first, last = (Numbered(worker, total, total, make_batch([b"x"])) for total in (5, 9))
    for _ in range(2):
        pursuit.queue([first])
        pursuit.note_portion(None, (), 5, at_end=True)
        step = pursuit.next_step(window, {}, 9)
        assert step is not None
        assert (step.missing, step.expired) == (5, 5)
        pursuit.rewind(Place("messages", *worker, 0, 0, 1), {})
    pursuit.queue([first, last])
    pursuit.note_portion(None, (), 5, at_end=True)
    for missing, expired in ((5, 5), (3, 0)):
        step = pursuit.next_step(window, {}, 9)
        assert step is not None
        assert (step.missing, step.expired) == (missing, expired)
        pursuit.advance(step)
