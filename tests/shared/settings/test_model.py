import errno
import math
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.settings import location
from shared.settings.entries import Collector, Stream
from shared.settings.explain import SettingsError
from shared.settings.file import load, render
from shared.settings.model import Settings
from shared.settings.tables import Bus

FULL = """
[bus]
directory = "/run/x"
high_water_mark = 7
[ingest]
fill_ms = 0
tcp_idle_seconds = 5
[[stream]]
name = "syslog"
listen = ["udp://[::]:514", "tcp://localhost:601", "unixgram:///run/log.sock"]
[[stream]]
name = "net-flow.v9"
listen = ["udp://0.0.0.0:2055"]
reply = "thanks"
reply_beyond_loopback = true
[[collector]]
name = "siem"
streams = ["syslog", "net-flow.v9"]
address = "192.0.2.9"
port = 514
from = ["10.0.0.0/8", "2001:db8::/32"]
sample = 3
group = "pair"
[[collector]]
name = "all"
streams = ["*"]
address = "siem.example.net"
port = 9995
source = "original"
"""
STREAM = '[[stream]]\nname = "a"\nlisten = ["udp://localhost:1"]\n'
COLLECTOR = '[[collector]]\nname = "a"\nstreams = ["messages"]\naddress = "192.0.2.9"\nport = 9\n'


def written(directory: Path, text: str) -> Path:
    """A settings file."""
    path = directory / "fanwire.toml"
    path.write_text(text)
    return path


def read(directory: Path, text: str, **environment: str) -> Settings:
    """The settings of a file and an environment."""
    return load(written(directory, text), environment)


def refusal(directory: Path, text: str, **environment: str) -> str:
    """The one line by which these settings are refused."""
    with pytest.raises(SettingsError) as refused:
        read(directory, text, **environment)
    line = str(refused.value)
    assert len(line.splitlines()) == 1
    return line


def test_defaults_are_the_documented_ports() -> None:
    """Without file and environment the documented endpoints are served, and answered."""
    found = load(None, {})
    assert found == Settings()
    assert found.gateway.listen == ("tcp://127.0.0.1:5000",)
    assert [str(endpoint) for endpoint in found.streams[0].endpoints] == [
        "udp://localhost:6667",
        "tcp://localhost:6667",
    ]
    assert found.streams[0].reply == "Got your message!"


def test_file_is_read(tmp_path: Path) -> None:
    """Every kind of entry of a file comes through; what it leaves out keeps its default."""
    found = read(tmp_path, FULL)
    assert found.bus == Bus(directory="/run/x", high_water_mark=7)
    assert [stream.name for stream in found.streams] == ["syslog", "net-flow.v9"]
    assert found.collectors[0].prefixes == ("10.0.0.0/8", "2001:db8::/32")
    assert found.collectors[1].source == "original"
    assert [collector.host for collector in found.collectors] == ["", "siem.example.net"]
    assert found.gateway == Settings().gateway


def test_file_named_by_the_environment_is_read(tmp_path: Path) -> None:
    """FANWIRE_CONFIG names the file, unless one is given."""
    named, given_path = tmp_path / "named.toml", tmp_path / "given.toml"
    named.write_text("[bus]\nhigh_water_mark = 1\n")
    given_path.write_text("[bus]\nhigh_water_mark = 2\n")
    environment = {"FANWIRE_CONFIG": str(named)}
    assert load(None, environment).bus.high_water_mark == 1
    assert load(given_path, environment).bus.high_water_mark == 2


def test_installed_program_finds_a_file_that_nobody_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc goes before the user's own directory, a named file before both; a checkout looks for none."""
    system, own = tmp_path / "etc" / "fanwire.toml", tmp_path / "home" / "fanwire" / "fanwire.toml"
    monkeypatch.setattr(location, "SYSTEM", system)
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "home")}
    assert location.settings_file(None, environment, look=True) is None
    for path in (own, system):
        path.parent.mkdir(parents=True)
        path.touch()
        assert location.settings_file(None, environment, look=True) == path
    assert location.settings_file(own, environment, look=True) == own
    named = environment | {"FANWIRE_CONFIG": str(own)}
    assert location.settings_file(None, named, look=True) == own
    assert location.settings_file(None, environment | {"FANWIRE_CONFIG": ""}, look=True) is None
    assert location.IS_CHECKOUT
    assert location.settings_file(None, environment) is None


def test_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """A file that is missing, or a directory, is named with the reason."""
    for path, reason in ((tmp_path / "missing.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SettingsError, match=f"^{path}: {reason}.*; name the file by --config or FANWIRE_CONFIG$"):
            load(path, {})


def test_file_of_another_user_is_told_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there, and that this user may not read, does not have to be named otherwise."""
    path = tmp_path / "fanwire.toml"
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=error))
    with pytest.raises(
        SettingsError, match=f"^{path}: Permission denied; let this user read it, or run as one who may$"
    ):
        load(path, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[bus\n", "not TOML: "),
        ("a = " + "[" * 100_000, "not TOML: "),
        ("a = " + "9" * 5000, "not TOML: "),
        ("[bus]\ncolour = 1\n", "[bus] colour: unknown key; expected one of directory, high_water_mark"),
        (
            "[busses]\n",
            "[busses]: unknown table (did you mean 'bus'?); expected one of [bus], [broker], [gateway], [ingest], ",
        ),
        (
            STREAM + "port = 1\n",
            '[[stream]] "a" port: unknown key (it belongs to [[collector]]); expected one of name, listen, reply',
        ),
        (COLLECTOR + "prefixes = []\n", '[[collector]] "a" prefixes: unknown key; expected one of'),
        ('[bus]\n"a\\nb" = 1\n', "unknown key; expected one of directory, high_water_mark"),
        (
            '[bus]\nhigh_water_mark = "many"\n',
            "[bus] high_water_mark: expected a whole number from 1 to 65536, got a text in quotes",
        ),
        (
            "[bus]\nhigh_water_mark = true\n",
            "[bus] high_water_mark: expected a whole number from 1 to 65536, got true or false",
        ),
        (
            "[bus]\nhigh_water_mark = 1.5\n",
            "[bus] high_water_mark: expected a whole number from 1 to 65536, got a number",
        ),
        ("[bus]\nhigh_water_mark = 0\n", "[bus] high_water_mark: expected a whole number from 1 to 65536"),
        ("[bus]\nhigh_water_mark = 1e400\n", "[bus] high_water_mark: expected a whole number"),
        (f"[bus]\nhigh_water_mark = {2**70}\n", "[bus] high_water_mark: "),
        ("[ingest]\ntcp_idle_seconds = nan\n", "[ingest] tcp_idle_seconds: expected a number from above 0 to 86400"),
        ("[ingest]\ntcp_idle_seconds = inf\n", "[ingest] tcp_idle_seconds: expected a number from above 0 to 86400"),
        ("[ingest]\nfill_ms = 200\n", "[ingest] fill_ms: expected a number from 0 to 100"),
        ("[gateway]\nlisten = [1]\n", "[gateway] listen: expected a text in quotes that"),
        (
            "[gateway]\nlease_seconds = 1979-05-27\n",
            "[gateway] lease_seconds: expected a number from 0 to 31536000, got a date",
        ),
        (
            "[gateway]\nserve_seconds = 1\nlisten = 'tcp://localhost:1'\n",
            "[gateway] listen: expected a list in brackets that is not empty, got a text",
        ),
        (
            "[gateway]\nlisten = ['udp://localhost:1']\n",
            "[gateway] listen: 'udp://localhost:1' does not begin with tcp://",
        ),
        ("[gateway]\nlisten = ['tcp://localhost:0']\n", "expected tcp://HOST:PORT with a port from 1 to 65535"),
        ("bus = 3\n", "line 1: bus: expected a table, got a whole number"),
        ("[stream]\nname = 'a'\n", "line 1: [stream]: write [[stream]], as there may be several, not [stream]"),
        ("[[bus]]\n", "line 1: [[bus]]: write [bus], as there is only one, not [[bus]]"),
        (COLLECTOR.replace("streams", "stream"), "\"a\" stream: unknown key (did you mean 'streams'?)"),
        (COLLECTOR.replace("messages", "mesages"), "no stream 'mesages' (did you mean 'messages'?)"),
        ("[[stream]]\nlisten = ['udp://localhost:1']\n", "line 1: [[stream]] number 1: name is missing"),
        (
            "listen = ['udp://localhost:1']\n",
            "line 1: listen: this key is in no table (it belongs to [bus] or [gateway]",
        ),
        ("[[stream]]\n[bus]\nlisten = ['tcp://127.0.0.1:1']\n[bus]\n", "line 4: not TOML: this table is there already"),
        ("[bus]\npool = 1\npool = 2", "line 3: not TOML: this key is there already"),
        ("[gateway]\nallow_transmit = yes\n", "line 2: not TOML: invalid value; a text needs quotes, a switch is true"),
        ('[bus]\ndirectory = "/run\n', "line 2: not TOML: the quotes are not closed on this line"),
        ("[transmitter]\nuser = 'x'\nethertypes = ['ip']\n", "line 3: [transmitter] ethertypes: 'ip' is not"),
        ("[bus]\nlisten = ['tcp://127.0.0.1:1']\n", "line 2: [bus] listen: 'tcp://127.0.0.1:1' is open to every user"),
        (COLLECTOR.replace("192.0.2.9", "192.0.2.9:514"), "nor a host name; the port has a key of its own"),
        ("stream = 3\n", "line 1: stream: expected a list in brackets, got a whole number"),
        (
            '[[stream]]\nname = "a"\nlisten = []\n',
            '[[stream]] "a" listen: expected a listener, unless [uplink] receives it',
        ),
        ('[[stream]]\nname = "a"\n', '[[stream]] "a": listen is missing'),
        (STREAM.replace('"a"', '"a/b"'), '[[stream]] "a/b" name: expected a text in quotes: up to 64 letters'),
        (
            STREAM + 'reply = "' + "x" * 1025 + '"\n',
            '[[stream]] "a" reply: expected a text in quotes with 0 to 1024 characters',
        ),
        (STREAM + STREAM, 'line 5: [[stream]] "a" name: another one has it; give each its own'),
        (STREAM.replace(":1", ""), "listen: 'udp://localhost': expected udp://HOST:PORT"),
        (STREAM + 'protocol = "netflow9"\n', "(did you mean 'netflow'?); expected one of netflow, ipfix, sflow"),
        (
            '[ingest]\nspread = "datagram"\n' + STREAM + 'protocol = "sflow"\n',
            'line 6: [[stream]] "a" protocol: with [ingest] spread = "datagram" no worker sees all',
        ),
        ("[broker]\nmemory = 1000\n", "[broker] memory: expected a whole number from 67108864"),
        ("[forwarder]\nmemory = 268435456\n", "[forwarder] held_memory: may take 268435456 bytes, over half of memory"),
        ("[transmitter]\nmemory = 268435456\n", "[transmitter] held_memory: may take 268435456 bytes, over half"),
        (
            "[offload]\nmark_mask = 0x7f\n",
            "line 2: [offload] mark_mask: 0x0000007f is not 8 to 16 bits side by side, as 0xfff00000 is",
        ),
        (
            "[offload]\nmark_mask = 0xff00ff00\n",
            "[offload] mark_mask: 0xff00ff00 is not 8 to 16 bits side by side, as 0xfff00000 is",
        ),
        (
            "[offload]\nmark_mask = 0xffffff\n",
            "[offload] mark_mask: 0x00ffffff is not 8 to 16 bits side by side, as 0xfff00000 is",
        ),
        (
            f'[[token]]\nname = "a"\ncertificate = "a"\nscopes = ["collect"]\nstreams = {["messages"] * 65}\n',
            '[[token]] "a" streams: expected a list in brackets with 1 to 64 entries',
        ),
        ("[gateway]\nmax_clients = 100000\n", "[gateway] max_clients: may take 409600000 bytes, over half of memory"),
        ("[ingest]\ntcp_connections = 5000\n", "[ingest] tcp_connections: may take 491520000 bytes, over half"),
        (COLLECTOR + COLLECTOR, 'line 7: [[collector]] "a" name: another one has it; give each its own'),
        ('[offload]\nunseen = ["traps"]\n', "[offload] unseen: there is no stream 'traps'; name a [[stream]]"),
        (
            '[offload]\nunseen = ["x"]\n[[stream]]\nname = "x"\nlisten = ["udp://localhost:1"]\njournal = true\n',
            '[offload] unseen: "x" has journal, which sees all of it; leave one out',
        ),
        (COLLECTOR.replace("messages", "traps"), "\"a\" streams: there is no stream 'traps'; name a [[stream]]"),
        (
            COLLECTOR.replace("192.0.2.9", "192.0.2.300"),
            "address: '192.0.2.300' is neither an IP address nor a host name",
        ),
        (COLLECTOR.replace("192.0.2.9", "fe80::1%eth0"), "address: 'fe80::1%eth0' has a scope (%)"),
        (COLLECTOR + 'from = ["10.0.0.1/8"]\n', "from: 10.0.0.1/8 has host bits set; expected 10.0.0.0/8"),
        (COLLECTOR + 'from = ["ten"]\n', "from: 'ten' does not appear to be an IPv4 or IPv6 network"),
        (COLLECTOR.replace("= 9", "= 0"), '[[collector]] "a" port: expected a whole number from 1 to 65535'),
        (
            COLLECTOR.replace('"a"', '"a\\n"'),
            '" name: expected a text in quotes: 1 to 255 bytes, without control characters',
        ),
        (COLLECTOR.replace('"a"', f'"{"é" * 128}"'), '" name: expected 1 to 255 bytes of UTF-8'),
        (
            COLLECTOR + 'group = "a\\u001b[31m"\n',
            "group: expected a text in quotes: up to 64 characters, without control",
        ),
        (
            '[[stream]]\nname = "a\\n"\nlisten = ["udp://localhost:1"]\n',
            '" name: expected a text in quotes: up to 64 letters',
        ),
        (
            '[bus]\ndirectory = "run"\n',
            "line 2: [bus] directory: expected a text in quotes: an absolute path, or one that",
        ),
        ('[journal]\ndirectory = "~/j"\n', "line 2: [journal] directory: expected a text in quotes: an absolute path"),
        (COLLECTOR.replace("= 9", "= 65536"), '[[collector]] "a" port: expected a whole number from 1 to 65535'),
        (COLLECTOR + "sample = 0\n", '[[collector]] "a" sample: expected a whole number from 1 to 1000000'),
        (COLLECTOR + 'source = "forged"\n', "source: 'forged' is not allowed; expected one of relay, original"),
        ('[ingest]\nspread = "a - at `$.b"\n', "[ingest] spread: 'a - at `$.b' is not allowed; expected"),
    ],
)
def test_bad_setting_is_one_line_with_file_key_and_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    """SettingsError is one line that begins with the file, names the key, and says what was expected there."""
    line = refusal(tmp_path, text)
    assert line.startswith(f"{tmp_path}/fanwire.toml: ")
    assert expected in line


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused with the line where it is not."""
    path = tmp_path / "fanwire.toml"
    path.write_bytes(b"[bus]\n# caf\xe9\n")
    with pytest.raises(SettingsError, match="line 2: not UTF-8; save the file in that encoding"):
        load(path, {})


def test_environment_overrides_the_file(tmp_path: Path) -> None:
    """A scalar of any section is read from its variable as the type it has."""
    found = read(
        tmp_path,
        FULL,
        FANWIRE_BUS__HIGH_WATER_MARK="9",
        FANWIRE_INGEST__FILL_MS="0.5",
        FANWIRE_FORWARDER__SEGMENTATION="false",
        FANWIRE_GATEWAY__MAX_CLIENTS="500",
        OTHER_VARIABLE="x",
        FANWIRE="x",
        FANWIRE_RUNTIME_DIR="somebody else's",
    )
    assert found.bus == Bus(directory="/run/x", high_water_mark=9)
    assert found.ingest.fill_ms == 0.5
    assert found.ingest.tcp_idle_seconds == 5
    assert found.forwarder.segmentation is False
    assert found.gateway.max_clients == 500


def test_lists_are_for_the_file() -> None:
    """A variable for an entry of a list is refused, the built-in stream's too: it would be left out in silence."""
    variable = "FANWIRE_STREAM__MESSAGES__RECEIVE_BUFFER"
    assert outcome(None, {variable: "1048576"}) == f"{variable}: [[stream]] is a list; set it in the settings file"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FANWIRE_BUS__HIGH_WATER_MARK", "many", "expected a whole number from 1 to 65536"),
        ("FANWIRE_BUS__HIGH_WATER_MARK", "0", "expected a whole number from 1 to 65536"),
        ("FANWIRE_BUS__HIGH_WATER_MARK", "", "expected a whole number from 1"),
        (
            "FANWIRE_BUS__DIRECTORY",
            "",
            "expected a text in quotes: an absolute path, or one that begins with a variable",
        ),
        ("FANWIRE_FORWARDER__SEGMENTATION", "perhaps", "expected true or false"),
        ("FANWIRE_INGEST__TCP_IDLE_SECONDS", "nan", "expected a number from above 0"),
        (
            "FANWIRE_INGEST__SPREAD",
            "flows",
            "'flows' is not allowed (did you mean 'flow'?); expected one of flow, source",
        ),
        ("FANWIRE_GATEWAY__LISTEN", "tcp://localhost:1", "got a text in quotes; set it in the settings file"),
        ("FANWIRE_BUS__COLOUR", "1", "not a setting; [bus] has directory, high_water_mark"),
        ("FANWIRE_BUS_HIGH_WATER_MARK", "1", "not a setting; expected FANWIRE_SECTION__KEY"),
        ("FANWIRE_BUS", "1", "not a setting; expected FANWIRE_SECTION__KEY"),
        ("FANWIRE_RADIO__COLOUR", "1", "not a setting; expected FANWIRE_SECTION__KEY"),
        ("FANWIRE_STREAM", "1", "not a setting; expected FANWIRE_SECTION__KEY"),
        ("FANWIRE_STREAM__SYSLOG", "1", "[[stream]] is a list; set it in the settings file"),
        ("FANWIRE_STREAM__SYSLOG__REPLY", "1", "[[stream]] is a list; set it in the settings file"),
        ("FANWIRE_COLLECTOR__NOBODY__PORT", "1", "[[collector]] is a list; set it in the settings file"),
        ("FANWIRE_TOKEN__ADMIN__HASH", "1", "[[token]] is a list; set it in the settings file"),
    ],
)
def test_bad_variable_is_one_line_that_names_it(tmp_path: Path, variable: str, value: str, expected: str) -> None:
    """A variable that is no setting, or has the wrong type, is refused in one line that begins with it."""
    line = refusal(tmp_path, FULL, **{variable: value})
    assert line.startswith(f"{variable}: ")
    assert expected in line


def test_combination_made_by_a_variable_is_checked(tmp_path: Path) -> None:
    """A value that is right by itself and wrong together with the rest is refused."""
    text = STREAM + 'protocol = "netflow"\n'
    assert '[ingest] spread = "datagram"' in refusal(tmp_path, text, FANWIRE_INGEST__SPREAD="datagram")


@pytest.mark.parametrize(
    "text", ["bus = 3\n", "stream = 3\n", "stream = [3]\n", "[stream]\n", "[[stream]]\nname = 3\n"]
)
@pytest.mark.parametrize("variable", ["FANWIRE_BUS__DIRECTORY", "FANWIRE_STREAM__X__REPLY"])
def test_variable_over_a_section_of_the_wrong_shape_is_refused(tmp_path: Path, text: str, variable: str) -> None:
    """A file whose sections are no tables is refused in one line, whatever the environment adds to it."""
    refusal(tmp_path, text, **{variable: "/x"})


@pytest.mark.parametrize("text", ["", FULL, "stream = []\n", STREAM + 'reply = "\\u0000\\"\\\\ \\u007f é\\n"\n'])
def test_rendered_settings_read_the_same(tmp_path: Path, text: str) -> None:
    """The output of `render` is read back to the same settings."""
    found = read(tmp_path, text)
    assert read(tmp_path, render(found)) == found
    assert read(tmp_path, render(found, defaults=False)) == found


def test_what_is_as_by_default_can_be_left_out(tmp_path: Path) -> None:
    """Without defaults only what differs is rendered: of nothing but defaults, nothing."""
    assert render(Settings(), defaults=False) == ""
    found = read(tmp_path, COLLECTOR + "sample = 2\n")
    assert render(found, defaults=False) == COLLECTOR + "sample = 2\n"


replies = st.none() | st.text(max_size=40)
streams = st.builds(
    Stream,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
    listen=st.just(("udp://localhost:1",)),
    reply=replies,
    receive_buffer=st.integers(4096, 1 << 30),
    protocol=st.sampled_from([None, "netflow", "ipfix", "sflow"]),
)
plain = partial(st.text, st.characters(exclude_categories=("Cc", "Cs")))
collectors = st.builds(
    Collector,
    name=plain(min_size=1, max_size=20),
    streams=st.just(("*",)),
    address=st.ip_addresses().map(str),
    port=st.integers(1, 65535),
    sample=st.integers(1, 1_000_000),
    group=plain(max_size=20),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.floats(0, 1),
    st.lists(streams, max_size=3, unique_by=lambda stream: stream.name),
    st.lists(collectors, max_size=3, unique_by=lambda collector: collector.name),
    st.text(max_size=20),
)
def test_any_settings_are_rendered_so_that_they_read_the_same(
    tmp_path: Path, fill_ms: float, some: list[Stream], others: list[Collector], directory: str
) -> None:
    """Settings with any text and number in them are read back to the same."""
    builtins = msgspec.to_builtins(Settings(streams=tuple(some), collectors=tuple(others)))
    builtins["ingest"]["fill_ms"] = fill_ms
    builtins["bus"]["directory"] = f"/{directory}"
    found = msgspec.convert(builtins, Settings)
    assert read(tmp_path, render(found)) == found
    assert read(tmp_path, render(found, defaults=False)) == found


def test_nan_is_no_number_of_seconds() -> None:
    """A setting that would make every comparison false is refused from the environment too."""
    assert not math.isnan(load(None, {"FANWIRE_INGEST__FILL_MS": "0.25"}).ingest.fill_ms)
    with pytest.raises(SettingsError, match="FANWIRE_INGEST__FILL_MS"):
        load(None, {"FANWIRE_INGEST__FILL_MS": "nan"})


def outcome(path: Path | None, environment: dict[str, str]) -> str:
    """Return the reason why the settings are refused, "" when they are not."""
    try:
        load(path, environment)
    except SettingsError as refused:
        return str(refused)
    return ""


lines = st.sampled_from(
    [*FULL.splitlines(), *STREAM.splitlines(), *COLLECTOR.splitlines(), "a = [", "[[bus]]", "[stream]"]
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.lists(lines | st.text(max_size=12), max_size=12).map("\n".join))
def test_arbitrary_text_raises_nothing_else(tmp_path: Path, text: str) -> None:
    """A file is settings, or refused in one line that names it, whatever stands in it."""
    path = tmp_path / "fanwire.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    line = outcome(path, {})
    assert not line or line.startswith(f"{path}: ")
    assert len(line.splitlines()) <= 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["BUS__", "STREAM__SYSLOG__", "COLLECTOR__SIEM__", "", "STREAM", "INGEST__FILL_MS"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0=")),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
)
def test_arbitrary_variable_raises_nothing_else(tmp_path: Path, prefix: str, name: str, value: str) -> None:
    """A variable is a setting, another program's, or refused by SettingsError, whatever its name and value."""
    line = outcome(written(tmp_path, FULL), {f"FANWIRE_{prefix}{name}": value})
    assert not line or line.startswith(("FANWIRE_", str(tmp_path)))
    assert len(line.splitlines()) <= 1


@pytest.mark.parametrize(
    ("directory", "environment", "expected"),
    [
        ("$XDG_RUNTIME_DIR/fanwire", {"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/fanwire"),
        ("$XDG_RUNTIME_DIR/fanwire", {"XDG_RUNTIME_DIR": ""}, f"/tmp/fanwire-{os.geteuid()}"),
        ("$XDG_RUNTIME_DIR/fanwire", {"RUNTIME_DIRECTORY": "/run/fanwire:/run/other"}, "/run/fanwire"),
        ("/srv/bus", {"RUNTIME_DIRECTORY": "/run/fanwire"}, "/srv/bus"),
    ],
)
def test_bus_directory_follows_its_environment(
    monkeypatch: pytest.MonkeyPatch, directory: str, environment: dict[str, str], expected: str
) -> None:
    """The default directory is systemd's, else the user's runtime directory; one that was set is that one."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(Bus(directory=directory).path) == expected


def test_bus_directory_without_a_runtime_directory_is_this_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime directory is one under /tmp that bears the user's id, where nothing names one."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert str(Bus().path).startswith("/tmp/fanwire-")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"listen": ("tcp://0.0.0.0:5800",), "keys": "/keys"}, ""),
        ({"connect": "tcp://bus.example:65534", "keys": "/keys"}, ""),
        ({"listen": ("tcp://0.0.0.0:5800",)}, "is open to every user"),
        ({"listen": ("tcp://127.0.0.1:5800",)}, "is open to every user"),
        ({"listen": ("tcp://[::1]:5800",)}, "is open to every user"),
        ({"connect": "tcp://localhost:5800"}, "is open to every user"),
        ({"connect": "tcp://localhost:65535"}, "subscribers have the next one"),
        ({"connect": "ipc:///run/bus"}, "does not begin with tcp://"),
        ({"listen": ("tcp://localhost",)}, "expected tcp://HOST:PORT"),
    ],
)
def test_bus_over_tcp(fields: dict[str, Any], said: str) -> None:
    """Endpoints of the bus are checked, and each takes keys, on loopback too."""
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        found = Bus(**fields)
        assert [*map(str, found.endpoints), str(found.broker or "")] == [*found.listen, found.connect]
