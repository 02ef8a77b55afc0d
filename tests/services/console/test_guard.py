import asyncio
import base64
import hashlib
from typing import Any

import pytest

from services.console.guard import ADMIN, CHANGES, HEADERS, LINGER_BYTES, METHODS, Guard, by_digest
from shared.settings.entries import Token

SECRET = "x" * 40
TOKEN = Token(name="noc", hash=f"sha256:{hashlib.sha256(SECRET.encode()).hexdigest()}", scopes=("list",))
OTHER = Token(name="box", hash=f"sha256:{hashlib.sha256(b'y').hexdigest()}", scopes=("collect",))


ADMIN_SECRET = "a" * 40
ADMIN_TOKEN = Token(name="boss", hash=f"sha256:{hashlib.sha256(ADMIN_SECRET.encode()).hexdigest()}", scopes=("admin",))
TOKENS = by_digest([TOKEN, OTHER, ADMIN_TOKEN, Token(name="pem", certificate="pem", scopes=("list",))])
SAID = {
    405: ("this address only shows; use GET", "this changes something; use POST"),
    421: ("the console does not know the host name in this address; add it to [console] hosts",),
    403: (
        "a page of another site may not ask",
        "only the console's own page may change something; other programs use the gateway",
        "'noc' lacks scope admin; add it to its [[token]], or give another token",
    ),
    415: ("the request must be application/json",),
    401: (
        "a token with scope list or admin is needed, as password or as bearer",
        "a known token with scope admin is needed, as bearer or as password",
    ),
    200: ("ok", "ok, boss"),
}


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send(
        {"type": "http.response.body", "body": b"ok, " + scope[ADMIN].name.encode() if ADMIN in scope else b"ok"}
    )


def ask(
    method: str = "GET",
    *,
    path: str = "/",
    remote: bool = False,
    hosts: tuple[str, ...] | None = ("relay", "[::1]"),
    **headers: str,
) -> int:
    """The status of the answer to a request with these headers; every answer binds the browser."""
    return ask_whole(method, path, remote, hosts, headers)[0]


def ask_whole(
    method: str, path: str, remote: bool, hosts: tuple[str, ...] | None, headers: dict[str, str]
) -> tuple[int, str]:
    """The same, with the sentence."""
    said: list[dict[str, object]] = []
    body_sent = [b'{"name": ', b'"siem"}']

    async def receive() -> dict[str, object]:
        piece = body_sent.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(body_sent)}

    async def send(message: dict[str, object]) -> None:
        # Unread bytes when the connection is closed may cost the client this answer.
        assert not body_sent or (method in METHODS and message.get("status", 200) == 200)
        said.append(message)

    guard = Guard(_app, hosts, lambda: TOKENS, remote=remote)
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    assert set(HEADERS) <= set(said[0]["headers"])  # type: ignore[call-overload]
    status = said[0]["status"]
    assert isinstance(status, int)
    body = said[1]["body"]
    assert isinstance(body, bytes)
    sentence = body.decode().rstrip("\n")
    assert sentence in SAID[status]
    return status, sentence


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
        ("10.0.0.1.evil.example", 421),
        ("10.0.0.1:8443", 200),
        ("[2001:db8::1]:8443", 200),
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
    """Only what reads is answered, whatever token is shown; what changes something is below a path of its own."""
    assert ask(method, host="relay", origin="http://relay", authorization=f"Bearer {ADMIN_SECRET}") == 405
    assert ask(method, host="relay") == 405
    assert ask("HEAD", host="relay") == 200


def test_a_token_is_needed_beyond_this_host() -> None:
    """Any name with the token as password, or the token as bearer, lets in; another scope or token does not."""

    def basic(password: str) -> str:
        return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()

    assert ask(host="relay", remote=True) == 401
    for right in (basic(SECRET), f"Bearer {SECRET}", f"bearer {SECRET}"):
        assert ask(host="relay", remote=True, authorization=right) == 200
    for wrong in (
        basic("y"),
        "Bearer y",
        "Bearer",
        "Basic !",
        "Digest x",
        "Basic " + base64.b64encode(b"no colon").decode(),
    ):
        assert ask(host="relay", remote=True, authorization=wrong) == 401


RIGHT = {
    "host": "relay:8080",
    "origin": "http://relay:8080",
    "content-type": "application/json",
    "authorization": f"Bearer {ADMIN_SECRET}",
}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("method", "changes", "status", "sentence"),
    [
        ("POST", {}, 200, "ok, boss"),
        ("POST", {"authorization": "Basic " + base64.b64encode(f"x:{ADMIN_SECRET}".encode()).decode()}, 200, ""),
        ("GET", {}, 405, "this changes something; use POST"),
        ("HEAD", {}, 405, "this changes something"),
        ("PUT", {}, 405, "this changes something"),
        ("OPTIONS", {}, 405, "this changes something"),
        ("POST", {"host": "evil.example", "origin": "http://evil.example"}, 421, "does not know the host name"),
        ("POST", {"origin": "http://evil.example"}, 403, "a page of another site"),
        ("POST", {"origin": "null"}, 403, "a page of another site"),
        ("POST", {"origin": None}, 403, "only the console's own page"),
        ("POST", {"content-type": "text/plain"}, 415, "the request must be application/json"),
        ("POST", {"content-type": None}, 415, "the request must be application/json"),
        ("POST", {"authorization": None}, 401, "a"),
        ("POST", {"authorization": "Bearer unknown"}, 401, "a"),
        ("POST", {"authorization": f"Bearer {SECRET}"}, 403, "'noc' lacks scope admin"),
    ],
)
def test_only_an_admin_changes_something(
    method: str, changes: dict[str, str | None], status: int, sentence: str, remote: bool
) -> None:
    """A change is asked for by POST, by our page, as JSON, with a token of scope admin, on this host too."""
    headers = {name: value for name, value in {**RIGHT, **changes}.items() if value is not None}
    found = ask_whole(method, f"{CHANGES}remove", remote, ("relay",), headers)
    assert found[0] == status
    assert sentence in found[1]


@pytest.mark.parametrize("comes", [True, False])
def test_no_more_is_read_of_a_refused_request_than_needed(monkeypatch: pytest.MonkeyPatch, comes: bool) -> None:
    """Of a request that is refused a limited part is read, for a limited time: then it is answered."""
    monkeypatch.setattr("services.console.guard.LINGER_SECONDS", 0.01)
    read, said = 0, list[object]()

    async def receive() -> dict[str, object]:
        nonlocal read
        if not comes:
            await asyncio.Event().wait()
        read += 5000
        return {"type": "http.request", "body": bytes(5000), "more_body": True}

    async def send(message: dict[str, object]) -> None:
        said.append(message.get("status"))

    guard = Guard(_app, None, dict, remote=False)
    scope = {"type": "http", "method": "POST", "path": f"{CHANGES}remove", "headers": []}
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    assert said == [403, None]
    assert read < LINGER_BYTES + 5000


def test_who_may_change_something_is_told_to_the_page() -> None:
    """A request that only shows has the admin's name with it where the token is an admin's, and else nobody's."""
    for secret, sentence in ((ADMIN_SECRET, "ok, boss"), (SECRET, "ok"), ("unknown", "ok")):
        headers = {"host": "relay", "authorization": f"Bearer {secret}"}
        assert ask_whole("GET", "/api/rights", False, ("relay",), headers) == (200, sentence)


class Counted(dict[str, Token]):
    """Tokens that count how often they are looked at."""

    looks = 0

    def get(self, key: str, default: Any = None) -> Any:
        """Look one up."""
        self.looks += 1
        return super().get(key, default)

    def __iter__(self) -> Any:
        raise AssertionError("it looks at all of them")


def test_a_request_costs_no_more_where_there_are_many_tokens() -> None:
    """A token is looked up once, and only for a request that may be answered; nothing is no token."""
    empty = Token(name="empty", hash=f"sha256:{hashlib.sha256(b'').hexdigest()}", scopes=("list",))
    tokens = Counted({**TOKENS, **by_digest([empty])})
    guard = Guard(_app, ("relay",), lambda: tokens, remote=True)

    def status(method: str, host: str, *authorization: bytes) -> tuple[object, int]:
        said: list[Any] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            said.append(message)

        raw = [(b"host", host.encode()), *((b"authorization", each) for each in authorization)]
        scope = {"type": "http", "method": method, "path": "/", "headers": raw}
        tokens.looks = 0
        asyncio.run(guard(scope, receive, send))
        return said[0]["status"], tokens.looks

    shown = f"Bearer {SECRET}".encode()
    assert status("POST", "relay", shown) == (405, 0)
    assert status("GET", "evil.example", shown) == (421, 0)
    assert status("GET", "relay", shown) == (200, 1)
    assert status("GET", "relay", b"Bearer nonsense") == (401, 1)
    assert status("GET", "relay", b"Bearer ") == status("GET", "relay") == (401, 0)


@pytest.mark.parametrize("begun", [False, True])
def test_what_the_end_cuts_is_said_to_be_cut(begun: bool) -> None:
    """An answer that does not come before the console ends is a sentence instead; one that has begun just stops."""
    said = list[Any]()

    async def waiting(_scope: Any, _receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        said.append(message)

    async def cut() -> None:
        guard = Guard(waiting, None, dict, remote=False)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        task = asyncio.ensure_future(guard(scope, None, send))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cut())
    assert [message.get("status") for message in said] == ([200] if begun else [503, None])
    assert begun or said[1]["body"] == b"the console ends, and there is no answer yet; look again once it runs\n"
