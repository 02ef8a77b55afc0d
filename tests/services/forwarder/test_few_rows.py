import ctypes
import errno
import os
import socket
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import services.forwarder.mixed_rows
import services.forwarder.service
from services.forwarder.few_rows import FEW_ROWS, few_of
from services.forwarder.mixed_rows import MIXED_ROWS, Vector, mixed_of
from services.forwarder.plan import CONTROL
from shared.datagrams import mmsg
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


def by_exporter(found: list[bytes]) -> list[list[bytes]]:
    """Payloads of two exporters that send in turn, by the number that each begins with; empty ones by themselves."""
    return [[payload for payload in found if payload[:1] and payload[0] % 2 == first] for first in (0, 1)] + [
        [payload for payload in found if not payload]
    ]


@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads, st.booleans(), st.booleans())
def test_few_leave_as_many_do(lab: None, found: list[tuple[int, int]], segmentation: bool, filtered: bool) -> None:
    """One by one or with arrays, collectors get each exporter's copies in order, and the accounts are the same."""
    every = [size for size, count in found for _ in range(count)]
    batch = make_batch(
        [bytes([number % 254 + 1]) * size for number, size in enumerate(every)], ["192.0.2.1", "198.51.100.2"]
    )
    wants: dict[str, Any] = {"prefixes": ("192.0.2.0/24",)} if filtered else {}
    outcomes = []
    with pytest.MonkeyPatch.context() as patched:
        for few in (True, False):
            if not few:
                patched.setattr(services.forwarder.service, "few_of", lambda *_: None)
                patched.setattr(services.forwarder.service, "mixed_of", lambda *_: None)
            with ExitStack() as opened:
                sinks = [listen(opened, "127.0.0.1") for _ in range(2)]
                for sink in sinks:
                    enlarge_receive_buffer(sink, 1 << 24)
                clients = [make_client(f"c{n}", sink.getsockname()[1], **wants) for n, sink in enumerate(sinks)]
                accounts = Sent(opened, *clients, segmentation=segmentation).send(batch)
                outcomes.append((accounts, [by_exporter(drain(sink)) for sink in sinks]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1][0] == outcomes[0][1][1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads, st.booleans(), st.lists(st.sampled_from(ERRORS), min_size=1, max_size=12))
def test_an_error_on_the_way_of_few_costs_and_doubles_nothing(
    lab: None, found: list[tuple[int, int]], segmentation: bool, errors: list[int]
) -> None:
    """The way of many goes on from just where a send of few datagrams failed, whatever the place and the error.

    The kernel tells of an error by taking fewer messages of a vector, or none.
    """
    sent = [bytes([number % 255 + 1]) * size for size, count in found for number in range(count)]
    original, failing = socket.socket.sendmsg, list(errors)
    whole = mmsg.send

    def sendmsg(self: socket.socket, *arguments: Any) -> int:
        if failing and (error := failing.pop(0)):
            raise OSError(error, os.strerror(error))
        return original(self, *arguments)

    def send(descriptor: int, headers: Any, start: int, stop: int) -> tuple[int, int]:
        for at in range(start, stop):
            if failing and (error := failing.pop(0)):
                return whole(descriptor, headers, start, at) if at > start else (0, error)
        return whole(descriptor, headers, start, stop)

    with ExitStack() as opened, pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "sendmsg", sendmsg)
        patched.setattr(services.forwarder.mixed_rows, "send", send)
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


VECTOR = Vector()
"""One for all tests, as a forwarder has: what earlier rows left in its memory must not show."""


@given(payloads, st.sampled_from([0, 100, 1472]), st.integers(1, 3), st.data())
def test_mixed_rows_hold_exactly_the_selected_ones(
    found: list[tuple[int, int]], largest: int, exporters: int, data: st.DataObject
) -> None:
    """Each exporter's rows are sent once and in order; a send is cut at one length, and its last may be shorter."""
    every = [size for size, count in found for _ in range(count)]
    sources = [f"192.0.2.{number}" for number in range(1, exporters + 1)]
    batch = Gathered([make_batch([bytes([n % 255 + 1]) * size for n, size in enumerate(every)], sources)])
    chosen = data.draw(st.none() | st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)).filter(any))
    rows = None if chosen is None else np.flatnonzero(np.array(chosen, np.bool_))
    mixed = mixed_of(batch, rows, largest, VECTOR)
    if mixed is None:
        assert len(batch) > MIXED_ROWS
        return
    wanted = list(range(len(batch))) if rows is None else rows.tolist()
    assert mixed.rest(0, rows).tolist() == wanted
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(services.forwarder.mixed_rows, "send", lambda *_: (0, 0))
        with socket.socket() as sock:
            mixed.send(sock)
    messages = VECTOR.messages[: len(mixed.rows)]
    sent = [sizes_of(message) for message in messages]
    assert [(len(each), sum(each)) for each in sent] == list(zip(mixed.rows, mixed.sizes, strict=True))
    assert sorted(size for each in sent for size in each) == sorted(every[row] for row in wanted)
    for message, each in zip(messages, sent, strict=True):
        segment = segment_of(message)
        assert not segment or (set(each[:-1]) == {segment} and 0 < each[-1] <= segment <= largest)
        assert bool(segment) == (len(each) > 1)
    left = [set(mixed.rest(number, rows).tolist()) for number in range(len(sent) + 1)]
    gone = [sorted(before - after) for before, after in pairwise(left)]
    for exporter in range(exporters):
        assert [row for each in gone for row in each if row % exporters == exporter] == [
            row for row in wanted if row % exporters == exporter
        ]


def sizes_of(message: Any) -> list[int]:
    """The sizes of the pieces of a message."""
    memory = ctypes.string_at(int(message["iov"]), int(message["iovlen"]) * mmsg.IOVEC.itemsize)
    sizes: list[int] = np.frombuffer(memory, mmsg.IOVEC)["len"].tolist()
    return sizes


def segment_of(message: Any) -> int:
    """The length at which the kernel cuts a message; 0 where it does not."""
    if not message["control"]:
        return 0
    control = np.frombuffer(ctypes.string_at(int(message["control"]), int(message["controllen"])), CONTROL)[0]
    return int(control["size"])
