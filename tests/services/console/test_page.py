"""The page in a browser: Debian's Chromium, driven by Playwright. Both are optional, so the test is too."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.services.gateway.transport.test_tls import entry
from tests.stack import PATIENCE_SECONDS, PATIENT, Stack, ask_json, wait_until

CHROMIUM = shutil.which("chromium")
AXE = os.environ.get("FANWIRE_AXE", "")
"""Path of axe.min.js (npm: axe-core): where it is given, accessibility is checked too."""
HOSTILE = "<img src=x onerror=alert(1)>"
WIDTHS = (390, 1280, 2560)

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is missing")]


def test_the_page_beside_a_running_stack(stack: Stack) -> None:
    """Rates move, a loss appears under its cause and with the ledger's number, a collector dies and comes back.

    Names are text, nothing is wider than the window, and the console says nothing of an error.
    """
    stack.configure(PATIENT + entry("boss", "admin") + entry("noc", "list"))
    stack.start_all()
    stack.start("console")
    for name, port in (("siem", 9514), (HOSTILE, 9515)):
        ask_json({"op": "register", "name": name, "streams": ["messages"], "port": port})
    with (
        sync_api.sync_playwright() as playwright,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hostile,
    ):
        hostile.bind(("127.0.0.1", 9515))
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("console", lambda message: errors.extend([message.text] * (message.type == "error")))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "dialog",
            lambda dialog: errors.extend(
                [dialog.message] * (not dialog.message.startswith(("Remove the collector", "Withhold the copies")))
            ),
        )
        page.goto("http://127.0.0.1:8080/")

        def row(name: str) -> str:
            exporter.sendto(b"<34>1 a datagram", ("127.0.0.1", 6667))
            text: str = page.locator("#collectors tbody tr", has_text=name).inner_text(timeout=PATIENCE_SECONDS * 1000)
            return text

        wait_until(lambda: "refusing" in row("siem") and "refused" in row("siem"), "the loss has its cause")
        wait_until(lambda: "/s" in row(HOSTILE) and "\t0/s" not in row(HOSTILE), "rates move")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as siem:
            siem.bind(("127.0.0.1", 9514))
            wait_until(lambda: "ok" in row("siem"), "the collector is back")
        lost = ask_json({"op": "list"})["clients"]["siem"]["lost"]
        wait_until(
            lambda: f"\t{lost:,}\t" in page.locator("#collectors tbody tr", has_text="siem").inner_text(), "one number"
        )
        check_widths(page)
        page.get_by_role("link", name=HOSTILE).first.click()
        page.get_by_role("button", name="Show me one datagram").click()

        def shown() -> bool:
            exporter.sendto(b"<34>1 a datagram", ("127.0.0.1", 6667))
            return "auth.crit" in page.locator("#detail").inner_text()

        wait_until(shown, "a datagram is shown with its priority")
        check_changes(page)
        stack["console"].stop()
        wait_until(lambda: "no connection" in page.locator("#link").inner_text(), "the page says that it is alone")
        errors = [error for error in errors if "ERR_" not in error]
        assert errors == []
        browser.close()


def check_changes(page: Any) -> None:
    """Buttons that change something are there for as long as a token with scope admin is; a collector is removed."""
    remove = page.get_by_role("button", name="Remove this collector")
    page.locator("#admin summary").click()
    check_access(page)
    for secret in ("wrong", "secret noc"):
        page.get_by_label("Token with scope admin").fill(secret)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Give it", disabled=False).wait_for()
        assert "This token is not known, or it lacks scope admin" in page.locator("#admin").inner_text()
        assert remove.count() == 0
    page.get_by_label("Token with scope admin").fill("secret boss")
    page.keyboard.press("Enter")
    page.goto("http://127.0.0.1:8080/#/stream/messages")
    page.get_by_role("button", name="Send a probe").click()
    wait_until(lambda: "ok: sent from 127." in page.locator("#detail").inner_text(), "the probe comes back")
    check_access(page)
    page.goto("http://127.0.0.1:8080/#/collector/siem")
    wait_until(lambda: "9514" in page.locator("#detail").inner_text(), "its facts are there")
    with page.expect_event("dialog") as asked:
        page.once("dialog", lambda dialog: dialog.dismiss())
        remove.click()
    assert "Remove the collector siem?" in asked.value.message
    assert "siem" in ask_json({"op": "list"})["clients"]
    check_withholding(page)
    page.once("dialog", lambda dialog: dialog.accept())
    remove.click()
    wait_until(lambda: "siem has been removed" in page.locator("#detail").inner_text(), "it is removed")
    assert list(ask_json({"op": "list"})["clients"]) == [HOSTILE]
    page.get_by_role("button", name="Forget it").click()
    wait_until(lambda: remove.count() == 0, "there are no buttons any more")


def check_withholding(page: Any) -> None:
    """The page of a collector says that its copies are withheld, since when and why; the same button releases them."""
    page.once("dialog", lambda dialog: dialog.accept(HOSTILE))
    page.get_by_role("button", name="Withhold its copies").click()
    wait_until(lambda: f"by boss: {HOSTILE}" in page.locator("#detail").inner_text(), "the reason is shown, as text")
    assert "withheld for" in page.locator("#detail h1").inner_text()
    check_access(page)
    assert ask_json({"op": "list"})["withheld"]["siem"]["by"] == "boss"
    page.get_by_role("button", name="Release its copies").click()
    page.get_by_role("button", name="Withhold its copies").wait_for()
    assert ask_json({"op": "list"})["withheld"] == {}


def check_widths(page: Any) -> None:
    """Nothing sticks out at any width, in light and in dark, and axe finds nothing where it is there."""
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    check_access(page)


def check_access(page: Any) -> None:
    """Axe finds nothing on the page as it is now, where axe is there."""
    if AXE:
        page.evaluate(Path(AXE).read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert [violation["id"] for violation in found] == []
