"""Listeners receive what they are there for, or say why not: paths, groups, families, system calls."""

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from shared.bus.zmq_sockets import Subscriber
from tests.builders import BusEnds, accounts_when, take_datagrams, take_mark
from tests.network import End, Host, veth
from tests.refusing import refused
from tests.services.transmitter.started import as_nobody, readable_interpreter
from tests.stack import Running, Stack, wait_until


def started(stack: Stack, *listen: str, rules: str = "") -> Running:
    """A worker with a stream of these listeners, under these refusals."""
    quoted = ", ".join(f'"{each}"' for each in listen)
    stack.configure(f'[[stream]]\nname = "s"\nlisten = [{quoted}]\n')
    before, stack.interpreter = stack.interpreter, refused(rules) if rules else stack.interpreter
    worker = stack.start("ingest")
    stack.interpreter = before
    return worker


def listening(stack: Stack, bus: BusEnds, *listen: str, rules: str = "") -> tuple[Running, Subscriber]:
    """Such a worker, and a subscriber to its stream."""
    worker = started(stack, *listen, rules=rules)
    subscriber = bus.subscriber("datagrams/s/")
    take_mark(subscriber, "s")
    return worker, subscriber


def refusal(stack: Stack, *listen: str) -> str:
    """The line with which a worker ends that can't have these listeners."""
    quoted = ", ".join(f'"{each}"' for each in listen)
    stack.configure(f'[[stream]]\nname = "s"\nlisten = [{quoted}]\n')
    worker = stack.start("ingest", ready=False)
    assert worker.process.wait(60) in (1, 78)
    assert "Traceback" not in worker.text
    return worker.text


def send_to_path(path: Path, *payloads: bytes) -> None:
    """Send datagrams to a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for payload in payloads:
            sock.sendto(payload, str(path))


class TestPath:
    def test_takes_from_every_user(self, stack: Stack, bus: BusEnds) -> None:
        """A path has mode 0666, as /dev/log has, whatever the umask: another user's datagrams arrive."""
        path = Path("/tmp", f"fanwire-test-{os.getpid()}.sock")
        before = os.umask(0o077)
        try:
            worker, subscriber = listening(stack, bus, f"unixgram://{path}")
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o666
        script = "import socket, sys; socket.socket(1, 2).sendto(b'from another', sys.argv[1])"
        command = [readable_interpreter(), "-I", "-c", script, str(path)]
        subprocess.run(command, preexec_fn=as_nobody, cwd="/", check=True)
        assert take_datagrams(subscriber, 1)[0][2] == b"from another"
        assert worker.stop() == 0
        assert not path.exists()

    @pytest.mark.parametrize("instead", ["nothing", "file", "directory"])
    def test_is_made_anew_when_others_remove_it(self, stack: Stack, bus: BusEnds, tmp_path: Path, instead: str) -> None:
        """A path that was removed is bound again within seconds and said so; what stands in its place is left alone."""
        path = tmp_path / "run" / "in.sock"
        path.parent.mkdir()
        worker, subscriber = listening(stack, bus, f"unixgram://{path}")
        (other := tmp_path / "other").write_text("mine")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connected:
            connected.connect(str(path))
            # In one step each: between two the worker may bind the path.
            match instead:
                case "nothing":
                    path.unlink()
                case "file":
                    other.rename(path)
                case "directory":
                    path.parent.rename(tmp_path / "away")
            if instead != "nothing":
                wait_until(lambda: "a listener receives nothing" in worker.text, "it says what is in the way")
                line = next(line for line in worker.log if line["event"].startswith("a listener receives nothing"))
                assert f"unixgram://{path}" in line["event"]
                assert instead == "directory" or path.read_text() == "mine"
                connected.send(b"to the old one")  # who is connected is heard until the new one is there
                assert take_datagrams(subscriber, 1)[0][2] == b"to the old one"
                path.unlink() if instead == "file" else path.parent.mkdir()
            worker.wait_for("bound the path again")
        (line,) = worker.events("bound the path again: another program had removed it")
        assert line["listen"] == f"unixgram://{path}"
        assert path.stat().st_mode & 0o777 == 0o666
        wait_until(lambda: reaches(path), "it is listened on")
        send_to_path(path, b"to the new one")
        assert take_datagrams(subscriber, 1)[0][2] == b"to the new one"
        assert worker.stop(signal.SIGTERM) == 0
        assert not path.exists()

    def test_that_another_took_is_left_to_it(self, stack: Stack, bus: BusEnds, tmp_path: Path) -> None:
        """A path that another process has bound meanwhile stays its own, also when the worker ends."""
        path = tmp_path / "in.sock"
        worker, _ = listening(stack, bus, f"unixgram://{path}", "udp://127.0.0.1:6667")
        path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(str(path))
            wait_until(lambda: "Address already in use" in worker.text, "it says who is in the way")
            assert worker.stop(signal.SIGTERM) == 0
            send_to_path(path, b"still mine")
            assert other.recv(100) == b"still mine"


def reaches(path: Path) -> bool:
    """Return whether a path is listened on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        return sock.connect_ex(str(path)) == 0


class TestGroup:
    def test_is_joined_and_received_once(self, stack: Stack, bus: BusEnds) -> None:
        """Datagrams to a multicast group, IPv4 and IPv6, arrive on the interface that is named, once."""
        listen = ("udp://239.1.1.2%mc0:5514", "udp://[ff15::114%mc0]:5514", "udp://[ff02::114%mc0]:5515")
        with Host() as relay, Host() as exporter:
            near = End(relay, "mc0", "10.21.0.1/24 fd00:21::1/64")
            with veth(near, End(exporter, "up0", "10.21.0.2/24 fd00:21::2/64")):
                with relay.entered():
                    _, subscriber = listening(stack, bus, *listen)
                    second = stack.start("ingest.2")
                multicast(exporter, "10.21.0.2", b"four")
                with exporter.entered():
                    index = socket.if_nametoindex("up0")
                with exporter.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
                    six.sendto(b"site", ("ff15::114", 5514, 0, index))
                    six.sendto(b"link", ("ff02::114", 5515, 0, index))
                assert sorted(payload for _, _, payload in take_datagrams(subscriber, 3)) == [b"four", b"link", b"site"]
                assert second.stop() == 0
        (drained,) = second.events("drained")
        assert not drained.get("stream/s", {}).get("received")
        counted = accounts_when(bus, "ingest.1", lambda accounts: accounts["stream/s"]["received"] >= 3)
        assert counted["stream/s"]["received"] == 3

    def test_comes_by_its_interface_alone(self, stack: Stack, bus: BusEnds) -> None:
        """Of two links, only the one that is named brings the group, and again once it was made anew."""
        with Host() as relay, Host() as exporter:
            near, far = End(relay, "mc0", "10.21.0.1/24"), End(exporter, "up0", "10.21.0.2/24")
            other, beyond = End(relay, "mc1", "10.22.0.1/24"), End(exporter, "up1", "10.22.0.2/24")
            with veth(other, beyond):
                with veth(near, far):
                    with relay.entered():
                        worker, subscriber = listening(stack, bus, "udp://239.1.1.2%mc0:5514")
                    multicast(exporter, "10.22.0.2", b"wrong link")
                    multicast(exporter, "10.21.0.2", b"right link")
                    assert take_datagrams(subscriber, 1) == [("10.21.0.2", 5999, b"right link")]
                wait_until(lambda: "a listener receives nothing" in worker.text, "it says that the interface is gone")
                with veth(near, far):
                    wait_until(
                        lambda: worker.events("joined the multicast group again: its interface is a new one"),
                        "it has joined again",
                    )
                    multicast(exporter, "10.21.0.2", b"again")
                    assert take_datagrams(subscriber, 1) == [("10.21.0.2", 5999, b"again")]

    @pytest.mark.parametrize(
        "listen", ["udp://239.1.1.1:5514", "udp://239.1.1.1%nosuch:5514", "udp://[ff15::1%nosuch]:9"]
    )
    def test_without_an_interface_is_refused(self, stack: Stack, listen: str) -> None:
        """A group that no route leads to, or on an interface that is not there, is refused, and the cure named."""
        assert (
            f"name an interface of this host (`ip link`), as in {listen.split('%')[0].split(':5514')[0]}%eth0"
            in refusal(stack, listen)
        )


def multicast(host: Host, source: str, payload: bytes) -> None:
    """Send a datagram to the group out of the interface that has this address."""
    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 5999))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
        sock.sendto(payload, ("239.1.1.2", 5514))


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        ("tcp://239.1.1.1:5514", "datagrams to 239.1.1.1 come by UDP only; listen on udp://"),
        ("tcp://[ff15::1]:5514", "datagrams to ff15::1 come by UDP only; listen on udp://"),
        ("tcp://255.255.255.255:5514", "datagrams to 255.255.255.255 come by UDP only; listen on udp://"),
        ("udp://[fe80::1]:5514", "add the interface, as in udp://[fe80::1%eth0]:5514"),
        ("udp://[ff02::1]:5514", "add the interface, as in udp://[ff02::1%eth0]:5514"),
        ("udp://192.0.2.1%eth0:5514", "an interface (%) goes with a multicast or link-local address alone"),
        ("udp://localhost%lo:5514", "an interface (%) goes with an address, not with a name"),
        ("udp://192.0.2.1:5514", "no interface of this host has that address; listen on one"),
        ("udp://240.0.0.1:5514", "no interface of this host has that address; listen on one"),
        ("udp://0.1.2.3:5514", "no interface of this host has that address; listen on one"),
    ],
)
def test_listener_that_could_never_receive_is_refused(stack: Stack, listen: str, why: str) -> None:
    """An address that nothing can come to is refused in one line that says what would do."""
    assert why in refusal(stack, listen)


def test_broadcast_is_received(stack: Stack, bus: BusEnds) -> None:
    """A listener at the broadcast address gets what is sent there."""
    with (
        Host() as relay,
        Host() as exporter,
        veth(End(relay, "bc0", "10.23.0.1/24"), End(exporter, "up0", "10.23.0.2/24")),
    ):
        with relay.entered():
            _, subscriber = listening(stack, bus, "udp://255.255.255.255:5514")
        with exporter.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.bind(("10.23.0.2", 5999))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"up0")
            sock.sendto(b"to all", ("255.255.255.255", 5514))
        assert take_datagrams(subscriber, 1) == [("10.23.0.2", 5999, b"to all")]


@pytest.mark.parametrize("scheme", ["udp", "tcp"])
def test_without_ipv6_everywhere_is_ipv4(stack: Stack, bus: BusEnds, scheme: str) -> None:
    """On a kernel without IPv6, `[::]` listens by IPv4, and says so."""
    worker, subscriber = listening(stack, bus, f"{scheme}://[::]:6667", rules="socket:0:10=EAFNOSUPPORT")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if scheme == "udp" else socket.SOCK_STREAM) as sock:
        sock.connect(("127.0.0.1", 6667))
        sock.send(b"Hello")
    assert take_datagrams(subscriber, 1)[0][2] == b"Hello"
    assert worker.events("this host has no IPv6: listening by IPv4 alone")


@pytest.mark.parametrize("rules", ["recvmmsg=ENOSYS", "recvmmsg=EPERM", "recvmmsg=ENOSYS,sendmmsg=ENOSYS"])
def test_refused_recvmmsg_is_replaced(stack: Stack, bus: BusEnds, rules: str) -> None:
    """Datagrams are received one by one, whole and in order, where a sandbox refuses recvmmsg(2); the log says so."""
    worker, subscriber = listening(stack, bus, "udp://127.0.0.1:6667", rules=rules)
    payloads = [b"", b"x" * 65_507, *(b"%d" % number * (number % 7) for number in range(600))]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for at in range(0, len(payloads), 100):
            for payload in payloads[at : at + 100]:
                sock.sendto(payload, ("127.0.0.1", 6667))
            found = take_datagrams(subscriber, len(payloads[at : at + 100]))
            assert found == [("127.0.0.1", sock.getsockname()[1], each) for each in payloads[at : at + 100]]
    assert worker.events("recvmmsg(2) is refused here: receiving datagrams one by one, which is slower")
    accounts = accounts_when(bus, "ingest.1", lambda found: found["stream/s"]["received"] == len(payloads))
    assert accounts["stream/s"].get("receive_errors", 0) == 0


@pytest.mark.parametrize(
    ("rules", "number"), [("recvmmsg=ENOSYS,recvmsg=ENOSYS", errno.ENOSYS), ("recvmmsg=EACCES", errno.EACCES)]
)
def test_receiving_that_always_fails_is_said(stack: Stack, bus: BusEnds, rules: str, number: int) -> None:
    """The log and the listener's account give the reason where no call receives, the log at most once a second."""
    worker, _ = listening(stack, bus, "udp://127.0.0.1:6667", rules=rules)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"lost", ("127.0.0.1", 6667))
    name = "listener/s/udp://127.0.0.1:6667"
    accounts = accounts_when(bus, "ingest.1", lambda found: found[name].get("receive_errors", 0) > 100)
    assert accounts[name]["receive_errno"] == number
    lines = worker.events("can't receive at a listener; see `fanwire doctor`")
    assert lines[0]["error"] == os.strerror(number)
    assert len(lines) < 10


@pytest.mark.usefixtures("bus")
@pytest.mark.parametrize("rules", ["accept4=ENOSYS,accept=ENOSYS", "recvfrom:2:16384=EACCES"])
def test_tcp_that_always_fails_is_said(stack: Stack, rules: str) -> None:
    """The log gives the reason where no connection can be accepted or read, and the worker does not spin."""
    worker = started(stack, "tcp://127.0.0.1:6667", rules=rules)
    with socket.create_connection(("127.0.0.1", 6667)) as connection:
        connection.sendall(b"lost\n")
        wait_until(lambda: "can't " in worker.text, "it says what fails")
        before = worker.cpu_seconds()
        wait_until(lambda: worker.text.count("can't ") > ("accept" in rules), "it goes on trying, once a second")
        assert worker.cpu_seconds() - before < 0.3
    assert worker.stop(signal.SIGTERM) == 0


def test_unknown_drop_count_ends_nothing(stack: Stack, bus: BusEnds) -> None:
    """A kernel that does not tell what it drops (SO_MEMINFO) costs the count alone, and one line."""
    worker, subscriber = listening(stack, bus, "udp://127.0.0.1:6667", rules="getsockopt:2:55=ENOPROTOOPT")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"Hello", ("127.0.0.1", 6667))
    assert take_datagrams(subscriber, 1)[0][2] == b"Hello"
    assert len(worker.events("the kernel does not report its drops (SO_MEMINFO): kernel_dropped stays as it is")) == 1
    assert worker.stop(signal.SIGTERM) == 0
