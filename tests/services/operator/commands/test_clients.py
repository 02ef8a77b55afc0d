import json

import pytest

from shared.bus.bodies.offload_messages import PATHS_TOPIC, CollectorPath, OffloadPaths
from tests.builders import BusEnds, wait_unwanted, wait_wanted
from tests.services.operator.played import PlayedGateway, run
from tests.stack import PATIENCE_SECONDS, Stack

SIEM = {"--stream": "messages", "--port": "9514", "--from": "10.0.0.0/8", "--sample": "4", "--group": "g"}
COPIES = {"--source": "original", "--hop-limit": "3", "--dscp": "46", "--since": "60"}


def test_register_asks_for_what_was_given(stack: Stack) -> None:
    """`register` sends the fields that were given and no others, and prints what was granted."""
    with PlayedGateway() as gateway:
        options = [word for pair in (SIEM | COPIES).items() for word in pair]
        code, text = run(
            stack, "register", "siem", *options, "--take-over", "--ttl", "60", "--gateway", gateway.endpoint
        )
        assert gateway.requests == [
            {
                "op": "register",
                "name": "siem",
                "streams": ["messages"],
                "port": 9514,
                "from": ["10.0.0.0/8"],
                "sample": 4,
                "group": "g",
                "source": "original",
                "hop_limit": 3,
                "dscp": 46,
                "since": 60.0,
                "ttl": 60.0,
                "take_over": True,
            }
        ]
    assert code == 0
    assert "siem: copies of messages go to 127.0.0.1 port 9514, source original" in text
    assert "hop limit 3, DSCP 46" in text
    assert "generation 1, expires in 60 s" in text


def test_a_collector_that_catches_up_is_seen_to(stack: Stack) -> None:
    """`clients` shows how far it is behind and when it will be level, as far as the registry knows."""
    entry = {"name": "siem", "address": "192.0.2.1", "port": 9, "streams": ["a"]}
    with PlayedGateway() as gateway:
        known = {"rows": 1200, "seconds": 75.2, "per_second": 600, "level_in": 4.0}
        gateway.clients = {
            "siem": {**entry, "catching_up": known},
            "new": {**entry, "name": "new", "catching_up": {**known, "level_in": None}},
        }
        text = run(stack, "clients", "--gateway", gateway.endpoint)[1]
        assert "1200 datagrams, 75 s behind, level again in 4 s" in text
        assert text.count("level again in") == 1
        register = "register", "siem", "--stream", "a", "--since", "left", "--gateway", gateway.endpoint
        assert run(stack, *register)[0] == 0
        assert gateway.requests[-1]["since"] == "left"


def test_a_plain_name(stack: Stack) -> None:
    """Without a stream it is a name on the list, and receives nothing, as it says; `--json` prints the entry."""
    with PlayedGateway() as gateway:
        code, text = run(stack, "register", "me", "--json", "--gateway", gateway.endpoint)
        assert gateway.requests == [{"op": "register", "name": "me"}]
        assert code == 0
        assert json.loads(text)["generation"] == 1
        code, text = run(stack, "register", "me", "--port", "9514", "--gateway", gateway.endpoint)
        assert (code, "but receives nothing; name --stream" in text, "health" in text) == (0, True, False)
        gateway.clients = {"me": {"name": "me", "address": "::1", "port": 4, "health": "ok"}}
        assert "receives nothing" in run(stack, "clients", "--gateway", gateway.endpoint)[1]


def test_what_clients_say_of_themselves_is_seen_and_not_obeyed(stack: Stack) -> None:
    """Control characters in an entry or in a refusal reach the terminal as what they are, each line staying one."""
    with PlayedGateway(leave=lambda _: {"ok": False, "error": "not_permitted", "message": "no\n\x1b[2J"}) as gateway:
        entry = {"name": "siem", "address": "192.0.2.1", "port": 9, "streams": ["a"], "group": "\x1b]0;mine\x07\u2028"}
        gateway.clients = {"siem": entry}
        _, table = run(stack, "clients", "--gateway", gateway.endpoint)
        code, refusal = run(stack, "leave", "siem", "--gateway", gateway.endpoint)
    assert r"\x1b]0;mine\x07\u2028" in table
    assert (code, refusal) == (77, "fanwire leave: no\\n\\x1b[2J\n")


def test_gateway_that_is_none(stack: Stack) -> None:
    """An answer in no UTF-8, nested without end, or a refusal without a word, ends in one line."""
    answers = {
        '{"ok": true, "clients": {"\udcff": 1}}': 69,
        '{"ok": true, "clients": ' + "[" * 100_000: 69,
        '{"ok": false}': 1,
    }
    for answer, expected in answers.items():
        with PlayedGateway(list=lambda _, answer=answer: answer) as gateway:  # type: ignore[misc]
            code, text = run(stack, "clients", "--json", "--gateway", gateway.endpoint)
        assert (code, len(text.splitlines())) == (expected, 1), text


def test_clients_as_a_table_and_as_json(stack: Stack) -> None:
    """The table has a line a client, whatever the name looks like; `--json` prints the clients object whole."""
    with PlayedGateway() as gateway:
        gateway.clients = {
            "[bold]me": {"name": "[bold]me", "address": "::1", "port": 4, "generation": 1, "newer": "field"},
            "siem": {"name": "siem", "address": "192.0.2.1", "port": 9514, "streams": ["a", "b"], "sample": 10},
        }
        code, text = run(stack, "clients", "--gateway", gateway.endpoint)
        assert code == 0
        assert [line.split()[:3] for line in text.splitlines() if "[bold]me" in line] == [["[bold]me", "::1", "4"]]
        assert "a, b" in text
        assert "hop limit" not in text
        code, text = run(stack, "clients", "--json", "--gateway", gateway.endpoint)
        assert json.loads(text) == gateway.clients
        gateway.clients["siem"] |= {"hop_limit": 3, "dscp": 46}
        code, text = run(stack, "clients", "--gateway", gateway.endpoint)
        assert [line.split()[-2:] for line in text.splitlines() if "siem" in line] == [["3", "46"]]


def test_leave_looks_the_generation_up(stack: Stack) -> None:
    """`leave` asks for the generation unless it is given; who is not on the list can't leave."""
    with PlayedGateway() as gateway:
        gateway.clients = {"me": {"name": "me", "address": "::1", "port": 4, "generation": 77}}
        assert run(stack, "leave", "me", "--gateway", gateway.endpoint) == (0, "me has left\n")
        assert gateway.said("leave") == [{"op": "leave", "name": "me", "generation": 77}]
        code, text = run(stack, "leave", "me", "--gateway", gateway.endpoint)
        assert (code, "me is not registered" in text) == (1, True)


@pytest.mark.parametrize(("error", "exit_code"), [("name_taken", 1), ("not_permitted", 77)])
def test_a_refusal_is_its_message_and_an_exit_code(stack: Stack, error: str, exit_code: int) -> None:
    """A refusal of the registry ends with its sentence and 1, or 77 where it is a matter of permission."""
    refusal = {"ok": False, "error": error, "message": "choose another name"}
    with PlayedGateway(register=lambda _: refusal) as gateway:
        code, text = run(stack, "register", "me", "--gateway", gateway.endpoint)
    assert (code, text) == (exit_code, "fanwire register: choose another name\n")


@pytest.mark.parametrize("answer", ["not JSON", "{}", '{"ok": true, "clients": {"a": 1}}'])
def test_an_answer_from_something_else_is_one_line(stack: Stack, answer: str) -> None:
    """A server that speaks another protocol ends the command with 69 and one line."""
    with PlayedGateway(list=lambda _: answer) as gateway:
        code, text = run(stack, "clients", "--gateway", gateway.endpoint)
    assert (code, text.count("\n")) == (69, 1)
    assert "not from a fanwire gateway" in text


def test_ways_of_copies_are_told_where_offload_is_asked_for(stack: Stack) -> None:
    """With `[offload] interfaces` the table and `--json` have each collector's path, as offload tells it on the bus."""
    entry = {"address": "192.0.2.1", "port": 9, "streams": ["messages"], "health": "ok"}
    with PlayedGateway() as gateway:
        gateway.clients = {name: {"name": name, **entry} for name in ("fast", "slow", "new")}
        stack.configure(f'[gateway]\nlisten = ["{gateway.endpoint}"]\n[offload]\ninterfaces = ["eth0"]\n')
        stack.start("broker")
        with BusEnds(stack.bus) as bus:
            publisher = bus.publisher("offload.1")
            told = [CollectorPath("fast", "kernel"), CollectorPath("slow", "frames", "it is slow")]
            for options in ((), ("--json",)):
                asking = stack.operator("clients", *options)
                wait_wanted(publisher, PATHS_TOPIC)
                publisher.publish(PATHS_TOPIC, OffloadPaths(1, 0, 1, told))
                assert asking.process.wait(PATIENCE_SECONDS) == 0
                wait_unwanted(publisher, PATHS_TOPIC)
                text = asking.text
                if options:
                    ways = {
                        name: (each.get("path"), each.get("path_reason")) for name, each in json.loads(text).items()
                    }
                    assert ways == {"fast": ("kernel", ""), "slow": ("frames", "it is slow"), "new": (None, None)}
                else:
                    assert "path" in text
                    assert "kernel" in text
                    assert "frames: it is slow" in " ".join(text.split())
