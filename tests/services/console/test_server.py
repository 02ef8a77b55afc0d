"""The console as a process: what it costs nobody, and how it ends."""

import asyncio
import json
import re
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, cast

from services.console.admin import Admin
from services.console.bus_watch import Watch
from services.console.guard import Holder
from shared.settings.model import Settings
from shared.settings.tables import Gateway
from tests.certificates import Authority
from tests.services.gateway.transport.test_tls import entry
from tests.stack import DRAIN_SECONDS, PATIENT, Stack, ask_json, wait_until

PAGES = 50


def fetch(path: str, at: str = "http://127.0.0.1:8080", **more: Any) -> tuple[int, str]:
    """The status and the text of an answer; `more` are the headers of the request, its body, and the TLS context."""
    context, data = more.pop("context", None), more.pop("data", None)
    try:
        with urllib.request.urlopen(
            urllib.request.Request(at + path, data, headers=more), timeout=60, context=context
        ) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def change(what: str, body: object, secret: str = "secret boss") -> tuple[int, str]:
    """The answer to our own page, when it asks for a change with this token."""
    return fetch(
        f"/api/admin/{what}",
        data=json.dumps(body).encode(),
        Origin="http://127.0.0.1:8080",
        Authorization=f"Bearer {secret}",
        **{"Content-Type": "application/json"},
    )


def status_of(path: str) -> int:
    """The status of an answer."""
    return fetch(path)[0]


def open_page() -> socket.socket:
    """A page that takes events: the first one has come."""
    page = socket.create_connection(("127.0.0.1", 8080), timeout=60)
    page.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    received = b""
    while b"\ndata: {" not in received:
        received += page.recv(65536)
    return page


def test_it_ends_in_time_however_many_pages_are_open(stack: Stack) -> None:
    """SIGTERM ends it within two seconds and with 0 while 50 pages are open; ready is said while copies flow only."""
    stack.configure(PATIENT)
    stack.start("broker")
    first = stack.start("console")
    assert fetch("/healthz") == (200, "the console runs\n")
    status, text = fetch("/readyz")
    assert (status, "the registry is not known yet" in text) == (503, True)
    assert "not heard on the bus" in text or "no service has reported yet" in text
    assert status_of("/") == 200
    assert fetch("/api/datagram?stream=nope") == (200, '{"error":"no such stream has reported"}')
    assert fetch("/api/datagram?collector=nope") == (200, '{"error":"no such collector is signed up"}')
    second = stack.start("console", ready=False)
    assert second.process.wait(60) == 1
    assert f"in use by process {first.process.pid} (" in second.text
    stack.running.remove(second)
    assert (status_of("/../__main__.py"), status_of("/nothing"), status_of("/metrics/exporters?top=0")) == (
        404,
        404,
        400,
    )
    for name in ("gateway", "forwarder", "ingest"):
        stack.start(name)
    ask_json({"op": "register", "name": "siem", "streams": ["messages"], "port": 9514})
    wait_until(lambda: fetch("/readyz") == (200, "copies flow\n"), lambda: f"copies flow: {fetch('/readyz')}")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(fetch, "/api/datagram?stream=messages")
        stack["forwarder"].process.send_signal(signal.SIGSTOP)
        wait_until(lambda: "copies do not flow to: siem" in fetch("/readyz")[1], "a sender that hangs is noticed")
        stack["forwarder"].process.send_signal(signal.SIGCONT)
        wait_until(lambda: status_of("/readyz") == 200, "copies flow again")
        assert waiting.result() == (200, '{"error":"no such datagram came within 5 s"}')
    unusable = "/api/datagram?stream=messages&exporter=nope"
    assert fetch(unusable) == (200, '{"error":"the exporter is not an IP address"}')
    with ExitStack() as pages:
        for _ in range(PAGES):
            pages.enter_context(open_page())
        began = time.monotonic()
        assert stack["console"].stop(signal.SIGTERM) == 0
        took = time.monotonic() - began
    assert took < 4, f"{took} s, with {PAGES} pages"  # two on a machine that is not busy


def test_nobody_waits_for_one_that_stands_still(stack: Stack) -> None:
    """While the console is stopped copies flow as before and the ledger is balanced; then it catches up."""
    stack.configure(PATIENT)
    stack.start_all()
    console = stack.start("console")
    ask_json({"op": "register", "name": "siem", "streams": ["messages"], "port": 9514})
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as siem,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        siem.bind(("127.0.0.1", 9514))
        siem.settimeout(60)
        console.process.send_signal(signal.SIGSTOP)
        try:
            for number in range(500):
                sender.sendto(str(number).encode(), ("127.0.0.1", 6667))
                assert siem.recv(100) == str(number).encode()
            ledger = stack.operator("ledger", "--json")
            assert ledger.process.wait(60) == 0, ledger.text
            (account,) = [
                account
                for kept in json.loads(ledger.text)["services"].values()
                for name, account in kept.items()
                if name == "collector/siem"
            ]
            assert account["sent"] == 500
        finally:
            console.process.send_signal(signal.SIGCONT)
    wait_until(
        lambda: (
            b'fanwire_copies_sent_total{collector="siem"} 500.0'
            in urllib.request.urlopen("http://127.0.0.1:8080/metrics", timeout=60).read()
        ),
        "it has the numbers",
    )


def test_without_its_extra_it_stays_and_says_so(stack: Stack) -> None:
    """Without a web server it stays up, names what is missing in one line, and ends with 0."""
    stack.start("broker")
    hide = "import sys, runpy; sys.modules['uvicorn'] = None; import importlib.util as u; f = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'uvicorn' else f(name, *a)\n"
    hide += "sys.argv[0] = 'console'; runpy.run_module('services.console', run_name='__main__')"
    stack.interpreter, stack.by_exec = [sys.executable, "-c", hide], True  # a fork would have loaded it
    running = stack.spawn("console", stack.interpreter)
    running.wait_for("pip install 'fanwire[console]'")
    assert len(running.text.splitlines()) <= 2
    assert running.stop() == 0


def test_beyond_this_host_by_tls_and_token(stack: Stack) -> None:
    """An https:// listener shows the gateway's certificate, and answers only those that have a token."""
    authority = Authority(stack.directory)
    certificate, key = authority.sign("gateway")
    settings = f'[gateway]\ncertificate = "{certificate}"\nkey = "{key}"\n'
    console_settings = settings + '[console]\nlisten = ["https://0.0.0.0:8443"]\nhosts = ["localhost"]\n'
    stack.configure(console_settings + entry("noc", "list"))
    stack.start("broker")
    console = stack.start("console")
    context = ssl.create_default_context(cafile=authority.certificate)
    at = "https://localhost:8443"
    assert fetch("/healthz", at, context=context)[0] == 401
    assert fetch("/healthz", at, context=context, Authorization="Bearer wrong")[0] == 401
    assert fetch("/healthz", at, context=context, Authorization="Bearer secret noc")[0] == 200
    assert fetch("/healthz", at, context=context, Authorization="Bearer secret noc", Host="evil.example")[0] == 421
    assert ssl.get_server_certificate(("localhost", 8443)) == certificate.read_text()
    with context.wrap_socket(socket.create_connection(("localhost", 8443)), server_hostname="localhost") as page:
        page.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret noc\r\n\r\n")
        page.settimeout(30)
        assert page.recv(1000).startswith(b"HTTP/1.1 200")
        renewed = authority.sign("gateway")[0].read_text()
        stack.configure(console_settings + entry("boss", "admin"))
        assert console.reload()["changed"] == ["token noc", "token boss"]
        revoked_at = time.time()
        rest = b"".join(iter(lambda: page.recv(65536), b"0\r\n\r\n"))
        assert sum(float(at) > revoked_at for at in re.findall(rb'data: {"at":([0-9.]+)', rest)) <= 1  # it has ended
    assert ssl.get_server_certificate(("localhost", 8443)) == renewed
    authority.sign("other")[1].replace(key)
    assert "not reloaded, the old settings stay: [gateway] certificate and key" in console.reload()["event"]
    assert ssl.get_server_certificate(("localhost", 8443)) == renewed


def test_a_listener_beyond_this_host_needs_tls(stack: Stack) -> None:
    """An http:// listener that is not loopback ends the start with 78 and the cure."""
    stack.configure('[console]\nlisten = ["http://0.0.0.0:8080"]\n')
    stack.start("broker")
    running = stack.start("console", ready=False)
    assert running.process.wait(60) == 78
    assert "is not loopback; use https://" in running.text


CHANGED = """
[[stream]]
name = "messages"
listen = ["udp://127.0.0.1:6667"]
[[stream]]
name = "other"
listen = ["tcp://127.0.0.1:6668"]
[[collector]]
name = "fixed"
address = "127.0.0.1"
port = 9515
streams = ["messages"]
"""


def test_an_admin_removes_a_collector_and_sends_a_probe(stack: Stack) -> None:
    """With a token of scope admin a collector is removed, and a probe comes back; each refusal is a sentence.

    A probe under way does not keep the console from ending.
    """
    stack.configure(PATIENT + CHANGED + entry("boss", "admin") + entry("noc", "list"))
    stack.start_all()
    console = stack.start("console")
    siem = ask_json({"op": "register", "name": "siem", "streams": ["messages"], "port": 9514})["client"]

    assert fetch("/api/rights") == (200, '{"admin":false}')
    assert fetch("/api/rights", Authorization="Bearer secret noc") == (200, '{"admin":false}')
    assert fetch("/api/rights", Authorization="Bearer secret boss") == (200, '{"admin":true}')
    wanted = {"name": "siem", "generation": siem["generation"]}
    assert change("remove", wanted, "secret noc")[0] == 403
    assert change("nothing", {})[0] == 404
    bodies: tuple[object, ...] = ({}, [], {**wanted, "more": 1}, {**wanted, "name": "n" * 5000})
    for body in bodies:
        assert change("remove", body) == (400, "expected a JSON object with the fields name and generation")
    assert change("probe", {}) == (400, "expected a JSON object with the field stream")
    assert change("remove", {**wanted, "generation": siem["generation"] + 1})[0] == 409
    assert "siem" in ask_json({"op": "list"})["clients"]

    for body in ({}, {"name": "siem", "reason": 1}):
        assert change("withhold", body) == (400, "expected a JSON object with the field name, and reason")
    assert change("release", {"name": "siem"})[0] == 409
    assert change("withhold", {"name": "siem", "reason": "slow"}, "secret noc")[0] == 403
    assert change("withhold", {"name": "siem", "reason": "slow"}) == (200, "siem gets no copies now")
    assert ask_json({"op": "list"})["withheld"]["siem"].items() >= {"by": "boss", "reason": "slow"}.items()
    wait_until(lambda: 'health="withheld"} 1.0' in fetch("/metrics")[1], "metrics say so too")
    assert change("release", {"name": "siem"}) == (200, "siem gets its copies again")
    (line,) = stack["gateway"].events("copies withheld by an admin")
    assert (line["client"], line["reason"], "by 'boss'" in line["by"]) == ("siem", "slow", True)

    assert change("remove", wanted) == (200, "siem has been removed")
    assert list(ask_json({"op": "list"})["clients"]) == ["fixed"]
    fixed = ask_json({"op": "list"})["clients"]["fixed"]
    status, sentence = change("remove", {"name": "fixed", "generation": fixed["generation"]})
    assert (status, "change it there" in sentence) == (409, True)

    assert change("probe", {"stream": "gone"}) == (404, "no stream 'gone' in the settings of this host")
    assert "no udp:// listener" in change("probe", {"stream": "other"})[1]
    with ThreadPoolExecutor() as threads:
        both = sorted(threads.map(lambda _: change("probe", {"stream": "messages"}), range(2)))
    assert [status for status, _ in both] == [200, 409]
    assert both[0][1].startswith("ok: sent from 127.")
    assert both[1][1] == "another probe is under way; wait some seconds"
    assert list(ask_json({"op": "list"})["clients"]) == ["fixed"]
    assert [line["by"] for line in console.events("client removed by an admin")] == ["boss"]
    assert {line["stream"] for line in console.events("probe sent by an admin")} == {"messages", "other"}

    stack["gateway"].stop()
    status, sentence = change("remove", wanted)
    assert (status, "no gateway at tcp://127.0.0.1:5000" in sentence) == (503, True)

    stack.start("gateway")
    probes = len(console.events("probe sent by an admin"))
    with ThreadPoolExecutor() as threads:
        probing = threads.submit(change, "probe", {"stream": "messages"})
        wait_until(lambda: len(console.events("probe sent by an admin")) > probes, "a probe is under way")
        assert console.stop(seconds=DRAIN_SECONDS) == 0
        assert probing.result() == (503, "the console ends, and there is no answer yet; look again once it runs\n")


def test_a_gateway_on_this_host_is_needed() -> None:
    """A gateway that listens by tls:// alone is not asked, since the console could not know its certificate."""
    gateway = Gateway(listen=("tls://0.0.0.0:5001",), certificate="gateway.pem", key="gateway.key")
    admin = Admin(cast(Watch, None), Settings(gateway=gateway))
    assert asyncio.run(admin.remove(Holder("boss", "secret boss"), "siem", 1)) == (
        503,
        "the console asks the gateway on this host only; add tcp://127.0.0.1:5000 to [gateway] listen",
    )
