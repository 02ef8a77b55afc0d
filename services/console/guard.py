"""Answers only who may ask: the Host and Origin that a browser names, and a token beyond this host. No socket.

A page of another site, open in the operator's browser, could let its own name lead to 127.0.0.1 (DNS rebinding). Its
requests carry that name as Host.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Iterable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from shared.settings.model import Token

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


class Guard:
    """Stands before the application: refuses what may not ask, and adds the headers that bind browsers.

    `hosts` are the names by which we may be called, None: any. `tokens`, where there is a need for one, returns those
    that let their holders in.
    """

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str] | None, tokens: Callable[[], Iterable[Token]] | None = None
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have the application answer it."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["method"], headers)
        if refusal is not None:
            status, text, more = refusal
            await send({"type": "http.response.start", "status": status, "headers": [*HEADERS, *more]})
            await send({"type": "http.response.body", "body": text.encode() + b"\n"})
            return

        async def send_bound(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]  # type: ignore[misc]
            await send(message)

        await self._app(scope, receive, send_bound)  # type: ignore[arg-type]

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        plain = [(b"content-type", b"text/plain; charset=utf-8")]
        if method not in METHODS:
            return 405, "this service only shows; use GET", [*plain, (b"allow", b"GET, HEAD")]
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            return 421, "the console does not know the host name in this address; add it to [console] hosts", plain
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            return 403, "a page of another site may not ask", plain
        if self._tokens is not None and not _is_known(headers.get(b"authorization", b""), self._tokens()):
            challenge = (b"www-authenticate", b'Basic realm="fanwire: any name, a token as password"')
            return 401, "a token with scope list or admin is needed, as password or as bearer", [*plain, challenge]
        return None


def _name_of(host: str) -> str:
    """Return a Host without its port, in lower case.

    >>> _name_of("[::1]:8080"), _name_of("Relay.example:80"), _name_of("relay")
    ('[::1]', 'relay.example', 'relay')
    """
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _is_known(authorization: bytes, tokens: Iterable[Token]) -> bool:
    """Return whether this is one of the tokens, compared with each in constant time."""
    kind, _, value = authorization.partition(b" ")
    secret = value.strip()
    if kind.lower() == b"basic":
        try:
            secret = base64.b64decode(secret, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif kind.lower() != b"bearer":
        return False
    digest = hashlib.sha256(secret).hexdigest()
    known = [token.hash.partition(":")[2] for token in tokens if token.hash and SCOPES & {*token.scopes}]
    return True in [hmac.compare_digest(digest, each) for each in known]
