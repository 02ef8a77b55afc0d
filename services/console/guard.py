"""Answers only who may ask: the Host and Origin that a browser names, a token beyond this host or to change. No socket.

A page of another site, open in the operator's browser, could let its own name lead to 127.0.0.1 (DNS rebinding). Its
requests carry that name as Host. Nor may such a page change anything (CSRF). So the credentials that a browser keeps
count only with an Origin that is our own page, and with JSON, which a browser lets no other site send unasked.
"""

import asyncio
import base64
import binascii
import hashlib
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.settings.entries import Token

HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
SCOPES: Final = frozenset({"list", "admin"})
"""Any of these lets a token's holder look."""
METHODS: Final = ("GET", "HEAD")
CHANGES: Final = "/api/admin/"
"""Below this path requests change something: by POST only, and with a token of scope `admin`, on this host too."""
ADMIN: Final = "fanwire.admin"
"""The key of a request's scope that has its `Holder`, if that has scope `admin`."""
MAY_SEE: Final = "fanwire.may_see"
"""The key of a request's scope that has a function: may an answer that lasts go on? Its token may be revoked."""
LINGER_SECONDS: Final = 1.0
LINGER_BYTES: Final = 64 * 1024
"""Time for the rest of a request that is not needed, and its size. A connection that is closed with unread bytes is
reset, and the answer may be lost on its way (RFC 9112, 9.6)."""
_PLAIN: Final = (b"content-type", b"text/plain; charset=utf-8")

Refusal = tuple[int, str, list[tuple[bytes, bytes]]]
"""A status, a sentence, and headers."""
ENDS: Final[Refusal] = 503, "the console ends, and there is no answer yet; look again once it runs", [_PLAIN]


@dataclass(frozen=True, slots=True)
class Holder:
    """The name of a `[[token]]`, and the token itself, to show to the gateway."""

    name: str
    secret: str


def by_digest(tokens: Iterable[Token]) -> dict[str, Token]:
    """Return the tokens by the digest of their secret: one is found as quickly among thousands.

    How long that takes tells nothing: nobody can choose the beginning of a digest.
    """
    return {each.hash.partition(":")[2]: each for each in tokens if each.hash}


class Guard:
    """Stands before the application: refuses what may not ask, and adds the headers that bind browsers.

    `hosts` are the names by which we may be called, None: any. `tokens` returns those of the settings, as `by_digest`
    does; `remote` says that one is needed to look.
    """

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str] | None, tokens: Callable[[], Mapping[str, Token]], *, remote: bool
    ) -> None:
        self._app = app
        self._remote = remote
        self._hosts = None if hosts is None else frozenset(hosts)
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have the application answer it."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        changes = scope["path"].startswith(CHANGES)
        refusal, token = self._refusal(scope["method"], changes, headers), None
        secret, digest = _secret_of(headers.get(b"authorization", b"")), ""
        if refusal is None:
            if secret:
                token = self._tokens().get(digest := hashlib.sha256(secret).hexdigest())
            refusal = self._lack(changes, headers, token)
        request = _Request(receive)
        if refusal is not None:
            await request.read_rest()
            await _say(send, refusal)
            return

        begun = False

        async def send_bound(message: dict[str, object]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if scope["method"] == "POST":
                    await request.read_rest()
                message["headers"] = [*message["headers"], *HEADERS]  # type: ignore[misc]
            await send(message)

        if token is not None and "admin" in token.scopes:
            scope[ADMIN] = Holder(token.name, secret.decode(errors="replace"))
        scope[MAY_SEE] = lambda: not self._remote or self._tokens().get(digest) == token
        try:
            await self._app(scope, request.receive, send_bound)  # type: ignore[arg-type]
        except asyncio.CancelledError:  # at the console's end, which does not wait for those who wait for others
            if begun:
                raise
            await _say(send, ENDS)

    def _refusal(self, method: str, changes: bool, headers: dict[bytes, bytes]) -> Refusal | None:
        """Return what speaks against a request, whoever sends it."""
        if changes and method != "POST":
            return 405, "this changes something; use POST", [_PLAIN, (b"allow", b"POST")]
        if not changes and method not in METHODS:
            return 405, "this address only shows; use GET", [_PLAIN, (b"allow", b"GET, HEAD")]
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and not _is_address(name := _name_of(host)) and name not in self._hosts:
            return 421, "the console does not know the host name in this address; add it to [console] hosts", [_PLAIN]
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            return 403, "a page of another site may not ask", [_PLAIN]
        if changes and origin is None:
            return 403, "only the console's own page may change something; other programs use the gateway", [_PLAIN]
        if changes and headers.get(b"content-type") != b"application/json":
            return 415, "the request must be application/json", [_PLAIN]
        return None

    def _lack(self, changes: bool, headers: dict[bytes, bytes], token: Token | None) -> Refusal | None:
        """Return the right that its sender lacks."""
        if self._remote and (token is None or not SCOPES & {*token.scopes}):
            return 401, "a token with scope list or admin is needed, as password or as bearer", _challenge(headers)
        if changes and token is None:
            return 401, "a known token with scope admin is needed, as bearer or as password", _challenge(headers)
        if changes and token is not None and "admin" not in token.scopes:
            return 403, f"{token.name!r} lacks scope admin; add it to its [[token]], or give another token", [_PLAIN]
        return None


async def _say(send: Send, refusal: Refusal) -> None:
    """Answer with a refusal."""
    status, text, more = refusal
    await send({"type": "http.response.start", "status": status, "headers": [*HEADERS, *more]})
    await send({"type": "http.response.body", "body": text.encode() + b"\n"})


class _Request:
    """The body of a request, piece by piece, and whether all of it has been read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._read = not message.get("more_body", False)
        return message

    async def read_rest(self) -> None:
        """Read what is left of it, within the limits, and forget it."""
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._read and size < LINGER_BYTES:
                    size += len((await self.receive()).get("body", b""))


def _challenge(headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Ask for a password, unless a token came as bearer: then our page asks, and the browser need not."""
    bearer = headers.get(b"authorization", b"").lower().startswith(b"bearer")
    how = b'Bearer realm="fanwire"' if bearer else b'Basic realm="fanwire: any name, a token as password"'
    return [_PLAIN, (b"www-authenticate", how)]


def _name_of(host: str) -> str:
    """Return a Host without its port, in lower case.

    >>> _name_of("[::1]:8080"), _name_of("Relay.example:80"), _name_of("relay")
    ('[::1]', 'relay.example', 'relay')
    """
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _is_address(name: str) -> bool:
    """Return whether a Host is an address: nobody can lead that elsewhere, and Prometheus calls Pods so."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _secret_of(authorization: bytes) -> bytes:
    """Return the token in the header, as bearer or as password; nothing where there is none."""
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
