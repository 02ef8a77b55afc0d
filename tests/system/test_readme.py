"""The code in the READMEs does what the text around it says when it is pasted, block by block."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from shared.settings.file import load
from shared.settings.model import Settings
from tests.capture import Collector
from tests.documents import block
from tests.network import End, Host, veth
from tests.openly import NOBODY, OpenStack, program_for_all
from tests.services.transmitter.started import IS_ROOT
from tests.stack import PATIENT, Stack, ask_json, sign_up, wait_until
from tests.system.test_fan_out import need

TOUR: Final = (
    block("README.md", "tour-watch"),
    block("README.md", "tour-siem"),
    block("README.md", "tour-archive"),
    block("README.md", "tour-original"),
    block("README.md", "tour-end"),
)

SHOWN: Final = (
    "'watching' :252A 'the disk is full' 'collecting .*archive' 'from .*second' 'collecting .*flows' 'from .*third'"
)
"""The reader's view at the end of each `sleep` of the tour: printed, in siem.log, or nc's port in /proc/net/udp."""
SLEEP: Final = """
exec 3>&1 >>said 2>&1
trap 'cat said >&3' EXIT
sleep() {
    until grep -qs "${shown[0]:?}" said siem.log /proc/net/udp; do command sleep 0.1; done
    shown=("${shown[@]:1}")
}
"""
AGAIN: Final = "cat said >&3; echo 'the second time' >&3; : >said"


def paste(stack: Stack, commands: str, *, code: int = 0, seconds: float = 60, **environment: str) -> str:
    """Let bash run the commands, where `fanwire` is on PATH; return all that they print."""
    if not (Path(sys.prefix) / "bin" / "fanwire").exists():
        pytest.skip("fanwire is not installed in this environment")
    script = stack.directory / "pasted.sh"
    script.write_text(f"set -eum\n{commands}")
    result = subprocess.run(
        ["bash", str(script)],
        env=stack.environment | environment,
        cwd=stack.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert result.returncode == code, result.stdout
    return result.stdout


@pytest.mark.timeout(240)
def test_tour_works_when_pasted_twice(open_stack: OpenStack) -> None:
    """Every line of the tour, pasted in order into one shell, does what the text says; the second time as well."""
    need("nc")
    need("logger")
    open_stack.start_all()
    open_stack.start("transmitter")
    (open_stack.directory / ".venv").symlink_to(sys.prefix)
    shown = f"shown=({SHOWN})"
    said = paste(open_stack, "\n".join((SLEEP, shown, *TOUR, AGAIN, shown, *TOUR)), seconds=220)
    for time_round in said.split("the second time\n"):
        assert re.search(r"Got message from \('127\.0\.0\.1', \d+\): b'Hello you there!\\n'", time_round), said
        assert "Got your message!" in time_round
        assert '{"ok":true,"client":{"name":"siem"' in time_round
        assert "the disk is full" in time_round
        assert re.search(r"Got message from .*first", time_round)
        assert re.search(r"Got message from .*second", time_round)
        assert re.search(r"Got message from \('127\.0\.0\.1', \d+\): .*third", time_round)
        assert "balanced" in time_round
    assert ask_json({"op": "list"})["clients"] == {}


def read(tmp_path: Path, text: str) -> Settings:
    """Settings as the services read them, from a file with this text."""
    path = tmp_path / "shown.toml"
    path.write_text(text)
    return load(path, {})


def test_example_of_settings_is_read(tmp_path: Path) -> None:
    """The settings that are shown as an example are read as what they say."""
    settings = read(tmp_path, block("shared/settings/README.md", "example"))
    assert [stream.name for stream in settings.streams] == ["syslog", "netflow"]
    assert [(each.name, each.address, each.port) for each in settings.collectors] == [("siem", "192.0.2.20", 514)]


def test_imported_file_is_what_was_there(stack: Stack) -> None:
    """The command that imports samplicator's file writes settings that are read, with its receivers as collectors."""
    (stack.directory / "samplicator.conf").write_text("10.0.0.0/255.0.0.0: 192.0.2.7/2055 192.0.2.8/2055\n")
    paste(stack, block("services/operator/README.md", "import"))
    settings = load(stack.directory / "site.toml", {})
    assert [stream.listen for stream in settings.streams] == [("udp://0.0.0.0:2000",)]
    assert {(each.address, each.port, each.source) for each in settings.collectors} == {
        ("192.0.2.7", 2055, "original"),
        ("192.0.2.8", 2055, "original"),
    }


def test_worker_takes_the_number_it_is_given(stack: Stack) -> None:
    """The command for another worker starts one that has the number shown."""
    stack.start("broker")
    command = block("services/ingest/README.md", "third-worker").replace("fanwire ingest", "exec fanwire ingest")
    worker = stack.spawn("third", ["bash", "-euc", command])
    wait_until(lambda: worker.events("ready"), f"it is ready: {worker.text}")
    assert {each["service"] for each in worker.events("ready")} == {"ingest.3"}


def test_reload_reaches_every_service_that_reads_again(stack: Stack) -> None:
    """The command for honcho's services has each of them read the settings again, and the broker go on."""
    need("pkill")
    stack.by_exec = True
    stack.start_all()
    ours = f'pkill() {{ command pkill -P {os.getpid()} "$@"; }}\n'  # there may be other services on this machine
    paste(stack, ours + block("deploy/README.md", "reload"))
    for name in ("gateway", "ingest.1", "forwarder"):
        wait_until(lambda name=name: stack[name].reloads, f"{name} heeds SIGHUP")  # type: ignore[misc]
    assert stack["broker"].process.poll() is None
    assert not stack["broker"].reloads


def test_capability_is_given_by_hand(open_stack: OpenStack) -> None:
    """The command by which root gives another user's transmitter its one capability starts one with raw sockets."""
    if not IS_ROOT:
        pytest.skip("only root can give a capability to another user")
    need("setpriv")
    interpreter, program = program_for_all()
    command = block("services/transmitter/README.md", "with-capability").replace("USER", "nobody")
    command = command.replace("GROUP", str(NOBODY))
    command = command.replace("fanwire transmitter", f"{interpreter} -m services.transmitter")
    open_stack.bus.mkdir(mode=0o700)
    os.chown(open_stack.bus, NOBODY, -1)  # the bus is that of the user who gets the capability
    as_user = ["setpriv", "--reuid", "nobody", "--init-groups", interpreter, "-m", "services.broker"]
    open_stack.spawn("broker", as_user, PYTHONPATH=str(program)).wait_for('"ready"')
    running = open_stack.spawn("transmitter", shlex.split(command), PYTHONPATH=str(program))
    running.wait_for('"ready"')
    process = Path(f"/proc/{running.process.pid}")
    status = (process / "status").read_text()
    assert re.search(rf"^Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t", status, re.MULTILINE)
    assert re.search(rf"^Gid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t", status, re.MULTILINE)
    assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)
    opened = {str(each.readlink()) for each in (process / "fd").iterdir()}
    packet = {f"socket:[{line.split()[-1]}]" for line in (process / "net" / "packet").read_text().splitlines()}
    assert opened & packet


def test_terminal_follows_entry_and_events(stack: Stack) -> None:
    """The two lines for a terminal sign up and watch; the entry ends with its connection, as the watcher reads."""
    need("nc")
    stack.configure(PATIENT)
    stack.start_all()
    register, watch = block("services/gateway/README.md", "by-hand").splitlines()
    watcher = stack.spawn("watcher", ["bash", "-c", watch])
    watcher.wait_for('"clients":{}')
    holder = stack.spawn("holder", ["bash", "-c", register])
    holder.wait_for('"client":{"name":"siem"')
    watcher.wait_for('"event":"joined"')
    subprocess.run(["pkill", "-P", str(holder.process.pid)], check=True)  # as Ctrl-C does
    watcher.wait_for('"event":"left"')
    subprocess.run(["pkill", "-P", str(watcher.process.pid)], check=True)


def test_second_host_takes_datagrams_in(stack: Stack) -> None:
    """With the keys and settings shown, ingest on a second host feeds the collectors of the broker's host."""

    def here(text: str, keys: Path) -> str:
        return text.replace("/etc/fanwire/keys", str(keys)).replace("[bus]\n", "")

    keys, branch_keys = stack.directory / "keys", stack.directory / "branch"
    paste(stack, block("services/broker/README.md", "make-keys").replace("/etc/fanwire/keys", str(keys)))
    paste(stack, f"fanwire keys {branch_keys} ingest")
    (keys / "ingest.branch.public").write_bytes((branch_keys / "ingest.public").read_bytes())
    (branch_keys / "broker.public").write_bytes((keys / "broker.public").read_bytes())
    with Host() as relay, Host() as branch, veth(
        End(relay, "lan", "192.0.2.10/24"), End(branch, "lan", "192.0.2.11/24")
    ):  # fmt: skip
        stack.configure(here(block("services/broker/README.md", "broker-host"), keys) + PATIENT)
        with relay.entered():
            stack.start("broker")
        stack.configure(here(block("services/broker/README.md", "with-keys"), keys) + PATIENT)
        with relay.entered(), Collector(relay, "127.0.0.1", 9514) as siem:
            stack.start("gateway")
            stack.start("forwarder")
            stack.bus = stack.directory / "other"
            stack.configure(here(block("services/broker/README.md", "second-host"), branch_keys))
            with branch.entered():
                stack.start("ingest.11")
            sign_up({"name": "siem", "streams": ["messages"], "port": 9514})
            with branch.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"from afar", ("127.0.0.1", 6667))
            siem.read(1)


def test_gateway_reads_its_credentials(stack: Stack) -> None:
    """With the settings shown for systemd's credentials the gateway listens by TLS."""
    need("openssl")
    lines = block("deploy/README.md", "with-credentials").replace("/etc/fanwire", str(stack.directory))
    subject = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=relay"
    token = "fanwire token siem --scope list --write siem.token > tokens.toml"
    paste(stack, f"openssl req {subject} -keyout key.pem -out gateway.pem; {token}")
    for name in ("key.pem", "tokens.toml"):
        (stack.directory / name).chmod(0o600)
    stack.configure(lines)
    stack.start("broker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDENTIALS_DIRECTORY", str(stack.directory))
        stack.start("gateway")
    said = paste(stack, "openssl s_client -connect 127.0.0.1:5001 </dev/null")
    assert "CN = relay" in said or "CN=relay" in said
