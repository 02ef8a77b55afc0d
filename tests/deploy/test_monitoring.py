"""Files for Prometheus and Grafana: every metric in them is one of the console's, and Prometheus can read them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documents import defined
from tests.stack import CHECKOUT

RULES = CHECKOUT / "deploy" / "prometheus" / "fanwire.rules.yml"
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


def test_the_dashboard_is_whole() -> None:
    """Its panels have names and places of their own, and a row goes hop by hop."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert "Troubleshooting, hop by hop" in [panel["title"] for panel in panels]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's package prometheus is not installed")
@pytest.mark.parametrize(("kind", "path"), [("rules", RULES), ("config", CONFIG)])
def test_prometheus_reads_it(kind: str, path: Path) -> None:
    """Prometheus's own check finds no fault."""
    done = subprocess.run(["promtool", "check", kind, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
