import pytest

from services.gateway.admission.peer import Peer
from services.gateway.bus.serving import ServingQuery
from services.gateway.registry.entry import Origin
from services.gateway.registry.registry import Registry
from shared.bus.messages import Body, Message, ServeReply, ServeRequest, serve_topic
from shared.bus.zmq_sockets import Requests
from tests.builders import make_client, make_envelope

TOPIC = serve_topic("original")


class Bus:
    """A publisher to whom somebody listens all the time."""

    def __init__(self) -> None:
        self.published: list[Body] = []

    def wanted(self, _topic: str) -> bool:
        """Somebody wants everything."""
        return True

    def publish(self, _topic: str, body: Body) -> bool:
        """Take what is published."""
        self.published.append(body)
        return True


def test_a_transmitter_that_went_and_came_at_once_has_said_nothing_yet() -> None:
    """One that is seen to subscribe again serves nobody until it says so, though it was never seen to be gone."""
    registry = Registry(lambda: 0.0, 1)
    requests, bus = Requests("gateway", 1), Bus()
    query = ServingQuery("original", bus, requests, registry, 0.5, lambda _seconds, _call: None)  # type: ignore[arg-type]
    client = make_client("siem", streams=("messages",), source="original")
    entry = registry.grant(client, Peer(1, "127.0.0.1", 4000), Origin.JSON)

    def asked() -> ServeRequest:
        query.publish()
        body = bus.published.pop()
        assert isinstance(body, ServeRequest)
        return body

    def word() -> str:
        registry.refresh_condition(entry)
        return entry.condition.word

    for _ in range(2):
        assert query.note_subscriptions([TOPIC])
        assert word() != "ok"
        question = asked()
        reply = ServeReply(question.id, question.revision)
        requests.answer(question.id, Message(question.reply, make_envelope(kind="serve.reply"), reply))
        assert word() == "ok"
        assert not query.note_subscriptions(["status/"])
        assert word() == "ok"


def test_who_has_left_is_asked_about_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change that nobody waits for the sender is asked until it serves that too, and then no more."""
    now = 100.0
    monkeypatch.setattr("services.gateway.bus.serving.time.monotonic", lambda: now)
    registry, bus = Registry(lambda: 0.0, 1), Bus()
    requests = Requests("gateway", 1, lambda: now)
    query = ServingQuery("original", bus, requests, registry, 0.5, lambda _seconds, _call: None)  # type: ignore[arg-type]
    client = make_client("siem", streams=("messages",), source="original")
    entry = registry.grant(client, Peer(1, "127.0.0.1", 4000), Origin.JSON)
    registry.serving["original"].note_served(registry.commit())

    def asked() -> list[Body]:
        nonlocal now
        now += 1.0
        query.note_heard()
        requests.expire()
        query.check()
        query.publish()
        published, bus.published = bus.published, []
        return published

    assert asked() == []
    registry.release(entry)
    questions = [each for _ in range(3) for each in asked() if isinstance(each, ServeRequest)]
    assert [each.revision for each in questions] == [registry.commit()] * 3
    question = questions[-1]
    reply = ServeReply(question.id, question.revision)
    requests.answer(question.id, Message(question.reply, make_envelope(kind="serve.reply"), reply))
    assert [asked() for _ in range(3)] == [[], [], []]


def test_a_silent_transmitter_is_asked_and_then_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing is asked before its collectors wait, and is not blamed while the gateway itself stood."""
    now = 100.0
    monkeypatch.setattr("services.gateway.bus.serving.time.monotonic", lambda: now)
    registry, bus = Registry(lambda: 0.0, 1), Bus()
    requests = Requests("gateway", 1, lambda: now)
    query = ServingQuery("original", bus, requests, registry, 0.5, lambda _seconds, _call: None)  # type: ignore[arg-type]
    client = make_client("siem", streams=("messages",), source="original")
    entry = registry.grant(client, Peer(1, "127.0.0.1", 4000), Origin.JSON)
    query.note_subscriptions([TOPIC])
    registry.serving["original"].note_served(registry.commit())

    def word_after(seconds: float, step: float = 0.25) -> str:
        nonlocal now
        for _ in range(round(seconds / step)):
            now += step
            query.check()
            query.publish()
        registry.refresh_condition(entry)
        return entry.condition.word

    query.publish()
    bus.published.clear()
    for _ in range(3):
        query.note_heard()
        assert word_after(1.5) == "ok"
    assert bus.published == []
    assert word_after(0.75) == "ok"
    assert len(bus.published) == 1
    assert word_after(10, step=10) == "ok"
    assert word_after(2) == "ok"
    assert word_after(0.75) == "waiting"
