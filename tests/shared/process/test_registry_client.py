import socket
from pathlib import Path

import pytest

from shared.net.addresses import parse_endpoint
from shared.process import registry_client
from shared.process.registry_client import Access, RegistryClient, UnreachableError


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
