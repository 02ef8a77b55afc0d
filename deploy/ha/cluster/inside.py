"""Builds hosts and network of the cluster, from within its namespaces; ends when standard input does."""

import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from deploy.ha.cluster import layout, traffic
from deploy.ha.cluster.layout import ADDRESS, CHECKOUT, HA, HOSTS, NODES, SHARING, Place

READY_SECONDS: Final = 60.0
TELL_SECONDS: Final = 10.0
RATE: Final = 1000


class Host:
    """A network of its own, joined to the others by a link `eth0`, and its first process."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        unshare = "unshare --net --mount --pid --fork --kill-child --mount-proc"
        command = [*unshare.split(), sys.executable, "-m", "deploy.ha.cluster.node", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=CHECKOUT)
        self.pid = layout.first_child(self.process.pid)
        run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", self.pid)
        run("ip", "link", "set", f"to-{name}", "master", "switch", "up")
        addresses = [f"address add {each}/16 dev eth0" for each in HOSTS[name].split()]
        lines = "\n".join(["link set lo up", *addresses, "link set eth0 up"])
        run(*self.there("ip", "-batch", "-"), text=lines)
        place.pid(name).write_text(self.pid)

    def there(self, *command: str) -> list[str]:
        """Return a command that is run in its network."""
        return ["nsenter", "--target", self.pid, "--net", *command]

    def begin(self) -> None:
        """Let it start its programs."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"begin\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Let it end; what it has started ends with it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def run(*command: str, text: str = "") -> None:
    """Run a command that must succeed."""
    subprocess.run(command, input=text, text=True, check=True)


def is_ready(host: Host) -> bool:
    """Return whether the check of deploy/ha says so of a node."""
    return subprocess.run(host.there(str(HA / "fanwire-ready")), stdout=subprocess.DEVNULL, check=False).returncode == 0


def main() -> int:
    """Run the cluster; return the exit code."""
    place = Place()
    host_has = {name for _, name in socket.if_nameindex()}
    assert host_has <= {"lo"}, f"refusing to start outside of a network namespace of its own, which has {host_has}"
    for node in NODES:
        layout.write(place, node)
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "switch", "type", "bridge")
    run("ip", "link", "set", "switch", "up")
    hosts = {name: Host(place, name) for name in HOSTS}
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        for host in hosts.values():
            host.begin()
        print("starting three relays and three NATS servers", flush=True)
        if waited(lambda: all(is_ready(hosts[name]) for name in NODES)):
            sharing = [hosts[name] for name in SHARING]
            helpers += share_address(place, sharing)
            if waited(lambda: any(map(has_address, sharing))):
                helpers += begin_traffic(place, hosts["collectors"], hosts["exporters"])
                counted = traffic.Counted(place.directory / "came")
                if waited(lambda: counted.state[traffic.CAME] > 0):
                    tell(place)
                    watch(place)
                    return 0
    finally:
        for host in hosts.values():
            host.end()
        for helper in helpers:
            helper.terminate()
        for process in (*helpers, *(host.process for host in hosts.values())):
            process.wait()
    return 1


def waited(condition: Callable[[], object]) -> bool:
    """Wait until it is true; return whether it is, and nobody has ended the cluster meanwhile."""
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            print(f"nothing flows after {READY_SECONDS:g} s, see the logs in {Place().directory}", flush=True)
            return False
        if select.select([sys.stdin], [], [], 0.2)[0]:
            return False
    return True


def share_address(place: Place, nodes: list[Host]) -> list[subprocess.Popen[bytes]]:
    """Start what moves the address of exporters between nodes; without it, the first one has it for good."""
    if shutil.which("keepalived", path=layout.environment(place, "a")["PATH"]) is None:
        print("keepalived is not installed: the address of exporters stays at a", flush=True)
        run(*nodes[0].there("ip", "address", "add", f"{ADDRESS}/16", "dev", "eth0"))
        return []
    found = []
    for node in nodes:
        directory = place.of(node.name)
        files = [str(directory / name) for name in ("keepalived.conf", "keepalived.pid", "vrrp.pid")]
        command = node.there("keepalived", "-nlD", "-f", files[0], "-p", files[1], "-r", files[2])
        with (directory / "keepalived.log").open("wb") as log:
            found.append(subprocess.Popen(command, stdout=log, stderr=log, env=layout.environment(place, node.name)))
    return found


def has_address(node: Host) -> bool:
    """Return whether a node has the address of exporters."""
    command = node.there("ip", "-4", "address", "show", "dev", "eth0")
    return f" {ADDRESS}/" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def begin_traffic(place: Place, collectors: Host, exporters: Host) -> list[subprocess.Popen[bytes]]:
    """Start a collector that counts, and exporters."""
    counted = traffic.Counted(place.directory / "came", new=True)
    sent = traffic.Sent(place.directory / "sent", new=True)
    collect = traffic.collect_command(layout.COLLECTOR, [(counted.path, layout.COLLECTOR_PORT)])
    send = traffic.send_command(sent.path, layout.EXPORTER, f"{ADDRESS}:{layout.PORT}", RATE)
    return [
        subprocess.Popen(host.there(*command), cwd=CHECKOUT)
        for host, command in ((collectors, collect), (exporters, send))
    ]


def tell(place: Place) -> None:
    """Print what can be tried."""
    print(
        f"""
Three nodes run, each a relay and a NATS server. JetStream keeps each stream on all three.
  site 1   a {NODES["a"]}, b {NODES["b"]}: share the address {ADDRESS}, which {layout.EXPORTERS} exporters send to
  site 2   c {NODES["c"]}
Collector {layout.COLLECTOR} gets what all nodes take in, from the one node that serves it.
{RATE} datagrams/s are sent. Each {TELL_SECONDS:g} s this terminal tells how many have come.

Try in another terminal, in this directory:
  deploy/ha/on a fanwire nodes                         # who is there, and serves whom?
  deploy/ha/on c fanwire top
  deploy/ha/on a fanwire ledger
  deploy/ha/on a ip -brief address                     # who has {ADDRESS}?
  deploy/ha/on exporters logger -d -n {ADDRESS} -P {layout.PORT} hello
  deploy/ha/on c fanwire watch syslog --count 1
Break it:
  deploy/ha/on a kill -9 -1                            # node a dies: relay and NATS server
  deploy/ha/on a kill -USR1 1                          # it starts again
  deploy/ha/on b ip link set eth0 down                 # node b is cut off; `up` joins it again
  touch {place.standby("a")}   # node a hands over first, for an upgrade
Logs: {place.directory}/{{a,b,c}}/*.log. Ctrl-C ends everything.
""",
        flush=True,
    )


def watch(place: Place) -> None:
    """Print counts until the end of standard input."""
    sent, counted = traffic.Sent(place.directory / "sent"), traffic.Counted(place.directory / "came")
    while not select.select([sys.stdin], [], [], TELL_SECONDS)[0]:
        until = max(0, sent.count - 5 * RATE)
        lost, twice = len(counted.lost(until)), counted.doubled()
        print(f"{time.strftime('%T')}  sent {sent.count:,}  lost {lost:,}  came twice {twice:,}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
