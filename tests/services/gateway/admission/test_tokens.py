import contextlib
import hashlib
import hmac
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.rights import NOBODY, Rights
from services.gateway.admission.tokens import Tokens, common_name
from services.gateway.protocol.requests import RequestError
from shared.settings.entries import Token
from shared.settings.values import Scope


def token(name: str, secret: str, *scopes: Scope, **fields: Any) -> Token:
    """An entry for that secret."""
    return Token(name=name, hash=f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}", scopes=scopes, **fields)


TOKENS = Tokens(
    [
        token("first", "secret 1", "list"),
        Token(name="router", certificate="router 7", scopes=("collect", "list")),
        token("last", "secret 2", "collect", streams=("netflow",), destinations=("10.2.0.0/24", "fd00::/8")),
    ],
    names_beyond_loopback=True,
)


def test_a_token_gives_its_holders_rights() -> None:
    """Each token finds its own entry, with its scopes, streams and destinations."""
    assert TOKENS.rights_of_token("secret 1") == Rights("first", frozenset({"list"}))
    last = TOKENS.rights_of_token("secret 2")
    assert (last.holder, last.scopes, last.names) == ("last", frozenset({"collect"}), False)
    addresses = ("10.2.0.9", "fd00::9", "10.3.0.9", "fe80::1")
    assert [last.may_send_to(ip_address(address)) for address in addresses] == [True, True, False, False]
    last.check_streams(["netflow"])
    for wanted in (["*"], ["netflow", "syslog"]):
        with pytest.raises(RequestError, match="'last' may sign up for these streams only: netflow"):
            last.check_streams(wanted)


@given(st.text() | st.sampled_from(["", "secret 1 ", "secret", "router 7", "SECRET 1"]))
def test_wrong_tokens_are_all_refused_alike(wrong: str) -> None:
    """The answer to any wrong token is the same, and says nothing of the right ones."""
    with pytest.raises(RequestError) as refused:
        TOKENS.rights_of_token(wrong)
    assert refused.value.error == "not_permitted"
    assert str(refused.value) == "unknown token; the operator makes one with `fanwire token`"


def test_every_token_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is the same for the first, the last and a wrong one: a hash, and a comparison with each there is."""
    compared: list[bool] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append(ours == theirs)
        return ours == theirs

    monkeypatch.setattr(hmac, "compare_digest", compare)
    work = []
    for secret in ("secret 1", "secret 2", "wrong", ""):
        compared.clear()
        with contextlib.suppress(RequestError):
            TOKENS.rights_of_token(secret)
        work.append(list(compared))
    assert work == [[True, False], [False, True], [False, False], [False, False]]


def test_a_certificate_gives_its_holders_rights() -> None:
    """A certificate counts by its subject's common name, if there is exactly one; unknown ones give no rights."""
    subject = ((("organizationName", "Lab"),), (("commonName", "router 7"),))
    assert common_name({"subject": subject}) == "router 7"
    rights = TOKENS.rights_of_certificate("router 7")
    assert (rights.holder, rights.scopes, rights.names) == ("router", frozenset({"collect", "list"}), True)
    assert common_name({"subject": (*subject, (("commonName", "second"),))}) is None
    assert [common_name(each) for each in (None, {}, {"subject": ()})] == [None] * 3
    for unknown in (None, "router 8", "first", "router"):
        assert TOKENS.rights_of_certificate(unknown) == NOBODY
