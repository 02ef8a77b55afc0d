"""The planner's end of the socket pair, whatever the applier does at the other end."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from services.offload.channel import LENGTH, WAITS, Answer, Request, receive, send
from services.offload.kernel_plan import MAX_REQUEST
from services.offload.planning.applier_link import ApplierLink

GONE = "the applier has ended, and its rules with it"


@pytest.fixture
def pair() -> Iterator[tuple[ApplierLink, socket.socket]]:
    """A link, and the applier's end."""
    ours, theirs = socket.socketpair()
    with closing(ApplierLink(ours, "")) as link, theirs:
        yield link, theirs


def test_answer_is_the_one_to_the_question(pair: tuple[ApplierLink, socket.socket]) -> None:
    """An answer that comes late, to what was asked before, is passed over."""
    link, applier = pair

    def answer() -> None:
        number = receive(applier, Request).number
        send(applier, Answer(number - 1, "late"))
        send(applier, Answer(number, "no"))

    with closing(applier):
        thread = threading.Thread(target=answer)
        thread.start()
        assert not link.ended
        assert link.ask("count") == Answer(1, "no")
        thread.join()


@pytest.mark.parametrize(("said", "cause"), [(b"", "ClosedError"), (LENGTH.pack(MAX_REQUEST + 1), "UnfitError")])
def test_end_is_noted_once_and_asked_no_more(pair: tuple[ApplierLink, socket.socket], said: bytes, cause: str) -> None:
    """After the end, or what no applier says, each question is answered by the reason."""
    link, applier = pair
    applier.sendall(said)
    applier.shutdown(socket.SHUT_WR)
    assert link.ask("count").error == f"{GONE} ({cause})"
    assert link.ended
    assert link.ask("reload").error == f"{GONE} ({cause})"
    receive(applier, Request)
    assert applier.recv(1) == b""  # the planner's end is closed: an applier that is there ends


def test_end_is_seen_though_nothing_is_asked(pair: tuple[ApplierLink, socket.socket]) -> None:
    """The descriptor tells of it."""
    link, applier = pair
    ended = [link.ended]
    applier.close()
    ended.append(link.ended)
    assert ended == [False, True]
    assert link.reason == f"{GONE} (ClosedError)"


def test_silence_is_taken_for_the_end(pair: tuple[ApplierLink, socket.socket]) -> None:
    """An applier that does not answer in time is let go, and its rules with it."""
    link, _ = pair
    assert link.ask("count", seconds=0.05).error == f"{GONE} (TimeoutError)"
    assert link.channel is None


def test_time_in_which_both_ends_stand_still_is_no_silence() -> None:
    """A planner whose wait is over when it goes on waits anew: the applier may have been stopped with it."""

    class StoodStill(socket.socket):
        stops = WAITS - 1

        def recvmsg(self, *arguments: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
            if self.stops:
                self.stops -= 1
                raise TimeoutError
            return super().recvmsg(*arguments)

    ours, applier = socket.socketpair()
    with closing(ApplierLink(StoodStill(fileno=ours.detach()), "")) as link, applier:
        send(applier, Answer(1))
        assert link.ask("count") == Answer(1)


def test_without_an_applier_there_is_a_reason() -> None:
    """It was not started at all."""
    link = ApplierLink(None, "no CAP_NET_ADMIN")
    assert link.ended
    assert link.ask("apply").error == "no CAP_NET_ADMIN"
