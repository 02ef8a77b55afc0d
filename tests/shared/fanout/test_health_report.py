from collections.abc import Iterable

from shared.bus.bodies.health_message import Health
from shared.bus.messages import MAX_MESSAGE, Body, encode, health_topic
from shared.client import Client
from shared.fanout import health_report
from shared.fanout.health import Symptom
from shared.fanout.health_report import HealthReporter
from tests.builders import make_client


class Bus:
    """A publisher that keeps what is published."""

    def __init__(self) -> None:
        self.published: list[Health] = []
        self.somebody = True

    def wanted(self, topic: str) -> bool:
        """Return whether somebody listens."""
        return self.somebody and topic == health_topic("relay")

    def publish(self, topic: str, body: Body) -> bool:
        """Take a message; it fits on the bus."""
        assert isinstance(body, Health)
        parts = encode(topic, body, sender="forwarder.1", boot=1, sequence=0, total=0)
        assert len(parts[2]) < MAX_MESSAGE // 2
        self.published.append(body)
        return True


class Sick:
    """Collectors that have a trouble."""

    def __init__(self, count: int) -> None:
        self.troubled = [(make_client(f"é{number}" + "n" * 200), Symptom("slow", 0.0), 3) for number in range(count)]

    def look(self, _now: float) -> Iterable[tuple[Client, Symptom, int]]:
        """Look at them."""
        return self.troubled


def make() -> tuple[Bus, HealthReporter]:
    """A bus, and who reports on it."""
    bus = Bus()
    return bus, HealthReporter(bus, "relay")  # type: ignore[arg-type]


def test_many_are_told_in_pieces() -> None:
    """10,000 collectors with long names go out in pieces of one report, complete and in order."""
    bus, reporter = make()
    sick = Sick(10_000)
    reporter.report(sick.look)
    assert [body.piece for body in bus.published] == list(range(len(bus.published)))
    assert {(body.report, body.pieces) for body in bus.published} == {(1, len(bus.published))}
    told = [each.name for body in bus.published for each in body.troubled]
    assert told == [client.name for client, *_ in sick.troubled]


def test_told_when_it_changes_and_each_second_and_to_who_asks() -> None:
    """An unchanged list is not sent again before its time; a change, or a new subscriber, has it sent at once."""
    bus, reporter = make()
    sick = Sick(1)
    for _ in range(3):
        reporter.report(sick.look)
    assert len(bus.published) == 1
    assert not reporter.asked_for(["status/", "health/original/"])
    assert reporter.asked_for(["health/"])
    reporter.report(sick.look)
    assert len(bus.published) == 2
    sick.troubled = []
    reporter.report(sick.look)
    assert (len(bus.published), bus.published[-1].troubled) == (3, [])
    reporter._tell_at -= health_report.REPEAT_SECONDS
    reporter.report(sick.look)
    assert len(bus.published) == 4


def test_nothing_is_told_to_nobody() -> None:
    """Without a subscriber nothing is published, and the first one is told."""
    bus, reporter = make()
    bus.somebody = False
    reporter.report(Sick(1).look)
    assert bus.published == []
    bus.somebody = True
    reporter.report(Sick(1).look)
    assert len(bus.published) == 1


def test_nothing_is_told_while_no_copies_flow() -> None:
    """Nothing is sent while no worker is heard, by which the gateway finds it; findings are sent later."""
    bus, reporter = make()
    reporter.report(Sick(1).look, flowing=False)
    assert bus.published == []
    reporter.report(Sick(1).look)
    assert len(bus.published) == 1


def test_without_collectors_it_is_told_once() -> None:
    """A service without collectors repeats nothing, answers who asks, and repeats its report from its first one on."""
    bus, reporter = make()
    nobody = Sick(0)
    for _ in range(2):
        reporter.report(nobody.look, serving=False)
        reporter._tell_at -= health_report.REPEAT_SECONDS
    assert len(bus.published) == 1
    assert reporter.asked_for(["health/"])
    reporter.report(nobody.look, serving=False)
    assert len(bus.published) == 2
    for _ in range(2):
        reporter.report(nobody.look)
        reporter._tell_at -= health_report.REPEAT_SECONDS
    assert len(bus.published) == 3
