import json

import pytest

from services.gateway.protocol.names_answer import BLOCK, NamesList
from shared.client import Client


def listed(clients: dict[str, Client]) -> str:
    """The list as the documented server prints it."""
    return json.dumps(
        {name: {"address": client.address, "port": client.port, "name": name} for name, client in clients.items()}
    )


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_list_is_what_json_dumps_prints(count: int) -> None:
    """The rendered list is `json.dumps` to the byte, in order of first registration, after changes and removals too."""
    names, clients = NamesList(), {}
    for number in range(count):
        name = f'n{number} "é\u2028'
        clients[name] = Client(name, 0, "127.0.0.1", number)
        names.put(clients[name])
        assert number % 50 or b"".join(names.render()) == listed(clients).encode()
    for name in list(clients)[: count // 2]:
        names.remove(name)
        del clients[name]
    for name in list(clients)[::3]:
        clients[name] = Client(name, 0, "::1", 1)
        names.put(clients[name])
    assert b"".join(names.render()) == listed(clients).encode()
