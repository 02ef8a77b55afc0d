"""Changes of a shared registry, on a log in memory: written together, decided anew, unsure, refused, released."""

import asyncio
import errno
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.admission.readmission import expel_loops
from services.gateway.cluster import changes as module
from services.gateway.cluster.bucket_log import LogError, OvertakenError, Write
from services.gateway.cluster.changes import AGAIN_SECONDS, ClusterChanges, _Asked
from services.gateway.cluster.records import Record
from services.gateway.cluster.replica import Replica
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.changes import Change, ignore
from services.gateway.registry.entry import Entry, Origin
from shared.client import Client, Withheld
from shared.settings.own_listeners import OwnListeners
from tests.services.gateway.cluster.test_replica import Log, Member

MOST = 200


class Node(Member):
    """A node whose changes are asked for as the gateway does; `before` is done once before its next write."""

    def __init__(self, log: Log, node: str) -> None:
        super().__init__(log, node)
        self.live()
        self.follow()
        self.changes = ClusterChanges(self.replica, MOST, MOST)
        self.registry.changes = self.changes
        self.before: Callable[[], None] | None = None
        self.unsure = False
        """The next write lands, and its answer is lost."""
        self.writes = 0
        self.answers: list[object] = []

    async def write(self, writes: Sequence[Write], expected: int) -> int:
        """Write records as JetStream does."""
        before, self.before = self.before, None
        if before:
            before()
        last = max([at for key, (at, _) in self.log.kept.items() if key.startswith("list.")], default=0)
        if last != expected:
            raise OvertakenError(last)
        for each in writes:
            self.log.write(each.key, each.data)
        self.writes += 1
        position = self.log.last
        asyncio.get_running_loop().call_later(0.01, self._read)
        if self.unsure:
            self.unsure = False
            raise LogError("no answer")
        return position

    def _read(self) -> None:
        self.follow()
        self.changes.note_position()

    def register(self, name: str, port: int, peer: Peer | None = None, *, hold: bool = False) -> None:
        """Ask for an entry; a name that is there is taken."""
        client = Client(name, 0, "192.0.2.1", port, streams=("messages",))

        def grant() -> Entry:
            if self.registry.find(name):
                raise RequestError("name_taken", "taken")
            return self.registry.grant(client, peer or Peer(5, "192.0.2.1", 9), Origin.JSON, hold=hold)

        self.changes.make(grant, self.answers.append, self.answers.append)

    @property
    def words(self) -> list[str]:
        """The answers, in short."""
        return [str(each) if isinstance(each, Exception) else each.client.name for each in self.answers]  # type: ignore[attr-defined]


def run(node: Node, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a node's changes while some work is done."""

    async def both() -> None:
        task = asyncio.create_task(node.changes.run())
        node.changes.log = node  # type: ignore[assignment]
        node.changes.available.set()
        async with asyncio.timeout(30):
            await work()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(both())


async def until(condition: Callable[[], object], node: Node) -> None:
    """Wait for a condition; who waits for what others have written gets it."""
    while not condition():
        node.changes.call(node.changes.waiting())
        await asyncio.sleep(0.005)


def test_what_is_apart_is_written_together() -> None:
    """Many that have nothing in common share a write; of two with one name the second is decided behind the first."""
    node = Node(Log(), "a")

    async def work() -> None:
        for number in range(50):
            node.register(f"of {number}", number)
        node.register("of 7", 99)
        await until(lambda: len(node.answers) == 51, node)

    run(node, work)
    assert node.words[:50] == [f"of {number}" for number in range(50)]
    assert node.words[50] == "taken"
    assert node.writes == 1
    generations = [entry.client.generation for entry in node.registry.entries()]
    assert len({*generations}) == 50
    assert node.registry.revision == 50


def test_the_limit_is_not_passed_together() -> None:
    """Near the limit of clients each is decided by itself."""
    node = Node(Log(), "a")

    async def work() -> None:
        for number in range(MOST + 3):
            node.register(f"of {number}", number)
        await until(lambda: len(node.answers) == MOST + 3, node)

    run(node, work)
    assert node.writes >= 4 + 3


def test_who_is_overtaken_decides_anew() -> None:
    """Another node that is first with the same name has it, and one that is first with another name does not matter."""
    log = Log()
    node, other = Node(log, "a"), Member(log, "b")

    def first(name: str) -> Callable[[], None]:
        def write() -> None:
            other.follow()
            other.change("grant", name)
            node._read()

        return write

    async def work() -> None:
        node.before = first("other")
        node.register("mine", 1)
        await until(lambda: node.answers, node)
        node.before = first("theirs")
        node.register("theirs", 2)
        await until(lambda: len(node.answers) == 2, node)

    run(node, work)
    assert node.words == ["mine", "taken"]
    assert node.changes.overtaken == 2
    other.follow()
    assert node.content == other.content


def test_an_answer_that_was_lost_is_found() -> None:
    """A record whose answer was lost is noticed when it comes back: the change is made once, and answered."""
    node = Node(Log(), "a")

    async def work() -> None:
        node.unsure = True
        node.register("mine", 1)
        await until(lambda: not node.changes.available.is_set(), node)
        await asyncio.sleep(0.05)
        node.changes.available.set()
        node.changes.wake.set()
        await until(lambda: node.answers, node)

    run(node, work)
    assert node.words == ["mine"]
    assert node.writes == 1


def test_without_a_quorum_all_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that waits for too long is refused, and the next ones are at once, renewals too."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    node = Node(Log(), "a")

    async def work() -> None:
        node.register("mine", 1)
        await until(lambda: node.answers, node)
        node.unsure = True
        node.follow = lambda: None  # type: ignore[method-assign]
        node.register("unsure", 2)
        await until(lambda: len(node.answers) == 2, node)
        node.register("late", 3)
        node.changes.renew(lambda: next(iter(node.registry.entries())), node.answers.append, node.answers.append)
        await asyncio.sleep(0.5)

    run(node, work)
    assert node.words[0] == "mine"
    late, *away = node.answers[1:]
    assert "the request may have been granted, or may be granted yet" in str(late)
    assert len(away) == 2
    assert all("the cluster has no quorum" in str(each) for each in away)
    assert node.changes.refused == 3


def test_a_connection_that_ended_meanwhile_holds_nothing() -> None:
    """An entry whose connection ends before its record comes back leaves again."""
    node = Node(Log(), "a")
    node.changes.connected = lambda _peer: False

    async def work() -> None:
        node.register("mine", 1, hold=True)
        await until(lambda: node.answers, node)
        await until(lambda: node.registry.find("mine") is None, node)

    run(node, work)
    assert node.registry.revision == 2


def test_a_look_for_loops_that_the_kernel_refuses_is_over() -> None:
    """A look for loops ends though the kernel can't tell this host's addresses; the next one finds what loops."""
    node, kernel = Node(Log(), "a"), Mock(return_value=True, side_effect=OSError(errno.EMFILE, "no descriptor"))
    destinations = Destinations(["messages"], OwnListeners([("0.0.0.0", 514)]), kernel, lambda _: False)
    over: list[object] = []

    async def work() -> None:
        node.register("mine", 514)
        await until(lambda: node.answers, node)
        for left in (1, 0):
            node.changes.make(partial(expel_loops, destinations, node.registry, set()), over.append)
            await until(lambda: over and len(node.registry) == left, node)  # noqa: B023
            over.clear()
            kernel.side_effect = None

    run(node, work)


def test_a_fault_of_ours_fails_its_change_only() -> None:
    """An error that nobody expected is logged and answered, and the next change is made; the gateway's own one is over.

    So it is with an error in the answer: the request was granted, and others get theirs.
    """
    node = Node(Log(), "a")
    over: list[None] = []

    def fail(*_: object) -> Any:
        raise KeyError("since")

    async def work() -> None:
        node.changes.make(fail, node.answers.append, node.answers.append)
        node.changes.make(fail, over.append)
        node.changes.make(lambda: None, fail, fail)
        node.changes.renew(fail, node.answers.append, node.answers.append)
        node.changes.when_sure(fail, fail)
        node.register("granted", 2)
        node.changes._queue[-1].done = fail
        node.register("mine", 1)
        await until(lambda: len(node.answers) == 3, node)

    with capture_logs() as logs:
        run(node, work)
    fault = "[Errno 5] the gateway failed at this request, as its log says"
    assert sorted(node.words) == [fault, fault, "mine"]
    assert over == [None]
    assert {entry.client.name for entry in node.registry.entries()} == {"granted", "mine"}
    decided, answered = "error while a change was decided", "error while a change was answered"
    assert sorted(each["event"] for each in logs) == [*[answered] * 3, *[decided] * 4]


@pytest.mark.parametrize("again", [0.0, 3600.0])
def test_a_change_of_ours_that_no_node_accepts_is_tried_seldom(again: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the gateway itself whose records no node accepts is written again after a while, and not before."""
    monkeypatch.setattr(module, "AGAIN_SECONDS", again)
    node = Node(Log(), "a")
    monkeypatch.setattr(node.replica, "_apply_listed", lambda _: None)
    client, peer, write = Client("mine", 0, "192.0.2.1", 9), Peer(5, "192.0.2.1", 9), node.write
    written: list[str] = []

    async def note(writes: Sequence[Write], expected: int) -> int:
        written.extend(each.key.removeprefix("list.client.") for each in writes)
        return await write(writes, expected)

    monkeypatch.setattr(node, "write", note)

    async def work() -> None:
        node.changes.make(lambda: node.registry.grant(client, peer, Origin.JSON), ignore)
        for number in range(4):
            node.register(f"other-{number}", number)
            await until(lambda: f"other-{number}" in written, node)  # noqa: B023
        if not again:
            await until(lambda: written.count("mine") > 1, node)

    run(node, work)
    assert (written.count("mine") == 1) == bool(again)


def test_a_fault_in_writing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected in a write is logged; once records can be written again, the change is made."""
    node = Node(Log(), "a")
    write, faults = node.write, [KeyError("odd")]

    async def fail_once(writes: Sequence[Write], expected: int) -> int:
        if faults:
            raise faults.pop()
        return await write(writes, expected)

    monkeypatch.setattr(node, "write", fail_once)

    async def work() -> None:
        node.register("mine", 1)
        await until(lambda: not node.changes.available.is_set(), node)
        node.changes.available.set()
        await until(lambda: node.answers, node)

    with capture_logs() as logs:
        run(node, work)
    assert node.words == ["mine"]
    assert [each["event"] for each in logs] == ["a fault has kept changes from being written"]


@pytest.mark.parametrize("error", [KeyError("odd"), LogError("message size exceeds maximum allowed")])
def test_a_change_of_ours_that_is_never_written_blocks_no_other(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the gateway itself that can't be written is tried again alone, and more and more seldom.

    Others that were written together with it are made as soon as records can be written again.
    """
    node, waited, tried = Node(Log(), "a"), list[float](), list[list[Write]]()
    client, peer, write = Client("mine", 0, "192.0.2.1", 9), Peer(5, "192.0.2.1", 9), node.write

    async def refuse(writes: Sequence[Write], expected: int) -> int:
        if any("mine" in each.key for each in writes):
            tried.append([*writes])
            raise error
        return await write(writes, expected)

    def append_in(seconds: float, asked: _Asked) -> None:
        waited.append(seconds)
        asyncio.get_running_loop().call_later(seconds / 100, node.changes._append, asked)

    monkeypatch.setattr(node, "write", refuse)
    monkeypatch.setattr(node.changes, "_append_in", append_in)

    def is_over(condition: Callable[[], object]) -> bool:
        node.changes.available.set()
        return bool(condition())

    async def work() -> None:
        node.changes.make(lambda: node.registry.grant(client, peer, Origin.JSON), ignore)
        for number in range(3):
            node.register(f"other-{number}", number + 10)
        await until(partial(is_over, lambda: len(node.answers) == 3), node)
        await until(partial(is_over, lambda: len(tried) == 5), node)

    with capture_logs():
        run(node, work)
    assert sorted(node.words) == ["other-0", "other-1", "other-2"]
    assert all(len(writes) == len(tried[-1]) for writes in tried[1:]), "once it has failed it is written alone"
    assert [seconds for seconds in waited if seconds][:4] == [AGAIN_SECONDS * 2**failures for failures in range(4)]


def test_a_change_whose_record_can_not_be_made_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected in the record of a change is logged and answered, and others are made."""
    node, propose = Node(Log(), "a"), Replica.propose

    def fail(replica: Replica, changes: Sequence[Change], landed: Callable[[], None]) -> list[Record]:
        if any(event.entry.client.name == "odd" for change in changes for event in change.events):
            raise KeyError("odd")
        return propose(replica, changes, landed)

    monkeypatch.setattr(Replica, "propose", fail)

    async def work() -> None:
        for number, name in enumerate(("one", "odd", "two")):
            node.register(name, number + 1)
        await until(lambda: len(node.answers) == 3, node)

    with capture_logs() as logs:
        run(node, work)
    assert sorted(node.words) == ["[Errno 5] the gateway failed at this request, as its log says", "one", "two"]
    assert [each["event"] for each in logs] == ["error while a change was decided"]


def test_an_order_that_is_written_with_others_has_one_revision() -> None:
    """All nodes have the same revision after an order that stands behind other changes of one write."""
    log = Log()
    node, other = Node(log, "a"), Member(log, "b")

    async def work() -> None:
        node.register("mine", 1)
        await until(lambda: node.answers, node)
        node.register("one", 2)
        node.register("two", 3)
        order = Withheld("admin", 1.0)
        node.changes.make(lambda: node.registry.order("mine", order), node.answers.append, node.answers.append)
        await until(lambda: len(node.answers) == 4, node)

    run(node, work)
    other.follow()
    assert node.writes == 2
    assert node.content == other.content
