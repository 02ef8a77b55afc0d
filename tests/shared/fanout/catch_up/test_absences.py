"""Signs that a collector is away, and the counts from which on it is owed what did not reach it."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from shared.bus.continuity import Position
from shared.fanout.catch_up.absences import Absences
from shared.fanout.served_collector import Served
from tests.builders import make_client

WORKER, OTHER = ("ingest.1", 1), ("ingest.2", 2)


class Held:
    """A backlog that has nothing."""

    def __init__(self, dropped: list[str]) -> None:
        self.drop = dropped.append

    def __bool__(self) -> bool:
        return False


class Live:
    """Collector `siem`, which catches up by itself, at streams `a` and `b`; what is sent is as the test says."""

    def __init__(self) -> None:
        self.account = Counter[str]()
        self.held: list[str] = []
        self.answer = 0
        """Errors that the network has still to tell."""
        self.reached = {"a": {WORKER: 0, OTHER: 70}, "b": {WORKER: 0}}
        client = make_client("siem", catch_up=True)
        self.destination = SimpleNamespace(
            client=client, held=Held(self.held), unreachable=False, read_errors=self._read
        )
        served: Served[Any] = Served(self.destination, self.account, Counter())
        self.absences: Absences[Any] = Absences({"siem": served}, self._positions)  # type: ignore[arg-type]
        self.absences.watch([client, make_client("other")], lambda _: ["a", "b"])

    def _read(self) -> None:
        self.account["refusals"] += self.answer
        self.answer = 0

    def _positions(self, stream: str) -> dict[tuple[str, int], Position]:
        return {worker: Position(0, 0, count) for worker, count in self.reached[stream].items()}

    def come(self, stream: str, count: int) -> None:
        """Let a batch come."""
        self.absences.note_live(WORKER, stream, self.reached[stream][WORKER])
        self.reached[stream][WORKER] += count

    def send(self, stream: str, *, refused: int = 0) -> list[str]:
        """Let what waits be sent; return who is found to be away."""
        away = self.absences.before_sending(stream)
        if not away:
            self.account["dropped_refused"] += refused
            away = self.absences.after_sending(stream)
        return away


def test_what_is_refused_is_owed_from_its_batch_on() -> None:
    """The batches that were being sent are owed whole, and what did not leave of them is left behind, not dropped."""
    site = Live()
    site.come("a", 10)
    assert site.send("a") == []
    site.come("a", 5)
    site.come("b", 7)
    assert site.send("a", refused=3) == ["siem"]
    owed_from = site.absences.leave("siem")
    assert owed_from("a") == {WORKER: 10, OTHER: 70}
    assert owed_from("b") == {WORKER: 0}
    assert site.absences.unsent_from("b") == {WORKER: 0}
    assert {name: count for name, count in site.account.items() if count} == {"left_behind": 3}


def test_an_answer_that_comes_later_is_to_what_left_last() -> None:
    """A refusal that is read before the next batches are sent means those before them; the others are owed too."""
    site = Live()
    site.come("a", 10)
    site.send("a")
    site.come("b", 4)
    site.send("b")
    site.come("a", 5)
    site.answer = 1
    assert site.send("a") == ["siem"]
    owed_from = site.absences.leave("siem")
    assert owed_from("a") == {WORKER: 10, OTHER: 70}
    assert owed_from("b") == {WORKER: 0}


def test_an_account_that_begins_anew_is_watched_from_its_own_counts_on() -> None:
    """A collector that has moved is found to be away by the first sign of its new account."""
    site = Live()
    site.come("a", 1)
    assert site.send("a", refused=5) == ["siem"]
    site.absences.leave("siem")
    site.absences.watch([site.destination.client], lambda _: ["a"])
    site.come("a", 1)
    assert site.send("a") == []
    site.come("a", 1)
    assert site.send("a", refused=1) == ["siem"]
