from typing import cast

from shared.bus.messages import Body, RegistrySnapshot, ServeReply, ServeRequest
from shared.bus.zmq_sockets import Publisher
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.serve_requests import REQUEST_SECONDS, ServeRequests
from tests.builders import make_envelope


class Bus:
    """A publisher that remembers the answers."""

    def __init__(self) -> None:
        self.answers: list[Body] = []

    def publish(self, _topic: str, body: Body) -> bool:
        """Remember it."""
        self.answers.append(body)
        return True


def test_a_request_waits_only_for_those_of_its_revision() -> None:
    """While a collector is joining, its revision and later ones wait, up to a limit; those before are answered."""
    bus, replica, now = Bus(), RegistryReplica(), 0.0
    requests = ServeRequests(cast(Publisher, bus), replica, lambda: now)
    replica.apply_message(make_envelope(boot=1), RegistrySnapshot(3, 0, 1, []))
    for revision in (1, 2, 3):
        requests.add(1, ServeRequest(revision, "reply/x/", revision))
    requests.answer(2)
    assert bus.answers == [ServeReply(1, 1)]
    requests.answer(3)
    assert bus.answers[1:] == [ServeReply(2, 2)]
    now = REQUEST_SECONDS
    requests.answer(3)
    assert not requests
