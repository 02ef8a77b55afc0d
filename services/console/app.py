"""The routes: the page and its parts, events, details, one datagram, changes, metrics, and health for programs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from services.console.admin import Admin, Said
from services.console.bus_watch import PICTURE_SECONDS, Watch
from services.console.guard import ADMIN, CHANGES, MAY_SEE
from services.console.metrics import exporter_metrics, render, stack_metrics
from services.console.one_datagram import Sampler
from services.console.views import Wish, show, show_collector, show_exporter, show_stream
from shared.monitoring.picture import Picture

PAGE: Final = Path(__file__).parent / "page"
PARTS: Final = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "flow.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
    "details.js": "text/javascript; charset=utf-8",
    "admin.js": "text/javascript; charset=utf-8",
    "drawing.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Files of the page, and their types."""
MAX_PAGES: Final = 200
MAX_TOP: Final = 1000
MAX_TEXT: Final = 256
MAX_BODY: Final = 4096
"""Bytes of a request that changes something: a name, and little else."""
START_SECONDS: Final = 1.5
"""Time that a request for `/readyz` waits for: less than deploy/ha and probes give an answer."""
LOOK_SECONDS: Final = 0.2
UNCACHED: Final = {"cache-control": "no-store"}
T = TypeVar("T")


class _Removal(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    generation: int


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    reason: str = ""


class _Release(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _Probe(msgspec.Struct, forbid_unknown_fields=True):
    stream: str


class Console:
    """Answers requests from what the watch knows."""

    def __init__(self, watch: Watch, sampler: Sampler, admin: Admin, version: str) -> None:
        self.admin = admin
        self._watch = watch
        self._sampler = sampler
        self._version = version
        self._shown: dict[tuple[Wish, bool], tuple[int, bytes]] = {}
        """The last event of each kind, which pages that see the same share, with the number of its picture."""
        self._rendered: tuple[Picture | None, dict[str, bytes]] = (None, {})
        """The last picture whose metrics were asked for, and its texts: scrapes of one second share them."""

    def application(self) -> Starlette:
        """Return the application."""
        routes: dict[str, Callable[[Request], Any]] = {
            "/": self._page,
            "/events": self._events,
            "/api/collectors/{name:path}": self._collector,
            "/api/exporters/{name:path}": self._exporter,
            "/api/streams/{name:path}": self._stream_detail,
            "/api/datagram": self._datagram,
            "/api/rights": self._rights,
            "/metrics": self._metrics,
            "/metrics/exporters": self._exporter_metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/{part}": self._part,
        }
        changes: dict[str, Callable[[Request], Any]] = {
            "remove": self._remove,
            "withhold": self._withhold,
            "release": self._release,
            "probe": self._probe,
        }
        return Starlette(
            routes=[
                *(Route(path, answer, methods=["GET"]) for path, answer in routes.items()),
                *(Route(CHANGES + change, answer, methods=["POST"]) for change, answer in changes.items()),
            ]
        )

    async def _page(self, _request: Request) -> Response:
        return FileResponse(PAGE / "page.html", media_type=PARTS["page.html"], headers={"cache-control": "no-cache"})

    async def _part(self, request: Request) -> Response:
        name = request.path_params["part"]
        if name not in PARTS:
            return PlainTextResponse("there is nothing here; the page is at /", 404)
        return FileResponse(PAGE / name, media_type=PARTS[name], headers={"cache-control": "no-cache"})

    async def _events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream", headers=UNCACHED)
        if self._watch.pages >= MAX_PAGES:
            return PlainTextResponse(f"{MAX_PAGES} pages are open already", 503)
        query = request.query_params
        wish = Wish(
            query.get("collectors", "trouble"), query.get("exporters", "rate"), query.get("text", "")[:MAX_TEXT]
        )
        return StreamingResponse(
            self._stream(wish, request.scope[MAY_SEE]), media_type="text/event-stream", headers=UNCACHED
        )

    async def _stream(self, wish: Wish, may_see: Callable[[], bool]) -> AsyncIterator[bytes]:
        self._watch.pages += 1
        try:
            self._watch.current()
            yield b"retry: 2000\n\n" + self._event(wish, whole=True)
            seen = self._watch.number
            while not self._watch.closing:
                seen = await self._watch.next_picture(seen)
                if not may_see():
                    return
                if not self._watch.closing:
                    yield self._event(wish, whole=False)
        finally:
            self._watch.pages -= 1

    def _event(self, wish: Wish, *, whole: bool) -> bytes:
        number, event = self._shown.get((wish, whole), (-1, b""))
        watch = self._watch
        if number != watch.number:
            view = show(watch.picture, watch.history, wish, watch.clock_offset, whole=whole)
            view["version"] = self._version
            event = b"data: " + msgspec.json.encode(view) + b"\n\n"
            self._shown = {key: told for key, told in self._shown.items() if told[0] == watch.number}
            self._shown[wish, whole] = watch.number, event
        return event

    async def _collector(self, request: Request) -> Response:
        name, watch = request.path_params["name"], self._watch
        found = [each for each in watch.current().collectors or () if each.client.name == name]
        return self._detail("collector", name, show_collector(found[0], watch.clock_offset) if found else None)

    async def _exporter(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = [each for each in self._watch.current().exporters or () if each.address == name]
        return self._detail("exporter", name, show_exporter(found[0]) if found else None)

    async def _stream_detail(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = [each for each in self._watch.current().streams if each.name == name]
        return self._detail("stream", name, show_stream(found[0]) if found else None)

    def _detail(self, kind: str, name: str, row: dict[str, Any] | None) -> Response:
        history = self._watch.history
        past = {"rates": history.rates(kind, name), "losses": history.losses(kind, name)}
        return _json({"kind": kind, "name": name, "row": row, "at": self._watch.picture.at, **past})

    async def _datagram(self, request: Request) -> Response:
        query = request.query_params
        found = await self._sampler.next_datagram(
            self._watch.observer.clients,
            stream=query.get("stream"),
            collector=query.get("collector"),
            exporter=query.get("exporter"),
            streams=[each.name for each in self._watch.picture.streams],
        )
        return _json(found)

    async def _rights(self, request: Request) -> Response:
        return _json({"admin": ADMIN in request.scope})

    async def _remove(self, request: Request) -> Response:
        if (asked := await _read(request, _Removal)) is None:
            return PlainTextResponse("expected a JSON object with the fields name and generation", 400)
        return _said(await self.admin.remove(request.scope[ADMIN], asked.name, asked.generation))

    async def _withhold(self, request: Request) -> Response:
        if (asked := await _read(request, _Order)) is None:
            return PlainTextResponse("expected a JSON object with the field name, and reason", 400)
        return _said(await self.admin.withhold(request.scope[ADMIN], asked.name, asked.reason))

    async def _release(self, request: Request) -> Response:
        if (asked := await _read(request, _Release)) is None:
            return PlainTextResponse("expected a JSON object with the field name", 400)
        return _said(await self.admin.release(request.scope[ADMIN], asked.name))

    async def _probe(self, request: Request) -> Response:
        if (asked := await _read(request, _Probe)) is None:
            return PlainTextResponse("expected a JSON object with the field stream", 400)
        return _said(await self.admin.probe(request.scope[ADMIN], asked.stream))

    async def _metrics(self, request: Request) -> Response:
        picture = self._watch.current()
        if picture is not self._rendered[0]:
            self._rendered = picture, {}
        return _exposition(request, stack_metrics(picture, self._watch.clock_offset, self._version), self._rendered[1])

    async def _exporter_metrics(self, request: Request) -> Response:
        top = request.query_params.get("top", "50")
        if not (top.isascii() and top.isdigit() and len(top) <= len(str(MAX_TOP)) and 1 <= int(top) <= MAX_TOP):
            return PlainTextResponse(f"top: expected a number from 1 to {MAX_TOP}", 400)
        return _exposition(request, exporter_metrics(self._watch.current(), int(top)), {})

    async def _healthz(self, _request: Request) -> Response:
        return PlainTextResponse("the console runs\n", headers=UNCACHED)

    async def _readyz(self, _request: Request) -> Response:
        """Answer 200 only while copies flow: every service reports, and every collector is served.

        A console that has just been started waits until it has heard that: its restart is no trouble of the relay.
        """
        deadline = time.monotonic() + START_SECONDS
        while (reasons := self._unready()) and self._watch.is_new and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)
        text = "\n".join(reasons) if reasons else "copies flow"
        return PlainTextResponse(text + "\n", 503 if reasons else 200, headers=UNCACHED)

    def _unready(self) -> list[str]:
        """Return why copies do not flow, or may not."""
        picture = self._watch.current(LOOK_SECONDS if self._watch.is_new else PICTURE_SECONDS)
        waiting = [each.client.name for each in picture.collectors or () if each.health in ("waiting", "unknown")]
        silent = [reason for reason in picture.verdict.reasons if reason.startswith(("not heard", "no service"))]
        if picture.collectors is None:
            silent.append("the registry is not known yet")
        if waiting:
            silent.append(f"copies do not flow to: {', '.join(waiting[:10])}")
        return silent


def _exposition(request: Request, metrics: Iterable[Metric], rendered: dict[str, bytes]) -> Response:
    body, content_type = render(metrics, request.headers.get("accept", ""), rendered)
    return Response(body, media_type=None, headers={"content-type": content_type, **UNCACHED})


async def _read(request: Request, kind: type[T]) -> T | None:
    """Return the body of a request; None when it is something else, too long, or its sender has gone."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                return None
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ClientDisconnect):
        return None


def _said(said: Said) -> Response:
    status, sentence = said
    return PlainTextResponse(sentence, status, headers=UNCACHED)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", headers=UNCACHED)
