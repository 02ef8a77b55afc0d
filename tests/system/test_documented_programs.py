"""The programs that fanwire started from, written as they are documented, against it unchanged."""

import json
import re
import socket
import sys

from tests.stack import Stack, ask, wait_until

# The documented TCP client: connect, send the name, read to the end.
CLIENT = """
import json, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
sock.connect(("127.0.0.1", 5000))
sock.send(sys.argv[1].encode())
data = b""
while True:
    chunk = sock.recv(1024)
    if not chunk:
        break
    data += chunk
print(json.dumps(json.loads(data), indent=4))
"""

# The documented UDP sender of the answering variant.
SENDER = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(60)
sock.sendto(b"Hello you there!", ("localhost", 6667))
print(sock.recvfrom(65507)[0].decode())
"""

# The documented TCP sender.
HELLO = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
sock.connect(("localhost", 6667))
sock.send(b"Hello")
sock.close()
"""


def test_two_clients_are_on_the_list(stack: Stack) -> None:
    """Two clients that send their names see the list, the second one with both on it."""
    stack.start_all()
    assert stack.spawn("first", [sys.executable, "-c", CLIENT, "name1"]).process.wait(60) == 0
    second = stack.spawn("second", [sys.executable, "-c", CLIENT, "name2"])
    assert second.process.wait(60) == 0
    listed = json.loads(second.text)
    assert list(listed) == ["name1", "name2"]
    assert list(listed["name1"]) == ["address", "port", "name"]
    assert listed["name1"]["address"] == "127.0.0.1"
    assert isinstance(listed["name1"]["port"], int)


def test_our_client_prints_the_list_with_indent_4(stack: Stack) -> None:
    """`-c -n NAME` registers NAME and prints the whole list as JSON, indented by four."""
    stack.start_all()
    client = stack.spawn("client", [sys.executable, "-m", "services.gateway", "-c", "-n", "name1"])
    assert client.process.wait(60) == 0
    assert client.text == json.dumps(json.loads(client.text), indent=4) + "\n"
    assert json.loads(client.text)["name1"]["name"] == "name1"


def test_gateway_prints_the_documented_line(stack: Stack) -> None:
    """The program without arguments is the server and says so in the documented words."""
    stack.start_all()
    assert stack["gateway"].text.startswith("Starting server...\n")


def test_messages_by_tcp_and_udp_are_watched_and_answered(stack: Stack) -> None:
    """`Hello` by TCP and `Hello you there!` by UDP show in `fanwire watch`, and the UDP sender is answered."""
    stack.start_all()
    watch = stack.operator("watch")
    watch.wait_for("watching")
    assert stack.spawn("hello", [sys.executable, "-c", HELLO]).process.wait(60) == 0
    sender = stack.spawn("sender", [sys.executable, "-c", SENDER])
    assert sender.process.wait(60) == 0
    assert sender.text == "Got your message!\n"
    watch.wait_for("): b'Hello'\n")
    watch.wait_for("): b'Hello you there!'\n")
    assert "Got message from ('127.0.0.1', " in watch.text


def test_the_answering_server_prints_two_lines(stack: Stack) -> None:
    """`watch --answering` prints a datagram as the documented server that answers, byte for byte."""
    stack.start_all()
    watch = stack.operator("watch", "messages", "--answering", "--count", "2")
    watch.wait_for("watching messages")
    sender = stack.spawn("sender", [sys.executable, "-c", SENDER])
    assert sender.process.wait(60) == 0
    assert sender.text == "Got your message!\n"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"it's \xff\n", ("127.0.0.1", 6667))
        port = sock.getsockname()[1]
        assert watch.process.wait(60) == 0
    said, first, second, *rest = watch.text.split("Got connection from: ")
    assert said == "watching messages\n"
    assert re.fullmatch(r"\('127\.0\.0\.1', \d+\)\nIt said: b'Hello you there!'\n", first)
    assert second == f"""('127.0.0.1', {port})\nIt said: b"it's \\xff\\n"\n"""
    assert not rest


def test_long_list_arrives_whole(stack: Stack) -> None:
    """A list of over 1 MB, far over the 1,024 bytes that the original read, arrives whole."""
    stack.start_all()
    clients = 2_000
    lines = b"".join(b'{"op":"register","name":"client-%d%s"}\n' % (number, b"x" * 240) for number in range(clients))
    answers = ask(lines, seconds=100).splitlines()
    assert len(answers) == clients
    assert all(json.loads(answer)["ok"] for answer in answers)
    with socket.create_connection(("127.0.0.1", 5000), timeout=60) as connection:
        connection.sendall(b"one more")
        whole = b"".join(iter(lambda: connection.recv(1024), b""))
    assert len(whole) > 1_000_000
    listed = json.loads(whole)
    assert len(listed) == clients + 1
    assert whole == json.dumps(listed).encode()


def test_largest_datagram_is_watched_whole(stack: Stack) -> None:
    """65,507 bytes, the most that UDP carries, come through uncut."""
    stack.start_all()
    watch = stack.operator("watch", "--hex", "--count", "1")
    watch.wait_for("watching")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"\xa5" * 65_507, ("127.0.0.1", 6667))
    wait_until(lambda: watch.process.poll() is not None, "watch ends after one datagram")
    assert "a5" * 65_507 in watch.text
