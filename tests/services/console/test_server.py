"""The console as a process: what it costs nobody, and how it ends."""

import json
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

from tests.stack import PATIENT, Stack, ask_json, wait_until

PAGES = 50


def status_of(path: str, **headers: str) -> int:
    """The status that the console answers with."""
    request = urllib.request.Request(f"http://127.0.0.1:8080{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


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
    assert (status_of("/healthz"), status_of("/readyz"), status_of("/")) == (200, 503, 200)
    assert (status_of("/../__main__.py"), status_of("/nothing"), status_of("/metrics/exporters?top=0")) == (
        404,
        404,
        400,
    )
    for name in ("gateway", "forwarder", "ingest"):
        stack.start(name)
    ask_json({"op": "register", "name": "siem", "streams": ["messages"], "port": 9514})
    wait_until(lambda: status_of("/readyz") == 200, "copies flow")
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


def test_a_listener_beyond_this_host_needs_tls(stack: Stack) -> None:
    """A tcp:// listener that is not loopback ends the start with 78 and the cure."""
    stack.configure('[console]\nlisten = ["tcp://0.0.0.0:8080"]\n')
    stack.start("broker")
    running = stack.start("console", ready=False)
    assert running.process.wait(60) == 78
    assert "is not loopback; use tls://" in running.text
