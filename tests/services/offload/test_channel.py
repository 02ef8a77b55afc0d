import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.offload.channel import (
    LENGTH,
    Answer,
    ClosedError,
    Request,
    UnfitError,
    name_error,
    receive,
    send,
)
from services.offload.kernel_plan import MAX_REQUEST
from tests.services.offload.applying.test_policy import PLAN
from tests.stack import PATIENCE_SECONDS


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket pair whose second end learns who sends."""
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    for end in (one, other):
        end.settimeout(PATIENCE_SECONDS)
    with one, other:
        yield one, other


def test_requests_and_answers_come_back(pair: tuple[socket.socket, socket.socket]) -> None:
    """A plan, longer than the socket's buffer, arrives as it was sent; and so does the answer."""
    one, other = pair
    request = Request("apply", 3, msgspec.structs.replace(PLAN, copies=PLAN.copies * 5000))
    sending = threading.Thread(target=send, args=(one, request))
    sending.start()
    assert receive(other, Request, os.getpid()) == request
    sending.join()
    send(other, Answer(3, "no", ((1, 2, 3),)))
    assert receive(one, Answer) == Answer(3, "no", ((1, 2, 3),))
    other.close()
    with pytest.raises(ClosedError):
        receive(one, Answer)
    with pytest.raises(ClosedError):
        send(one, request)


def test_plan_of_a_gigabyte_is_refused_unread(pair: tuple[socket.socket, socket.socket]) -> None:
    """The length alone decides: not a byte more is read, or kept."""
    one, other = pair
    one.sendall(LENGTH.pack(1 << 30))
    with pytest.raises(UnfitError, match=f"1073741824 bytes, more than {MAX_REQUEST}"):
        receive(other, Request, os.getpid())


def test_plan_of_another_process_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """The kernel says who has sent each piece: a process that holds the planner's end is not the planner."""
    one, other = pair
    send(one, Request("count", 1))
    with pytest.raises(UnfitError, match=rf"sent by process \[{os.getpid()}\], not by 1"):
        receive(other, Request, 1)


def test_plan_of_a_heir_of_the_socket_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """A process that has got the planner's end from it is not the planner."""
    one, other = pair
    script = f"import socket; socket.socket(fileno={one.fileno()}).sendall(bytes(8))"
    subprocess.run([sys.executable, "-c", script], pass_fds=(one.fileno(),), check=True)
    with pytest.raises(UnfitError, match="sent by process"):
        receive(other, Request, os.getpid())


@pytest.mark.parametrize(
    "body",
    [
        ["apply"],
        ["table", 1],
        ["apply", 1, None, "inet filter"],
        ["apply", 1, [["eth0"], [], [], "output"]],
        ["apply", -1],
        ["apply", 1, [["x" * 16], [], []]],
    ],
)
def test_nothing_names_another_table_or_hook(pair: tuple[socket.socket, socket.socket], body: list[object]) -> None:
    """A request has no field for a table or a hook: one that is added is passed over, another kind is refused."""
    one, other = pair
    data = msgspec.msgpack.encode(body)
    one.sendall(LENGTH.pack(len(data)) + data)
    try:
        request = receive(other, Request, os.getpid())
    except UnfitError:
        return
    assert not {"inet filter", "output"} & {str(part) for part in msgspec.to_builtins(request, str_keys=True)}
    assert {field.name for field in msgspec.structs.fields(Request)} == {"kind", "number", "plan"}


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_request_or_unfit(data: bytes) -> None:
    """No bytes raise anything else."""
    one, other = socket.socketpair()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with one, other:
        one.sendall(LENGTH.pack(len(data)) + data)
        with suppress(UnfitError):
            assert isinstance(receive(other, Request, os.getpid()), Request)


def test_errors_of_the_kernel_have_a_cure() -> None:
    """A table that belongs to another process is named as what it is."""
    assert "such as a second fanwire" in name_error(PermissionError(1, "table: Operation not permitted"))
    assert name_error(OSError(2, "rule x: No such file")) == "rule x: No such file"
