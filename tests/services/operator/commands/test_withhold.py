import time

from services.operator.commands.withhold import describe
from shared.client import Withheld
from tests.services.operator.played import PlayedGateway, run
from tests.stack import Stack


def test_withhold_and_release_say_what_they_did(stack: Stack) -> None:
    """The reason goes to the gateway; a name that has left since may be released, and is told to be away."""
    answers = iter([{"name": "siem"}, None])
    with PlayedGateway(
        withhold=lambda _: {"ok": True}, release=lambda _: {"ok": True, "client": next(answers)}
    ) as gateway:
        code, text = run(stack, "withhold", "a siem", "--reason", "too slow", "--gateway", gateway.endpoint)
        assert (code, "also when it signs up anew; `fanwire release 'a siem'` ends that" in text) == (0, True)
        said = [run(stack, "release", "siem", "--gateway", gateway.endpoint) for _ in range(2)]
        assert said == [(0, "siem: its copies flow again\n"), (0, "siem: released; it is not signed up now\n")]
        assert gateway.requests[0] == {"op": "withhold", "name": "a siem", "reason": "too slow"}


def test_order_in_a_line() -> None:
    """The line names who gave the order, its age and its reason, as far as they are known."""
    now = time.time()
    assert describe("siem", Withheld("", now - 300), here=True) == "siem is withheld for 5 min"
    told = describe("siem", Withheld("ops", now + 5, "too slow"), here=False)
    assert told == "siem is withheld by ops for 0 s: too slow; it is not signed up now"
