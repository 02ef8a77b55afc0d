import json
import os
import signal
import subprocess
import sys

from tests.services.operator.played import PlayedService, finish, run
from tests.stack import Stack

TOPIC = "datagrams/messages/"


def test_prints_each_datagram(stack: Stack) -> None:
    """Every datagram is a documented line, at once; Ctrl-C ends it with 0."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        watch = stack.operator("watch", "messages")
        ingest.wait_for_subscriber(TOPIC)
        ingest.publish([], 0)
        watch.wait_for("watching messages")
        ingest.publish([b"Hello you there!", b"\xff\n"], 0)
        watch.wait_for("Got message from ('192.0.2.7', 514): b'Hello you there!'\n")
        watch.wait_for("Got message from ('192.0.2.7', 514): b'\\xff\\n'\n")
    assert watch.stop(signal.SIGINT) == 0


def test_filters_and_ends_at_the_count(stack: Stack) -> None:
    """Only datagrams of the prefix are printed and counted, IPv6 too, and the count ends it with 0."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        watch = stack.operator("watch", "--hex", "--from", "2001:db8::/32", "--count", "2")
        ingest.wait_for_subscriber("datagrams/")
        ingest.publish([b"no"], 0)
        ingest.publish([b"\x01", b"\x02", b"\x03"], 1, source="2001:db8::9")
    code, text = finish(watch)
    assert code == 0
    assert [line for line in text.splitlines() if line.startswith("Got")] == [
        "Got message from ('2001:db8::9', 514): 01",
        "Got message from ('2001:db8::9', 514): 02",
    ]


def test_prints_json(stack: Stack) -> None:
    """`--json` prints one object a line with address, port and the payload in hexadecimal, whatever is in it."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        watch = stack.operator("watch", "--json", "--count", "3")
        ingest.wait_for_subscriber("datagrams/")
        ingest.publish([b"Hello", b"a\nb\xff"], 0)
        ingest.publish([b""], 2, source="2001:db8::9")
    code, text = finish(watch)
    assert code == 0
    said, *lines = text.splitlines()
    assert said == "watching all streams"
    assert [json.loads(line) for line in lines] == [
        {"address": "192.0.2.7", "port": 514, "payload": "48656c6c6f"},
        {"address": "192.0.2.7", "port": 514, "payload": "610a62ff"},
        {"address": "2001:db8::9", "port": 514, "payload": ""},
    ]


def test_one_form_at_a_time(stack: Stack) -> None:
    """Two forms of output at once are wrong usage."""
    code, text = run(stack, "watch", "--json", "--answering")
    assert code == 64
    assert "not allowed with" in text


def test_says_what_it_missed(stack: Stack) -> None:
    """A gap in the sender's running count is said, in datagrams; what was sent before it watched is no gap."""
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        watch = stack.operator("watch", "--count", "2")
        ingest.wait_for_subscriber("datagrams/")
        ingest.publish([b"first"], 1000)
        ingest.publish([b"second"], 1008)
    code, text = finish(watch)
    assert code == 0
    assert "7 datagrams missed so far" in text


def test_says_that_it_waits_for_ingest(stack: Stack) -> None:
    """With a broker and no ingest it says after a while what it waits for, and goes on as usual once that is there."""
    stack.start("broker")
    watch = stack.operator("watch")
    watch.wait_for("waiting for ingest")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        ingest.wait_for_subscriber("datagrams/")
        ingest.publish([], 0)
        ingest.publish([b"x"], 5)
        watch.wait_for("5 datagrams missed so far")
    assert watch.stop(signal.SIGTERM) == 0


def test_says_which_worker_is_silent(stack: Stack) -> None:
    """A worker that hangs is named once, though another goes on, and again when it is back or when it hung before."""
    stack.start("broker")
    for number in (1, 2):
        stack.start(f"ingest.{number}")
    watch = stack.operator("watch")
    watch.wait_for("watching all streams")
    stack["ingest.2"].process.send_signal(signal.SIGSTOP)
    try:
        watch.wait_for("nothing heard of ingest.2 for 3 s")
        late = stack.operator("watch")
        late.wait_for("nothing heard of ingest.2 for 3 s")
    finally:
        stack["ingest.2"].process.send_signal(signal.SIGCONT)
    watch.wait_for("ingest.2 is heard again")
    assert watch.text.count("nothing heard") == 1
    assert "ingest.1" not in watch.text
    for running in (watch, late):
        assert running.stop(signal.SIGINT) == 0


def test_ends_quietly_when_nobody_reads(stack: Stack) -> None:
    """The command ends with 0 and no complaint once its reader is gone, datagrams or not: `fanwire watch | head -1`."""
    stack.start("broker")
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "services.operator", "watch"]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, env=stack.environment)
    os.close(writer)
    with process, PlayedService(stack.bus, "ingest.1") as ingest:
        ingest.wait_for_subscriber("datagrams/")
        ingest.publish([b"one"], 0)
        assert os.read(reader, 1000).startswith(b"Got message")
        os.close(reader)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b"watching all streams\n"
