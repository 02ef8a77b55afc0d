import socket
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from shared.net.addresses import parse_endpoint
from shared.process import registry_client
from shared.process.registry_client import Access, RegistryClient, UnreachableError
from tests.network import End, Host, veth


def test_gateway_that_accepts_nobody_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client waits for an AF_UNIX listener whose queue is full as long as for one by TCP, and then says so."""
    monkeypatch.setattr(registry_client, "CONNECT_SECONDS", 0.02)
    endpoint = parse_endpoint(f"unix://{tmp_path}/gateway", ("unix",))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(endpoint.path)
        listener.listen(0)
        clients: list[RegistryClient] = []
        with pytest.raises(UnreachableError, match=r"no gateway at unix:.*\(timed out\)"):
            clients.extend(RegistryClient(Access(endpoint), 1) for _ in range(9))
        assert clients
        for client in clients:
            client.close()


def test_a_resolver_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's name without an answer is as a gateway without an answer: the message says so."""
    let_go = Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: let_go.wait() and [])
    monkeypatch.setattr(registry_client, "CONNECT_SECONDS", 0.02)
    endpoint = parse_endpoint("tcp://silent.example:7600", ("tcp",))
    for _ in range(2):
        with pytest.raises(
            UnreachableError, match=r"no gateway at tcp://silent.example:7600 \(no answer within 0.02 s\)"
        ):
            RegistryClient(Access(endpoint), 1)
    let_go.set()


def test_a_gateway_at_a_link_local_address(lab: None) -> None:
    """The interface behind `%` says by which link it is reached."""
    with Host() as here, Host() as there, veth(End(here, "up"), End(there, "eth", "fe80::5/64")):
        listener = there.socket(socket.AF_INET6, socket.SOCK_STREAM)
        with closing(listener), here.entered():
            listener.bind(("::", 0))
            listener.listen()
            endpoint = parse_endpoint(f"tcp://[fe80::5%up]:{listener.getsockname()[1]}", ("tcp",))
            RegistryClient(Access(endpoint), 1).close()


def test_each_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address takes no connection, the second one does; where none does the message says why."""
    asks = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        names = ("127.0.0.2", "127.0.0.1") if host == "both.example" else (host,)
        return [each for name in names for each in asks(name, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        endpoint = parse_endpoint(f"tcp://both.example:{listener.getsockname()[1]}", ("tcp",))
        RegistryClient(Access(endpoint), 1).close()
    with pytest.raises(UnreachableError, match="Connection refused"):
        RegistryClient(Access(endpoint), 1)
