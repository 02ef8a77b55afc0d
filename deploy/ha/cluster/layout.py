"""Names and addresses of the hosts, the settings of their programs, and files that all have in common."""

import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parent.parent.parent.parent
HA: Final = CHECKOUT / "deploy" / "ha"
NODES: Final = {"a": "10.99.0.11", "b": "10.99.0.12", "c": "10.99.0.13"}
SHARING: Final = ("a", "b")
"""Nodes that share the address of exporters."""
ADDRESS: Final = "10.99.0.10"
COLLECTOR: Final = "10.99.0.20"
EXPORTER: Final = "10.99.1.1"
EXPORTERS: Final = 200
HOSTS: Final = {
    **NODES,
    "collectors": COLLECTOR,
    "exporters": " ".join(f"10.99.1.{number + 1}" for number in range(EXPORTERS)),
}
"""Their addresses, all in one network of 16 bits."""
DIRECTORY: Final = "FANWIRE_CLUSTER"
"""Environment variable with the directory, for processes of the cluster."""
PORT, COLLECTOR_PORT = 514, 9514


@dataclass(frozen=True)
class Place:
    """The directory of the one cluster that a user has."""

    directory: Path = Path(
        os.environ.get(DIRECTORY)  # within a user namespace the user has another number
        or Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"), f"fanwire-cluster-{os.getuid()}")
    )

    @property
    def lock(self) -> Path:
        """The file that is locked while the cluster runs."""
        return self.directory / "lock"

    def pid(self, name: str) -> Path:
        """The file with the number of a host's first process, within the cluster; that of `cluster` itself, outside."""
        return self.directory / f"{name}.pid"

    def of(self, node: str) -> Path:
        """The directory of a node."""
        return self.directory / node

    def standby(self, node: str) -> Path:
        """The file by which a node hands over."""
        return self.of(node) / "standby"


def environment(place: Place, node: str) -> dict[str, str]:
    """Return the environment of programs at a node."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "FANWIRE_CONFIG": str(place.of(node) / "fanwire.toml"),
        "FANWIRE_STANDBY": str(place.standby(node)),
    }


def first_child(pid: int) -> str:
    """Return the process id of what unshare(1) has forked, once it has."""
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        time.sleep(0.01)
    return found[0]


def write(place: Place, node: str) -> None:
    """Write the settings of a node's programs."""
    place.of(node).mkdir()
    for name, text in (
        ("fanwire.toml", relay(place, node)),
        ("nats.conf", nats(node, NODES, place.of(node))),
        ("keepalived.conf", keepalived(place, node)),
    ):
        (place.of(node) / name).write_text(text)


def relay(place: Place, node: str) -> str:
    """Return the settings of a relay: all have one list of collectors, and each other's streams."""
    servers = [NODES[node], *(address for name, address in NODES.items() if name != node)]
    named = ", ".join(f'"nats://{address}:4222"' for address in servers)
    sites = ", ".join(f'"{name}"' for name in NODES)
    return f"""
[bus]
directory = "{place.of(node)}/bus"
[gateway]
database = "{place.of(node)}/registry.sqlite"
[uplink]
servers = [{named}]
plain_beyond_loopback = true
site = "{node}"
replicas = {len(NODES)}
keep_bytes = {1 << 28}
nodes = [{sites}]
registry = "try"
[[stream]]
name = "syslog"
listen = ["udp://0.0.0.0:{PORT}"]
[[collector]]
name = "siem"
streams = ["syslog"]
address = "{COLLECTOR}"
port = {COLLECTOR_PORT}
"""


def nats(node: str, nodes: Mapping[str, str], directory: Path) -> str:
    """Return the settings of a NATS server of a cluster; `nodes` has the address of each, by name."""
    routes = ", ".join(f'"nats://{address}:6222"' for name, address in nodes.items() if name != node)
    return f"""
server_name: "{node}"
listen: "{nodes[node]}:4222"
log_file: "{directory}/nats.log"
jetstream {{ store_dir: "{directory}/jetstream", sync_interval: always }}
cluster {{ name: "fanwire", listen: "{nodes[node]}:6222", routes: [{routes}] }}
"""


def keepalived(_: Place, node: str) -> str:
    """Return deploy/ha/keepalived.conf for a node."""
    text = (HA / "keepalived.conf").read_text()
    peers = [NODES[name] for name in SHARING if name != node]
    values = {"THIS": NODES[node], "PEER": peers[0], "ADDRESS": f"{ADDRESS}/16"}
    for name, value in values.items():
        text = re.sub(rf"^\${name}=.*$", f"${name}={value}", text, flags=re.MULTILINE)
    # A user namespace has no other user, and knows other users' files as those of nobody.
    text = text.replace("script_user nobody", "script_user root").replace("  enable_script_security\n", "")
    return text.replace("/usr/local/bin/fanwire-ready", str(HA / "fanwire-ready"))
