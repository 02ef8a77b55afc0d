from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.offload.planning.handover import RETIRE_SECONDS, Handover, Told
from services.offload.planning.planner import Planned
from tests.services.offload.planning.test_planner import client, plan

MOST = 255


class HandoverMachine(RuleBasedStateMachine):
    """Plans come and go; a sender hears all that is fresh, and keeps it by generation as senders do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.handover = Handover(MOST, lambda: self.now)
        self.heard: dict[int, Told] = {}
        self.marks: dict[int, tuple[float, frozenset[str]]] = {}
        """Of rules that were in the kernel: the time at which they went, and whom they served."""
        self.number = 0

    def hear(self) -> None:
        for told in self.handover.fresh:
            before = self.heard.get(told.generation)
            assert before is None or told.serial > before.serial
            self.heard[told.generation] = told
        self.handover.fresh.clear()

    @rule(names=st.sets(st.sampled_from(["a", "b", "c"])), six=st.booleans())
    def begin(self, names: set[str], six: bool) -> None:
        """A plan is told."""
        planned = plan(*(client(name) for name in names), *([client("six", "fd02::1")] if six else []))
        self.handover.begin(planned, (1, 2))
        self.hear()

    @precondition(lambda self: self.handover.pending)
    @rule(answer=st.booleans())
    def apply(self, answer: bool) -> None:
        """Its rules go in once the sender has answered."""
        pending = self.handover.pending
        assert pending is not None
        assert pending.known_to([])
        if not answer and pending.told:
            assert not pending.known_to(["relay"])
            self.handover.give_up()
            return
        for told in pending.told.values():
            self.handover.note_reply("relay", told.serial)
        assert pending.known_to(["relay"])
        assert pending.known_to(["relay", "original"]) == (not pending.told)
        self.handover.complete()

    @rule(seconds=st.floats(0.2, 70))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.handover.expire()
        self.hear()

    @rule()
    def withdraw(self) -> None:
        """The rules go."""
        self.handover.forget_live()

    @invariant()
    def marks_on_the_way_are_known(self) -> None:
        """A sender knows whom the kernel has served for each mark that a datagram may carry; a new one would, too."""
        live = self.handover.live
        for told in live.told.values() if live else ():
            self.marks[told.generation] = (self.now, frozenset(each.client.name for each in told.served))
        new = {told.generation: told for told in self.handover.told()}
        for generation, (seen, names) in self.marks.items():
            if seen + RETIRE_SECONDS > self.now:
                for known in (self.heard, new):
                    assert {each.client.name for each in known[generation].served} == names
                assert 1 <= generation <= MOST


TestHandover = HandoverMachine.TestCase
TestHandover.settings = settings(max_examples=25, stateful_step_count=30)


def test_generation_is_told_in_pieces_with_its_registry() -> None:
    """Each piece names the generation, and the registry of which it was made."""
    handover = Handover(4095, lambda: 100.0)
    handover.begin(plan(client("a"), client("b")), (7, 9))
    (told,) = handover.fresh
    (message,) = told.messages("reply/offload.1.a/")
    assert (message.generation, message.serial, message.piece, message.pieces) == (1001 + 1, told.serial, 0, 1)
    assert (message.registry, message.revision, message.reply) == (7, 9, "reply/offload.1.a/")
    assert [each.client.name for each in message.served] == ["a", "b"]


def test_retired_generation_is_told_once_more_as_serving_nobody() -> None:
    """Senders forget it then."""
    now = [100.0]
    handover = Handover(4095, lambda: now[0])
    handover.begin(plan(client("a")), (7, 9))
    handover.complete()
    handover.begin(Planned({}, {}), (7, 10))
    handover.complete()
    (first,) = handover.fresh
    handover.fresh.clear()
    now[0] += RETIRE_SECONDS - 1
    handover.expire()
    assert not handover.fresh
    assert handover.told() == [first]
    now[0] += 1
    handover.expire()
    (last,) = handover.fresh
    assert (last.generation, last.served) == (first.generation, ())
    assert last.serial > first.serial
    assert not handover.told()


def test_rules_of_before_stay_for_those_whom_a_refused_plan_serves_just_so() -> None:
    """They may serve fewer than the plan that was refused, but nobody who has left, or has another entry or way."""
    handover = Handover(4095, lambda: 100.0)
    assert handover.give_up()
    handover.begin(plan(client("a"), client("b", "fd02::1")), (7, 9))
    handover.complete()
    same = [client("a"), client("b", "fd02::1")]
    for clients, may_stay in (
        ([*same, client("c")], True),
        (same[:1], False),
        ([client("a", generation=2), same[1]], False),
        ([client("a", streams=("*",)), same[1]], False),
        ([], False),
    ):
        handover.begin(plan(*clients), (7, 10))
        assert handover.give_up() == may_stay
    assert handover.live


def test_numbers_that_are_still_told_are_passed_over() -> None:
    """With few numbers one may return within a minute: what it served before must not be forgotten with the new one."""
    now = [100.0]
    handover = Handover(5, lambda: now[0])
    handover.begin(plan(client("a")), (7, 1))
    handover.complete()
    (live,) = handover.told()
    for revision in range(2, 9):
        handover.begin(plan(client("b")), (7, revision))
        handover.give_up()
        now[0] += RETIRE_SECONDS / 3
        handover.expire()
    assert len(handover.fresh) > 8
    assert [each.generation for each in handover.fresh].count(live.generation) == 1
