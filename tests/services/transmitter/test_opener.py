import ast
import ctypes.util
import errno
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from services.transmitter import opener
from services.transmitter.privileges import Opened, unparse
from shared.process import lifecycle
from shared.process import opener as shared_opener
from shared.settings.tables import Bus, Transmitter
from tests.capabilities import NET_RAW
from tests.deploy.confined import SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, SCMP_CMP_EQ, Comparison, Filter
from tests.services.transmitter.started import IS_ROOT, NOBODY, Started, as_nobody, as_nobody_with_net_raw, started
from tests.stack import CHECKOUT, Stack

ETH_P_ALL = 3
VFS_CAP_REVISION_2 = 0x02000000
"""And 1 for effective: struct vfs_cap_data, linux/capability.h."""
SO_DETACH_FILTER = 27
STDLIB = sys.stdlib_module_names
ALL = [opener.SOCKETS] * 3
HELD = ("CapInh", "CapPrm", "CapEff", "CapAmb")
PACKAGE = CHECKOUT / "services/transmitter"
OURS = ("shared/settings/location", "shared/process/opener", "shared/process/privileges")
THIRD_PARTY = {"msgpack", "msgspec", "numpy", "pyroute2", "structlog", "zmq"}
"""Packages that the transmitter may import besides the standard library and ourselves."""
BROUGHT_ALONG = {"cython_runtime", "markdown_it", "mdurl", "psutil", "pygments", "rich", "typing_extensions"}
"""Packages that those import in turn, some only where they are installed."""
as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root, who can become another user")


@pytest.fixture(scope="module")
def copy() -> Iterator[Started]:
    """The opener before a stand-in."""
    with started() as found:
        yield found


def in_own_namespace(**options: Any) -> dict[str, Any]:
    """Options to run as root of a user and network namespace, or skip."""
    found = {"prefix": ("unshare", "-Urn"), "preexec_fn": as_nobody, **options}
    if subprocess.run(("unshare", "-Urn", "true"), preexec_fn=as_nobody, capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    return found


def assert_relinquished(found: dict[str, Any]) -> None:
    """Nothing held, nothing to gain, nothing for others to take."""
    assert [int(found["status"][name], 16) for name in HELD] == [0, 0, 0, 0]
    assert found["status"]["NoNewPrivs"] == "1"
    assert found["dumpable"] == 0
    assert found["core"] == [0, 0]


@as_root
def test_started_by_root_it_ends_as_nobody_with_its_sockets_alone(lab: None, copy: Started) -> None:
    """Root becomes the user, with every set empty, no groups, no way back, the sockets of each kind, and one file."""
    found = copy.said("--stay", environment={"SOME": "thing"})
    assert_relinquished(found)
    assert int(found["status"]["CapBnd"], 16) == 0
    assert found["status"]["Uid"].split() == found["status"]["Gid"].split() == [str(NOBODY)] * 4
    assert not found["status"]["Groups"]
    assert (found["kinds"], found["descriptors"], found["reason"]) == (ALL, 4, "")
    assert (found["given"], found["environment"]["SOME"]) == (["--stay"], "thing")
    facts = {"uid": NOBODY, "gid": NOBODY, "capabilities": 0, "bounding_capabilities": 0, "no_new_privs": 1}
    assert found["facts"] == facts | {"raw_sockets": 3 * opener.SOCKETS}


def test_a_plain_user_with_the_capability_loses_it(lab: None, copy: Started) -> None:
    """With CAP_NET_RAW alone, as by the systemd unit, it has the sockets and not the capability; the user stays."""
    found = copy.said(preexec_fn=as_nobody_with_net_raw)
    assert_relinquished(found)
    assert found["kinds"] == ALL
    assert found["facts"]["uid"] == (os.geteuid() or NOBODY)
    assert found["facts"]["bounding_capabilities"] > 0  # emptying it takes CAP_SETPCAP
    assert found["facts"]["capabilities"] == 0


def test_without_cap_net_admin_buffers_are_what_anybody_may_have(lab: None, copy: Started) -> None:
    """With CAP_NET_RAW alone the send buffers are as large as net.core.wmem_max lets them be."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, opener.SEND_BUFFER)
        most = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert copy.said(preexec_fn=as_nobody_with_net_raw)["buffers"] == [most] * opener.SOCKETS


def test_root_of_a_user_namespace_keeps_its_uid_and_nothing_else(lab: None, copy: Started) -> None:
    """In `unshare -Urn` there is nobody else to become, and its root is nobody special outside."""
    found = copy.said(**in_own_namespace())
    assert_relinquished(found)
    assert int(found["status"]["CapBnd"], 16) == 0
    assert (found["facts"]["uid"], found["kinds"]) == (0, ALL)


def test_a_plain_user_without_the_capability_gets_the_reason(lab: None, copy: Started) -> None:
    """Without CAP_NET_RAW it goes on without sockets; the reason names the cures, in one line."""
    found = copy.said("--config", "absent.toml", preexec_fn=as_nobody)
    assert_relinquished(found)
    assert (found["kinds"], found["given"]) == ([0, 0, 0], ["--config", "absent.toml"])
    for cure in ("CAP_NET_RAW", "systemd", "setpriv", "+net_raw", "unshare -Urn", "container", "no_new_privs"):
        assert cure in found["reason"]
    assert "\n" not in found["reason"]


def test_where_privilege_is_required_its_lack_ends_it(lab: None, copy: Started) -> None:
    """With --require-privilege the same is one line on stderr and exit code 77, before the bus is touched."""
    bus = {"XDG_RUNTIME_DIR": str(copy.directory / "untouched")}
    for arguments in (["--require-privilege"], ["--config=x", "--require-privilege"]):
        done = copy.run(*arguments, preexec_fn=as_nobody, environment=bus)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (77, "", 1)
        assert "CAP_NET_RAW is missing" in done.stderr
    assert not (copy.directory / "untouched").exists()


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (errno.EPERM, "CAP_NET_RAW is missing"),
        (errno.EACCES, "aa-status"),
        (errno.EAFNOSUPPORT, "RestrictAddressFamilies="),
    ],
)
def test_who_forbids_raw_sockets_is_named(lab: None, copy: Started, error: int, cure: str) -> None:
    """With the capability and all, a sandbox may forbid them: by its error the line tells where to look."""
    if ctypes.util.find_library("seccomp") is None:
        pytest.skip("libseccomp is not here")

    def confine() -> None:
        as_nobody_with_net_raw()
        denied = Filter(SCMP_ACT_ALLOW)
        denied.add(SCMP_ACT_ERRNO | error, "socket", Comparison(0, SCMP_CMP_EQ, socket.AF_PACKET, 0))
        denied.load()

    found = copy.said(preexec_fn=confine)
    assert_relinquished(found)
    assert found["kinds"] == [0, 0, 0]
    assert cure in found["reason"]
    done = copy.run("--require-privilege", preexec_fn=confine)
    assert (done.returncode, cure in done.stderr) == (77, True)


@as_root
def test_capability_that_only_could_be_had_is_told_from_one(lab: None, copy: Started) -> None:
    """A capability in the bounding set alone is held by nobody: a container with cap_add and a user who is not root."""
    as_container = ("setpriv", "--bounding-set=-all,+net_raw,+setuid,+setgid", f"--reuid={NOBODY}", "--clear-groups")
    found = copy.said(prefix=as_container)
    assert int(found["status"]["CapBnd"], 16) & NET_RAW
    assert found["kinds"] == [0, 0, 0]
    assert "in a container NET_RAW must be effective for its user" in found["reason"]


@as_root
def test_setcap_under_no_new_privs_is_told_to_be_in_vain(lab: None, copy: Started) -> None:
    """A Python with the file capability has its sockets, and under no_new_privs has none, and the line says why."""
    python = copy.directory / "python-with-capability"
    shutil.copy(Path(copy.interpreter).resolve(), python)
    try:
        os.setxattr(python, "security.capability", struct.pack("<5I", VFS_CAP_REVISION_2 | 1, NET_RAW, 0, 0, 0))
    except OSError as error:
        pytest.skip(f"no file capabilities here: {error.strerror}")
    assert copy.said(interpreter=str(python), preexec_fn=as_nobody)["kinds"] == ALL
    found = copy.said(interpreter=str(python), preexec_fn=as_nobody, prefix=("setpriv", "--no-new-privs"))
    assert found["kinds"] == [0, 0, 0]
    assert "a setcap on python counts for nothing under no_new_privs" in found["reason"]


@as_root
def test_a_user_who_cannot_read_the_interpreter_gets_no_sockets(lab: None, copy: Started, tmp_path: Path) -> None:
    """A Python that the user can't read, as under /root, is found out before anything is given up for it."""
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "python").symlink_to(copy.interpreter)
    found = copy.said(interpreter=str(hidden / "python"))
    assert_relinquished(found)
    assert (found["facts"]["uid"], found["kinds"]) == (0, [0, 0, 0])
    assert f"can't read {hidden}/python" in found["reason"]
    assert "[transmitter] user 'nobody'" in found["reason"]
    assert copy.run("--require-privilege", interpreter=str(hidden / "python")).returncode == 77


@as_root
def test_a_user_who_cannot_read_the_settings_gets_no_sockets(lab: None, copy: Started, tmp_path: Path) -> None:
    """Settings for root's eyes would be missing after the change of user: that is said, and root reads them."""
    settings = tmp_path / "fanwire.toml"
    settings.touch(0o600)
    found = copy.said(f"--config={settings}")
    assert (found["kinds"], found["facts"]["uid"]) == ([0, 0, 0], 0)
    assert f"can't read {settings}" in found["reason"]


@as_root
@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("no-such-user", "there is no such user; name another"),
        ("root", "that is root too; name another"),
        ("0", "that is root too; name another"),
        ("4294967295", "not in this user namespace"),  # (uid_t)-1, which setresuid(2) takes for `leave as it is`
        ("99999999999999999999", "there is no such user; name another"),
    ],
)
def test_root_without_anybody_to_become_gets_no_sockets(lab: None, copy: Started, user: str, why: str) -> None:
    """A user who is not there, or is root, means no sockets: root's uid alone would still be root's."""
    found = copy.said(environment={"FANWIRE_TRANSMITTER__USER": user})
    assert_relinquished(found)
    assert found["kinds"] == [0, 0, 0]
    assert why in found["reason"]


@as_root
def test_the_hosts_root_is_no_try_out(lab: None, copy: Started) -> None:
    """Root of a user namespace who is root outside too does not count as nobody special."""
    found = copy.said(**in_own_namespace(preexec_fn=None))
    assert found["kinds"] == [0, 0, 0]
    assert "root outside too" in found["reason"]


@as_root
def test_root_without_the_right_to_become_another_gets_no_sockets(lab: None, copy: Started) -> None:
    """A container's root with CAP_NET_RAW alone can't cease to be root, and is told what that takes."""
    found = copy.said(prefix=("setpriv", "--bounding-set=-all,+net_raw"))
    assert found["kinds"] == [0, 0, 0]
    assert "CAP_SETUID and CAP_SETGID" in found["reason"]


@as_root
@pytest.mark.parametrize("by", ["environment", "--config", "--config=", "FANWIRE_CONFIG", "--conf"])
def test_the_user_is_the_one_of_the_settings(lab: None, copy: Started, by: str) -> None:
    """`[transmitter] user`, a name or a uid, is read from wherever the transmitter will read it."""
    settings = copy.directory / "fanwire.toml"
    settings.write_text('[transmitter]\nuser = "1234"\n')
    arguments = {"--config": ["--config", str(settings)], "--config=": [f"--config={settings}"]}
    arguments["--conf"] = ["--conf", str(settings)]  # argparse takes what is unambiguous
    environment = {"FANWIRE_CONFIG": str(settings)} if by == "FANWIRE_CONFIG" else {}
    if by == "environment":
        environment = {"FANWIRE_CONFIG": str(settings), "FANWIRE_TRANSMITTER__USER": "4321"}
    found = copy.said(*arguments.get(by, []), environment=environment)
    uid = 4321 if by == "environment" else 1234
    assert (found["facts"]["uid"], found["facts"]["gid"], found["kinds"]) == (uid, uid, ALL)


@as_root
@pytest.mark.parametrize(
    "text", ["[transmitter", "transmitter = 1", "[transmitter]\nuser = 5", "x = " + "[" * 9999, '[transmitter]\nuser="']
)
def test_settings_that_are_wrong_are_the_transmitters_to_report(lab: None, copy: Started, text: str) -> None:
    """Unreadable settings do not stop the opener: it becomes the default user, arguments go on."""
    settings = copy.directory / "wrong.toml"
    settings.write_text(text)
    found = copy.said("--config", str(settings))
    assert (found["facts"]["uid"], found["given"]) == (NOBODY, ["--config", str(settings)])


@as_root
def test_settings_from_a_pipe_are_left_to_the_transmitter(lab: None, copy: Started) -> None:
    """A pipe can be read once only, and not by the opener: it does not wait for it either."""
    os.mkfifo(copy.directory / "pipe")
    assert copy.said("--config", str(copy.directory / "pipe"), timeout=60)["facts"]["uid"] == NOBODY


def test_defaults_are_those_of_the_settings() -> None:
    """The opener can't import them, and agrees with them all the same."""
    assert lifecycle.NOT_PERMITTED == shared_opener.NOT_PERMITTED
    assert Transmitter().user == shared_opener.DEFAULT_USER
    assert Bus().directory == shared_opener.DEFAULT_DIRECTORY


def test_wrong_usage_is_the_transmitters_to_report(lab: None, copy: Started) -> None:
    """Arguments that make no sense go on as they are."""
    assert copy.said("--config", preexec_fn=as_nobody)["given"] == ["--config"]


def test_neither_loader_nor_interpreter_is_told_where_to_find_code(lab: None, copy: Started, tmp_path: Path) -> None:
    """LD_ and PYTHON variables end here; the path has its own directory and the installed ones alone."""
    told = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": "x", "FANWIRE_X": "y"}
    found = copy.said(preexec_fn=as_nobody, environment=told)
    assert not [name for name in found["environment"] if name.startswith(("LD_", "PYTHON"))]
    assert found["environment"]["FANWIRE_X"] == "y"
    assert found["path"][0] == str(copy.directory)
    assert not {"", str(tmp_path), str(copy.directory / "services/transmitter")} & set(found["path"])


def test_no_other_descriptor_is_inherited(lab: None, copy: Started) -> None:
    """Descriptors that the opener was started with do not reach the transmitter."""
    with (copy.directory / "fanwire.toml").open("w") as secret:
        found = copy.said(preexec_fn=as_nobody_with_net_raw, pass_fds=[secret.fileno()])
    assert (found["kinds"], found["descriptors"]) == (ALL, 3)


def test_what_cannot_be_started_ends_in_one_line(lab: None, copy: Started) -> None:
    """An interpreter that is gone is exit code 77, and nothing goes on with the sockets."""
    script = (
        "import sys; sys.path.insert(0, '.'); sys.executable = '/absent'; import services.transmitter.__main__ as m; "
    )
    command = [copy.interpreter, "-c", script + "sys.exit(m.main([]))"]
    done = subprocess.run(
        command, cwd=copy.directory, preexec_fn=as_nobody_with_net_raw, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (77, 1)
    assert "'/absent'" in done.stderr


def test_no_raw_socket_takes_the_place_of_stderr(lab: None, copy: Started) -> None:
    """Started with its standard streams closed, it has others that lead nowhere: what is logged is not sent."""
    script = 'exec 3>&1 0<&- 1>&- 2>&-; "$@"; echo $? >&3'
    done = copy.run("--x", prefix=("sh", "-c", script, "sh"), preexec_fn=as_nobody_with_net_raw)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_process_stays_the_same(lab: None, copy: Started) -> None:
    """The transmitter has the process id of what was started, as systemd's Type=notify wants it."""
    command = [copy.interpreter, "-m", "services.transmitter"]
    with subprocess.Popen(command, cwd=copy.directory, stdout=subprocess.PIPE, preexec_fn=as_nobody) as process:
        assert process.stdout
        assert json.load(process.stdout)["pid"] == process.pid


@as_root
def test_a_closed_bus_directory_is_handed_on_as_a_descriptor(lab: None, copy: Started) -> None:
    """A descriptor of the bus directory leads into root's runtime directory where that is closed to the user."""
    bus = copy.directory / "closed" / "fanwire"
    bus.parent.mkdir(mode=0o700)
    environment = {"XDG_RUNTIME_DIR": str(bus.parent)}
    found = copy.said(environment=environment)
    assert (stat.S_IMODE(bus.stat().st_mode), bus.stat().st_uid) == (0o700, 0)  # made, and left for the broker to open
    assert (found["bus"], found["descriptors"]) == ("Permission denied", 5)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(bus / "publish"))
        listener.listen()
        for path, mode in ((bus, 0o750), (bus / "publish", 0o770)):
            os.chown(path, 0, NOBODY)
            path.chmod(mode)
        found = copy.said(environment=environment)
    assert found["bus"] == "Success"
    assert found["environment"]["FANWIRE_BUS__DIRECTORY"].startswith("/proc/self/fd/")


@as_root
def test_an_open_bus_directory_keeps_its_name(lab: None, copy: Started) -> None:
    """The user is told the path as root has it where it can go there, since /tmp/fanwire-UID would be another."""
    settings = copy.directory / "bus.toml"
    settings.write_text(f'[bus]\ndirectory = "{copy.directory}/$NAME"\n')
    found = copy.said("--config", str(settings), environment={"NAME": "there"})
    assert found["environment"]["FANWIRE_BUS__DIRECTORY"] == f"{copy.directory}/there"
    assert found["descriptors"] == 4
    accounts = (copy.directory / "there" / "accounts.transmitter").stat()
    assert (stat.S_IMODE(accounts.st_mode), accounts.st_uid, accounts.st_gid) == (0o600, NOBODY, NOBODY)


@as_root
def test_systemds_runtime_directory_stays_as_it_is(lab: None, copy: Started) -> None:
    """RUNTIME_DIRECTORY names the bus directory for any user: nothing is made or handed on."""
    found = copy.said(environment={"RUNTIME_DIRECTORY": "/run/absent"})
    assert "FANWIRE_BUS__DIRECTORY" not in found["environment"]


@as_root
def test_a_link_for_a_bus_directory_is_the_transmitters_to_refuse(lab: None, copy: Started, tmp_path: Path) -> None:
    """A link in its place is handed on as it is, not as the closed directory that it leads to."""
    (copy.directory / "link").symlink_to(tmp_path)
    found = copy.said(environment={"FANWIRE_BUS__DIRECTORY": str(copy.directory / "link")})
    assert found["environment"]["FANWIRE_BUS__DIRECTORY"] == f"{copy.directory}/link"
    assert found["descriptors"] == 3
    assert not list(tmp_path.iterdir())


CLIENT = """
import os, sys
import zmq
from shared.process.privileges import relinquish
handle = os.open(sys.argv[1], os.O_PATH | os.O_DIRECTORY)
relinquish(("nobody", 65534, 65534))
with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
    subscriber.connect(f"ipc:///proc/self/fd/{handle}/subscribe")
    subscriber.subscribe("")
    print(subscriber.recv_multipart() if subscriber.poll(10_000) else "nothing came")
"""


@as_root
def test_zeromq_reaches_the_broker_by_the_descriptor(stack: Stack) -> None:
    """Undumpable and another user, a process connects through /proc/self/fd to the bus of root's broker."""
    stack.start("broker")
    client = stack.spawn("client", [sys.executable, "-c", CLIENT, str(stack.bus)])
    client.wait_for("\n")
    assert "status/broker" in client.text


@pytest.fixture
def sockets(lab: None) -> Iterator[Opened]:
    """The opener's sockets."""
    opened = opener.open_sockets()
    yield opened
    for sock in chain(*opened.values()):
        sock.close()


def test_sockets_can_only_send(sockets: Opened) -> None:
    """Not even bound to every protocol does a packet socket receive anything, and that can't be undone."""
    listening = sockets["packet"][0]
    listening.bind(("lo", ETH_P_ALL))
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        other.bind(("lo", ETH_P_ALL))
        sender.sendto(b"seen", ("127.0.0.1", 9))
        assert other.recv(100).endswith(b"seen")
    for sock in chain(*sockets.values()):
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
        with pytest.raises(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def test_sockets_are_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sockets before a refused one are closed, and the error says what forbids it."""
    opened = []

    def refuse(kind: str) -> socket.socket:
        if kind == "ip4":
            raise OSError(errno.EACCES, "Permission denied")
        opened.append(socket.socket())
        return opened[-1]

    monkeypatch.setattr(opener, "open_socket", refuse)
    with pytest.raises(PermissionError, match="aa-status") as caught:
        opener.open_sockets()
    assert caught.value.errno == errno.EACCES
    assert [sock.fileno() for sock in opened] == [-1] * opener.SOCKETS


def test_without_ipv6_there_are_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host without IPv6 the transmitter has the sockets for IPv4 and frames."""

    def refuse(kind: str) -> socket.socket:
        if kind == "ip6":
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return socket.socket()

    monkeypatch.setattr(opener, "open_socket", refuse)
    opened = opener.open_sockets()
    assert [part.partition(":")[0] for part in unparse(opened).split(";")] == ["packet", "ip4"]
    for sock in chain(*opened.values()):
        sock.close()


def imported(path: Path) -> set[str]:
    """Modules that a file imports, dotted, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize(
    "module", ["__init__", "__main__", "opener", "privileges", *(f"../../{path}" for path in OURS)]
)
def test_what_runs_with_privilege_imports_the_standard_library_alone(module: str) -> None:
    """No third-party code, and no other code of ours, runs before the privileges are gone."""
    ours = {f"services.transmitter.{name}" for name in ("opener", "privileges", "unprivileged")}
    ours |= {path.replace("/", ".") for path in OURS}
    others = {name for name in imported(PACKAGE / f"{module}.py") if name.partition(".")[0] not in STDLIB} - ours
    assert not others
    assert (module == "__main__") == ("services.transmitter.unprivileged" in imported(PACKAGE / f"{module}.py"))


def modules_loaded_by(module: str) -> set[str]:
    """Top-level modules that an interpreter loads for one of ours."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); import {}; "
    script += "print(*{{name.partition('.')[0] for name in set(sys.modules) - before}})"
    command = [sys.executable, "-P", "-c", script.format(module), str(CHECKOUT)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_opener_loads_the_standard_library_alone() -> None:
    """The imports of its imports are no third party's either."""
    assert modules_loaded_by("services.transmitter.opener") - STDLIB == {"services", "shared"}


def test_the_transmitter_imports_what_is_allowed_alone() -> None:
    """A new dependency of the process that holds the raw sockets has to be written down here."""
    direct = {name.partition(".")[0] for path in PACKAGE.glob("*.py") for name in imported(path)}
    assert direct - STDLIB == {"services", "shared"} | (direct & THIRD_PARTY)
    loaded = {name for name in modules_loaded_by("services.transmitter.unprivileged") if not name.startswith("_")}
    assert loaded - STDLIB - {"services", "shared"} <= THIRD_PARTY | BROUGHT_ALONG


def test_nobody_else_touches_raw_sockets() -> None:
    """AF_PACKET and SOCK_RAW are named by the transmitter alone, and where the doctor sees if they may be had."""
    doctor = CHECKOUT / "services" / "operator" / "doctor" / "facts.py"
    raw = {"AF_PACKET", "PF_PACKET", "SOCK_RAW", "IPPROTO_RAW", "IP_HDRINCL", "IPV6_HDRINCL"}
    for folder in ("services", "shared"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(ast.parse(path.read_text()))}
            assert not names & raw or path.is_relative_to(PACKAGE) or path == doctor, f"{path} has {names & raw}"
