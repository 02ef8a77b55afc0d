import asyncio
import base64
import hashlib

import pytest

from services.console.guard import HEADERS, Guard
from shared.settings.model import Token

SECRET = "x" * 40
TOKEN = Token(name="noc", hash=f"sha256:{hashlib.sha256(SECRET.encode()).hexdigest()}", scopes=("list",))
OTHER = Token(name="box", hash=f"sha256:{hashlib.sha256(b'y').hexdigest()}", scopes=("collect",))


SAID = {
    405: "this service only shows; use GET",
    421: "the console does not know the host name in this address; add it to [console] hosts",
    403: "a page of another site may not ask",
    401: "a token with scope list or admin is needed, as password or as bearer",
    200: "ok",
}


async def _app(scope: object, receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]


def ask(
    method: str = "GET", *, tokens: bool = False, hosts: tuple[str, ...] | None = ("relay", "[::1]"), **headers: str
) -> int:
    """The status of the answer to a request with these headers; every answer binds the browser."""
    said: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        said.append(message)

    guard = Guard(_app, hosts, (lambda: [TOKEN, OTHER]) if tokens else None)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "headers": raw}
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    assert set(HEADERS) <= set(said[0]["headers"])  # type: ignore[call-overload]
    status = said[0]["status"]
    assert isinstance(status, int)
    assert said[1]["body"] == SAID[status].encode() + b"\n" * (status != 200)
    return status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("relay", 200),
        ("relay:8080", 200),
        ("RELAY", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("", 421),
        ("relay.evil:80", 421),
    ],
)
def test_a_name_that_is_not_ours_is_refused(host: str, status: int) -> None:
    """A page that lets its own name lead here (DNS rebinding) gets nothing; a proxy by a path may call any name."""
    assert ask(host=host) == status
    assert ask(host=host, hosts=None) == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://relay:8080", 200), ("http://evil.example", 403), ("null", 403), ("https://relay", 403)],
)
def test_a_page_of_another_site_is_refused(origin: str, status: int) -> None:
    """A request that names another site as its origin is refused."""
    assert ask(host="relay:8080", origin=origin) == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(method: str) -> None:
    """Only what reads is answered."""
    assert ask(method, host="relay") == 405
    assert ask("HEAD", host="relay") == 200


def test_a_token_is_needed_beyond_this_host() -> None:
    """Any name with the token as password, or the token as bearer, lets in; another scope or token does not."""

    def basic(password: str) -> str:
        return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()

    assert ask(host="relay", tokens=True) == 401
    for right in (basic(SECRET), f"Bearer {SECRET}", f"bearer {SECRET}"):
        assert ask(host="relay", tokens=True, authorization=right) == 200
    for wrong in (
        basic("y"),
        "Bearer y",
        "Bearer",
        "Basic !",
        "Digest x",
        "Basic " + base64.b64encode(b"no colon").decode(),
    ):
        assert ask(host="relay", tokens=True, authorization=wrong) == 401
