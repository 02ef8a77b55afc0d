import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.uplink import __main__ as program
from services.uplink.outgoing.outbox import LARGEST_MESSAGE
from shared.bus.messages import status_topic
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from shared.nats import installed
from shared.process.lifecycle import CANT_CREATE, OperatorError
from shared.settings.model import Settings
from shared.settings.uplink import Uplink
from tests.builders import BusEnds, accounts_when, take_datagrams, take_last_report
from tests.services.ingest.flows.exported import netflow_v9
from tests.services.uplink.nats import NatsServer, free_port, handled
from tests.services.uplink.sites import Site, assert_balanced, away, exporter, flows, home, receive
from tests.stack import CHECKOUT, Stack, wait_until
from tests.traffic import open_receiver

pytestmark = pytest.mark.usefixtures("lab")


class Pair:
    """Two sites that exchange `flows` both ways; `only` leaves Bonn for Berlin alone."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.server = stack.enter_context(NatsServer(directory))
        self.ports = {"bonn": free_port(), "berlin": free_port()}
        only = free_port()
        settings = {
            "bonn": ('send = ["*"]\nreceive = ["berlin/flows", "berlin/dual"]', home("only.v9", only)),
            "berlin": ('send = ["flows", "dual"]\nreceive = ["bonn/*"]', away("only.v9")),
        }
        self.only = only
        self.dual = {name: free_port() for name in settings}
        self.sites = {
            name: stack.enter_context(Site(directory / name, name, self.server, self._streams(name) + stream, uplink))
            for name, (uplink, stream) in settings.items()
        }
        for site in self.sites.values():
            site.begin()
        for site in self.sites.values():
            flows(site)
        self.bonn, self.berlin = self.sites["bonn"], self.sites["berlin"]
        ports = iter((9521, 9522))
        self.collectors = {
            name: stack.enter_context(closing(site.sign_up("flows", next(ports)))) for name, site in self.sites.items()
        }

    def _streams(self, name: str) -> str:
        return home("flows", self.ports[name]) + home("dual", self.dual[name]) + 'protocol = "netflow"\n'

    def send(self, site: str, *payloads: bytes, source: str = "127.0.0.7") -> tuple[str, int]:
        """Send datagrams to a site's `flows`; return where from."""
        with closing(exporter(source)) as sock:
            for payload in payloads:
                sock.sendto(payload, ("127.0.0.1", self.ports[site]))
            host, port = sock.getsockname()
            return host, port

    def accounts(self, site: str, condition: Callable[[Accounts], object]) -> Accounts:
        """Return the accounts of a site's uplink once they are so; they add up."""
        with BusEnds(self.sites[site].bus) as bus:
            found = accounts_when(bus, "uplink.1", condition)
        assert not list(discrepancies(found))
        return found

    def inject(self, work: Callable[[Client], "asyncio.Future[None]"]) -> None:
        """Do something as another client of the server."""

        async def connected() -> None:
            client = Client()
            await client.connect(self.server.address)
            await work(client)
            await client.close()

        asyncio.run(connected())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two sites and a server, for all tests of this module."""
    with ExitStack() as stack:
        yield Pair(tmp_path_factory.mktemp("sites"), stack)


@pytest.fixture
def collectors(pair: Pair) -> dict[str, socket.socket]:
    """A collector of `flows` at each site, which has nothing left to read."""
    last = {f"the last of {name}".encode() for name in pair.sites}
    for name in pair.sites:
        pair.send(name, f"the last of {name}".encode())
    for sock in pair.collectors.values():
        missing = set(last)
        while missing:
            missing.difference_update(receive(sock, 1))
    return pair.collectors


def numbered(count: int, word: bytes = b"") -> list[bytes]:
    """Payloads that can be told apart."""
    return [b"%s %d %s" % (word, number, b"." * (number % 200)) for number in range(count)]


def total(accounts: Accounts, prefix: str, counter: str) -> int:
    """The sum of a counter over accounts whose names begin so."""
    return sum(account.get(counter, 0) for name, account in accounts.items() if name.startswith(prefix))


def test_datagrams_of_one_site_arrive_at_another(pair: Pair, collectors: dict[str, socket.socket]) -> None:
    """A collector elsewhere gets each datagram once and in order, and filters by exporter; sites echo nothing."""
    payloads = [b"", b"x" * 65_507, *numbered(300)]
    filtered = pair.berlin.sign_up("flows", 9523, **{"from": ["127.0.0.8/32"]})
    with closing(filtered), BusEnds(pair.berlin.bus) as bus:
        watcher = bus.subscriber("datagrams/flows/")
        wait_until(
            lambda: (message := watcher.receive()) and message.envelope.sender == "uplink.1", "Berlin marks flows"
        )
        for at in range(0, len(payloads), 50):
            source = pair.send("bonn", *payloads[at : at + 50])
            assert receive(collectors["berlin"], len(payloads[at : at + 50])) == payloads[at : at + 50]
            assert take_datagrams(watcher, len(payloads[at : at + 50])) == [
                (*source, payload) for payload in payloads[at : at + 50]
            ]
        pair.send("bonn", b"from eight", source="127.0.0.8")
        pair.send("berlin", b"the other way")
        assert receive(filtered, 1) == [b"from eight"]
        assert sorted(receive(collectors["berlin"], 2)) == [b"from eight", b"the other way"]
    assert sorted(receive(collectors["bonn"], len(payloads) + 2)) == sorted(
        [*payloads, b"from eight", b"the other way"]
    )
    for sock in collectors.values():
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
    assert_balanced(*(pair.sites[name] for name in collectors))


def test_a_stream_that_has_no_listener_here(pair: Pair) -> None:
    """A stream of a site alone is a stream here: collectors sign up for it, by its name with a dot."""
    with closing(pair.berlin.sign_up("only.v9", 9524)) as collector, closing(exporter("127.0.0.7")) as sock:
        sock.sendto(b"far away", ("127.0.0.1", pair.only))
        assert receive(collector, 1) == [b"far away"]


def test_an_exporter_that_feeds_two_sites_is_one_exporter(pair: Pair) -> None:
    """Datagrams that an exporter sends to both sites come once at each, by its numbers; what one lacks comes too."""
    payloads = [netflow_v9(number, uptime=number * 10) for number in range(100)]
    with closing(pair.berlin.sign_up("dual", 9525)) as collector, closing(exporter("127.0.0.9")) as sock:
        for payload in payloads[:90]:
            sock.sendto(payload, ("127.0.0.1", pair.dual["berlin"]))
        pair.accounts("berlin", lambda accounts: accounts["sending/dual"]["taken"] == 90)
        for payload in payloads:
            sock.sendto(payload, ("127.0.0.1", pair.dual["bonn"]))
        assert sorted(receive(collector, 100)) == sorted(payloads)
        found = pair.accounts("berlin", lambda accounts: accounts["stream/dual"]["received"] >= 100)
        assert found["stream/dual"]["dropped_double"] == 90
        collector.setblocking(False)
        with pytest.raises(BlockingIOError):
            collector.recv(100)
    code, text, _ = pair.berlin.run("ledger")
    assert (code, text.splitlines()[-1]) == (0, "balanced"), text


def test_a_killed_server_costs_nothing(pair: Pair, collectors: dict[str, socket.socket]) -> None:
    """Datagrams that are sent while the server is dead wait; afterwards all of them arrive, once and in order."""
    first, meanwhile, after = numbered(200, b"first"), numbered(200, b"meanwhile"), numbered(200, b"after")
    pair.send("bonn", *first)
    pair.server.stop(signal.SIGKILL)
    wait_until(lambda: "has ended; trying again" in pair.bonn.uplink.text, "Bonn notices")
    pair.send("bonn", *meanwhile)
    pair.accounts("bonn", lambda accounts: accounts["sending/flows"]["held"] >= 200)
    pair.server.start()
    assert receive(collectors["berlin"], 400) == first + meanwhile
    pair.send("bonn", *after)
    assert receive(collectors["berlin"], 200) == after
    told = pair.bonn.uplink.log
    ended = [line["event"] for line in told if "the connection to" in line["event"]]
    assert len({*ended}) == len(ended) > 0, "each trouble once, however often it is tried"
    assert pair.bonn.uplink.events("connected to a NATS server again")
    assert len(pair.bonn.uplink.events("connected to a NATS server")) == 2
    assert "Traceback" not in pair.bonn.uplink.text
    pair.accounts("bonn", lambda accounts: accounts["sending/flows"]["held"] == 0)


@pytest.mark.parametrize(
    ("site", "number"), [("bonn", signal.SIGTERM), ("berlin", signal.SIGTERM), ("berlin", signal.SIGKILL)]
)
def test_a_restart_of_an_uplink_costs_nothing(
    pair: Pair, collectors: dict[str, socket.socket], site: str, number: signal.Signals
) -> None:
    """Datagrams that come while an uplink is restarted are there afterwards, once and in order, on either side."""
    first, meanwhile = numbered(200, b"first"), numbered(200, b"meanwhile")
    pair.send("bonn", *first)
    if number == signal.SIGKILL:
        assert receive(collectors["berlin"], 200) == first
        pair.accounts("berlin", lambda accounts: "uplink" in accounts)  # it has noted what it has published
    pair.sites[site].uplink.stop(number)
    pair.send("bonn", *meanwhile)
    pair.sites[site].start("uplink")
    expected = meanwhile if number == signal.SIGKILL else first + meanwhile
    assert receive(collectors["berlin"], len(expected)) == expected
    code, text, _ = pair.berlin.run("ledger")
    assert (code, text.splitlines()[-1]) == (0, "balanced"), text


def test_doubles_and_strangers_are_dropped_and_counted(pair: Pair, collectors: dict[str, socket.socket]) -> None:
    """A message that comes again under another number, and one that is none, change nothing but their counters."""
    kept: list[Msg] = []

    async def listen_and_repeat(client: Client) -> None:
        subscription = await client.subscribe("fanwire.bonn.flows.*")
        await handled(client)
        pair.send("bonn", *numbered(50, b"again"))
        while sum(b"again 49 " in each.data for each in kept) == 0:
            kept.append(await subscription.next_msg(timeout=30))
        for each in (*kept, *kept):
            await client.publish(each.subject, each.data)
        await client.publish(kept[0].subject, b"FWU1 and no more")
        await client.publish("fanwire.bonn.flows.a.b", kept[0].data)
        await client.publish("fanwire.bonn.flows.ingest-77", kept[0].data)
        await client.flush()

    before = pair.accounts("berlin", lambda accounts: accounts.get("uplink"))
    pair.inject(listen_and_repeat)  # type: ignore[arg-type]
    assert receive(collectors["berlin"], 50) == numbered(50, b"again")
    unreadable = before["uplink"].get("messages_unreadable", 0)
    after = pair.accounts("berlin", lambda accounts: accounts["uplink"].get("messages_unreadable", 0) == unreadable + 2)
    repeated = total(after, "arriving/bonn/", "repeated") - total(before, "arriving/bonn/", "repeated")
    assert repeated == 100
    pair.send("bonn", b"still here")
    assert receive(collectors["berlin"], 1) == [b"still here"]
    assert "a message of another site is dropped" in pair.berlin.uplink.text


def test_a_reload_that_needs_a_restart_is_refused(pair: Pair) -> None:
    """SIGHUP tells that the uplink has to be restarted where a stream that it exchanges has changed, and only there."""
    site, before = pair.berlin, pair.berlin.settings
    for settings, expected in (
        (before + '[[collector]]\nname = "c"\nstreams = ["flows"]\naddress = "10.0.0.9"\nport = 9\n', "reloaded"),
        (
            before.replace('"netflow"', '"ipfix"'),
            "not reloaded, the old settings stay: what goes to other sites, or comes from there, has changed; "
            "restart the uplink",
        ),
        (before, "reloaded"),
    ):
        site.configure(settings)
        assert site.uplink.reload()["event"] == expected


def test_a_bus_has_one_uplink(pair: Pair) -> None:
    """A second uplink on a bus ends with one line: other sites would get everything twice."""
    second = pair.bonn.start("uplink.2", ready=False)
    assert second.process.wait(60) == CANT_CREATE
    assert (
        f"another uplink runs on {pair.bonn.bus}: other sites would get everything twice; stop it first" in second.text
    )


def test_without_servers_nothing_is_there(stack: Stack) -> None:
    """Switched off, an uplink waits for its end: it imports nothing of NATS or the bus, and opens no connection."""
    found = stack.start("uplink")
    script = "import sys, services.uplink.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert {"nats", "nkeys", "zmq", "numpy"} & set(done.stdout.split()) == set()
    sockets = [each for each in Path(f"/proc/{found.process.pid}/fd").iterdir() if "socket" in str(each.readlink())]
    assert len(sockets) == 2, "the pair by which signals wake it"
    assert not stack.bus.exists()
    assert found.stop() == 0


def test_its_last_report_says_so(stack: Stack) -> None:
    """Told to end, an uplink says that this report is its last: a sender that ends later does not wait for it."""
    stack.configure(f'[uplink]\nservers = ["nats://127.0.0.1:{free_port()}"]\nsite = "a"\n')
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        subscriber = bus.subscriber(status_topic("uplink.1"))
        uplink = stack.start("uplink")
        uplink.process.send_signal(signal.SIGTERM)
        take_last_report(subscriber)
        assert uplink.process.wait(60) == 0


def test_the_extra_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages of the extra the check says which are missing, and what installs them."""
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "nats" else object())
    with pytest.raises(OperatorError) as refused:
        program._check(Settings(uplink=Uplink(servers=("nats://127.0.0.1:1",), site="a")))
    assert str(refused.value) == "[uplink] servers: needs nats: pip install 'fanwire[uplink]'"


def test_what_finds_no_room_is_counted(stack: Stack, tmp_path: Path) -> None:
    """As much waits as may; the rest is dropped under its cause, told once, and memory stays below its ceiling."""
    with NatsServer(tmp_path) as server, BusEnds(stack.bus) as bus:
        settings = (
            f'servers = ["{server.address}"]\nsite = "a"\nsend = ["*"]\nmemory = 120000000\nkeep_bytes = 1073741824\n'
        )
        stack.configure(f"[uplink]\n{settings}")
        for name in ("broker", "ingest", "uplink"):
            stack.start(name)
        uplink = stack["uplink"]
        uplink.wait_for("made the stream of this site")
        assert server.process is not None
        server.freeze()
        overfill(stack, bus, "dropped_server_slow", "JetStream acknowledges too slowly: datagrams for other sites")
        server.process.send_signal(signal.SIGCONT)
        uplink.wait_for("there is room again for what waits for JetStream")
        accounts_when(bus, "uplink.1", lambda found: not found["sending/messages"]["held"])
        server.stop(signal.SIGKILL)
        overfill(stack, bus, "dropped_server_away", "no more may wait for the NATS servers")
    assert uplink.resident_mb("VmHWM") < 115 + 60  # and what one turn takes from a full queue, before it looks
    refused = f"can't connect to {server.address}: [Errno 111] Connect call failed"
    assert uplink.text.count(refused) == 1
    assert uplink.stop() == 0
    assert '"dropped_stopped"' in uplink.text


def overfill(stack: Stack, bus: BusEnds, cause: str, told: str) -> None:
    """Send until the uplink drops under a cause; it says so once, and its accounts add up."""
    with closing(exporter("127.0.0.7")) as sock:
        while told not in stack["uplink"].text:
            for _ in range(10):
                sock.sendto(bytes(60_000), ("127.0.0.1", 6667))
            time.sleep(0.005)
    found = accounts_when(bus, "uplink.1", lambda found: cause in found["sending/messages"])
    assert not list(discrepancies(found))
    assert found["sending/messages"]["held"] * 60_000 < 120_000_000 / 3 + LARGEST_MESSAGE  # and one is being filled
    assert stack["uplink"].text.count(told) == 1


def test_a_backlog_waits_for_those_who_want_it(tmp_path: Path) -> None:
    """A backlog in JetStream at the start of a host is for its collectors, also if its services start one by one."""
    port, payloads = free_port(), numbered(300)
    collector = '[[collector]]\nname = "c"\nstreams = ["flows"]\naddress = "127.0.0.1"\nport = 9526\n'
    receiver, _ = open_receiver("127.0.0.1", 9526)
    with (
        NatsServer(tmp_path) as server,
        Site(tmp_path / "a", "a", server, home("flows", port), 'send = ["*"]') as a,
        Site(tmp_path / "b", "b", server, away("flows"), 'receive = ["a/flows"]', collector) as b,
        closing(receiver),
        closing(exporter("127.0.0.7")) as sock,
        BusEnds(a.bus) as bus,
    ):
        a.begin("broker", "ingest", "uplink")
        wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
        b.begin("broker", "uplink")
        flows(b)
        assert b.uplink.stop() == 0
        for payload in payloads:
            sock.sendto(payload, ("127.0.0.1", port))
        accounts_when(bus, "uplink.1", lambda found: found["sending/flows"]["acknowledged"] == len(payloads))
        b.begin("uplink")
        b.uplink.wait_for("connected to a NATS server")
        b.begin("gateway", "forwarder")
        assert receive(receiver, len(payloads)) == payloads
