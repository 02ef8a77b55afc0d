import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from services.operator.__main__ import COMMANDS, main, make_parser
from services.operator.cli.output import Output, as_hex, as_payload, as_text
from services.operator.commands import config
from shared.settings.file import load, render
from shared.settings.model import Settings
from tests.services.operator.played import PlayedGateway, finish, run
from tests.stack import CHECKOUT, Stack

ASCII = {"PYTHONIOENCODING": "ascii"}
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}


def test_help_lists_commands_and_services(stack: Stack) -> None:
    """`fanwire --help` names every command, and the services that the same program runs."""
    code, text = run(stack, "--help")
    assert code == 0
    for command in (
        *("clients", "register", "leave", "watch", "tap", "play", "collect", "frame", "wake"),
        *("config", "import", "keys", "token", "status", "streams", "ledger", "top", "doctor", "ready"),
    ):
        assert f"    {command} " in text
    assert "fanwire broker|gateway|ingest|forwarder|transmitter|journal|offload|uplink|console runs one" in text


def test_interrupted_while_it_loads() -> None:
    """Ctrl-C before a command has begun ends it with 130 and without a word."""
    script = """if True:
        import signal, sys
        from services.__main__ import main
        class Interrupt:
            def find_spec(self, name, *_):
                if name == "services.operator.__main__":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        sys.argv[1:] = ["watch"]
        sys.exit(main())
    """
    ended = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, b"")


def test_each_command_loads_what_it_needs(stack: Stack) -> None:
    """A command does not wait for the packages that another one needs."""
    script = (
        "import sys; from services.operator.__main__ import make_parser; make_parser('clients'); print(*sys.modules)"
    )
    stack.by_exec = True  # what is forked has loaded them all
    loaded = finish(stack.spawn("loading", [sys.executable, "-c", script]))[1].split()
    assert "services.operator.commands.clients" in loaded
    assert not {"services.operator.doctor.command", "pyroute2", "importlib.metadata"} & set(loaded)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_in_its_module(command: str) -> None:
    """The parser of a command knows that command, without all the others."""
    with pytest.raises(SystemExit, match="0"):
        make_parser(command).parse_args([command, "--help"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuch",),
        ("watch", "--count", "0"),
        ("watch", "--from", "10.0.0.0/33"),
        ("watch", "nosuch"),
        ("collect", "siem"),
        ("clients", "--gateway", "udp://127.0.0.1:5000"),
        ("register", "siem", "--address", "not an address"),
        ("register", "siem", "--hop-limit", "0"),
        ("import", "socat", "file"),
        ("import", "pmacct", "file", "--listen", "tcp:1"),
        ("import", "pmacct", "file", "--stream", "a/b"),
        ("collect", "siem", "--stream", "*", "--dscp", "64"),
    ],
)
def test_wrong_usage_is_64(stack: Stack, arguments: tuple[str, ...]) -> None:
    """Wrong usage ends with 64 and says what was expected."""
    code, said = run(stack, *arguments)
    assert code == 64
    assert said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "encoding"),
    [
        (("clients",), ASCII),
        (("clients", "--json"), ASCII),
        (("register", "pare-feu é 🧱"), ASCII),
        (("clients",), POSIX),
        (("clients", "--json"), POSIX),
    ],
)
def test_a_terminal_that_knows_no_more_than_ascii(
    stack: Stack, arguments: tuple[str, ...], encoding: dict[str, str]
) -> None:
    """Names beyond ASCII are printed escaped, and tables drawn, where the terminal has no such characters."""
    with PlayedGateway() as gateway:
        gateway.clients["siège"] = {
            "name": "siège", "address": "192.0.2.1", "port": 514, "generation": 1, "streams": ["messages"], "from": [],
            "source": "relay", "health": "ok",
        }  # fmt: skip
        command = [sys.executable, "-m", "services.operator", *arguments, "--gateway", gateway.endpoint]
        running = stack.spawn("command", command, PYTHONCOERCECLOCALE="0", **encoding)
        assert running.process.wait(60) == 0, running.text
        assert running.text.isascii()
        assert ("pare-feu \\u00e9 \\ud83e\\uddf1" if "register" in arguments else "si\\u00e8ge") in running.text
        assert "--json" not in arguments or list(json.loads(running.text)) == ["siège"]


@pytest.mark.parametrize("arguments", [("clients",), ("clients", "--json"), ("config",)])
def test_output_that_cannot_be_written_is_one_line(stack: Stack, arguments: tuple[str, ...]) -> None:
    """Standard output on a full disk ends a command with 1, and one line that says why."""
    with PlayedGateway() as gateway, Path("/dev/full").open("wb") as full:
        connect = ("--gateway", gateway.endpoint) if "clients" in arguments else ()
        finished = subprocess.run(
            [sys.executable, "-m", "services.operator", *arguments, *connect],
            env=stack.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert finished.returncode == 1
    assert finished.stderr == f"fanwire {arguments[0]}: standard output: No space left on device\n"


def test_unknown_stream_names_the_streams(stack: Stack) -> None:
    """`watch` of a stream that is not in the settings says which are, and which one may be meant."""
    said = "no stream 'mesages' (did you mean 'messages'?); the streams are: messages\n"
    assert run(stack, "watch", "mesages")[1].endswith(said)


MAC = "01:02:03:04:05:06"
FRAME = ("frame", "lo", "--destination", MAC, "--source", MAC, "--ethertype", "0x0801", "--payload", "x")


@pytest.mark.parametrize("command", [("watch",), ("ledger",), FRAME])
def test_without_a_broker_is_69(stack: Stack, command: tuple[str, ...]) -> None:
    """Without a broker the commands on the bus end with one line that says where they looked and what to do."""
    code, text = run(stack, *command)
    assert (code, len(text.splitlines())) == (69, 1)
    assert f"no broker at {stack.bus}; start it with `fanwire run`, or name the settings of the one that runs" in text
    assert "fanwire run" in text


@pytest.mark.parametrize(
    "arguments", [("clients",), ("register", "siem"), ("leave", "siem"), ("collect", "siem", "--stream", "messages")]
)
def test_without_a_gateway_is_69(stack: Stack, arguments: tuple[str, ...]) -> None:
    """Without a gateway the commands of the registry end with one line that says where they looked and what to do."""
    code, text = run(stack, *arguments)
    assert (code, len(text.splitlines())) == (69, 1)
    assert "no gateway at tcp://127.0.0.1:5000 (Connection refused)" in text


def test_bad_settings_are_78(stack: Stack) -> None:
    """A settings file with an unknown key ends any command with one line that names the key."""
    stack.configure("[gateway]\nlissen = []\n")
    code, text = run(stack, "config")
    assert (code, len(text.splitlines())) == (78, 1)
    assert "[gateway] lissen: unknown key (did you mean 'listen'?)" in text


ASKING = "these settings can't be used: asking the gateway at"


def test_clients_are_listed_without_settings(stack: Stack, lab: None) -> None:
    """A settings file that can't be used does not keep `clients` from the gateway, whose address it still tells."""
    listen = f'[gateway]\nlisten = ["tls://127.0.0.1:9", "unix://{stack.directory}/gateway.sock"]\n'
    stack.configure(f"[gateway]\nlisten = ['tcp://127.0.0.1:5000', 'unix://{stack.directory}/gateway.sock']\n")
    stack.start("broker")
    stack.start("gateway")
    stack.configure(f"{listen}lissen = []\n")
    code, _, complaint = stack.run("clients")
    said = complaint.splitlines()[-1]
    assert (code, said) == (0, f"{ASKING} unix://{stack.directory}/gateway.sock")
    stack.configure("[gateway]\nlissen = []\n")
    code, said, complaint = stack.run("clients")
    assert (code, "0 clients" in said) == (0, True)
    first, second = complaint.splitlines()
    assert "[gateway] lissen: unknown key" in first
    assert second == f"{ASKING} tcp://127.0.0.1:5000"
    assert stack.run("leave", "siem")[0] == 78


def test_config_prints_what_load_reads(stack: Stack, tmp_path: Path) -> None:
    """`config` prints the effective settings as a file that gives the same settings again."""
    code, text = run(stack, "config")
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert code == 0
    assert load(again, {}) == load(tmp_path / "fanwire.toml", {}) != Settings()
    source, _, rest = text.partition("\n")
    assert (source, render(load(again, {}))) == (f"# read from {tmp_path}/fanwire.toml", rest)


def test_config_says_where_settings_are_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`config` names the variables that count, and says so where there is no file."""
    monkeypatch.setenv("FANWIRE_CONFIG", "")
    assert config.run(Namespace(config=None, check=False), Settings()) == 0
    monkeypatch.setenv("FANWIRE_BUS__POOL", "0")
    assert config.run(Namespace(config=None, check=False), Settings()) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert said == ["# no settings file: the defaults", "# no settings file: the defaults", "# with FANWIRE_BUS__POOL"]


def test_output_ends_at_its_count(tmp_path: Path) -> None:
    """An output takes no more datagrams than it has room for, and leaves the rest where they are."""
    datagrams = iter([("192.0.2.1", 514, b"one"), ("192.0.2.1", 514, b"two\0"), ("::1", 1, b"three")])
    with (tmp_path / "out").open("wb") as file:
        output = Output(file, as_payload, 2)
        output.write(datagrams)
        assert output.full
    assert (tmp_path / "out").read_bytes() == b"one\ntwo\0\n"
    assert next(datagrams)[2] == b"three"


def test_lines_are_as_documented() -> None:
    """The line has the address as Python shows it, and the payload as bytes or in hexadecimal."""
    assert as_text("127.0.0.1", 53411, b"Hello\n") == b"Got message from ('127.0.0.1', 53411): b'Hello\\n'\n"
    assert as_hex("::1", 1, b"\0\xff") == b"Got message from ('::1', 1): 00ff\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["legder"], "no command 'legder' (did you mean 'ledger'?); `fanwire` lists all"),
        (["forwader"], "no command 'forwader' (did you mean 'forwarder'?)"),
        (["import", "pmact", "file"], "no 'pmact' (did you mean 'pmacct'?); expected one of: samplicator, pmacct"),
        (["collect", "me", "--source", "origin"], "no 'origin' (did you mean 'original'?)"),
        (["keys", "there", "forwarde"], "no 'forwarde' (did you mean 'forwarder'?)"),
    ],
)
def test_mistyped_words_are_guessed(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command, service or choice that there is none of ends with 64, and the nearest one is named."""
    with pytest.raises(SystemExit, match="64"):
        sys.exit(main(arguments))
    assert said in capsys.readouterr().err


def test_without_a_command_all_are_listed(stack: Stack) -> None:
    """`fanwire` alone prints the help, as `fanwire --help` does, and ends with 0."""
    assert run(stack, "--help") == (lambda command: (command.process.wait(60), command.text))(
        stack.spawn("fanwire", [sys.executable, "-m", "services.operator"])
    )
