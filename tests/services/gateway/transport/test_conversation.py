"""A conversation, input by input: the clock is the test's, and a client and a handler are played."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.protocol.decoder import MAX_LINE
from services.gateway.protocol.requests import ListStreams, RequestError, SignUp
from services.gateway.transport.conversation import (
    LINGER_BYTES,
    WRITE_SIZE,
    Action,
    Conversation,
    ConversationState,
    Handle,
    Refuse,
    Step,
    Write,
    WriteLastWords,
    split_answer,
)
from services.gateway.transport.deadlines import Deadlines
from shared.settings.tables import Gateway

SETTINGS = Gateway(idle_seconds=100, request_seconds=5, output_buffer=4096)
LINE = b'{"op":"streams"}\n'
STEPS = {
    Step.GIVE_WAY: "give way",
    Step.HALF_CLOSE: "half-close",
    Step.CLOSE: "close",
    Step.ABORT: "abort",
    Step.ABORT_SLOW: "abort slow",
}


class Played:
    """A conversation, and what it has said is to be done."""

    def __init__(self, *, introduced: bool = True) -> None:
        self.now = 0.0
        self.wait_seconds = 0.0
        self.stalls = False
        deadlines = Deadlines(SETTINGS, lambda: self.now, introduced=introduced)
        self.told = Conversation(SETTINGS, deadlines, "192.0.2.7", lambda: self.wait_seconds)
        self.performed: list[Action] = []

    @property
    def state(self) -> ConversationState:
        return self.told.state

    @property
    def deadline(self) -> float:
        return self.told.deadlines.passes_at

    @property
    def written(self) -> bytes:
        return b"".join(action.data for action in self.performed if isinstance(action, Write))

    def act(self) -> list[str]:
        """Perform every action; a transport that `stalls` says so with each write."""
        done: list[str] = []
        while (action := self.told.next_action()) is not None:
            self.performed.append(action)
            done.append(STEPS[action] if isinstance(action, Step) else type(action).__name__)
            if isinstance(action, Write) and self.stalls:
                self.told.pause_writing()
        return done

    def receive(self, data: bytes) -> list[str]:
        self.told.receive(data)
        return self.act()


def reach(state: ConversationState) -> Played:
    """A conversation in a state."""
    played = Played()
    if state is ConversationState.RECEIVING:
        played.receive(b"{")
    elif state is ConversationState.ANSWERING:
        played.receive(LINE)
    elif state is ConversationState.WAITING_TURN:
        played.receive(LINE + b"{")
        played.told.answer([b"a\n"])
        assert played.act() == ["Write", "give way"]
    elif state is ConversationState.LINGERING:
        played.told.drain()
        assert played.act() == ["half-close"]
    elif state is ConversationState.CLOSED:
        played.told.drop()
        assert played.act() == ["abort"]
    assert played.state is state
    return played


INPUTS: dict[str, Callable[[Conversation], object]] = {
    "part": lambda told: told.receive(b"{"),
    "request": lambda told: told.receive(LINE),
    "end": lambda told: told.receive_end(),
    "abandon": lambda told: told.abandon(),
    "answer": lambda told: told.answer([b"a\n"]),
    "last answer": lambda told: told.answer([b"a\n"], closes=True),
    "push": lambda told: told.push(b"event\n"),
    "turn": lambda told: told.take_turn(),
    "refuse": lambda told: told.refuse(RequestError("unavailable", "full", closes=True)),
    "expire": lambda told: told.expire(needed=False),
    "expire needed": lambda told: told.expire(needed=True),
    "drain": lambda told: told.drain(),
    "drop": lambda told: told.drop(),
}
IDLE, RECEIVING, ANSWERING, TURN, LINGERING, CLOSED = ConversationState
SAME: dict[str, tuple[ConversationState | None, list[str]]] = dict.fromkeys(INPUTS, (None, []))
ENDS = {"abandon": (LINGERING, []), "drop": (CLOSED, ["abort"])}
TRANSITIONS: dict[ConversationState, dict[str, tuple[ConversationState | None, list[str]]]] = {
    IDLE: SAME
    | ENDS
    | {
        "part": (RECEIVING, []),
        "request": (ANSWERING, ["Handle"]),
        "end": (LINGERING, ["close"]),
        "push": (None, ["Write"]),
        "refuse": (ANSWERING, ["Refuse"]),
        "expire": (ANSWERING, ["Refuse"]),
        "drain": (LINGERING, ["half-close"]),
    },
    RECEIVING: SAME
    | ENDS
    | {
        "request": (ANSWERING, ["Refuse"]),  # `{{` is no JSON
        "end": (ANSWERING, ["Refuse"]),
        "push": (None, ["Write"]),
        "refuse": (ANSWERING, ["Refuse"]),
        "expire": (ANSWERING, ["Refuse"]),
        "expire needed": (ANSWERING, ["Refuse"]),
        "drain": (LINGERING, ["half-close"]),
    },
    ANSWERING: SAME
    | ENDS
    | {
        "answer": (IDLE, ["Write"]),
        "last answer": (LINGERING, ["Write", "half-close"]),
    },
    TURN: SAME
    | ENDS
    | {
        "push": (None, ["Write"]),
        "turn": (RECEIVING, []),
        "drain": (LINGERING, ["half-close"]),
    },
    LINGERING: SAME
    | ENDS
    | {
        "expire": (CLOSED, ["abort"]),
        "expire needed": (CLOSED, ["abort"]),
    },
    CLOSED: SAME
    | {
        "drop": (CLOSED, ["abort"]),
        "expire": (CLOSED, ["abort"]),
        "expire needed": (CLOSED, ["abort"]),
    },
}
OURS = {("refuse", ANSWERING), ("refuse", TURN), ("refuse", LINGERING), ("refuse", CLOSED), ("abandon", CLOSED)}
"""The shell refuses a connection that has just begun, and hears of no end after it has cut it."""
NO_DEADLINE = {("expire", ANSWERING), ("expire needed", ANSWERING), ("expire", TURN), ("expire needed", TURN)}


@pytest.mark.parametrize(
    ("state", "given", "after", "actions"),
    [
        (state, given, after or state, actions)
        for state, row in TRANSITIONS.items()
        for given, (after, actions) in row.items()
        if (given, state) not in OURS | NO_DEADLINE
    ],
)
def test_every_input_in_every_state(
    state: ConversationState, given: str, after: ConversationState, actions: list[str]
) -> None:
    """Each input leads from each state to one state, and to these actions in this order."""
    played = reach(state)
    INPUTS[given](played.told)
    assert (played.act(), played.state) == (actions, after)
    assert played.act() == []


@pytest.mark.parametrize("state", ConversationState)
def test_deadline_of_every_state(state: ConversationState) -> None:
    """A client has time for what it is to do next; while the gateway is to act there is no deadline."""
    expected = {IDLE: 100.0, RECEIVING: 5.0, LINGERING: 5.0, ANSWERING: math.inf, TURN: math.inf, CLOSED: math.inf}
    assert reach(state).deadline == expected[state]


def test_request_has_its_time_from_the_first_byte() -> None:
    """The deadline of a request stays however steadily bytes come; that of being idle begins anew after each."""
    played = Played()
    played.now = 1.0
    played.receive(b'{"op":')
    assert (played.state, played.deadline) == (RECEIVING, 6.0)
    played.now = 4.0
    played.receive(b'"streams"')
    assert played.deadline == 6.0
    assert played.receive(b"}\n") == ["Handle"]
    played.told.answer([b"a\n"])
    played.act()
    assert (played.state, played.deadline) == (IDLE, 104.0)


def test_blank_lines_are_no_request() -> None:
    """An empty line leaves the connection idle."""
    played = reach(ANSWERING)
    played.told.answer([b"a\n"])
    played.act()
    played.now = 7.0
    assert (played.receive(b"\r\n"), played.state, played.deadline) == ([], IDLE, 107.0)


def test_client_that_is_not_introduced_has_little_time() -> None:
    """Until it has said who it is, it has `request_seconds` in all, whatever it says; then it may be idle."""
    played = Played(introduced=False)
    assert played.deadline == 5.0
    played.now = 4.0
    played.receive(LINE)
    played.told.answer([b"no\n"])
    played.act()
    assert played.deadline == 5.0
    played.now = 5.0
    played.told.expire(needed=False)
    assert played.act() == ["Refuse"]
    (refused,) = [action.refused for action in played.performed if isinstance(action, Refuse)]
    assert (refused.error, str(refused)) == ("too_slow", "no `auth` received within 5 s")
    played = Played(introduced=False)
    played.receive(LINE)
    played.told.deadlines.introduce()
    assert played.deadline == math.inf
    played.told.answer([b"yes\n"])
    played.act()
    assert played.deadline == 100.0


@pytest.mark.parametrize("awaited", ["answer", "turn", "reader"])
def test_client_that_keeps_the_gateway_busy_has_to_introduce_itself(awaited: str) -> None:
    """Lines without end, and answers that are not read, do not put off the time by which a client says who it is."""
    played = Played(introduced=False)
    played.receive(b"{}\n" * 1000)
    if awaited == "turn":
        played.told.answer([b"no\n"])
        assert played.act() == ["Write", "give way"]
    elif awaited == "reader":
        played.now = 4.0
        played.told.pause_writing()
    assert played.deadline == 5.0
    played.told.expire(needed=False)
    if awaited == "reader":
        assert played.act() == ["abort slow"]
    else:
        assert played.act() == ["Refuse"]
        played.told.answer([b"too slow\n"], closes=True)
        played.told.take_turn()
        assert (played.act(), played.state) == (["Write", "half-close"], LINGERING)


def test_idle_connection_that_is_needed_stays() -> None:
    """One that holds an entry, or watches, has its idle time again."""
    played = Played()
    played.now = 100.0
    played.told.expire(needed=True)
    assert (played.act(), played.deadline) == ([], 200.0)


def test_requests_are_answered_one_at_a_time() -> None:
    """A second request in the same read waits for the first one's answer, and for the turn of other connections."""
    played = Played()
    assert played.receive(LINE * 2) == ["Handle"]
    assert played.receive(LINE) == []
    for _ in range(2):
        played.told.answer([b"a", b"\n"])
        assert played.act() == ["Write", "give way"]
        played.told.take_turn()
        assert played.act() == ["Handle"]
    played.told.answer([b"a\n"])
    assert (played.act(), played.state) == (["Write"], IDLE)
    assert played.written == b"a\n" * 3


def test_name_is_the_only_request() -> None:
    """After the answer to a name all is said; what still comes is thrown away, but not without end."""
    played = Played()
    assert played.receive(b"router-7") == ["Handle"]
    assert played.performed == [Handle(SignUp("router-7"), 0.0)]
    played.told.answer([b"{}"])
    assert played.act() == ["Write", "half-close"]
    assert played.receive(b"x" * LINGER_BYTES) == []
    assert (played.receive(b"x"), played.state) == (["abort"], CLOSED)


def test_end_of_the_client_comes_after_its_answers() -> None:
    """All that was asked before the end is answered, a last line without newline too; then the connection is closed."""
    played = Played()
    played.told.receive(LINE + LINE[:-1])
    played.told.receive_end()
    assert played.act() == ["Handle"]
    played.told.answer([b"a\n"])
    assert played.act() == ["Write", "give way"]
    played.told.take_turn()
    assert played.act() == ["Handle"]
    played.told.answer([b"b\n"])
    assert played.act() == ["Write", "give way"]
    played.told.take_turn()
    assert (played.act(), played.state) == (["close"], LINGERING)


@pytest.mark.parametrize(
    "beginning", [b'{"op":"list","op":"list"}', b"{" * (MAX_LINE + 1), b"{", b"\xff", b"GET / HTTP/1.1"]
)
def test_what_may_be_another_protocol_ends_it(beginning: bytes) -> None:
    """After a refusal that closes no request begins."""
    played = Played()
    assert played.receive(beginning + b"\n" + LINE) == ["Refuse"]
    played.told.answer([b"no\n"], closes=True)
    assert (played.act(), played.state) == (["Write", "half-close"], LINGERING)
    assert played.receive(LINE) == []


def test_client_that_is_behind_is_waited_for() -> None:
    """While the transport's buffer is full no more is written; then the answer goes on where it was."""
    played = reach(ANSWERING)
    played.stalls = True
    answer = bytes(3 * WRITE_SIZE)
    played.now = 2.0
    played.told.answer([answer])
    for number in range(1, 4):
        assert (played.act(), played.deadline) == (["Write"], 7.0)
        assert len(played.written) == number * WRITE_SIZE
        played.told.resume_writing()
    assert (played.act(), played.state, played.written) == ([], IDLE, answer)
    assert played.deadline == 102.0


@pytest.mark.parametrize("needed", [True, False])
def test_client_that_takes_no_answer_is_dropped(needed: bool) -> None:
    """One that is behind with an answer for too long is cut, and counted."""
    played = reach(ANSWERING)
    played.stalls = True
    played.told.answer([bytes(2 * WRITE_SIZE)])
    played.act()
    played.told.expire(needed=needed)
    assert (played.act(), played.state) == (["abort slow"], CLOSED)


def test_request_does_not_begin_while_the_client_is_behind() -> None:
    """Bytes of a client that does not read wait, without a deadline of their own."""
    played = Played()
    played.receive(b"{")
    played.told.pause_writing()
    assert played.receive(LINE[1:]) == []
    assert played.deadline == 5.0
    played.told.resume_writing()
    assert played.act() == ["Handle"]


@pytest.mark.parametrize("needed", [True, False])
def test_watcher_that_reads_nothing(needed: bool) -> None:
    """It is told behind what it has not read, if it holds something or watches; else it is cut."""
    played = Played()
    played.stalls = True
    played.told.push(b"event 1\n")
    assert played.act() == ["Write"]
    played.told.push(b"event 2\n")
    played.told.expire(needed=needed)
    assert played.act() == (["WriteLastWords", "half-close"] if needed else ["abort slow"])
    assert b"event 2" not in played.written
    assert played.told.buffered == 0


def test_events_go_between_answers() -> None:
    """Pushed lines come behind the answer under way, and before the next one."""
    played = Played()
    played.receive(LINE * 2)
    played.told.push(b"early\n")
    assert played.act() == []
    played.told.answer([b"answer 1\n"])
    assert played.act() == ["Write", "give way", "Write"]
    played.told.push(b"late\n")
    played.act()
    played.told.take_turn()
    assert played.act() == ["Handle"]
    played.told.answer([b"answer 2\n"])
    played.act()
    assert played.written == b"answer 1\nearly\nlate\nanswer 2\n"


@pytest.mark.parametrize("answering", [True, False])
def test_too_many_events_cut_the_watcher_off(answering: bool) -> None:
    """Beyond `output_buffer` they are let go of, and the client is told so, after the answer under way."""
    played = reach(ANSWERING if answering else IDLE)
    if not answering:
        played.told.pause_writing()
    for _ in range(5):
        played.told.push(b"x" * 1000)
    if answering:
        assert played.act() == []
        played.told.answer([b"answer\n"])
        assert played.act() == ["Write", "WriteLastWords", "half-close"]
    else:
        assert played.act() == ["WriteLastWords", "half-close"]
    assert (played.state, played.told.buffered) == (LINGERING, 0)
    words = [action.refused for action in played.performed if isinstance(action, WriteLastWords)]
    assert [(refused.error, "watch again" in str(refused)) for refused in words] == [("too_slow", True)]
    played.told.push(b"more\n")
    assert played.act() == []


def test_requests_over_the_rate_wait_and_are_told_once() -> None:
    """A request that has to wait is handled later; the client hears why before its first answer, on JSON lines."""
    played = Played()
    played.wait_seconds = 1.5
    assert played.receive(LINE) == ["Write", "Handle"]
    assert b'"slowed"' in played.written
    assert b"192.0.2.7" in played.written
    assert played.performed[-1] == Handle(ListStreams(), 1.5)
    played.told.answer([b"a\n"])
    played.act()
    assert played.receive(LINE) == ["Handle"]
    named = Played()
    named.wait_seconds = 1.5
    assert named.receive(b"name") == ["Handle"]


def test_line_that_is_refused_costs_as_much_as_a_request() -> None:
    """A line that is no request waits for its turn as one that is, unless it ends the connection."""
    played = Played()
    played.wait_seconds = 1.5
    assert played.receive(b'{"op":"nonsense"}\n[]\n') == ["Write", "Refuse"]
    played.told.answer([b"no\n"])
    played.act()
    played.told.take_turn()
    assert played.act() == ["Refuse"]
    waits = [action.wait_seconds for action in played.performed if isinstance(action, Refuse)]
    assert waits == [1.5, 0.0]


def test_client_that_sends_faster_than_it_reads_is_not_read() -> None:
    """Beyond one line's worth of requests that wait, reading pauses; when all is said it goes on, to throw away."""
    played = reach(ANSWERING)
    reading = []
    for count in (MAX_LINE // len(LINE), 2):
        played.receive(LINE * count)
        reading.append(played.told.reading)
    played.told.drain()
    played.told.answer([b"a\n"])
    assert played.act() == ["Write", "half-close"]
    assert [*reading, played.told.reading] == [True, False, True]


def test_drain_waits_for_the_answer() -> None:
    """The request under way is answered, others are not."""
    played = Played()
    played.receive(LINE * 2)
    played.told.drain()
    assert played.act() == []
    played.told.answer([b"a\n"])
    assert (played.act(), played.state) == (["Write", "half-close"], LINGERING)


def test_late_answer_is_for_nobody() -> None:
    """An answer that comes when the connection is cut goes nowhere, and what waited is let go of."""
    played = reach(ANSWERING)
    played.receive(LINE * 10)
    played.told.push(b"event\n")
    played.told.drop()
    assert played.told.buffered == 0
    played.told.answer([b"a\n"])
    assert (played.act(), played.written) == (["abort"], b"")


@given(st.lists(st.binary(max_size=3 * WRITE_SIZE // 2), max_size=6))
def test_answer_is_written_whole_in_pieces(parts: list[bytes]) -> None:
    """Joined, the writes are the answer; each but the last has from `WRITE_SIZE` bytes to under twice that."""
    pieces = list(split_answer(parts))
    assert b"".join(pieces) == b"".join(parts)
    assert all(WRITE_SIZE <= len(piece) < 2 * WRITE_SIZE for piece in pieces[:-1])


def give(played: Played, event: str) -> list[str]:
    """Give an input as a transport, a handler and the gateway's clock do; return the actions."""
    if event == "resume":
        played.told.resume_writing()
    elif event == "stall":
        played.stalls = not played.stalls
    elif event.startswith("expire"):
        played.now += 60
        if played.deadline <= played.now:
            INPUTS[event](played.told)
    elif event != "refuse":
        INPUTS[event](played.told)
    return played.act()


@given(st.lists(st.sampled_from([*INPUTS, "resume", "stall", "request", "answer", "push"]), max_size=40), st.booleans())
def test_whatever_happens_the_rules_hold(events: list[str], introduced: bool) -> None:
    """Of any inputs: nothing is said after the end, no request begins before the last answer, nobody waits for ever."""
    played = Played(introduced=introduced)
    handled = answered = 0
    over = False
    for event in events:
        waits = played.state is ANSWERING
        refused = not introduced and event.startswith("expire")
        answered += waits and (refused or event in ("answer", "last answer"))
        for action in give(played, event):
            assert not over or action.startswith("abort")
            over |= action in ("half-close", "close") or action.startswith("abort")
            handled += action in ("Handle", "Refuse")
        over |= event == "abandon"
        assert handled - answered <= 1
        assert over == played.told.over
        assert (
            played.state is CLOSED or (introduced and played.state in (ANSWERING, TURN)) or played.deadline < math.inf
        )
