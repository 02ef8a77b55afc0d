"""Requests for raw frames, sent between two hosts; the clock is the test's, and the kernel where it has to err."""

import errno
import socket
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pytest

import services.transmitter.raw_frames
from services.transmitter.policy import Audit, Policy
from services.transmitter.raw_frames import FRAMES_AT_ONCE, MAX_JOBS, RawFrames
from shared.bus.frame_requests import ANSWER_SECONDS, sending_seconds
from shared.bus.messages import TransmitReply, TransmitRequest
from shared.fanout.sending.next_hops import NextHops
from shared.settings.tables import Transmitter
from tests.capture import Capture
from tests.network import End, Host, veth
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
ETHERTYPE, OTHER_ETHERTYPE = 0x0801, 0x0842
HEADER = bytes.fromhex("020000000001 020000000002 0801")
REPLY = "reply/test.1/"


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Socket:
    """A packet socket whose kernel errs as it is told: `errors` are those of the next frames, 0 for one that leaves."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.errors: list[int] = []

    def sendto(self, frame: bytes, where: tuple[str, int]) -> int:
        """Send a frame, or fail."""
        if self.errors and (error := self.errors.pop(0)):
            raise OSError(error, "played")
        return self._socket.sendto(frame, where)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class Desk:
    """A host with interface `wire`, who asks for frames there, and a host at the other end who sees what leaves."""

    def __init__(self, opened: ExitStack, clock: Clock, **settings: Any) -> None:
        self.clock = clock
        self.host, self.peer = opened.enter_context(Host()), opened.enter_context(Host())
        opened.enter_context(veth(End(self.host, "wire"), End(self.peer, "far")))
        self.sockets = [
            Socket(opened.enter_context(self.host.socket(socket.AF_PACKET, socket.SOCK_RAW))) for _ in range(2)
        ]
        allowed: dict[str, Any] = {"interfaces": ("wire", "gone"), "ethertypes": (ETHERTYPE, 0x8100), "vlans": (7,)}
        policy = Policy(Transmitter(**allowed | settings), clock)
        self.told: list[dict[str, Any]] = []
        self.audit = Audit(lambda _event, **facts: self.told.append(facts), clock)
        self.answers: list[TransmitReply] = []
        with self.host.entered():
            self.next_hops = opened.enter_context(closing(NextHops()))
        self.frames = RawFrames(
            self.sockets,  # type: ignore[arg-type]
            self.next_hops,
            policy,
            self.audit,
            lambda topic, reply: self.answers.append(reply) if topic == REPLY else None,
        )
        self._wire = opened.enter_context(Capture(self.peer, "far"))
        self._number = 0

    def ask(self, frame: bytes = HEADER, interface: str = "wire", **fields: Any) -> int:
        """Ask for a frame; return the number of the request."""
        self._number += 1
        self.frames.accept_request(TransmitRequest(self._number, REPLY, interface, frame, **fields))
        return self._number

    def work(self) -> float:
        """Do what the loop does; time stands still."""
        return self.frames.work()

    def work_for(self, seconds: float, step: float = 0.01) -> int:
        """Do what the loop does while time passes; return the number of frames that have left."""
        before = self.left
        for _ in range(round(seconds / step)):
            self.work()
            self.clock.now += step
        return self.left - before

    @property
    def left(self) -> int:
        """Return the number of frames that have left."""
        return self.frames.counters["frames_sent"]

    def arrived(self) -> list[bytes]:
        """The frames that came at the other end since the last look, without what the kernel has to say."""
        frames = [
            bytes.fromhex((macs[1] + macs[0]).replace(":", "")) + protocol.to_bytes(2) + payload
            for protocol, payload, macs, *_ in self._wire.frames()
        ]
        return [frame for frame in frames if frame[:12] == HEADER[:12]]

    def answer(self) -> TransmitReply:
        """The only answer since the last look."""
        (reply,) = self.answers
        self.answers.clear()
        return reply


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the requests."""
    clock = Clock()
    monkeypatch.setattr(services.transmitter.raw_frames, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def desk(opened: ExitStack, clock: Clock) -> Desk:
    """A desk that allows one interface and one ethertype."""
    return Desk(opened, clock)


@pytest.mark.parametrize("size", [0, 1, 46, 1500])
def test_a_frame_leaves_byte_for_byte(desk: Desk, size: int) -> None:
    """Of any size up to the MTU, the bytes that were asked for are on the wire, and the answer says so."""
    frame = HEADER + bytes(range(256)) * 6
    frame = frame[: 14 + size]
    number = desk.ask(frame)
    desk.work()
    assert desk.arrived() == [frame]
    assert desk.answer() == TransmitReply(number, 1)


def test_a_tagged_frame_may_have_a_tag_more(desk: Desk) -> None:
    """With a VLAN tag a frame has four bytes more than the MTU and header, and not one more."""
    tagged = HEADER[:12] + bytes.fromhex("8100 0007 0801") + bytes(1500)
    desk.ask(tagged)
    desk.work()
    assert desk.answer().sent == 1
    desk.ask(tagged + b"x")
    reply = desk.answer()
    assert (reply.error, reply.sent) == ("bad_request", 0)
    assert "1518 bytes (MTU 1500), this one 1519" in reply.message


def test_as_many_as_asked_for_leave_in_turns(desk: Desk) -> None:
    """A long request leaves in turns, so that copies have theirs; it is answered once, at the end."""
    count = 2 * FRAMES_AT_ONCE + 7
    number = desk.ask(count=count)
    for left in (FRAMES_AT_ONCE, 2 * FRAMES_AT_ONCE):
        assert desk.work() == 0
        assert desk.left == left
        assert desk.answers == []
    assert desk.work() == float("inf")
    assert desk.answer() == TransmitReply(number, count)
    assert len(desk.arrived()) == count


def test_requests_share_the_turns(desk: Desk) -> None:
    """A turn is no longer for many due requests than for one; each has its part, and ends when it is done."""
    numbers = [desk.ask(HEADER + bytes([number]), count=count) for number, count in enumerate((1000, 1000, 30))]
    desk.work()
    assert desk.answer() == TransmitReply(numbers[2], 30)
    came = [frame[14] for frame in desk.arrived()]
    assert [came.count(number) for number in range(3)] == [FRAMES_AT_ONCE // 3, FRAMES_AT_ONCE // 3, 30]
    while desk.work() == 0:
        pass
    assert sorted(reply.id for reply in desk.answers) == numbers[:2]


def test_frames_leave_at_the_pace_asked_for(desk: Desk) -> None:
    """The first leaves at once, each other at its time; the loop is told when the next one is due."""
    number = desk.ask(count=5, per_second=10)
    for sent in range(1, 5):
        assert desk.work() == pytest.approx(0.1, abs=0.001)
        assert desk.left == sent
        desk.clock.now += 0.099
        assert desk.work() == pytest.approx(0.001, abs=0.0005)
        assert desk.left == sent
        desk.clock.now += 0.0011
    assert desk.work() == float("inf")
    assert desk.answer() == TransmitReply(number, 5)


def test_the_pace_is_kept_by_a_loop_that_is_late(desk: Desk) -> None:
    """Frames that became due while the loop was busy leave together, and later ones at their own time."""
    desk.ask(count=100, per_second=100)
    desk.work()
    desk.clock.now += 0.3501
    assert desk.work() == pytest.approx(0.0099)
    assert desk.left == 36
    assert desk.work_for(1, step=0.07) in range(60, 65)
    assert desk.answer().sent == 100


def test_fast_and_slow_requests_keep_their_own_pace(desk: Desk) -> None:
    """Requests of different paces do not disturb each other."""
    desk.ask(HEADER + b"\x00", count=1000, per_second=500)
    desk.ask(HEADER + b"\x01", count=1000, per_second=20)
    desk.work_for(1, step=0.005)
    came = [frame[14] for frame in desk.arrived()]
    assert came.count(0) in range(498, 503)
    assert came.count(1) in range(19, 22)


def test_more_requests_than_there_may_be_are_unavailable(desk: Desk) -> None:
    """One request too many is answered at once; when one has ended there is room again."""
    for _ in range(MAX_JOBS):
        desk.ask(count=2, per_second=1)
    desk.work()
    number = desk.ask()
    reply = desk.answer()
    assert (reply.id, reply.sent, reply.error) == (number, 0, "unavailable")
    assert str(MAX_JOBS) in reply.message
    desk.clock.now += 1
    desk.work()
    assert [reply.sent for reply in desk.answers] == [2] * MAX_JOBS
    desk.answers.clear()
    desk.ask()
    desk.work()
    assert desk.answer().sent == 1


def test_the_limit_of_frames_a_second_slows_requests_down(opened: ExitStack, clock: Clock) -> None:
    """Frames that the policy does not let leave now leave later; nothing is lost, and the loop does not spin."""
    desk = Desk(opened, clock, frames_per_second=100)
    number = desk.ask(count=60)
    assert desk.work() > 0.001
    assert desk.left == 10
    assert desk.work_for(0.3, step=0.002) in range(28, 32)
    desk.work_for(0.3, step=0.002)
    assert desk.answer() == TransmitReply(number, 60)
    assert len(desk.arrived()) == 60


def test_what_the_interface_does_not_take_is_not_counted_against_the_limit(opened: ExitStack, clock: Clock) -> None:
    """Frames that may leave, but that the interface does not take or refuses, leave later, or let others leave."""
    desk = Desk(opened, clock, frames_per_second=100)
    desk.sockets[0].errors = [0, errno.ENOBUFS, 0, errno.EPERM]
    desk.ask(count=10)
    for _ in range(2):
        desk.work()
        clock.now += 0.002
    assert desk.answer().sent == 2
    number = desk.ask(count=8)
    desk.work()
    assert desk.answer() == TransmitReply(number, 8)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOBUFS])
def test_a_full_queue_is_waited_for(desk: Desk, error: int) -> None:
    """Frames that the interface does not take now leave a moment later, each once; none is counted as failed."""
    desk.sockets[0].errors = [0, 0, error, error, 0, error]
    number = desk.ask(count=10)
    waits = []
    while not desk.answers:
        if (seconds := desk.work()) != float("inf"):
            waits.append(seconds)
            desk.clock.now += seconds
    assert waits == pytest.approx([0.002] * 3)
    assert desk.answer() == TransmitReply(number, 10)
    assert len(desk.arrived()) == 10
    assert desk.frames.counters == {"frames_sent": 10}


@pytest.mark.parametrize(("count", "per_second"), [(10, 0.0), (10, 5.0)])
def test_a_request_that_cannot_leave_ends(desk: Desk, count: int, per_second: float) -> None:
    """An interface that takes nothing ends a request before who asked gives up, who hears how many frames had left."""
    desk.sockets[0].errors = [0, 0, *[errno.ENOBUFS] * 5000]
    desk.ask(count=count, per_second=per_second)
    seconds = sending_seconds(count, per_second) + ANSWER_SECONDS
    desk.work_for(seconds - 0.1)
    reply = desk.answer()
    assert (reply.sent, reply.error) == (2, "unavailable")
    assert "wire" in reply.message
    assert desk.work() == float("inf")


def test_a_request_that_would_take_for_ever_is_refused(desk: Desk) -> None:
    """A request may take an hour and no more, however slow its pace; the refusal names that limit."""
    desk.ask(count=3601, per_second=1.0)
    desk.ask(count=2, per_second=1e-300)
    assert desk.answers.pop().error == "bad_request"
    desk.ask(count=3602, per_second=1.0)
    reply = desk.answers.pop()
    assert reply.error == "bad_request"
    assert "at most 3600 s" in reply.message
    assert desk.answers == []


@pytest.mark.parametrize(
    ("error", "word", "said"),
    [
        (errno.ENETDOWN, "unavailable", "wire: Network is down"),
        (errno.ENXIO, "unavailable", "wire: No such device or address"),
        (errno.EPROTONOSUPPORT, "bad_request", "check sequence"),
        (errno.EPERM, "unavailable", "wire: played"),
    ],
)
def test_an_error_ends_the_request_and_the_answer_says_how_many_left(
    desk: Desk, error: int, word: str, said: str
) -> None:
    """Of a request that fails on its way those that have left are told, in whichever turn they did."""
    for before in (3, FRAMES_AT_ONCE, FRAMES_AT_ONCE + 3):
        desk.sockets[0].errors = [0] * before + [error]
        number = desk.ask(count=1000)
        desk.work()
        desk.work()
        reply = desk.answer()
        assert (reply.id, reply.error, reply.sent) == (number, word, before)
        assert said in reply.message
        assert len(desk.arrived()) == before
    assert desk.frames.counters["frames_failed"] == 3


def test_a_link_that_goes_down_ends_the_request(desk: Desk) -> None:
    """Without carrier no more frames leave, since nobody would get them: the answer says so, and how many had left."""
    desk.ask(count=10, per_second=10)
    desk.work()
    desk.peer.run("ip", "link", "set", "dev", "far", "down")

    def down() -> bool:
        desk.next_hops.apply_events()
        link = desk.next_hops.link("wire")
        return link is not None and not link.up

    wait_until(down, "the link is down")
    desk.clock.now += 0.1
    assert desk.work() == float("inf")
    reply = desk.answer()
    assert (reply.error, reply.sent) == ("unavailable", 1)
    assert "carrier" in reply.message


@pytest.mark.parametrize(
    ("frame", "interface", "word", "said", "cause"),
    [
        (HEADER, "lo", "not_permitted", "[transmitter] interfaces", "interface"),
        (HEADER, "gone", "bad_request", "no such interface", ""),
        (HEADER[:12] + OTHER_ETHERTYPE.to_bytes(2), "wire", "not_permitted", "ethertype 0x0842", "ethertype"),
        (HEADER[:13], "wire", "bad_request", "at least 14 bytes", ""),
        (b"", "wire", "bad_request", "at least 14 bytes", ""),
        (HEADER + bytes(1501), "wire", "bad_request", "at most 1514 bytes", ""),
    ],
)
def test_what_may_not_leave_is_refused_at_once(
    desk: Desk, frame: bytes, interface: str, word: str, said: str, cause: str
) -> None:
    """Refused without a turn, counted, told why; what the policy refuses is in the audit too."""
    number = desk.ask(frame, interface)
    reply = desk.answer()
    assert (reply.id, reply.sent, reply.error) == (number, 0, word)
    assert said in reply.message
    assert desk.frames.counters == {"frames_refused": 1}
    assert [facts["cause"] for facts in desk.told] == [cause] * bool(cause)
    desk.work()
    assert desk.arrived() == []


@pytest.mark.parametrize(
    ("tags", "cause"),
    [
        ("8100 0007 0806", "ethertype"),
        ("8100 0007 8100 0007 0800", "ethertype"),
        ("88a8 0007 8100 e007 86dd", "ethertype"),
        ("9100 0007 0842", "ethertype"),
        ("8100 0008 0801", "vlan"),
        ("8100 0000 0801", "vlan"),
        ("8100 0007 88a8 0008 0801", "vlan"),
        ("9200 0008 9300 0007 0801", "vlan"),
        ("8100 0007", ""),
        ("8100 0007 8100 0007 81", ""),
        ("8100", ""),
    ],
)
def test_what_is_behind_tags_is_looked_at(desk: Desk, tags: str, cause: str) -> None:
    """A frame leaves only if each of its tags names a VLAN that may be, and what is behind them all may leave too."""
    desk.ask(HEADER[:12] + bytes.fromhex(tags))
    assert desk.answer().error == ("not_permitted" if cause else "bad_request")
    assert [facts["cause"] for facts in desk.told] == [cause] * bool(cause)
    desk.work()
    assert desk.arrived() == []
    desk.ask(HEADER[:12] + bytes.fromhex("88a8 0007 8100 e007 0801") + b"payload")
    desk.work()
    assert desk.answer().sent == 1
    assert len(desk.arrived()) == 1


def test_a_check_sequence_of_its_own_is_left_to_the_driver(desk: Desk) -> None:
    """Frames with and without one leave by sockets of their own; one that the driver can't send so is refused."""
    desk.sockets[1].errors = [errno.EPERM]
    for said in ("played", "check sequence"):  # the test's word, and veth's
        desk.ask(HEADER + b"with", own_fcs=True)
        desk.work()
        reply = desk.answer()
        assert reply.sent == 0
        assert said in reply.message
        desk.ask()
        desk.work()
        assert desk.answer().sent == 1
    assert desk.arrived() == [HEADER] * 2


def test_what_is_left_at_the_end_is_answered(desk: Desk) -> None:
    """Each request that is under way at the end is answered, with how many of its frames have left."""
    numbers = [desk.ask(count=count, per_second=1) for count in (5, 6)]
    desk.work()
    desk.frames.close()
    assert [(reply.id, reply.sent, reply.error) for reply in desk.answers] == [
        (number, 1, "unavailable") for number in numbers
    ]
    assert "is shutting down" in desk.answers[0].message
    desk.clock.now += 10
    assert desk.work() == float("inf")
    assert desk.left == 2
