import contextlib
import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shared.bus.zmq_sockets import Subscriber, new_context
from tests.services.gateway.talk import Talk, talk_to
from tests.services.gateway.test_server import counters
from tests.stack import Running, Stack, ask, ask_json, wait_until


@pytest.fixture
def talk() -> Iterator[Any]:
    """Begins conversations, which end with the test."""
    begun: list[Talk] = []

    def begin() -> Talk:
        begun.append(talk_to())
        return begun[-1]

    yield begin
    for conversation in begun:
        conversation.close()


@pytest.fixture
def gateway(stack: Stack) -> Running:
    """A gateway and the broker it needs."""
    stack.start("broker")
    return stack.start("gateway")


def apply(clients: dict[str, Any], event: dict[str, Any]) -> None:
    """Follow one event."""
    if event["event"] in ("joined", "changed"):
        assert (event["client"]["name"] in clients) == (event["event"] == "changed")
        clients[event["client"]["name"]] = event["client"]["generation"]
    else:
        assert clients.pop(event["name"]) == event["generation"]


def generations(listed: dict[str, Any]) -> dict[str, int]:
    """The generation of each client on a list."""
    return {name: client["generation"] for name, client in listed["clients"].items()}


def test_list_then_every_event(talk: Any, gateway: Running) -> None:
    """A watcher gets the list, then each change with the next revision, and ends up with what is listed."""
    ask(b"before")
    watcher, actor = talk(), talk()
    snapshot = watcher.ask("watch", id="w")
    assert (snapshot["ok"], snapshot["id"], list(snapshot["clients"])) == (True, "w", ["before"])
    generation = actor.ask("register", name="a", ttl=60)["client"]["generation"]
    again = actor.ask("register", name="a")["client"]["generation"]
    actor.ask("leave", name="a", generation=again)
    actor.ask("register", name="b", ttl=0.3)
    events = watcher.follow(snapshot["revision"] + 5)
    assert [event["event"] for event in events] == ["joined", "changed", "left", "joined", "expired"]
    assert [event["revision"] for event in events] == [snapshot["revision"] + number for number in range(1, 6)]
    assert events[0]["client"]["generation"] == generation
    clients = generations(snapshot)
    for event in events:
        apply(clients, event)
    listed = ask_json({"op": "list"})
    assert (clients, events[-1]["revision"]) == (generations(listed), listed["revision"])


def test_watcher_may_ask_on(talk: Any, gateway: Running) -> None:
    """The connection that watches takes requests as before; idleness does not end it."""
    watcher = talk()
    watcher.ask("watch")
    assert watcher.ask("streams")["ok"]
    watcher.connection.sendall(b'{"op":"register","name":"own"}\n')
    lines = [watcher.read(), watcher.read()]
    assert {line.get("event", "answer") for line in lines} == {"answer", "joined"}


def since(answer: dict[str, Any], more: int = 0) -> dict[str, Any]:
    """The fields that continue from what an answer showed, or from another revision of the same list."""
    return {"revision": answer["revision"] + more, "epoch": answer["epoch"]}


@pytest.mark.parametrize("resume", [False, True])
def test_watching_anew_repeats_nothing(talk: Any, gateway: Running, resume: bool) -> None:
    """A second `watch` is followed by no event that its answer holds already, however close the change was."""
    watcher = talk()
    begun = watcher.ask("watch")
    again = {"op": "watch", "id": "again"} | (since(begun) if resume else {})
    watcher.connection.sendall(b'{"op":"register","name":"a"}\n' + json.dumps(again).encode() + b"\n")
    lines = [watcher.read()]
    while lines[-1].get("id") != "again":
        lines.append(watcher.read())
    ask(b"b")
    names = [watcher.read()["client"]["name"]]
    while names[-1] != "b":
        names.append(watcher.read()["client"]["name"])
    assert names == (["a", "b"] if resume else ["b"])


def test_list_behind_what_a_watcher_has_not_read(stack: Stack, talk: Any, small_buffers: None) -> None:
    """The events that wait for a watcher come before the answer to what it asks then, not after."""
    stack.configure("[gateway]\nrequest_seconds = 60\noutput_buffer = 100000000\n")
    stack.start("broker")
    stack.start("gateway")
    slow, actor = talk(), talk()
    slow.ask("watch")
    for _ in range(20):
        actor.connection.sendall(b'{"op":"register","name":"%s"}\n' % (b"n" * 250) * 50)
        for _ in range(50):
            assert actor.read()["ok"]
    slow.connection.sendall(b'{"op":"list"}\n')
    time.sleep(0.3)
    line = slow.read()
    while "event" in line:
        seen = line["revision"]
        line = slow.read()
    assert line["revision"] == seen


def test_list_behind_events_of_the_same_moment(gateway: object, talk: Any) -> None:
    """No event follows a list that shows its result already, though events of a moment are gathered."""
    watcher = talk()
    watcher.ask("watch")
    asked = b"".join(b'{"op":"register","name":"%s"}\n{"op":"list"}\n' % name for name in (b"a", b"b", b"c"))
    watcher.connection.sendall(asked)
    told: list[dict[str, Any]] = []
    while len(lists := [line for line in told if "clients" in line]) < 3:
        told.append(watcher.read())
    events = [told.index(line) for line in told if "event" in line]
    assert [line["revision"] for line in lists] == [told[at]["revision"] for at in events]
    assert all(at < told.index(line) for at, line in zip(events, lists, strict=True))


def test_answer_is_whole_before_too_slow(stack: Stack, talk: Any, small_buffers: None) -> None:
    """A watcher that is cut off while it reads a long answer gets all of that answer, then `too_slow` as a line."""
    stack.configure("[gateway]\noutput_buffer = 65536\nrequest_seconds = 60\n")
    stack.start("broker")
    stack.start("gateway")
    actor = talk()
    names = (b"n" * 200 + b"-%d" % number for number in range(1000))
    ask(b"".join(b'{"op":"register","name":"%s"}\n' % name for name in names), seconds=60)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect(("127.0.0.1", 5000))
        slow.sendall(b'{"op":"watch"}\n')
        wait_until(lambda: ask_json({"op": "list"})["ok"], "the list is on its way")
        for _ in range(300):
            assert actor.ask("register", name="a")["ok"]
        lines = b"".join(iter(lambda: slow.recv(65536), b"")).splitlines()
    assert len(json.loads(lines[0])["clients"]) == 1000
    assert json.loads(lines[-1])["error"] == "too_slow"


def test_cut_off_while_its_answer_waits(stack: Stack, talk: Any) -> None:
    """One that is cut off while `register` waits for the forwarder harms nobody else's answer, and gets its own."""
    stack.configure("[gateway]\noutput_buffer = 4096\nserve_seconds = 4\n")
    stack.start("broker")
    gateway = stack.start("gateway")
    context = new_context()
    silent = Subscriber(context, stack.bus, 64)
    silent.subscribe("serve/relay/")  # who would send copies, and never says that they flow
    silent.subscribe("status/gateway.1/")  # what comes of it shows that the gateway has seen both
    try:
        wait_until(silent.receive, "the gateway knows of who would send copies")
        first, second, actor = talk(), talk(), talk()
        first.ask("watch")
        for conversation, name, port in ((first, b"first", 9514), (second, b"second", 9515)):
            conversation.connection.sendall(b'{"op":"register","name":"%s","streams":["*"],"port":%d}\n' % (name, port))
        for _ in range(40):
            actor.ask("register", name="third")
        assert second.read()["client"]["name"] == "second"
        assert first.read()["client"]["name"] == "first"
        assert first.read()["error"] == "too_slow"
    finally:
        silent.close()
        context.term()
    assert "Traceback" not in gateway.text


def test_resume_from_a_revision(talk: Any, gateway: Running) -> None:
    """With the last revision seen a watcher gets what it missed instead of the list; one too old gets the list."""
    snapshot = talk().ask("watch")
    for number in range(5):
        ask(b"n%d" % number)
    resumed = talk()
    answer = resumed.ask("watch", **since(snapshot, 2))
    assert "clients" not in answer
    assert answer["epoch"] == snapshot["epoch"]
    assert [resumed.read()["client"]["name"] for _ in range(3)] == ["n2", "n3", "n4"]
    ask(b"n5")
    assert resumed.read()["client"]["name"] == "n5"
    assert list(talk().ask("watch", **since(snapshot, 10**6))["clients"]) == [f"n{number}" for number in range(6)]


def test_resume_over_a_restart(stack: Stack, talk: Any, gateway: Running) -> None:
    """A watcher that knows all goes on after the gateway was killed; one that missed something gets the list."""
    ask(b"a")
    known = talk().ask("watch")
    gateway.stop(signal.SIGKILL)
    stack.start("gateway")
    resumed = talk()
    answer = resumed.ask("watch", **since(known))
    assert "clients" not in answer
    ask(b"b")
    assert resumed.read()["revision"] == known["revision"] + 1
    assert "clients" not in talk().ask("watch", **since(answer, 1))
    assert list(talk().ask("watch", **since(known, -1))["clients"]) == ["a", "b"]


@pytest.mark.parametrize("how", ["begun anew", "restored"])
def test_revision_of_another_list(stack: Stack, talk: Any, how: str) -> None:
    """A watcher with a revision of a list that has begun anew, or was restored from a copy, gets the whole list.

    So does one that says no epoch, as it can't be known what its revision is of.
    """
    database, copy = stack.directory / "registry.sqlite", stack.directory / "copy.sqlite"
    stack.configure(f'[gateway]\ndatabase = "{database}"\n')
    stack.start("broker")
    stack.start("gateway").stop()
    shutil.copy(database, copy)
    gateway = stack.start("gateway")
    known = [talk().ask("watch")]
    for number in range(5):
        ask(b"before%d" % number)
        known.append(talk().ask("watch"))
    gateway.stop()
    database.unlink()
    if how == "restored":
        copy.rename(database)
    stack.start("gateway")
    for number in range(5):
        ask(b"after%d" % number)
    for seen in known:
        assert list(talk().ask("watch", **since(seen))["clients"]) == [f"after{number}" for number in range(5)]
    listed = talk().ask("list")
    assert listed["revision"] == known[-1]["revision"]
    assert len(talk().ask("watch", revision=listed["revision"])["clients"]) == 5
    assert "clients" not in talk().ask("watch", **since(listed))


def test_who_does_not_read_is_cut_off(stack: Stack, talk: Any, small_buffers: None) -> None:
    """A watcher that never reads is told `too_slow` and closed; others miss nothing, and memory stays bounded."""
    stack.configure("[gateway]\noutput_buffer = 65536\nrequest_seconds = 60\n")
    stack.start("broker")
    gateway = stack.start("gateway")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(60)
    slow.connect(("127.0.0.1", 5000))
    slow.sendall(b'{"op":"watch"}\n')
    watcher, actor = talk(), talk()
    begin = watcher.ask("watch")["revision"]
    before = gateway.resident_mb()
    for _ in range(1000):
        actor.connection.sendall(b'{"op":"register","name":"%s"}\n' % (b"n" * 250))
        assert actor.read()["ok"]
        assert watcher.read()["revision"] == (begin := begin + 1)
    assert gateway.resident_mb() - before < 20
    with slow:
        received = b"".join(iter(lambda: slow.recv(65536), b""))
    last = json.loads(received.splitlines()[-1])
    assert (last["ok"], last["error"]) == (False, "too_slow")
    missed = talk()
    seen = json.loads(received.splitlines()[-2])["revision"]
    answer = missed.ask("watch", revision=seen, epoch=json.loads(received.splitlines()[0])["epoch"])
    assert ("clients" in answer) or missed.read()["revision"] == seen + 1


def test_who_asks_on_but_does_not_read(stack: Stack, talk: Any, small_buffers: None) -> None:
    """A watcher that reads nothing is cut off in time, whatever it goes on asking."""
    stack.configure("[gateway]\noutput_buffer = 100000000\nrequest_seconds = 1\n")
    stack.start("broker")
    stack.start("gateway")
    actor, prefixes = talk(), [f"10.0.{number}.0/24" for number in range(64)]
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", 5000))
        slow.sendall(b'{"op":"watch"}\n')

        def is_cut_off() -> bool:
            for _ in range(100):  # events of a moment are gathered: nobody knows how many fill the buffers
                assert actor.ask("register", name="n", **{"from": prefixes})["ok"]
                with contextlib.suppress(ConnectionError):  # it may be cut off by now
                    slow.sendall(b'{"op":"streams"}\n')
            return counters(stack).get("too_slow") == 1

        wait_until(is_cut_off, "it is cut off")


def test_idle_watcher_stays(stack: Stack, talk: Any) -> None:
    """A watcher has nothing to say, and is not closed for it."""
    stack.configure("[gateway]\nidle_seconds = 0.3\n")
    stack.start("broker")
    stack.start("gateway")
    watcher = talk()
    watcher.ask("watch")
    time.sleep(1.2)
    ask(b"late")
    assert watcher.read()["client"]["name"] == "late"


def test_loser_of_a_name_is_told(talk: Any, gateway: Running) -> None:
    """The former owner of an entry reads on its connection who took it over, and its renewals are refused."""
    first, second = talk(), talk()
    generation = first.ask("register", name="siem", streams=["*"], port=9514, ttl=30)["client"]["generation"]
    assert second.ask("register", name="siem", streams=["*"], port=9515)["error"] == "name_taken"
    assert second.ask("register", name="siem", streams=["*"], port=9515, take_over=True)["ok"]
    told = first.read()
    assert (told["event"], told["name"], told["generation"]) == ("taken_over", "siem", generation)
    assert "127.0.0.1" in told["message"]
    assert first.ask("renew", name="siem", generation=generation)["error"] == "stale_generation"


def test_held_entry_over_a_restart(stack: Stack, talk: Any, gateway: Running) -> None:
    """The holder of an entry may sign up again after the gateway was killed, without take_over."""
    before = talk().ask("register", name="held", streams=["*"], port=9514, hold=True)["client"]
    gateway.stop(signal.SIGKILL)
    stack.start("gateway")
    assert list(ask_json({"op": "list"})["clients"]) == ["held"]
    holder = talk()
    after = holder.ask("register", name="held", streams=["*"], port=9514, hold=True)["client"]
    assert after["generation"] > before["generation"]
    holder.close()
    wait_until(lambda: ask_json({"op": "list"})["clients"] == {}, "the held entry leaves")


def test_held_entry_stays_while_the_gateway_is_replaced(stack: Stack, talk: Any, gateway: Running) -> None:
    """A gateway that is told to end closes the connections, which is not the fault of who holds entries by them."""
    talk().ask("register", name="held", streams=["*"], port=9514, hold=True)
    assert gateway.stop() == 0
    stack.start("gateway")
    assert list(ask_json({"op": "list"})["clients"]) == ["held"]


def test_second_gateway_on_the_same_file(stack: Stack, gateway: Running) -> None:
    """A gateway on other addresses but with the same database is refused, and the first goes on."""
    stack.configure('[gateway]\nlisten = ["tcp://127.0.0.1:5005"]\n')
    second = stack.start("gateway", ready=False)
    assert second.process.wait(60) == 1
    assert "in use by another gateway" in second.text
    assert ask_json({"op": "list"})["ok"]


def test_damaged_file(stack: Stack, gateway: Running) -> None:
    """A damaged database is set aside and reported, and the gateway starts with an empty list."""
    ask(b"a")
    gateway.stop()
    file = stack.bus / "registry.sqlite"
    file.write_bytes(b"\xa5" * file.stat().st_size)
    again = stack.start("gateway")
    assert ask_json({"op": "list"})["clients"] == {}
    damaged = "the registry's file is damaged: it was renamed to `file`, and the registry starts empty"
    assert len(again.events(damaged)) == 1
    assert len(list(stack.bus.glob("registry.sqlite.damaged-*"))) >= 1


def test_registry_that_is_not_kept(stack: Stack) -> None:
    """With an empty `database` a restart begins with nothing, and no file is written."""
    stack.configure('[gateway]\ndatabase = ""\n')
    stack.start("broker")
    gateway = stack.start("gateway")
    ask(b"a")
    gateway.stop(signal.SIGKILL)
    stack.start("gateway")
    assert ask_json({"op": "list"})["clients"] == {}
    assert list(stack.bus.glob("registry*")) == []


def test_leases_of_this_host_end_however_many_lapse(stack: Stack, talk: Any) -> None:
    """Twelve clients here that do not renew are gone in time: no network is between that could be at fault."""
    stack.start("broker")
    stack.start("gateway")
    watcher, actor = talk(), talk()
    watcher.ask("watch")
    for number in range(12):
        actor.ask("register", name=f"n{number}", ttl=0.2)
    told = [watcher.read() for _ in range(24)]
    assert {line["name"] for line in told if line["event"] == "expired"} == {f"n{number}" for number in range(12)}
