from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from structlog.testing import capture_logs

from shared.bus.bodies.offload_messages import KernelCopies, OffloadReply
from shared.bus.messages import Body, Datagrams, Message, Status
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import DatagramBatch
from shared.fanout.awaited_rules import (
    PATIENCE_SECONDS,
    REGISTRY_SECONDS,
    AwaitedRules,
)
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.resumption import MAX_WAITING, MAX_WAITING_BYTES
from tests.builders import make_batch, make_envelope

STATUS = Status("ingest.1", 1, 0, 1, 0, 1, {})


class Sender:
    """A sender of copies, its clock, what it serves of the registry, and what it publishes."""

    def __init__(self) -> None:
        self.now, self.revision = 10.0, 0
        self.published: list[tuple[str, Body]] = []
        replica = SimpleNamespace(holds=lambda boot, revision: boot == 7 and self.revision >= revision)
        publisher = SimpleNamespace(publish=lambda topic, body: self.published.append((topic, body)))
        self.awaited = AwaitedRules(
            KernelRules("relay"), cast(Publisher, publisher), cast(RegistryReplica, replica), lambda: self.now
        )

    def hear(self, payload: str, *marks: int, boot: int = 1) -> list[str]:
        """Let datagrams with these marks come, all with this payload; return what is handled then."""
        batch = make_batch([payload.encode()] * len(marks or (0,)))
        batch.generations = np.array(marks, np.uint16) if marks else None
        return names(self.awaited.order(Message("", make_envelope(boot=boot), Datagrams("messages", 0), batch)))

    def report(self) -> list[str]:
        """Let a report of the worker come; return what is handled then."""
        return names(self.awaited.order(Message("", make_envelope(), STATUS)))

    def learn(self, generation: int, serial: int = 1, **fields: Any) -> list[str]:
        """Let offload tell of a generation; return what need not wait any more."""
        body = KernelCopies(generation, serial, "reply/offload.1.a/", 0, 1, [], **fields)
        return names(self.awaited.note(make_envelope(sender="offload.1"), body))


def names(messages: Sequence[Message]) -> list[str]:
    """Return the first payload of each message, or its kind."""
    return [
        bytes(each.batch.payload[: int(each.batch.rows["length"][0])]).decode()
        if each.batch is not None
        else type(each.body).__name__
        for each in messages
    ]


def test_worker_waits_from_the_first_datagram_of_unknown_rules_on() -> None:
    """All that stands behind it waits too, so that the order stays; other workers do not wait."""
    sender = Sender()
    assert sender.hear("a") == ["a"]
    assert sender.hear("b", 0, 3) == []
    assert sender.hear("c") == []
    assert sender.report() == []
    assert sender.hear("d", 4) == []
    assert sender.hear("e", boot=2) == ["e"]
    assert sender.learn(5) == []
    assert sender.learn(3) == ["b", "c", "Status"]
    assert sender.hear("f", 3) == []
    assert sender.learn(4) == ["d", "f"]
    assert sender.hear("g", 3, 4, 5, 0) == ["g"]


def test_rules_are_not_awaited_for_long() -> None:
    """After two seconds the datagrams go on, for whoever drops them; nobody waits for these rules a second time."""
    sender = Sender()
    sender.hear("a", 3)
    sender.now += PATIENCE_SECONDS / 2
    sender.hear("b", 4)
    assert not sender.awaited.overdue()
    sender.now += PATIENCE_SECONDS / 2
    with capture_logs() as logs:
        assert names(sender.awaited.overdue()) == ["a", "b"]
    assert [line["generations"] for line in logs] == [[3, 4]]
    assert "datagrams are marked by rules that offload has not told of" in logs[0]["event"]
    assert not sender.awaited
    assert sender.hear("c", 3, 4) == ["c"]
    assert sender.hear("d", 5) == []


def test_what_waits_has_bounds() -> None:
    """Too many messages, or too much payload: nothing waits any more."""
    sender = Sender()
    for _ in range(MAX_WAITING):
        assert sender.hear("a", 3) == []
    with capture_logs():
        assert len(sender.hear("a", 3)) == MAX_WAITING + 1
    sender = Sender()
    half = DatagramBatch("messages", 0, make_batch([b""]).rows, memoryview(bytearray(MAX_WAITING_BYTES // 2)))
    half.generations = np.array([3], np.uint16)
    message = Message("", make_envelope(), Datagrams("messages", 0), half)
    for _ in range(2):
        assert sender.awaited.order(message) == ()
    with capture_logs():
        assert len(sender.awaited.order(Message("", make_envelope(), STATUS, None))) == 0
        assert len(sender.awaited.order(message)) == 4


def test_offload_is_answered_once_its_registry_is_served() -> None:
    """The sender says that it knows a generation when it serves the registry that it was made of, or a later one."""
    sender = Sender()
    sender.learn(3, serial=8)
    sender.learn(4, serial=9, registry=7, revision=5)
    sender.learn(5, serial=10, registry=6, revision=1)
    assert sender.awaited
    sender.awaited.answer()
    sender.revision = 6
    sender.awaited.answer()
    assert sender.published == [("reply/offload.1.a/", OffloadReply(8)), ("reply/offload.1.a/", OffloadReply(9))]
    assert sender.awaited
    sender.now += REGISTRY_SECONDS
    sender.awaited.answer()
    assert not sender.awaited
    sender.learn(4, serial=9, registry=7, revision=5)
    sender.awaited.answer()
    assert len(sender.published) == 3


def test_end_of_the_process_lets_nothing_wait() -> None:
    """Messages that still wait then go on, and are counted where they are dropped."""
    sender = Sender()
    sender.hear("a", 3)
    with capture_logs():
        assert names(sender.awaited.give_up()) == ["a"]
    assert names(sender.awaited.give_up()) == []
