"""The console as a process: what it costs nobody, and how it ends."""

import json
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

from tests.certificates import Authority
from tests.services.gateway.transport.test_tls import entry
from tests.stack import PATIENT, Stack, ask_json, wait_until

PAGES = 50


def fetch(path: str, at: str = "http://127.0.0.1:8080", **more: Any) -> tuple[int, str]:
    """The status and the text of an answer; `more` are the headers of the request, and the TLS context."""
    context = more.pop("context", None)
    try:
        with urllib.request.urlopen(
            urllib.request.Request(at + path, headers=more), timeout=60, context=context
        ) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


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
    stack.start("console")
    assert fetch("/healthz") == (200, "the console runs\n")
    status, text = fetch("/readyz")
    assert (status, "the registry is not known yet" in text) == (503, True)
    assert "not heard on the bus" in text or "no service has reported yet" in text
    assert status_of("/") == 200
    assert fetch("/api/datagram?stream=nope") == (200, '{"error":"no such stream has reported"}')
    assert fetch("/api/datagram?collector=nope") == (200, '{"error":"no such collector is signed up"}')
    second = stack.start("console", ready=False)
    assert second.process.wait(60) == 1
    assert "set another [console] listen" in second.text
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
    assert fetch("/api/datagram?stream=messages") == (200, '{"error":"no such datagram came within 5 s"}')
    stack["forwarder"].process.send_signal(signal.SIGSTOP)
    wait_until(lambda: "copies do not flow to: siem" in fetch("/readyz")[1], "a sender that hangs is noticed")
    stack["forwarder"].process.send_signal(signal.SIGCONT)
    wait_until(lambda: status_of("/readyz") == 200, "copies flow again")
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
    stack.interpreter = [sys.executable, "-c", hide]
    running = stack.spawn("console", stack.interpreter)
    running.wait_for("pip install 'fanwire[console]'")
    assert len(running.text.splitlines()) <= 2
    assert running.stop() == 0


def test_beyond_this_host_by_tls_and_token(stack: Stack) -> None:
    """A tls:// listener shows the gateway's certificate, and answers only those that have a token."""
    authority = Authority(stack.directory)
    certificate, key = authority.sign("gateway")
    settings = f'[gateway]\ncertificate = "{certificate}"\nkey = "{key}"\n'
    stack.configure(
        settings + '[console]\nlisten = ["tls://0.0.0.0:8443"]\nhosts = ["localhost"]\n' + entry("noc", "list")
    )
    stack.start("broker")
    stack.start("console")
    context = ssl.create_default_context(cafile=authority.certificate)
    at = "https://localhost:8443"
    assert fetch("/healthz", at, context=context)[0] == 401
    assert fetch("/healthz", at, context=context, Authorization="Bearer wrong")[0] == 401
    assert fetch("/healthz", at, context=context, Authorization="Bearer secret noc")[0] == 200
    assert fetch("/healthz", at, context=context, Authorization="Bearer secret noc", Host="evil.example")[0] == 421


def test_a_listener_beyond_this_host_needs_tls(stack: Stack) -> None:
    """A tcp:// listener that is not loopback ends the start with 78 and the cure."""
    stack.configure('[console]\nlisten = ["tcp://0.0.0.0:8080"]\n')
    stack.start("broker")
    running = stack.start("console", ready=False)
    assert running.process.wait(60) == 78
    assert "is not loopback; use tls://" in running.text
