import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain

import pytest

from services.transmitter import opener
from services.transmitter import privileges as transmitter_privileges
from services.transmitter.privileges import KINDS, RawSockets, adopt, prove, unparse
from shared.process import privileges
from shared.process.privileges import outside_uid
from tests.capabilities import raise_ambient
from tests.services.transmitter.started import (
    IS_ROOT,
    PR_SET_KEEPCAPS,
    Started,
    as_nobody,
    as_nobody_with_net_raw,
    started,
)

CAP_SETUID = 1 << 7
RELINQUISHED = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"), "0") | {"NoNewPrivs": "1"}
PREAMBLE = """
import os, socket, sys
sys.path.insert(0, ".")
from services.transmitter import privileges
from services.transmitter.privileges import RawSockets, prove
from shared.process import privileges as given_up
from shared.process.privileges import relinquish
none, one = RawSockets(reason="none"), RawSockets(packet=(socket.socket(),))
"""
as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root, who can become another user")


@pytest.fixture(scope="module")
def copy() -> Iterator[Started]:
    """A copy of the package that every user can read."""
    with started() as found:
        yield found


@pytest.fixture
def handed_on(lab: None) -> str:
    """The value of `--inherited` for open sockets, which only the test can close."""
    opened = opener.open_sockets()
    text = unparse(opened)
    for sock in chain(*opened.values()):
        sock.set_inheritable(True)
        sock.detach()
    return text


def said_by(copy: Started, script: str, become: Callable[[], None] | None = None) -> str:
    """Run a script that uses `privileges`, as another user if told to; return its output, errors included."""
    command = [copy.interpreter if become else sys.executable, "-c", PREAMBLE + script]
    done = subprocess.run(
        command, cwd=copy.directory, preexec_fn=become, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def as_nobody_with_setuid() -> None:
    """For preexec_fn: a plain user who can become root."""
    ctypes.CDLL(None).prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    as_nobody()
    raise_ambient(CAP_SETUID)


def test_sockets_are_adopted(handed_on: str) -> None:
    """The opener's sockets are taken over by kind, non-blocking, and are not inherited any further."""
    sockets = adopt(handed_on)
    assert len(sockets) == 3 * opener.SOCKETS
    for kind in KINDS:
        for sock in getattr(sockets, kind):
            assert (sock.family, sock.type, sock.proto) == KINDS[kind]
            assert not sock.getblocking()
            assert not sock.get_inheritable()
    sockets.close()


def test_without_sockets_there_is_a_reason() -> None:
    """No sockets come with the reason, whatever is in it."""
    sockets = adopt("none:no raw sockets: a; b, c")
    assert (bool(sockets), sockets.reason) == (False, "no raw sockets: a; b, c")


@pytest.mark.parametrize(
    "text", ["", "none", "packet", "packet:", "packet:x", "packet:-1", "packet:9" * 20, "frames:3", "packet:1000000"]
)
def test_what_the_opener_does_not_say_is_refused(text: str) -> None:
    """A made-up value ends in one line, not in a traceback of its own."""
    with pytest.raises(PermissionError, match="opener"):
        adopt(text)


@pytest.mark.parametrize(
    "kinds", [("ip4",), ("packet", "packet"), ("packet", "ip4", "ip4"), ("packet", "tcp"), ("udp",)]
)
def test_sockets_of_other_kinds_are_refused(lab: None, kinds: tuple[str, ...]) -> None:
    """Descriptors of another kind than they are said to be are refused, and closed."""
    made = {"udp": (socket.AF_INET, socket.SOCK_DGRAM), "tcp": (socket.AF_INET, socket.SOCK_STREAM)}
    opened = [opener.open_socket(kind) if kind in KINDS else socket.socket(*made[kind]) for kind in kinds]
    text = ";".join(f"{kind}:{sock.detach()}" for kind, sock in zip(KINDS, opened, strict=False))
    with pytest.raises(PermissionError, match="opener"):
        adopt(text)


def test_sockets_that_could_receive_are_refused(lab: None) -> None:
    """Without the opener's filter a packet socket could listen to everything."""
    text = f"ip4:{opener.open_socket('ip4').detach()};packet:{socket.socket(*KINDS['packet']).detach()}"
    with pytest.raises(PermissionError, match="opener"):
        adopt(text)


def test_something_else_than_a_socket_is_refused() -> None:
    """A descriptor in an argument that was typed by hand is left alone."""
    reader, writer = os.pipe()
    with pytest.raises(PermissionError, match="opener"):
        adopt(f"packet:{reader}")
    os.close(reader)
    os.close(writer)


def test_proof_fails_with_a_capability(lab: None, copy: Started) -> None:
    """A process that still has CAP_NET_RAW is told by which sets."""
    said = said_by(copy, "prove(none)", as_nobody_with_net_raw)
    assert "refuses to run" in said
    assert "it still holds capabilities: CapInh, CapPrm, CapEff, CapAmb" in said


def test_proof_fails_where_an_exec_could_gain_privileges(lab: None, copy: Started) -> None:
    """A plain user without capabilities may still run what is setuid, unless no_new_privs is set."""
    assert "it could gain privileges by executing a program" in said_by(copy, "prove(none)", as_nobody)


def test_proof_fails_where_a_raw_socket_can_be_had(lab: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw socket that opens is one too many, whatever /proc says."""
    monkeypatch.setattr(transmitter_privileges, "own_status", lambda: RELINQUISHED)
    with pytest.raises(PermissionError, match="it could open another raw socket: packet"):
        prove(RawSockets(reason="none"))


@as_root
def test_proof_fails_for_root_with_sockets(copy: Started) -> None:
    """Root's uid is a privilege of its own; it passes without sockets alone, to say why there are none."""
    said = said_by(copy, "relinquish(None); print(prove(none)['uid']); prove(one)")
    assert said.startswith("0\n")
    assert "it is root, or can become root" in said


@as_root
def test_proof_fails_where_root_is_put_by(copy: Started) -> None:
    """A saved uid of 0 is root's too."""
    said = said_by(copy, "os.setresuid(65534, 65534, 0); relinquish(None); prove(one)")
    assert "it is root, or can become root" in said


@as_root
def test_proof_fails_where_root_can_be_had(copy: Started) -> None:
    """Becoming root must not work, whatever /proc says."""
    script = f"privileges.own_status = lambda: {RELINQUISHED}; prove(one)"
    assert "it is root, or can become root" in said_by(copy, script, as_nobody_with_setuid)


@as_root
def test_who_can_empty_the_bounding_set_must(copy: Started) -> None:
    """With CAP_SETPCAP, a capability that stays in the bounding set ends the opener."""
    script = """
def refuse(option, value, kernels=given_up._prctl):
    if (option, value) == (given_up.PR_CAPBSET_DROP, 13):
        raise PermissionError(1, "refused")
    kernels(option, value)
given_up._prctl = refuse
relinquish(("nobody", 65534, 65534))
"""
    assert "PermissionError: [Errno 1] refused" in said_by(copy, script)


def test_who_one_is_outside_of_the_user_namespace() -> None:
    """Our own uid is somebody outside; what no map reaches, such as (uid_t)-1, is nobody."""
    assert outside_uid(os.getuid()) is not None
    assert outside_uid((1 << 32) - 1) is None


def test_a_refused_prctl_is_an_error() -> None:
    """A refusal of the kernel to give something up is not passed over."""
    with pytest.raises(OSError, match="prctl"):
        privileges._prctl(1 << 30, 0)
