"""Files for Prometheus and Grafana: every metric in them is one of the console's, and Prometheus can read them."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from services.console.metrics import render, stack_metrics
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.monitoring.picture import NO_TROUBLE
from tests.documents import defined
from tests.services.console.told import busy
from tests.stack import CHECKOUT

RULES = CHECKOUT / "deploy" / "prometheus" / "fanwire.rules.yml"
RULES_TESTED = RULES.with_name("fanwire.rules.test.yml")
CONFIG = CHECKOUT / "deploy" / "prometheus" / "prometheus.yml"
DASHBOARD = CHECKOUT / "deploy" / "grafana" / "fanwire.json"
METRIC = re.compile(r"\bfanwire_[a-z_]+\b")


@pytest.mark.parametrize("path", [RULES, DASHBOARD], ids=lambda path: path.name)
def test_every_metric_is_one_of_the_consoles(path: Path) -> None:
    """Rules and dashboard ask for metrics that the console's README defines, and for no others."""
    asked = set(METRIC.findall(path.read_text()))
    assert len(asked) > 8
    assert asked <= defined("metric").keys()


def test_each_alert_says_what_to_do() -> None:
    """Every alert has a summary and an action."""
    text = RULES.read_text()
    alerts = text.count("- alert: ")
    assert alerts >= 10
    assert text.count("summary: ") == text.count("action: ") == text.count("severity: ") == alerts


def test_each_alert_is_tested_with_series_of_the_console() -> None:
    """Every alert has a test of its own, whose series have the names and the labels that the console prints."""
    tested = RULES_TESTED.read_text()
    assert set(re.findall("alert: (.*)", RULES.read_text())) == set(re.findall("name: (.*)", tested))
    picture = busy()
    services = tuple(replace(each, missed=0, memory=1, memory_ceiling=2) for each in picture.services)
    nodes = Nodes(True, [Node("a", "live")])
    metrics = stack_metrics(replace(picture, balanced=True, services=services, nodes=nodes), 0.0, "1")
    text = render(metrics, "")[0].decode()
    printed = {(sample.name, frozenset(sample.labels)) for family in parse(text) for sample in family.samples}
    for name, labels in re.findall(r"series: '(\w+){(.*?)}'", tested):
        of_the_console = frozenset(re.findall(r'(\w+)="', labels)) - {"instance", "job"}
        assert name == "up" or (name, of_the_console) in printed


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus is not installed")
def test_each_alert_fires_and_resolves() -> None:
    """Each alert fires while its fault lasts, no other one does, and none is left afterwards."""
    done = subprocess.run(["promtool", "test", "rules", str(RULES_TESTED)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    """Its panels have names and places of their own, and a row goes hop by hop."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert "Troubleshooting, hop by hop" in [panel["title"] for panel in panels]


def test_the_dashboard_tells_of_collectors_as_the_page_does() -> None:
    """Words of health that are no trouble on the page are none there, and the kernel's copies are among those sent."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [each["expr"] for panel in panels for each in panel.get("targets", [])]
    words = [found.split("|") for query in queries for found in re.findall(r'health[=!]~"([^"]+)"', query)]
    assert [{*each} for each in words] == 2 * [NO_TROUBLE - {"unknown"}]
    sent = [query for query in queries if "fanwire_copies_sent_total" in query]
    assert len([query for query in sent if "fanwire_copies_by_kernel_total" in query]) == len(sent) == 2


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus is not installed")
@pytest.mark.parametrize(("kind", "path"), [("rules", RULES), ("config", CONFIG)])
def test_prometheus_reads_it(kind: str, path: Path) -> None:
    """Prometheus's own check finds no fault."""
    done = subprocess.run(["promtool", "check", kind, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
