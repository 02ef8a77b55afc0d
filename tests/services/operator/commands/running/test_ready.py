import pytest

from services.operator.__main__ import make_parser
from services.operator.commands.running.ready import hints
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Console, Gateway
from tests.services.operator.commands.running.test_status import JOURNALED
from tests.services.operator.played import PlayedService, finish, run
from tests.stack import Stack


def test_waits_for_the_broker_and_for_every_service(stack: Stack) -> None:
    """Started before anything else it waits, and says that all are ready when the last one has reported."""
    ready = stack.operator("ready", "broker", "ingest")
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.3") as ingest:
        ingest.wait_for_subscriber("status/")
        assert ready.process.poll() is None
        ingest.report({})
        assert finish(ready) == (0, "all ready: broker ingest\n")


def test_names_who_is_missing_at_the_timeout(stack: Stack) -> None:
    """At the timeout it ends with 69 and the names of those that were not heard, the broker included."""
    code, text = run(stack, "ready", "broker", "ingest", "--timeout", "0.2")
    assert (code, text) == (69, "fanwire ready: not ready after 0.2 s, see their logs: broker ingest\n")
    stack.start("broker")
    code, text = run(stack, "ready", "--timeout", "2")
    missing = "gateway ingest forwarder transmitter"
    assert (code, text) == (69, f"fanwire ready: not ready after 2 s, see their logs: {missing}\n")
    stack.configure(JOURNALED)
    assert run(stack, "ready", "--timeout", "2")[1].endswith(f"{missing} journal\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["ready", "ingset"],
            "no service 'ingset' (did you mean 'ingest'?); the services are: broker, gateway, ingest, forwarder, "
            "transmitter, journal, offload, uplink, console",
        ),
        (["ready", "ingest", "ingest.2"], "no service 'ingest.2'"),
        *(([*command.split(), text], f"expected a number above 0, up to 1e+09, not {text!r}")
          for command in ("ready --timeout", "ledger --seconds", "tap messages --write x.pcapng --seconds")
          for text in ("nan", "inf", "1e300", "0", "-1", "soon")),
    ],
)  # fmt: skip
def test_what_cannot_be_waited_for(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """A word that is no service, and a time that none can wait, are wrong usage, told at once with what is known."""
    with pytest.raises(SystemExit, match="64"):
        make_parser(arguments[0]).parse_args(arguments)
    assert said in " ".join(capsys.readouterr().err.split())


def test_hints_follow_the_settings() -> None:
    """The lines to try name the file, listeners and stream of the settings; a host of many addresses becomes one."""
    page, watch, send, sign_up = hints(Settings())
    assert page.startswith("http://127.0.0.1:8080/ ")
    assert watch.split()[:2][-1] == "watch"
    assert send == "echo 'Hello you there!' | nc -u -w1 127.0.0.1 6667"
    request = '{"op":"register","name":"siem","streams":["messages"],"port":9514}'
    assert sign_up == f"printf '{request}\\n' | nc -N 127.0.0.1 5000"
    stream = Stream(name="syslog", listen=("tcp://[::1]:601", "udp://[::]:514"))
    elsewhere = Settings(
        streams=(stream,),
        gateway=Gateway(listen=("unix:///run/gateway.sock",)),
        console=Console(listen=("unix:///run/console.sock",)),
    )
    page, watch, send, sign_up = hints(elsewhere, "my site.toml")
    assert " watch --config 'my site.toml' " in watch
    assert page == "the live page is at /run/console.sock"
    assert send.endswith("nc -u -w1 ::1 514")
    assert '["syslog"]' in sign_up
    assert sign_up.endswith("nc -N -U /run/gateway.sock")
