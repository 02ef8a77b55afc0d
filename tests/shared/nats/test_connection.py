from itertools import islice, pairwise

from shared.nats.connection import OWN_TRIES, rotated
from shared.settings.uplink import Uplink

SERVERS = tuple(f"nats://127.0.0.1:{port}" for port in (1, 2, 3))


def tried(nodes: tuple[str, ...]) -> list[int]:
    """The ports of the servers that are tried first."""
    uplink = Uplink(servers=SERVERS, site="a", nodes=nodes)
    return [each.port for each in islice(rotated(uplink), 2 * (OWN_TRIES + 1))]


def test_a_site_tries_all_servers_in_turn() -> None:
    """Servers are tried in turn, from any of them on: that of the site's own choice is as good as the others."""
    assert all(later == earlier % 3 + 1 for earlier, later in pairwise(tried(())))
    assert {tried(())[0] for _ in range(100)} == {1, 2, 3}


def test_a_node_prefers_its_own_server() -> None:
    """A node tries the server that its settings name first again and again, and each other one in between."""
    assert tried(("a", "b")) == [*[1] * OWN_TRIES, 2, *[1] * OWN_TRIES, 3]
