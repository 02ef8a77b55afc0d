import errno
import os
import socket
import subprocess
import sys

import pytest

from shared.net.addresses import Endpoint
from shared.net.port_holders import explain_bind

IN_USE = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
LISTEN = "import socket; s = socket.create_server(('{}', 0)); print(s.getsockname()[1], flush=True); input()"


@pytest.mark.parametrize("at", ["127.0.0.1", "0.0.0.0"])
def test_process_that_has_a_port_is_named(at: str) -> None:
    """Number and name of the process that listens there are told, be it at this address or at all of them."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN.format(at)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        endpoint = Endpoint("tcp", "127.0.0.1", int(other.stdout.readline()))
        said = explain_bind(IN_USE, endpoint, "[gateway] listen")
        other.stdin.close()
    assert said.startswith(f"in use by process {other.pid} (python")
    assert said.endswith("); stop that, or set another [gateway] listen")
    assert explain_bind(IN_USE, endpoint, "[gateway] listen").startswith("in use; see by which process with `ss -ltnp`")


def test_port_that_is_this_process_s_own_is_named_twice() -> None:
    """A port where this process itself listens can only be in the settings twice."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = Endpoint("http", "127.0.0.1", taken.getsockname()[1])
        assert (
            explain_bind(IN_USE, endpoint, "[console] listen")
            == "[console] listen has this address twice; remove one of them"
        )
