"""The front page's real site as it is written: exporters, the relay, and collectors on hosts of their own.

Its commands run under a directory that stands for `/`, without systemd, whose units have tests of their own.
"""

import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from shared.net.addresses import Endpoint
from shared.settings.file import load
from tests.capture import Collector
from tests.documents import block
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.services.ingest.flows.exported import netflow_v5
from tests.stack import CHECKOUT, Running, wait_until
from tests.system.test_fan_out import need

EXPORTER, RELAY, SIEM, FLOWS = "10.10.0.2", "10.20.0.10", "10.20.0.20", "10.20.0.30"
INSTALL: Final = block("README.md", "site-install")
SETTINGS: Final = block("README.md", "site-settings")
SOCKETS: Final = block("README.md", "site-sockets")
MAKE, START, CHECK = block("README.md", "site-start").partition("systemctl daemon-reload && systemctl enable")
COLLECT: Final = block("README.md", "site-collector")
BY_HAND: Final = block("services/gateway/README.md", "by-tls")
STAND_INS: Final = """
systemctl() { :; }
systemd-sysusers() { :; }
sysctl() { :; }
chown() { :; }
sudo() { shift 2; env "$@"; }
python3() {
    command python3 "$@" --without-pip
    printf '#!/bin/sh\nexec pip --python "${0%%pip}python" "$@"\n' >"$3/bin/pip"
    chmod +x "$3/bin/pip"
}
"""
"""The last one makes an environment with the pip of this one: to install another takes longer than all the rest."""
OFFLINE: Final = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"}
"""`pip install .` without a network; the last one, set to 0, switches isolation off."""


class Site:
    """The hosts of the page, and the directory that is the relay's `/`."""

    def __init__(self, stack: OpenStack, exporters: Host, relay: Host, siem: Host, flows: Host) -> None:
        self.stack, self.exporters, self.relay, self.siem, self.flows = stack, exporters, relay, siem, flows
        self.root = stack.directory / "root"
        self.root.mkdir()

    def here(self, text: str) -> str:
        """Let paths of the page lead into the directory."""
        for path in ("/etc/", "/opt/"):
            text = text.replace(path, f"{self.root}{path}")
        return text.replace("/run/fanwire", str(self.stack.bus))

    def paste(self, host: Host, commands: str, directory: Path, **environment: str) -> str:
        """Run commands on a host as they are pasted; return what they print."""
        script = f"set -eu\n{STAND_INS}{self.here(commands)}"
        with host.entered():
            done = subprocess.run(
                ["bash", "-c", script],
                env=self.stack.environment | environment,
                cwd=directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=250,  # a busy machine installs for a minute
                check=False,
            )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def install(self) -> None:
        """Do what the page says before the services are started."""
        site_packages = sysconfig.get_path("purelib")
        self.paste(self.relay, INSTALL, CHECKOUT, PYTHONPATH=site_packages, **OFFLINE)
        (installed,) = self.root.glob("opt/fanwire/lib/python*/site-packages")
        (installed / "dependencies.pth").write_text(site_packages)
        settings = self.root / "etc/fanwire/fanwire.toml"
        settings.write_text(self.here(SETTINGS))
        self.paste(self.relay, MAKE, CHECKOUT, PYTHONPATH="")
        shutil.copy(settings, self.stack.directory / "fanwire.toml")

    def start(self) -> None:
        """Start the services on the relay, as the target does."""
        with self.relay.entered():
            self.stack.start_all()
            self.stack.start("transmitter")

    def send(self, payload: bytes, port: int) -> tuple[str, int]:
        """Send a datagram from an exporter to the relay; return the address and port that it came from."""
        with self.exporters.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
            exporter.bind((EXPORTER, 0))
            exporter.sendto(payload, (RELAY, port))
            address, source_port = exporter.getsockname()
            return str(address), int(source_port)


@contextmanager
def site(stack: OpenStack) -> Iterator[Site]:
    """The network of the page: the relay is the exporters' router here, and has a link to each collector."""
    with ExitStack() as opened:
        exporters, relay, siem, flows = (opened.enter_context(Host()) for _ in range(4))
        lan = f"{RELAY}/32"
        for one, other in (
            (End(exporters, "eth", f"{EXPORTER}/16"), End(relay, "field", "10.10.0.1/16")),
            (End(relay, "siem", lan), End(siem, "eth", f"{SIEM}/24")),
            (End(relay, "flows", lan, "02:00:00:00:00:30"), End(flows, "eth", f"{FLOWS}/24")),
        ):
            opened.enter_context(veth(one, other))
        exporters.route("10.20.0.0/24", via="10.10.0.1")
        for address, name in ((SIEM, "siem"), (FLOWS, "flows")):
            relay.run("ip", "route", "add", f"{address}/32", "dev", name, "src", RELAY)
        relay.sysctl("net.ipv4.ip_unprivileged_port_start", 0)  # systemd binds port 514 as root
        yield Site(stack, exporters, relay, siem, flows)


@pytest.mark.timeout(240)
def test_real_site_works_as_written(open_stack: OpenStack) -> None:
    """Pasted step by step, the page ends with copies that carry the exporter's address, at both collectors."""
    need("openssl")
    if not (Path(sys.prefix) / "bin" / "fanwire").exists():
        pytest.skip("fanwire is not installed in this environment")
    with site(open_stack) as here, Collector(here.siem, SIEM, 514) as siem:
        here.install()
        here.start()
        assert "errors: 0" in here.paste(here.relay, CHECK.partition("\n")[2], CHECKOUT, PYTHONPATH="")
        source = here.send(b"<14>the disk is full", 514)
        (arrived,) = siem.read(1)  # not the probe's: no copy claims a loopback address on another host
        assert (arrived.source, arrived.source_port, arrived.payload) == (*source, b"<14>the disk is full")
        sign_up_by_hand(here)
        collect_flows(here)


def sign_up_by_hand(here: Site) -> None:
    """The gateway's README: with the certificate and the token alone, by `register` and by `openssl`."""
    take_along(here)
    said = here.paste(here.flows, BY_HAND, here.stack.directory / "flows")
    assert f"copies of netflow go to {FLOWS} port 2055" in said
    assert '{"ok":true,"holder":"flows","scopes":["collect","list"],"streams":["*"]}\n' in said
    assert '"flows":{"name":"flows"' in said
    here.paste(here.relay, "fanwire leave flows", CHECKOUT)


def take_along(here: Site) -> None:
    """Copy the two files to the flow collector's host."""
    directory = here.stack.directory / "flows"
    directory.mkdir()
    for name in ("gateway.pem", "flows.token"):
        shutil.copy(here.root / "etc/fanwire" / name, directory)


def collect_flows(here: Site) -> None:
    """The page's last step: the flow collector signs up by TLS, and prints what comes from the exporter's address."""
    with here.flows.entered():
        collector = here.stack.spawn("collect", ["bash", "-c", f"cd flows && exec {COLLECT}"])
    wait_until(lambda: arrives(here, collector), "a flow of the exporter's address arrives")
    assert collector.stop() == 0, collector.text


def arrives(here: Site, collector: Running) -> bool:
    """Return whether the collector has printed a datagram sent just now."""
    source = here.send(netflow_v5(0), 2055)
    return f"Got message from {source!r}" in collector.text


def listeners(kind: str) -> set[str]:
    """Return the listeners of the shown socket unit, datagrams or streams."""
    lines = [line.partition("=") for line in SOCKETS.splitlines()]
    return {at for key, _, at in lines if key == f"Listen{kind}" and at}


def test_sockets_are_those_of_the_streams(tmp_path: Path) -> None:
    """The socket unit's drop-in has every listener of the settings shown, and no other."""
    path = tmp_path / "site.toml"
    path.write_text(SETTINGS)
    settings = load(path, {})
    endpoints: list[Endpoint] = [endpoint for stream in settings.streams for endpoint in stream.endpoints]
    for kind, scheme in (("Datagram", "udp"), ("Stream", "tcp")):
        assert listeners(kind) == {f"{each.host}:{each.port}" for each in endpoints if each.scheme == scheme}
