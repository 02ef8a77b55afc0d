"""Files for Prometheus and Grafana: every metric in them is one of the console's, and Prometheus can read them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from services.console.metrics import exporter_metrics, render, stack_metrics
from shared.bus.bodies.nodes_message import Node, Nodes
from shared.monitoring.picture import NO_TROUBLE
from tests.services.console.told import busy, client, observe
from tests.stack import CHECKOUT

RULES = CHECKOUT / "deploy" / "prometheus" / "fanwire.rules.yml"
RULES_TESTED = RULES.with_name("fanwire.rules.test.yml")
CONFIG = CHECKOUT / "deploy" / "prometheus" / "prometheus.yml"
DASHBOARD = CHECKOUT / "deploy" / "grafana" / "fanwire.json"
METRIC = re.compile(r"\bfanwire_[a-z_]+\b")
OF_PROMETHEUS = {"instance", "job"}
"""Labels that it gives every series."""


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard, with those in folded rows."""
    rows = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for row in rows for panel in [row, *row.get("panels", [])]]


def queries() -> list[str]:
    """Return the dashboard's queries."""
    return [target["expr"] for panel in panels() for target in panel.get("targets", [])]


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each metric of a query, with the labels that it is selected by and added up by."""
    for metric, selected in re.findall(r"\b(fanwire_[a-z_]+)(?:{([^}]*)})?", query):
        by = re.findall(r"\bby \(([^)]*)\)", query)
        named = {name.strip() for names in by for name in names.split(",")}
        yield metric, {*re.findall(r"(\w+)[=!]", selected), *named} - OF_PROMETHEUS


@cache
def of_the_console() -> dict[str, set[frozenset[str]]]:
    """Return the metrics that the console prints where everything reports, with the labels of their series."""
    streams = {"stream/flows": {"received": 1, "exporters": 1}}
    offload = {"rules/siem": {"copied": 1}, "marks/flows": {"marked": 1, "unseen": 1}, "egress/eth0": {"link_drops": 1}}
    uplink = {"uplink": {"connected": 1}, "sending/flows": {"taken": 1}, "receiving/bonn": {"late_ms": 1}}
    told = observe([client("siem")], {"ingest.1": streams, "offload.1": offload, "uplink.1": uplink}).picture(0.0)
    nodes = Nodes(True, [Node("a", "live", 0)])
    services = tuple(replace(each, missed=0, memory=1, memory_ceiling=2) for each in told.services)
    told = replace(told, balanced=True, services=services, nodes=nodes)
    found: dict[str, set[frozenset[str]]] = {}
    for picture in (busy(), told):
        for metrics in (stack_metrics(picture, 0.0, "1"), exporter_metrics(picture, 50)):
            for family in parse(render(metrics, "")[0].decode()):
                for sample in family.samples:
                    found.setdefault(sample.name, set()).add(frozenset(sample.labels))
    return found


@pytest.mark.parametrize("path", [RULES, DASHBOARD], ids=lambda path: path.name)
def test_every_metric_is_one_of_the_consoles(path: Path) -> None:
    """Rules and dashboard ask for metrics that `/metrics` has, by labels that these have, and for no others."""
    expressions = queries() if path is DASHBOARD else re.findall("expr: (.*)", path.read_text())
    found = [each for query in expressions for each in asked(query)]
    assert {metric for metric, _ in found} == set(METRIC.findall("\n".join(expressions)))
    assert len(found) > 8
    for metric, labels in found:
        assert any(labels <= of_series for of_series in of_the_console().get(metric, ())), (metric, labels)


def test_the_dashboard_shows_every_place_of_loss() -> None:
    """Each metric of what is lost, dropped or missed, of any service, is in some panel."""
    shown = {metric for query in queries() for metric, _ in asked(query)}
    losses = {name for name in of_the_console() if re.search("lost|drop|missed", name)}
    assert len(losses) == 7
    assert losses <= shown


def test_rows_of_what_runs_by_choice_are_folded() -> None:
    """Journal, uplink and the kernel's copies have rows of their own, folded: most relays have no data for them."""
    folded = {row["title"] for row in json.loads(DASHBOARD.read_text())["panels"] if row.get("collapsed")}
    assert folded == {"Exporters", "Journal", "Uplink, sites and nodes", "Copies by the kernel"}


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
    for name, labels in re.findall(r"series: '(\w+){(.*?)}'", tested):
        own = frozenset(re.findall(r'(\w+)="', labels)) - OF_PROMETHEUS
        assert name == "up" or own in of_the_console()[name]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus is not installed")
def test_each_alert_fires_and_resolves() -> None:
    """Each alert fires while its fault lasts, no other one does, and none is left afterwards."""
    done = subprocess.run(["promtool", "test", "rules", str(RULES_TESTED)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    """Its panels have names and places of their own, and a row goes hop by hop."""
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()}) == len(panels())
    assert "Troubleshooting, hop by hop" in [panel["title"] for panel in panels()]


def test_the_dashboard_tells_of_collectors_as_the_page_does() -> None:
    """Words of health that are no trouble on the page are none there, and the kernel's copies are among those sent."""
    words = [found.split("|") for query in queries() for found in re.findall(r'health[=!]~"([^"]+)"', query)]
    assert [{*each} for each in words] == 2 * [NO_TROUBLE - {"unknown"}]
    sent = [query for query in queries() if "fanwire_copies_sent_total" in query]
    assert len([query for query in sent if "fanwire_copies_by_kernel_total" in query]) == len(sent) == 2


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus is not installed")
@pytest.mark.parametrize(("kind", "path"), [("rules", RULES), ("config", CONFIG)])
def test_prometheus_reads_it(kind: str, path: Path) -> None:
    """Prometheus's own check finds no fault."""
    done = subprocess.run(["promtool", "check", kind, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
