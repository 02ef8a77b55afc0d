import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.gateway.protocol.decoder import MAX_LINE
from shared.bus.messages import Status
from shared.bus.status import Reports
from shared.bus.zmq_sockets import Subscriber, new_context
from tests.stack import Running, Stack, ask, ask_json, wait_until
from tests.system.test_fan_out import need


@pytest.fixture
def gateway(stack: Stack) -> Running:
    """A gateway and the broker it needs."""
    stack.start("broker")
    return stack.start("gateway")


def connect(port: int = 5000) -> socket.socket:
    """A connection to the gateway."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    """Return all bytes until the gateway closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def refusal(request: bytes) -> str:
    """The error word that a request is answered with."""
    answer = json.loads(ask(request))
    assert answer["ok"] is False
    assert answer["message"]
    return str(answer["error"])


def client(stack: Stack, *arguments: str) -> Running:
    """The documented client, run to its end."""
    running = stack.start("gateway", "-c", *arguments, ready=False)
    running.process.wait(60)
    return running


def many(count: int, rest: bytes = b"") -> bytes:
    """Lines that register so many names, each with the rest behind its number."""
    return b"".join(b'{"op":"register","name":"n%d%s"}\n' % (number, rest) for number in range(count))


def counters(stack: Stack) -> dict[str, int]:
    """The gateway's account, as it reports it to a new subscriber."""
    context = new_context()
    subscriber = Subscriber(context, stack.bus, 64)
    subscriber.subscribe("status/gateway.1/")
    reports, found = Reports(), list[dict[str, int]]()

    def reported() -> bool:
        while (message := subscriber.receive()) is not None:
            assert isinstance(message.body, Status)
            if report := reports.add(message.envelope, message.body):
                found.append(report.accounts["gateway"])
        return bool(found)

    try:
        wait_until(reported, "a status report")
    finally:
        subscriber.close()
        context.term()
    return found[-1]


def test_documented_client_twice(stack: Stack, gateway: Running) -> None:
    """Two clients on the list show both, with indent 4 and exactly address, port and name each."""
    first, second = client(stack, "-n", "name1"), client(stack, "-n", "name2")
    assert (first.process.returncode, second.process.returncode) == (0, 0)
    assert list(json.loads(first.text)) == ["name1"]
    shown = json.loads(second.text)
    assert list(shown) == ["name1", "name2"]
    assert list(shown["name1"]) == ["address", "port", "name"]
    assert second.text == json.dumps(shown, indent=4) + "\n"
    assert "Starting server...\n" in gateway.text


def test_documented_client_says_what_is_wrong(stack: Stack) -> None:
    """Without a server the client ends with 69, refused with 1, and one line says why."""
    alone = client(stack)
    assert alone.process.returncode == 69
    sentence = "Connection refused; start the gateway with `python -m services.gateway`"
    assert alone.text == f"fanwire gateway: tcp://127.0.0.1:5000: {sentence}\n"
    json_there = client(stack, "-n", "{a")
    assert (json_there.process.returncode, "would read this name as JSON" in json_there.text) == (64, True)
    stack.start("broker")
    stack.start("gateway")
    refused = client(stack, "-n", "a\tb")
    assert refused.process.returncode == 1
    assert "fanwire gateway: bad_name: the name has control characters" in refused.text
    stack.configure("[gateway]\nlisten = 5\n")
    assert client(stack).process.returncode == 78


def test_names_answer_is_to_the_byte(gateway: Running) -> None:
    """The list is what `json.dumps` prints, nothing before or after, then the connection is closed."""
    with connect() as connection:
        connection.sendall("é".encode())
        port = connection.getsockname()[1]
        assert read_all(connection) == json.dumps({"é": {"address": "127.0.0.1", "port": port, "name": "é"}}).encode()


def test_same_name_again_replaces(gateway: Running) -> None:
    """On the names protocol the last one who says a name has it."""
    ask(b"one")
    with connect() as connection:
        connection.sendall(b"one\r\n")
        port = connection.getsockname()[1]
        assert json.loads(read_all(connection)) == {"one": {"address": "127.0.0.1", "port": port, "name": "one"}}


@pytest.mark.parametrize(("count", "rest"), [(3_000, "x" * 200), pytest.param(20_000, "", marks=pytest.mark.soak)])
def test_many_clients(stack: Stack, count: int, rest: str) -> None:
    """A list of over 1 MB arrives whole on both protocols."""
    stack.configure("[gateway]\nmax_clients = 30000\n")
    stack.start("broker")
    stack.start("gateway")
    answers = ask(many(count, rest.encode())).splitlines()
    assert len(answers) == count
    assert all(answer.startswith(b'{"ok":true') for answer in answers)
    text = ask(b"last")
    assert len(text) > 1_000_000
    names = [f"n{number}{rest}" for number in range(count)] + ["last"]
    assert list(json.loads(text)) == names
    answer = ask_json({"op": "list"})
    assert list(answer["clients"]) == names
    assert answer["clients"][names[7]]["health"] == "ok"


def test_ten_megabytes_without_an_end(gateway: Running) -> None:
    """A name or line is refused, the client can read why although it is still sending, and memory stays flat."""
    ask(b"warm")
    for beginning, error in ((b"", "bad_name"), (b'{"op":', "too_long"), (b'{"op":"register","name":"', "too_long")):
        before = gateway.forget_peak()
        for _ in range(5):
            assert refusal(beginning + b"n" * 10_000_000) == error
        assert gateway.resident_mb("VmHWM") - before < 10, beginning


def test_bad_input_has_its_answer(gateway: Running) -> None:
    """Each kind of bad input is answered with its word and a sentence, and nothing is registered."""
    for request, error in (
        (b"\xff\xfe", "bad_name"),
        (b"POST / HTTP/1.1\r\nHost: localhost:5000\r\n\r\n" + b'{"op":"list"}\n', "bad_request"),
        (b'{"op":"register","name":"' + b"n" * 70_000 + b'"}\n', "too_long"),
        (b'{"op":"list"' + b" " * 10_000_000, "too_long"),
        (b'{"op":"list","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}\n", "bad_request"),
        (b'{"op":"nonsense"}\n', "bad_request"),
        (b'{"op":"register","name":"c","streams":["nothing"],"port":9000}\n', "unknown_stream"),
        (b'{"op":"register","name":"c","streams":["messages"],"port":0}\n', "bad_request"),
        (b'{"op":"register","name":"c","streams":["messages"],"port":70000}\n', "bad_request"),
        (b'{"op":"register","name":"c","streams":["messages"],"port":6667}\n', "loop"),
        (b'{"op":"register","name":"c","streams":["messages"],"port":9,"source":"original"}\n', "no_transmitter"),
        (b'{"op":"register","name":"c","streams":["messages"],"port":9,"address":"192.0.2.1"}\n', "unproven_address"),
        (b'{"op":"leave","name":"c","generation":1}\n', "stale_generation"),
        (b'{"op":"transmit","interface":"eth1","frame":"0"}\n', "bad_request"),
        (b'{"op":"transmit","interface":"eth1","frame":"0000000000000000000000000000"}\n', "not_permitted"),
    ):
        assert refusal(request) == error, request[:100]
        assert ask_json({"op": "list"})["clients"] == {}, request[:100]


def test_refusals_are_counted(stack: Stack, gateway: Running) -> None:
    """Each refusal is counted under its word, and HTTP on its own."""
    refusal(b"GET / HTTP/1.1\r\n")
    refusal(b'{"op":"nonsense"}\n')
    refusal(b"\xff")
    ask(b"fine")
    account = counters(stack)
    assert (account["refused_bad_request"], account["refused_bad_name"], account["cross_protocol"]) == (2, 1, 1)
    assert (account["clients"], account["collectors"], account["requests"]) == (1, 0, 1)


def test_registry_over_json(gateway: Running) -> None:
    """A collector signs up, is listed, renews, and leaves; answers carry the request's id."""
    fields = {"op": "register", "name": "siem", "streams": ["messages"], "port": 9514, "ttl": 60, "id": "r1"}
    answer = ask_json({**fields, "from": ["10.0.0.0/8"], "sample": 10, "group": "g", "dscp": 46})
    entry = answer["client"]
    generation = entry["generation"]
    assert (answer["ok"], answer["id"], entry.pop("generation") > 0) == (True, "r1", True)
    assert 50 < entry.pop("expires_in") <= 60
    assert 0 <= entry.pop("health_since") < 20
    assert entry == {
        "name": "siem",
        "address": "127.0.0.1",
        "port": 9514,
        "streams": ["messages"],
        "source": "relay",
        "from": ["10.0.0.0/8"],
        "sample": 10,
        "group": "g",
        "hop_limit": 64,
        "dscp": 46,
        "health": "waiting",
        "lost": 0,
        "withheld": None,
    }
    listed = ask_json({"op": "list"})
    assert listed["clients"]["siem"]["generation"] == generation
    assert 50 < ask_json({"op": "renew", "name": "siem", "generation": generation})["expires_in"] <= 60
    assert ask_json({"op": "leave", "name": "siem", "generation": generation, "id": 0}) == {"ok": True, "id": 0}
    after = ask_json({"op": "list"})
    assert after["clients"] == {}
    assert after["revision"] > listed["revision"]
    assert ask_json({"op": "streams"})["streams"] == {
        "messages": {"listen": ["udp://localhost:6667", "tcp://localhost:6667"]}
    }


def test_client_that_receives_nothing_is_told(gateway: Running) -> None:
    """The answer to a `register` without streams says that nothing is received, and how that is asked for."""
    asked: list[dict[str, object]] = [{}, {"streams": []}, {"port": 9514, "from": ["10.0.0.0/8"]}]
    for wishes in asked:
        answer = ask_json({"op": "register", "name": "siem", "take_over": True, **wishes})
        assert (answer["ok"], answer["receives"], "streams and port" in answer["message"]) == (True, False, True)
    answer = ask_json({"op": "register", "name": "siem", "take_over": True, "streams": ["messages"], "port": 9514})
    assert (answer["ok"], answer["receives"], "message" in answer) == (True, True, False)


def test_taken_name(gateway: Running) -> None:
    """A second client with a taken name is refused on either protocol, and the first stays as it was."""
    taken = ask_json({"op": "register", "name": "siem", "streams": ["*"], "port": 9514})["client"]
    assert refusal(b'{"op":"register","name":"siem","streams":["*"],"port":9515}\n') == "name_taken"
    assert refusal(b"siem") == "name_taken"
    assert ask_json({"op": "list"})["clients"]["siem"]["generation"] == taken["generation"]
    assert ask_json({"op": "register", "name": "siem", "streams": ["*"], "port": 9515, "take_over": True})["ok"]


def test_first_line_that_is_none_ends_the_connection(gateway: Running) -> None:
    """After what is no JSON object, HTTP first of all, nothing more is executed, and it is the gateway that closes."""
    for line, error in (
        (b"POST / HTTP/1.1\r\nHost: localhost:5000\r\nContent-Length: 99\r\n\r", "bad_request"),
        (b'{"op":"nonsense"}\n{"op":"list"}\nHost: localhost:5000', "bad_request"),
        (b'{"op":"list","op":', "bad_request"),
        (b'{"op":"leave","name":"a","name":"b","generation":1}', "bad_request"),
        (b'{"op":' + b"[" * 60_000, "bad_request"),
        (b'{"op":"list"' + b" " * 70_000 + b"}", "too_long"),
        (b"\xff\xfe", "bad_name"),
    ):
        with connect() as connection:
            connection.sendall(line + b'\n{"op":"register","name":"smuggled"}\n')
            answers = [json.loads(answer) for answer in read_all(connection).splitlines()]
        assert answers[-1]["error"] == error, line[:100]
        assert [answer["ok"] for answer in answers[:-1]] == ([False, True] if b"nonsense" in line else [])
        assert ask_json({"op": "list"})["clients"] == {}, line[:100]


def test_netcat_speaks_it(gateway: Running) -> None:
    """`printf ... | nc -q1` gets its answers, also for a last line without newline."""
    need("nc")
    command = """printf '{"op":"register","name":"a"}\\n{"op":"list"}' | nc -q1 127.0.0.1 5000"""
    lines = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=True).stdout.splitlines()
    assert list(json.loads(lines[1])["clients"]) == ["a"]


def test_held_entry_lasts_as_long_as_its_connection(stack: Stack) -> None:
    """With `hold` the entry goes when the connection does, and idleness does not end the connection."""
    stack.configure("[gateway]\nidle_seconds = 0.3\n")
    stack.start("broker")
    stack.start("gateway")
    with connect() as connection:
        connection.sendall(b'{"op":"register","name":"held","hold":true}\n')
        assert json.loads(connection.recv(65536))["ok"]
        time.sleep(1.5)
        assert list(ask_json({"op": "list"})["clients"]) == ["held"]
        connection.sendall(b'{"op":"list"}\n')
        assert json.loads(connection.recv(65536))["ok"]
    wait_until(lambda: ask_json({"op": "list"})["clients"] == {}, "the held entry leaves")


def test_leases_expire(stack: Stack) -> None:
    """An entry goes when its time is up; names on the documented protocol have what the settings say."""
    stack.configure("[gateway]\nlease_seconds = 0.5\n")
    stack.start("broker")
    stack.start("gateway")
    assert b"short" in ask(b"short")
    assert ask_json({"op": "register", "name": "long", "ttl": 3600})["ok"]
    wait_until(lambda: list(ask_json({"op": "list"})["clients"]) == ["long"], "the short lease expires")


def test_connection_that_sends_nothing(stack: Stack) -> None:
    """It is told so and closed after the idle time; one that closes by itself is nothing."""
    stack.configure("[gateway]\nidle_seconds = 0.3\n")
    stack.start("broker")
    stack.start("gateway")
    connect().close()
    with connect() as connection:
        assert json.loads(read_all(connection))["error"] == "too_slow"


def test_request_byte_by_byte(stack: Stack) -> None:
    """A request has so long from its first byte, however steadily the bytes come."""
    stack.configure("[gateway]\nrequest_seconds = 0.5\n")
    stack.start("broker")
    stack.start("gateway")
    with connect() as connection:
        connection.settimeout(0.05)
        answer = b""
        for byte in b'{"op":"list"' + b" " * 600:
            connection.send(bytes([byte]))
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
            break
        assert json.loads(answer)["error"] == "too_slow"


def test_client_that_does_not_read(stack: Stack, small_buffers: None) -> None:
    """It is dropped when it takes nothing for the time allowed; others are answered, and memory stays flat."""
    stack.configure("[gateway]\nrequest_seconds = 0.5\n")
    stack.start("broker")
    gateway = stack.start("gateway")
    ask(many(1_000, b"x" * 240))
    ask(b'{"op":"list"}\n')
    before = gateway.resident_mb()
    stalled = [connect() for _ in range(50)]
    for connection in stalled:
        connection.sendall(b'{"op":"list"}\n' * 1000)
    assert b"other" in ask(b"other")
    wait_until(lambda: counters(stack).get("too_slow") == 50, "stalled clients are dropped")
    assert gateway.resident_mb() - before < 30
    for connection in stalled:
        connection.close()


def test_client_that_ends_and_does_not_read(stack: Stack) -> None:
    """One that sends no more and reads nothing is dropped in time, wherever its answers have got stuck."""
    stack.configure("[gateway]\nrequest_seconds = 0.5\n")
    stack.start("broker")
    stack.start("gateway")
    ask(many(200))
    with contextlib.ExitStack() as opened:
        for number in range(1, 40):
            connection = opened.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", 5000))
            connection.sendall(b'{"op":"list"}\n' * number)
            connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: counters(stack)["connections"] == 0, "all are dropped")


def test_two_thousand_connections(stack: Stack) -> None:
    """Two thousand connections at once are all answered."""
    stack.start("broker")
    stack.start("gateway")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        connections = [connect() for _ in range(2000)]
        for number, connection in enumerate(connections):
            connection.sendall(b'{"op":"register","name":"n%d"}\n' % number)
            connection.shutdown(socket.SHUT_WR)
        for number, connection in enumerate(connections):
            assert json.loads(read_all(connection))["client"]["name"] == f"n{number}"
            connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_one_connection_too_many(stack: Stack) -> None:
    """Beyond the limit a connection is told `unavailable` and closed; those that are open are served."""
    stack.configure("[gateway]\nmax_connections = 3\n")
    stack.start("broker")
    stack.start("gateway")
    connections = [connect() for _ in range(3)]
    assert refusal(b"one too many") == "unavailable"
    connections[0].sendall(b"one of us")
    assert b"one of us" in read_all(connections[0])
    for connection in connections:
        connection.close()
    wait_until(lambda: ask_json({"op": "list"})["ok"], "room again")
    assert counters(stack)["connections_refused"] >= 1


def test_one_address_has_not_all_connections(stack: Stack) -> None:
    """Beyond its limit an address is told so by name and closed; another one, and AF_UNIX, are served meanwhile."""
    path = stack.directory / "g.sock"
    stack.configure(f'[gateway]\nlisten = ["tcp://127.0.0.1:5000", "unix://{path}"]\nmax_connections_per_address = 2\n')
    stack.start("broker")
    stack.start("gateway")
    connections = [connect() for _ in range(2)]
    for connection in connections:
        connection.sendall(b'{"op":"list"}\n')
        assert json.loads(connection.recv(65536))["ok"]
    answer = json.loads(ask(b"one too many"))
    assert answer["error"] == "unavailable"
    assert "127.0.0.1 has reached the limit of 2 connections" in answer["message"]
    with socket.create_connection(("127.0.0.1", 5000), 30, ("127.0.0.2", 0)) as other:
        other.sendall(b"other")
        assert json.loads(read_all(other))["other"]["address"] == "127.0.0.2"
    with socket.socket(socket.AF_UNIX) as local:
        local.connect(str(path))
        local.sendall(b"local")
        assert "local" in json.loads(read_all(local))
    connections.pop().close()
    wait_until(lambda: ask_json({"op": "list"})["ok"], "room again")
    connections.pop().close()


def test_requests_over_the_rate_wait(stack: Stack) -> None:
    """A client above its address's rate is told once, loses no answer, gets them late, and is not read on."""
    stack.configure("[gateway]\nrequests_per_second = 20\n")
    stack.start("broker")
    gateway = stack.start("gateway")
    begin = time.monotonic()
    lines = [json.loads(line) for line in ask(b'{"op":"streams"}\n' * 220).splitlines()]
    assert time.monotonic() - begin > 0.9  # 200 at once, and 20 more at their pace
    told = [line for line in lines if "event" in line]
    assert [line["event"] for line in told] == ["slowed"]
    assert "more than 20 requests a second come from 127.0.0.1" in told[0]["message"]
    assert sum(line.get("ok", False) for line in lines) == 220
    with connect() as connection, contextlib.suppress(TimeoutError):
        connection.settimeout(0.5)
        before = gateway.resident_mb()
        for _ in range(200):
            connection.send(b'{"op":"streams"}\n' * 4000)
        raise AssertionError("it reads what it does not answer")
    assert gateway.resident_mb() - before < 20
    with socket.create_connection(("127.0.0.1", 5000), 30, ("127.0.0.2", 0)) as other:
        other.sendall(b"other")
        assert "other" in json.loads(read_all(other))
    assert counters(stack)["requests_delayed"] > 0


def test_waiting_request_goes_with_its_connection(stack: Stack) -> None:
    """A request whose client has gone before its turn came is not executed."""
    stack.configure("[gateway]\nrequests_per_second = 2\n")
    stack.start("broker")
    gateway = stack.start("gateway")
    with connect() as connection:
        connection.sendall(b'{"op":"streams"}\n' * 20 + b'{"op":"register","name":"gone"}\n')
        received = b""
        while b"slowed" not in received:
            received += connection.recv(65536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset at once
    with socket.create_connection(("127.0.0.1", 5000), 30, ("127.0.0.2", 0)) as other:
        time.sleep(1)
        other.sendall(b'{"op":"list"}\n')
        assert json.loads(other.recv(65536))["clients"] == {}
    assert "Traceback" not in gateway.text


def test_descriptors_run_out_and_come_back(stack: Stack, gateway: Running) -> None:
    """Without a descriptor to be had, who is connected is served, others wait, nothing spins, and it recovers."""
    with connect() as known, socket.socket() as waiting:
        known.sendall(b'{"op":"list"}\n')
        assert json.loads(known.recv(65536))["ok"]
        limits = resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
        waiting.settimeout(60)
        waiting.connect(("127.0.0.1", 5000))
        waiting.sendall(b"waiting")
        gateway.wait_for("out of system resource")
        begin, worked, said = time.monotonic(), gateway.cpu_seconds(), len(gateway.text.splitlines())
        known.sendall(b'{"op":"register","name":"a","streams":["*"],"port":9514,"address":"192.0.2.1"}\n')
        assert json.loads(known.recv(65536))["error"] == "unavailable"
        known.sendall(b'{"op":"register","name":"b"}\n')
        assert json.loads(known.recv(65536))["ok"]
        time.sleep(3)
        passed = time.monotonic() - begin
        assert gateway.cpu_seconds() - worked < passed / 10
        assert len(gateway.text.splitlines()) - said <= passed + 1
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, limits)
        assert list(json.loads(read_all(waiting))) == ["b", "waiting"]
    assert "Traceback" not in gateway.text


def test_no_descriptors_left(stack: Stack) -> None:
    """With more connections than descriptors it says so at most once a second, and serves again afterwards."""
    stack.start("broker")
    command = "ulimit -n 90; exec python -m services.gateway"
    gateway = stack.spawn("gateway", ["sh", "-c", command])
    gateway.wait_for('"ready"')
    connections = [connect() for _ in range(200)]
    time.sleep(1)
    assert len(gateway.text.splitlines()) < 10
    assert "Traceback" not in gateway.text
    for connection in connections:
        connection.close()

    def served() -> bool:
        with contextlib.suppress(ConnectionError):  # refused while those that have gone are still on the books
            return b"again" in ask(b"again")
        return False

    wait_until(served, "served again")


def test_unix_listener(stack: Stack) -> None:
    """An AF_UNIX listener is for its owner, counts as loopback, survives a kill, and its file goes at exit."""
    path = stack.directory / "g.sock"
    stack.configure(f'[gateway]\nlisten = ["unix://{path}"]\n')
    stack.start("broker")
    stack.start("gateway").stop(signal.SIGKILL)
    assert path.is_socket()
    gateway = stack.start("gateway")
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        request = b'{"op":"register","name":"u","streams":["*"],"port":9000,"take_over":true}\n'
        connection.sendall(request)
        assert json.loads(connection.recv(65536))["client"]["address"] == "127.0.0.1"
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(path))
            other.sendall(request)
            assert json.loads(other.recv(65536))["ok"]
        assert f"taken over from this host, user {os.geteuid()}" in json.loads(connection.recv(65536))["message"]
    second = stack.start("gateway", ready=False)
    assert second.process.wait(60) == 1
    assert str(path) in second.text
    assert gateway.stop() == 0
    assert not path.exists()


def test_ipv6_listener(stack: Stack) -> None:
    """A client of either family shows as itself."""
    stack.configure('[gateway]\nlisten = ["tcp://localhost:5000", "tcp://[::1]:5002"]\n')
    stack.start("broker")
    stack.start("gateway")
    assert json.loads(ask(b"six", port=5002, host="::1"))["six"]["address"] == "::1"
    assert json.loads(ask(b"four"))["four"]["address"] == "127.0.0.1"


def test_port_in_use(stack: Stack, gateway: Running) -> None:
    """A second gateway ends with 1 and one line that names the endpoint and the process that has it."""
    second = stack.start("gateway", ready=False)
    assert second.process.wait(60) == 1
    assert f"tcp://127.0.0.1:5000: in use by process {gateway.process.pid} (" in second.text


def test_configured_collectors(stack: Stack) -> None:
    """A collector of the settings is listed and can't be taken away; one that would loop stops the start."""
    collector = '[[collector]]\nname = "siem"\nstreams = ["messages"]\naddress = "127.0.0.1"\nport = {}\n'
    stack.configure(collector.format(6667))
    stack.start("broker")
    refused = stack.start("gateway", ready=False)
    assert refused.process.wait(60) == 78
    assert "siem" in refused.text
    stack.configure(collector.format(9514))
    stack.start("gateway")
    generation = ask_json({"op": "list"})["clients"]["siem"]["generation"]
    assert ask_json({"op": "leave", "name": "siem", "generation": generation})["error"] == "not_permitted"


def test_without_a_broker(stack: Stack) -> None:
    """It says what it waits for, serves clients meanwhile, and is ready once there is a broker."""
    gateway = stack.start("gateway", ready=False)
    gateway.wait_for("waiting for the broker")
    assert b"early" in ask(b"early")
    assert not gateway.events("ready")
    stack.start("broker")
    gateway.wait_for('"ready"')


@pytest.fixture
def busy(gateway: Running) -> Iterator[list[socket.socket]]:
    """Connections in every condition: silent, in the middle of a line, holding, with answers it does not read."""
    beginnings = (b"", b'{"op":', b'{"op":"register","name":"h","hold":true}\n', b'{"op":"list"}\n' * 20_000)
    connections = [connect() for _ in beginnings]
    for connection, beginning in zip(connections, beginnings, strict=True):
        connection.sendall(beginning[: 8 * MAX_LINE])
    yield connections
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it(gateway: Running, busy: list[socket.socket], number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it with 0 whatever its connections do, and the address is free again."""
    assert gateway.stop(number) == 0
    assert "Traceback" not in gateway.text


def test_restart(stack: Stack, gateway: Running) -> None:
    """A gateway that was killed goes on with its list and revision, and gives no generation twice."""
    ask(b"name")
    generation = ask_json({"op": "register", "name": "a"})["client"]["generation"]
    before = ask_json({"op": "list"})
    gateway.stop(signal.SIGKILL)
    stack.start("gateway")
    assert ask_json({"op": "list"}) == before
    assert ask_json({"op": "register", "name": "b"})["client"]["generation"] > generation
    assert ask_json({"op": "leave", "name": "a", "generation": generation})["ok"]


def test_leaves_nothing_behind(stack: Stack, gateway: Running) -> None:
    """At the end no descriptor of a connection that has gone is left."""
    ask(b"warm")
    descriptors = Path(f"/proc/{gateway.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for number in range(100):
        ask(b"n%d" % number)
    wait_until(lambda: len(list(descriptors.iterdir())) <= before, "descriptors are closed")
