"""Cures as texts: what can be pasted stands between backticks, and is a command as a whole."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import CHECKOUT

SOURCES = [*sorted((CHECKOUT / "services/operator/doctor").glob("*.py")), CHECKOUT / "shared/monitoring/probe.py"]
COMMAND = re.compile(
    r"\b(sysctl -|ip (-6 |route|link|neigh|address|maddress)|chmod \d|chmod \w\+|ulimit|fanwire (leave|release|ledger)"
    r"|systemctl \w|nft list|timedatectl|setpriv|sudo -|tracepath|journalctl|df |aws |gcloud |openstack |az )"
)
QUOTED = re.compile(r"`[^`]*`")


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a module, with V for each value in them; no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "V" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inner:
            yield node.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_commands_stand_between_backticks(path: Path) -> None:
    """No command has words of a sentence around it that would be pasted too, and the shell can read each."""
    for text in texts(path):
        assert not COMMAND.search(QUOTED.sub("", text)), text
        for command in QUOTED.findall(text):
            assert subprocess.run(["sh", "-nc", command[1:-1]], check=False).returncode == 0, command
