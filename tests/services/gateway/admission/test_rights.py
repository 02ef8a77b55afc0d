import pytest

from services.gateway.admission.rights import HERE, NOBODY, Rights
from services.gateway.protocol.requests import (
    Auth,
    Confirm,
    Leave,
    ListClients,
    ListStreams,
    Octets,
    Register,
    Release,
    Renew,
    Request,
    RequestError,
    SignUp,
    Transmit,
    WatchClients,
    Withhold,
)
from shared.settings.values import Scope

REQUESTS: dict[str, Request] = {
    "auth": Auth(token="x"),
    "list": ListClients(),
    "watch": WatchClients(),
    "streams": ListStreams(),
    "register": Register(name="c"),
    "renew": Renew(name="c", generation=1),
    "leave": Leave(name="c", generation=1),
    "withhold": Withhold(name="c"),
    "release": Release(name="c"),
    "confirm": Confirm(name="c", nonce="n"),
    "transmit": Transmit(interface="eth0", frame=Octets(bytes(14))),
    "name": SignUp("c"),
}
ENTRIES = {"register", "renew", "leave", "confirm"}
LISTS = {"list", "watch", "streams"}


def allowed(rights: Rights) -> set[str]:
    """The requests that these rights are enough for."""
    found = set()
    for name, request in REQUESTS.items():
        try:
            rights.check(request)
            found.add(name)
        except RequestError as refused:
            error = refused.error
            assert error == "not_permitted", name
    return found


@pytest.mark.parametrize(
    ("scopes", "names", "expected"),
    [
        ({"list"}, False, LISTS),
        ({"collect"}, False, ENTRIES),
        ({"transmit"}, False, {"transmit"}),
        ({"list", "collect"}, False, LISTS | ENTRIES),
        ({"list", "collect"}, True, {*LISTS, *ENTRIES, "name"}),
        ({"collect"}, True, ENTRIES),
        ({"list"}, True, LISTS),
        ({"admin"}, False, REQUESTS.keys() - {"auth", "name"}),
        ({"admin"}, True, REQUESTS.keys() - {"auth"}),
    ],
)
def test_each_scope_allows_its_requests(scopes: set[Scope], names: bool, expected: set[str]) -> None:
    """A scope is enough for its own requests and no others; a name takes two, and that names are taken at all."""
    assert allowed(Rights("siem", frozenset(scopes), names=names)) == {*expected, "auth"}


def test_without_a_token_it_depends_on_where_one_is() -> None:
    """On this host everything may be asked for; from elsewhere nothing but who one is."""
    assert allowed(HERE) == REQUESTS.keys()
    assert allowed(NOBODY) == {"auth"}
