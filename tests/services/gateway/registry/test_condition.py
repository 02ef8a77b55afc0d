import pytest

from services.gateway.registry.condition import Condition
from services.gateway.registry.entry import Entry
from services.gateway.registry.registry import Registry
from shared.bus.bodies.health_message import Health, Troubled
from tests.services.gateway.table import Table


@pytest.fixture
def registry() -> Table:
    """An empty registry at time 0."""
    return Table()


def word(registry: Registry, entry: Entry) -> str:
    """The entry's word when it is looked at."""
    registry.refresh_condition(entry)
    return entry.condition.word


def test_health_follows_what_is_served(registry: Table) -> None:
    """A collector is fresh, then waiting when nobody answered, then ok; a name is always ok."""
    name, first = registry.join("n"), registry.collect("c")
    serving = registry.serving["relay"]
    assert [word(registry, entry) for entry in (name, first)] == ["ok", "fresh"]
    revision = registry.commit()
    serving.note_unanswered(revision)
    assert word(registry, first) == "waiting"
    serving.note_served(revision)
    second = registry.collect("d")
    assert [word(registry, entry) for entry in (first, second)] == ["ok", "fresh"]
    serving.forget()
    assert word(registry, first) == "waiting"
    assert registry.collectors == 2


def test_health_is_that_of_the_entrys_source(registry: Table) -> None:
    """Facts about copies of one source say nothing of the other's, and either shows in the version."""
    relay, original = registry.collect("r"), registry.collect("o", "original")
    versions = [registry.version()]
    registry.serving["original"].note_served(registry.commit())
    versions.append(registry.version())
    assert [word(registry, entry) for entry in (relay, original)] == ["fresh", "ok"]
    registry.serving["relay"].note_unanswered(registry.commit())
    versions.append(registry.version())
    assert [word(registry, entry) for entry in (relay, original)] == ["waiting", "ok"]
    assert len(set(versions)) == 3


def report(number: int, *troubled: Troubled, piece: int = 0, pieces: int = 1) -> Health:
    """Return the report of a sender of relay copies."""
    return Health("relay", number, piece, pieces, list(troubled))


def test_trouble_shows_with_since_when_and_its_cost(registry: Table) -> None:
    """A report on a collector's present generation is its condition, and the next list replaces all of it."""
    entry, other = registry.collect("c"), registry.collect("d")
    registry.serving["relay"].note_served(registry.commit())
    generation = entry.client.generation
    registry.now = 100.0
    before = registry.version()
    registry.note_health(1, report(1, Troubled("c", generation, "slow", 2500, 7), Troubled("d", 1 << 40, "slow", 0, 1)))
    assert registry.version() != before
    registry.refresh_conditions()
    assert (entry.condition, registry.seconds_in(entry.condition)) == (Condition("slow", 97.5, 7), 2.5)
    assert other.condition.word == "ok"
    registry.now = 101.0
    registry.note_health(1, report(2, Troubled("c", generation, None, 0, 9)))
    registry.refresh_conditions()
    assert entry.condition == Condition("ok", 101.0, 9)
    registry.now = 102.0
    registry.note_health(1, report(3, Troubled("c", generation, None, 0, 12)))
    registry.refresh_conditions()
    assert entry.condition == Condition("ok", 101.0, 12)


def test_trouble_counts_only_while_copies_flow(registry: Table) -> None:
    """A collector that is not served waits, whatever was said of it; with its sender the word is forgotten."""
    entry = registry.collect("c")
    serving = registry.serving["relay"]
    registry.note_health(1, report(1, Troubled("c", entry.client.generation, "refusing", 0, 1)))
    assert word(registry, entry) == "fresh"
    serving.note_served(registry.commit())
    assert word(registry, entry) == "refusing"
    serving.forget()
    assert word(registry, entry) == "waiting"
    serving.note_served(registry.commit())
    assert word(registry, entry) == "ok"


def test_only_whole_lists_count(registry: Table) -> None:
    """Of a list that lost a piece, or is mixed with another sender's, nothing is taken; the next one is."""
    entry = registry.collect("c")
    registry.serving["relay"].note_served(registry.commit())
    sick = Troubled("c", entry.client.generation, "slow", 0, 1)
    registry.note_health(1, report(1, sick, pieces=2))
    registry.note_health(2, report(1, piece=1, pieces=2))
    registry.note_health(1, report(2, sick, piece=1, pieces=2))
    assert word(registry, entry) == "ok"
    registry.note_health(1, report(3, pieces=2))
    registry.note_health(1, report(3, sick, piece=1, pieces=2))
    assert word(registry, entry) == "slow"
