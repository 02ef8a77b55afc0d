import errno
import os
import socket
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import services.forwarder.service
from services.forwarder.few_rows import FEW_ROWS, few_of
from shared.datagrams.gathered import Gathered
from shared.net.sockets import enlarge_receive_buffer
from tests.builders import make_batch, make_client
from tests.services.forwarder.sent import Sent
from tests.services.forwarder.test_destination import listen

sizes = st.sampled_from([0, 1, 40, 100, 100, 100, 1464, 1472, 1473, 9000])
payloads = st.lists(st.tuples(sizes, st.integers(1, 9)), min_size=1, max_size=9) | st.tuples(
    sizes, st.integers(65, 200)
).map(lambda run: [run])

ERRORS = (
    0, 0, 0, errno.EAGAIN, errno.ENOBUFS, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EMSGSIZE, errno.EINVAL,
    errno.EIO, errno.EPERM, errno.ENOMEM,
)  # fmt: skip
"""Answers of the kernel to one send; 0: it is taken."""


def drain(sock: socket.socket) -> list[bytes]:
    """All that has come: over loopback it is there when the sender's call returns."""
    found = []
    sock.setblocking(False)
    while True:
        try:
            found.append(sock.recv(1 << 16))
        except BlockingIOError:
            return found


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads, st.booleans(), st.booleans())
def test_few_leave_as_many_do(lab: None, found: list[tuple[int, int]], segmentation: bool, filtered: bool) -> None:
    """One by one or planned with arrays, collectors get the same copies in order, and the accounts are the same."""
    batch = make_batch(
        [bytes([number % 255 + 1]) * size for size, count in found for number in range(count)],
        ["192.0.2.1", "198.51.100.2"],
    )
    wants: dict[str, Any] = {"prefixes": ("192.0.2.0/24",)} if filtered else {}
    outcomes = []
    with pytest.MonkeyPatch.context() as patched:
        for few in (True, False):
            if not few:
                patched.setattr(services.forwarder.service, "few_of", lambda *_: None)
            with ExitStack() as opened:
                sinks = [listen(opened, "127.0.0.1") for _ in range(2)]
                for sink in sinks:
                    enlarge_receive_buffer(sink, 1 << 24)
                clients = [make_client(f"c{n}", sink.getsockname()[1], **wants) for n, sink in enumerate(sinks)]
                accounts = Sent(opened, *clients, segmentation=segmentation).send(batch)
                outcomes.append((accounts, [drain(sink) for sink in sinks]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1][0] == outcomes[0][1][1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads, st.booleans(), st.lists(st.sampled_from(ERRORS), min_size=1, max_size=12))
def test_an_error_on_the_way_of_few_costs_and_doubles_nothing(
    lab: None, found: list[tuple[int, int]], segmentation: bool, errors: list[int]
) -> None:
    """The way of many goes on from just where a send of few datagrams failed, whatever the place and the error."""
    sent = [bytes([number % 255 + 1]) * size for size, count in found for number in range(count)]
    original, failing = socket.socket.sendmsg, list(errors)

    def sendmsg(self: socket.socket, *arguments: Any) -> int:
        if failing and (error := failing.pop(0)):
            raise OSError(error, os.strerror(error))
        return original(self, *arguments)

    with ExitStack() as opened, pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "sendmsg", sendmsg)
        sink = listen(opened)
        account = Sent(opened, make_client("c", sink.getsockname()[1]), segmentation=segmentation).send(
            make_batch(sent)
        )["collector/c"]
        assert drain(sink) == sent
        assert (account["sent"], account["bytes"]) == (len(sent), sum(map(len, sent)))


@given(payloads, st.sampled_from([0, 100, 1472]), st.data())
def test_few_hold_exactly_the_selected_rows(found: list[tuple[int, int]], largest: int, data: st.DataObject) -> None:
    """Sends hold the payloads of the rows in order; many rows that do not fit one send are left to arrays."""
    batch = Gathered([make_batch([bytes([n % 255 + 1]) * size for size, count in found for n in range(count)])])
    chosen = data.draw(st.none() | st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)))
    rows = None if chosen is None else np.flatnonzero(np.array(chosen, np.bool_))
    few = few_of(batch, rows, largest)
    every = [payload for each in batch.batches for _, _, payload in each.datagrams()]
    wanted = every if rows is None else [every[row] for row in rows]
    if few is None:
        assert len(wanted) > FEW_ROWS or not wanted or len(batch) > 64
        return
    assert sum(few.rows) == len(wanted)
    assert few.sizes == [sum(map(len, pieces)) for pieces in few.sends]
    assert b"".join(bytes(piece) for pieces in few.sends for piece in pieces) == b"".join(wanted)
    assert all(rows == 1 for rows in few.rows) or few.segment
    assert not few.segment or (few.segment <= largest and few.segment == len(wanted[0]))
