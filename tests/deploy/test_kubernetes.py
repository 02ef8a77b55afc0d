"""The manifests for Kubernetes agree with units, settings and the image; `kubectl`, where it is, puts them together."""

import shutil
import subprocess
import tomllib
from typing import Any

import pytest
import yaml

from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.settings.file import load
from tests.deploy.test_container import BUILD
from tests.deploy.test_units import UNITS, lines
from tests.documents import block
from tests.stack import CHECKOUT

KUBERNETES = CHECKOUT / "deploy" / "kubernetes"
SETTINGS = KUBERNETES / "base" / "fanwire.toml"


def read(path: str) -> list[dict[str, Any]]:
    """The documents of a file."""
    return list(yaml.safe_load_all((KUBERNETES / path).read_text()))


def containers() -> dict[str, dict[str, Any]]:
    """The containers of the relay with source-preserving copies, by service."""
    files = ("base/relay.yaml", "original/transmitter.yaml")
    return {each["name"]: each for path in files for each in read(path)[0]["spec"]["template"]["spec"]["containers"]}


def test_every_service_has_a_container() -> None:
    """Each service is a container with its unit's memory, asked in time whether it reports; the Pod is, by /readyz."""
    assert set(containers()) == {*SERVICES, *OPTIONAL}
    for name, each in containers().items():
        assert each["args"][0] == name
        command = each["livenessProbe"]["exec"]["command"]
        assert command[:3] == ["fanwire", "ready", name]
        assert int(command[-1]) < each["livenessProbe"]["timeoutSeconds"]
        (unit,) = UNITS.glob(f"fanwire-{name}*.service")
        assert [each["resources"]["limits"]["memory"].removesuffix("i")] == lines(unit, "MemoryMax")
        mounts = {mount["name"] for mount in each["volumeMounts"]}
        assert {"bus", "settings"} <= mounts
        assert ("registry" in mounts) == (name == "gateway")
        assert {"name": "RUNTIME_DIRECTORY", "value": "/run/fanwire/bus"} in each["env"]
    assert "/readyz" in containers()["console"]["readinessProbe"]["exec"]["command"][-1]


def test_the_journal_has_a_volume_of_its_own() -> None:
    """Its container is as confined as the gateway's, has its unit's memory, and a claim that no other mounts."""
    (each,) = read("journal/journal.yaml")[0]["spec"]["template"]["spec"]["containers"]
    gateway = containers()["gateway"]
    assert each["securityContext"] == gateway["securityContext"]
    assert {*map(str, gateway["env"])} == {*map(str, each["env"])}
    (unit,) = UNITS.glob("fanwire-journal.service")
    assert [each["resources"]["limits"]["memory"].removesuffix("i")] == lines(unit, "MemoryMax")
    assert each["livenessProbe"]["exec"]["command"][:3] == ["fanwire", "ready", "journal"]
    (claim,) = yaml.safe_load((KUBERNETES / "journal" / "claim.yaml").read_text())
    name = claim["value"]["metadata"]["name"]
    assert {"name": name, "mountPath": "/var/lib/fanwire"} in each["volumeMounts"]
    assert name not in {mount["name"] for other in containers().values() for mount in other["volumeMounts"]}


def test_only_the_transmitter_has_a_capability() -> None:
    """NET_RAW is the transmitter's alone; nothing else can gain a privilege, and nothing runs as root."""
    for name, each in containers().items():
        confined = {
            "allowPrivilegeEscalation": name == "transmitter",
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]} | ({"add": ["NET_RAW"]} if name == "transmitter" else {}),
        }
        assert each["securityContext"] == confined
    pod = read("base/relay.yaml")[0]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in BUILD
    assert "hostNetwork" not in pod
    assert containers()["transmitter"]["command"][0] in BUILD


def test_ports_are_those_of_the_settings() -> None:
    """Containers and Services name the ports of the settings, which can be used; exporters' addresses are kept."""
    load(SETTINGS)
    told = tomllib.loads(SETTINGS.read_text())
    listens = {
        "ingest": {at for stream in told["stream"] for at in stream["listen"]},
        "gateway": {at for at in told["gateway"]["listen"] if "127.0.0.1" not in at},
        "console": {at for at in told["console"]["listen"] if "127.0.0.1" not in at},
    }
    for name, each in containers().items():
        ports = {port["containerPort"] for port in each.get("ports", ())}
        assert ports == {int(at.rpartition(":")[2]) for at in listens.get(name, ())}
    named = {port["name"] for each in containers().values() for port in each.get("ports", ())}
    services = read("base/services.yaml")
    (monitor,) = read("monitoring/podmonitor.yaml")
    used = {port["targetPort"] for service in services for port in service["spec"]["ports"]}
    assert used | {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]} == named
    assert services[0]["spec"]["externalTrafficPolicy"] == "Local"


def test_trouble_of_one_service_cuts_nobody_off() -> None:
    """The Services send to the one Pod that there is, be it ready or not; readiness is for people and alerts."""
    assert read("base/relay.yaml")[0]["spec"]["replicas"] == 1
    for service in read("base/services.yaml"):
        assert service["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("folder", ["base", "original", "monitoring"])
def test_kustomize_puts_them_together(folder: str) -> None:
    """Kubectl finds all that a folder names; with `original` the namespace allows what its transmitter needs."""
    assert f"deploy/kubernetes/{folder}" in block("deploy/kubernetes/README.md", "kubernetes-apply") or folder != "base"
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not here")
    made = subprocess.run([kubectl, "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=True)
    found = {each["kind"]: each for each in yaml.safe_load_all(made.stdout)}
    if folder != "monitoring":
        enforced = found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        assert enforced == ("privileged" if folder == "original" else "restricted")
        names = {each["name"] for each in found["StatefulSet"]["spec"]["template"]["spec"]["containers"]}
        assert ("transmitter" in names) == (folder == "original")
