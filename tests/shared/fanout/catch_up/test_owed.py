from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn, cast

from shared.bus.continuity import Position, Worker
from shared.client import Place
from shared.fanout.catch_up.journal_questions import Pursued
from shared.fanout.catch_up.owed import Owed
from shared.fanout.catch_up.past_routes import PastRoutes
from shared.fanout.catch_up.pursuit import Pursuit
from shared.fanout.catch_up.rings import Rings

WORKER = "ingest.1", 1


def test_a_message_costs_hardly_more_however_many_catch_up() -> None:
    """A worker's count moves on: the positions of its stream are found once for all, and who has had it is excused."""
    at, asked, excused = (
        {WORKER: Position(1, 0, 100), ("ingest.2", 1): Position(1, 0, 50)},
        list[str](),
        Counter[tuple[str, int]](),
    )

    def positions(stream: str) -> Mapping[Worker, Position]:
        asked.append(stream)
        return at

    pursued = {}
    for name in map(str, range(100)):
        pursuit = Pursuit("flows", 1, Counter())
        pursuit.begin([Place("flows", *WORKER, 1, 104 if name == "7" else 3)], at)
        pursued[name, "flows"] = Pursued(name, 1, pursuit)
    rings = Rings()
    rings.open("flows")
    owed = Owed(
        pursued, rings, positions, cast(PastRoutes[Any], SimpleNamespace(excuse=lambda *had: excused.update([had])))
    )
    before = owed.counted()
    at[WORKER].reached = 110
    owed.note_counted(before)
    assert asked == ["flows", "flows"]
    assert excused == {("7", 4): 1}
    assert set(owed.accounts()) == {f"owed/flows/{name}" for name in range(100)}
    assert len(asked) == 3


def test_what_one_is_owed_is_found_without_a_look_at_others() -> None:
    """The accounts of collectors are told each second: with thousands that catch up it must not take each for each."""

    class Unseen(dict[tuple[str, str], Pursued]):
        """Pursuits that nobody goes through."""

        def __iter__(self) -> NoReturn:
            raise AssertionError("somebody goes through all of them")

        items = values = keys = __iter__

    at = {WORKER: Position(1, 0, 100)}
    pursuit, rings = Pursuit("flows", 1, Counter()), Rings()
    pursuit.begin([Place("flows", *WORKER, 1, 30)], {})
    rings.open("flows")
    rings.open("syslog")
    owed = Owed(
        Unseen({("siem", "flows"): Pursued("siem", 1, pursuit)}), rings, lambda _: at, cast(PastRoutes[Any], None)
    )
    assert (owed.deferred("siem"), owed.deferred("other")) == (70, 0)
