from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared.fanout.sending.backlog
from shared.datagrams.gathered import Gathered
from shared.fanout.sending.backlog import Backlog, BacklogMemory
from shared.process.memory import Memory
from tests.builders import make_batch

ROWS = 4
ACTIONS = st.lists(st.tuples(st.sampled_from(["hold", "release", "wait", "drop"]), st.integers(0, 2)), max_size=60)


class Clock:
    """The clock of what waits: it stands still unless moved."""

    now = 0.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@given(ACTIONS, st.integers(1, 40), st.integers(100, 3000), st.integers(100, 5000))
def test_every_row_is_held_sent_or_dropped(
    actions: list[tuple[str, int]], most_rows: int, most_bytes: int, limit: int
) -> None:
    """Rows leave three queues in order or are dropped, limits are kept, and memory adds up, whatever happens."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(shared.fanout.sending.backlog, "time", clock)
        memory = BacklogMemory(limit)
        accounts = [Counter[str]() for _ in range(3)]
        queues = [Backlog(account, "dropped_x", 3.0, most_rows, most_bytes, memory) for account in accounts]
        batches: list[Gathered] = []
        offered, sent = [0] * 3, [list[int]() for _ in range(3)]
        for action, number in actions:
            queue = queues[number]
            if action == "hold":  # two of the three get everything, the third half of it
                batches.append(Gathered([make_batch([b"x" * (60 * (number + 1))] * ROWS)]))
                rows = [None, None, np.arange(0, ROWS, 2)]
                for each, (holding, wanted) in enumerate(zip(queues, rows, strict=True)):
                    holding.hold(batches[-1], wanted)
                    offered[each] += ROWS if wanted is None else len(wanted)
            elif action == "wait":
                clock.now += number
                for holding in queues:
                    holding.expire(clock.now)
            elif action == "drop":
                queue.drop()
            elif queue:
                held = queue.pop_oldest()
                held_rows = np.arange(ROWS) if held.rows is None else held.rows
                if held.count > 1:
                    queue.put_back(held, held_rows[1:])
                sent[number].append(batches.index(held.batch) * ROWS + int(held_rows[0]))
            waiting = {id(held.batch): held.batch.payload_bytes for holding in queues for held in holding._queue}
            assert memory.used == sum(waiting.values()) <= limit
            for each, holding in enumerate(queues):
                assert accounts[each]["held"] == sum(held.count for held in holding._queue) <= most_rows
                assert offered[each] == len(sent[each]) + accounts[each]["held"] + accounts[each]["dropped_x"]
                assert sent[each] == sorted(set(sent[each]))
                assert all(held.expires_at > clock.now for held in holding._queue)


def test_half_goes_when_memory_is_short() -> None:
    """The oldest half of what waits is dropped, under a cause of its own, for all who wait for it."""
    memory = BacklogMemory(1 << 20)
    accounts = [Counter[str]() for _ in range(2)]
    queues = [Backlog(account, "dropped_x", 3.0, 1000, 1 << 20, memory) for account in accounts]
    batches = [Gathered([make_batch([bytes([number]) * 100] * ROWS)]) for number in range(6)]
    for batch in batches:
        for queue in queues:
            queue.hold(batch, None)
    memory.halve(Memory())
    for queue, account in zip(queues, accounts, strict=True):
        assert (account["dropped_memory"], account["held"], account["dropped_x"]) == (3 * ROWS, 3 * ROWS, 0)
        assert queue.pop_oldest().batch is batches[3]
