import errno
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.net.addresses import Endpoint
from shared.net.bpf import refuse_input
from shared.net.sockets import (
    InheritedSocket,
    bind_endpoint,
    close_listener,
    enlarge_receive_buffer,
    inherited,
    kernel_drops,
)


def leave(_: socket.socket) -> None:
    """Prepare nothing."""


def bound(opened: ExitStack, endpoint: Endpoint) -> list[socket.socket]:
    """The sockets of an endpoint, closed with the test."""
    return [opened.enter_context(sock) for sock in bind_endpoint(endpoint, leave)]


def free_port() -> int:
    """A UDP port that nobody has."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(("host", "families"), [("127.0.0.1", {"v4"}), ("::1", {"v6"}), ("::", {"v4", "v6"})])
def test_endpoint_is_reached_by_the_families_it_names(lab: None, host: str, families: set[str]) -> None:
    """`[::]` takes datagrams over IPv4 and IPv6, any other address those of its own family."""
    with ExitStack() as opened:
        port = free_port()
        (sock,) = bound(opened, Endpoint("udp", host, port))
        assert not sock.getblocking()
        sock.settimeout(60)
        for name, family, address in (("v4", socket.AF_INET, "127.0.0.1"), ("v6", socket.AF_INET6, "::1")):
            if name in families:
                with socket.socket(family, socket.SOCK_DGRAM) as sender:
                    sender.sendto(name.encode(), (address, port))
                assert sock.recv(10) == name.encode()


def test_address_in_use_leaves_nothing_bound(lab: None) -> None:
    """An address that somebody has is an error that says so, and an address that is not here is another."""
    with ExitStack() as opened:
        port = free_port()
        bound(opened, Endpoint("udp", "127.0.0.1", port))
        with pytest.raises(OSError, match="in use") as refused:
            bind_endpoint(Endpoint("udp", "127.0.0.1", port), leave)
        assert refused.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="assign") as refused:
            bind_endpoint(Endpoint("udp", "192.0.2.1", port), leave)
        assert refused.value.errno == errno.EADDRNOTAVAIL


def test_options_are_set_before_the_address_is_bound(lab: None) -> None:
    """The caller's options are set when the address is bound: two sockets that both share it can have it."""

    def share(sock: socket.socket) -> None:
        assert sock.getsockname()[1] == 0
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    with ExitStack() as opened:
        port = free_port()
        for _ in range(2):
            (sock,) = bind_endpoint(Endpoint("udp", "127.0.0.1", port), share)
            opened.enter_context(sock)


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
def test_path_is_taken_over_from_the_dead_alone(tmp_path: Path, scheme: str) -> None:
    """A file that a process left is replaced; one that is listened on, and a file of another kind, are not touched."""
    path = tmp_path / "x.sock"
    endpoint = Endpoint(scheme, path=str(path))
    (left,) = bind_endpoint(endpoint, leave)
    left.close()
    assert path.is_socket()
    (alive,) = bind_endpoint(endpoint, leave, path_mode=0o700)
    if scheme == "unix":
        alive.listen()
    assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(OSError, match="in use"):
        bind_endpoint(endpoint, leave)
    assert path.is_socket()
    close_listener(alive)
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(OSError, match="a file that is no socket is there"):
        bind_endpoint(endpoint, leave)
    assert path.read_text() == "mine"


def test_path_of_a_listener_that_stands_still_is_in_use(tmp_path: Path) -> None:
    """A listener that accepts nothing, and whose queue is full, is a live one: nobody waits for it."""
    path = str(tmp_path / "x.sock")
    with ExitStack() as opened:
        standing, waiting = (opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        standing.bind(path)
        standing.listen(0)
        waiting.connect(path)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60)
        opened.callback(socket.setdefaulttimeout, before)
        with pytest.raises(OSError, match="in use"):
            bind_endpoint(Endpoint("unix", path=path), leave)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_kernel_drops_are_counted(lab: None, host: str) -> None:
    """Datagrams are dropped and counted exactly once input is refused; queued ones stay."""
    with ExitStack() as opened:
        port = free_port()
        (sock,) = bound(opened, Endpoint("udp", host, port))
        assert enlarge_receive_buffer(sock, 65_536) == 65_536
        sender = opened.enter_context(socket.socket(sock.family, socket.SOCK_DGRAM))
        sender.connect((host, port))
        for _ in range(10):
            sender.send(b"fits")
        assert kernel_drops(sock) == 0
        refuse_input(sock)
        for _ in range(5):
            sender.send(b"refused")
        assert kernel_drops(sock) == 5
        assert [sock.recv(10) for _ in range(10)] == [b"fits"] * 10
        with pytest.raises(BlockingIOError):
            sock.recv(10)


def test_sockets_passed_to_another_process_are_left_alone() -> None:
    """Sockets are taken when LISTEN_PID is ours alone, and nobody after us is told of them."""
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert inherited(environment) == []
    assert environment == {"HOME": "/"}
    assert inherited(environment) == []


def test_inherited_socket_serves_its_address_once(lab: None) -> None:
    """An inherited socket is used for the address and kind it is bound to, and for nothing else."""
    with ExitStack() as opened:
        sock = opened.enter_context(InheritedSocket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        held: list[socket.socket] = [sock]
        for scheme, host in (("tcp", "127.0.0.1"), ("udp", "::1")):
            (other,) = bind_endpoint(Endpoint(scheme, host, port), leave, held=held)
            opened.enter_context(other)
        assert held == [sock]
        assert bind_endpoint(Endpoint("udp", "127.0.0.1", port), leave, held=held) == [sock]
        assert held == []


def test_buffer_of_an_inherited_socket_is_never_taken_back(lab: None) -> None:
    """A receive buffer that the service manager made larger than asked for stays; one that is smaller is enlarged."""
    with InheritedSocket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        assert enlarge_receive_buffer(sock, 8192) == 65_536
        assert enlarge_receive_buffer(sock, 131_072) == 131_072


def test_path_of_an_inherited_socket_stays(tmp_path: Path) -> None:
    """Closing an inherited AF_UNIX socket leaves its file, on which the service manager still listens."""
    path = tmp_path / "x.sock"
    sock = InheritedSocket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    assert bind_endpoint(Endpoint("unixgram", path=str(path)), leave, held=[sock]) == [sock]
    close_listener(sock)
    assert path.is_socket()
