import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from services.ingest import listeners
from services.ingest.listeners import bind_listener, listeners_of, reopen
from services.ingest.reuseport_sharing import share_port
from shared.process.lifecycle import OperatorError
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Bus

STREAM = Stream(name="a", listen=("udp://127.0.0.1:6671",))


@pytest.mark.parametrize(
    ("worker", "connect", "all_of_them"),
    [
        ("ingest.1", "", True),
        ("ingest.2", "", False),
        ("ingest.11", "", False),
        ("ingest.11", "tcp://192.0.2.10:5800", True),
        ("ingest.12", "tcp://192.0.2.10:5800", False),
    ],
)
def test_one_worker_of_a_host_has_what_cannot_be_shared(worker: str, connect: str, all_of_them: bool) -> None:
    """Paths and multicast groups are number 1's, and on a host without a broker theirs whose number ends in 1."""
    listen = ("udp://127.0.0.1:6671", "unixgram:///run/a", "udp://239.1.1.1%eth0:5514", "tcp://127.0.0.1:6671")
    stream = Stream(name="a", listen=listen)
    settings = Settings(bus=Bus(connect=connect, keys="/etc/fanwire/keys"), streams=(stream,))
    served = [str(endpoint) for _, endpoint in listeners_of(worker, settings.streams, settings)]
    assert served == [*(listen if all_of_them else (listen[0], listen[3]))]


@pytest.mark.usefixtures("lab")
def test_two_that_begin_at_once_see_each_other(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of another bus that binds the port after the first look is found by the second: nothing stays bound."""
    lock = tmp_path / "other" / "pool.1.lock"
    lock.parent.mkdir()

    def bind_both(*arguments: Any) -> list[socket.socket]:
        other = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        share_port(other)
        other.bind(("127.0.0.1", 6671))
        opened.enter_context(lock.open("w"))
        return bind_listener(*arguments)

    monkeypatch.setattr(listeners, "bind_listener", bind_both)
    settings = Settings(bus=Bus(directory=str(tmp_path / "ours")), streams=(STREAM,))
    with pytest.raises(OperatorError, match=f"of the bus in {tmp_path}/other, listens there"):
        reopen({("a", STREAM.endpoints[0]): STREAM}, {}, [], settings)
    opened.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 6671))
