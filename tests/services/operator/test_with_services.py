import json
import signal
import socket
import threading

from services.operator.commands.running.ready import SERVICES
from tests.services.operator.played import run
from tests.stack import Stack, wait_until

STREAM = '[[stream]]\nname = "{}"\nlisten = ["udp://127.0.0.1:{}"]\n'


def test_the_commands_with_the_services_they_are_for(stack: Stack) -> None:
    """Signed up, sent to, watched, collected, accounted for and taken off the list, by commands alone."""
    ready = stack.operator("ready", "broker", "gateway", "ingest", "forwarder")
    stack.start_all(ingest=2)
    ready.wait_for("all ready: broker gateway ingest forwarder\n")
    watch = stack.operator("watch", "messages")
    watch.wait_for("watching messages")
    collect = stack.operator("collect", "siem", "--stream", "*")
    collect.wait_for("collecting * at 127.0.0.1")
    assert run(stack, "register", "me")[0] == 0
    assert json.loads(run(stack, "clients", "--json")[1]).keys() == {"siem", "me"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
        exporter.sendto(b"Hello you there!", ("127.0.0.1", 6667))
        port = exporter.getsockname()[1]
    watch.wait_for(f"Got message from ('127.0.0.1', {port}): b'Hello you there!'\n")
    collect.wait_for("b'Hello you there!'\n")
    assert run(stack, "ledger")[1].endswith("balanced\n")
    code, text = run(stack, "status")
    assert (code, text.split()[:2]) == (0, ["5", "services"])
    pids = {line.split()[0]: line.split()[1] for line in text.splitlines() if ".1 " in line or ".2 " in line}
    expected = {each.name: str(each.process.pid) for each in stack.running if each.name in SERVICES or "." in each.name}
    assert pids == {name if "." in name else f"{name}.1": pid for name, pid in expected.items()}
    code, text = run(stack, "streams")
    (shown,) = (line.split() for line in text.splitlines() if "udp://localhost:6667," in line)
    assert (code, shown[0], shown[4:]) == (0, "messages", ["1", "0", "0", "siem"])
    assert collect.stop(signal.SIGINT) == watch.stop(signal.SIGINT) == 0
    assert run(stack, "leave", "me") == (0, "me has left\n")
    wait_until(lambda: run(stack, "clients", "--json")[1] == "{}\n", "nobody is left")


def test_ledger_balances_while_datagrams_flow(stack: Stack) -> None:
    """The accounts add up with nothing standing still, and a killed worker is listed as gone, not held against them."""
    stack.start_all(ingest=2)
    collect = stack.operator("collect", "siem", "--stream", "messages", "--write", "/dev/null")
    collect.wait_for("collecting")
    ended = threading.Event()

    def flow() -> None:
        while not ended.wait(0.001):  # a new source each time, so that both workers get some
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
                exporter.sendto(b"x" * 200, ("127.0.0.1", 6667))

    flowing = threading.Thread(target=flow)
    flowing.start()
    try:
        code, text = run(stack, "ledger")
        assert (code, text.splitlines()[-1]) == (0, "balanced")
        stack["ingest.2"].stop(signal.SIGKILL)
        code, text = run(stack, "ledger", "--json")
    finally:
        ended.set()
        flowing.join()
    answer = json.loads(text)
    assert (code, answer["discrepancies"]) == (0, [])
    assert [line.split()[0] for line in answer["gone"]] == ["ingest.2"]


def test_commands_say_where_their_streams_are_not_those_that_run(stack: Stack) -> None:
    """They go by the streams of the running services, and name each difference to their own settings, with a cure."""
    stack.configure(STREAM.format("syslog", 7000) + STREAM.format("netflow", 7001))
    for name in ("broker", "gateway", "ingest"):
        stack.start(name)
    stack.configure(STREAM.format("syslog", 7009) + STREAM.format("traps", 7002))
    sides = ("only the running services have netflow", "only these settings have traps", "other listeners run syslog")
    for arguments, expected in (
        (("streams",), 0),
        (("status",), 69),  # no forwarder runs
        (("watch", "traps"), 64),
        (("tap", "traps", "--write", "-"), 64),
        (("play", "none.pcapng", "--stream", "traps"), 64),
        (("register", "siem", "--stream", "traps", "--port", "9514"), 1),
        (("collect", "siem", "--stream", "traps"), 1),
    ):
        code, printed, said = stack.run(*arguments)
        assert code == expected, (arguments, said)
        assert all(side in said for side in (*sides, "reload the services by SIGHUP, or name")), (arguments, said)
        if arguments[0] == "streams":
            assert all(listen in printed for listen in ("udp://127.0.0.1:7000", "udp://127.0.0.1:7001"))
    watch = stack.operator("watch", "netflow")
    watch.wait_for("watching netflow")
    assert watch.stop(signal.SIGINT) == 0
