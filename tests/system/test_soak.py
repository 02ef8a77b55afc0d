"""Everything at once and for long: traffic, kills, collectors that come and go, floods; and the accounts in the end.

The normal run has some seconds of it; `make soak` has ten minutes, and a minute of flood. FANWIRE_SOAK_SECONDS and
FANWIRE_SOAK_RATE set its length and its datagrams a second, for a machine that can't bear more.
"""

import json
import math
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from shared.bus.messages import Status
from shared.bus.status import Reports
from shared.datagrams.limits import MAX_ROWS
from shared.ledger.accounts import is_origin, parse_origin
from shared.ledger.counters import REACHED
from shared.ledger.equations import dropped
from shared.net.sockets import kernel_drops
from shared.settings.model import Settings
from shared.settings.tables import Bus
from tests.benchmarks.site import PORT, RELAY, Site, collector_address, collector_port, site
from tests.benchmarks.workloads import exporter_address, read_mark
from tests.builders import BusEnds
from tests.openly import OpenStack
from tests.services.ingest.test_activation import activate
from tests.stack import ask_json, wait_until
from tests.system.checked_sink import MIXED, CheckedSink

STREAM = "mixed"
WORKERS = ("ingest.1", "ingest.2")
SERVICES = ("broker", "gateway", "forwarder", "transmitter", *WORKERS)
BURST = 64
RESTART_SECONDS = 0.1
"""The delay of systemd's RestartSec= in deploy/."""
AWAY_SECONDS = 2.0
"""Time around that for which the broker was seen to be away: services tell once a second, and come back one by one."""
CHURNING = 10
QUIET_SECONDS = 1.2
"""More than a second: services report once in each."""
CALM = 2_000
"""Datagrams a second that any machine takes."""
SLACK_MB = 32.0
"""Memory that a process may have more than in the beginning: allocators keep some."""
LENT_MB = Bus().pool / 2**20
"""And a worker, which keeps the memory that payloads were ever lent in."""


SOAK_SECONDS = float(os.environ.get("FANWIRE_SOAK_SECONDS", "600"))
SOAK_RATE = float(os.environ.get("FANWIRE_SOAK_RATE", "50000"))


class Traffic(threading.Thread):
    """Sends the mixed workload again and again: at a rate, as fast as it goes (0), or not at all; `sent` is exact."""

    def __init__(self, place: Site) -> None:
        super().__init__(daemon=True)
        self._offer = place.offer(MIXED)
        self._sending, self._idle = threading.Event(), threading.Event()
        self._rate = 0.0
        self._ending = False
        self.sent = 0

    def run(self) -> None:
        """Send while told to."""
        while not self._ending:
            self._idle.set()
            self._sending.wait()
            began, count = time.monotonic(), 0
            while self._sending.is_set() and not self._ending:
                if self._rate and count > (time.monotonic() - began) * self._rate:
                    time.sleep(0.001)
                    continue
                start = self.sent % MIXED.count
                stop = min(start + BURST, MIXED.count)
                self._offer.number_from(self.sent, start, stop)
                self._offer.send(start, stop)
                self.sent += stop - start
                count += stop - start

    def go(self, rate: float) -> None:
        """Send from now on."""
        self._rate = rate
        self._idle.clear()
        self._sending.set()

    def pause(self) -> int:
        """Send no more, and return how many have left."""
        self._sending.clear()
        self._idle.wait()
        return self.sent

    def end(self) -> None:
        """Send nothing ever again."""
        self._ending = True
        self._sending.set()
        self.join()


class World:
    """Exporters, a relay with all services and its own service manager, and collectors that count what comes.

    `relayed` collectors of the settings get copies with our address, `preserved` ones with the exporters' own, and
    `grouped` ones share a stream; `more` settings of the bus go with it.
    """

    def __init__(
        self,
        stack: OpenStack,
        place: Site,
        opened: ExitStack,
        relayed: int,
        preserved: int,
        more: str = "",
        *,
        grouped: int = 0,
        checked: bool = False,
    ) -> None:
        self.stack, self.place, self.relay = stack, place, place.relay
        self.original = range(relayed, relayed + preserved)
        self.grouped = range(relayed + preserved, relayed + preserved + grouped)
        self.sinks = opened.enter_context(place.sinks(relayed + preserved + grouped))
        self.checked: list[CheckedSink] = []
        for number, sink in enumerate(self.sinks):
            if checked:  # else nothing but probes is read: the kernel counts
                one = CheckedSink(sink, stack.directory, number, original=number in self.original)
                self.checked.append(opened.enter_context(closing(one)))
            else:
                sink.discard()
        self._probes: Counter[int] = Counter()
        self.held = {name: opened.enter_context(self._listener()) for name in WORKERS}
        self.restart_at: dict[str, float] = {}
        self.away_seconds, self._away_since = 0.0, math.inf
        """Time for which the bus has carried nothing, as the broker was away; time since which it is."""
        stack.configure(more + _settings(self))
        for name in SERVICES:
            self.start(name)
        self.wait_ready()
        self.bus = opened.enter_context(BusEnds(stack.bus))
        self._subscriber = self.bus.subscriber("status/")
        self.reports = Reports()
        self.traffic = Traffic(place)
        self.traffic.start()
        opened.callback(self.traffic.end)

    def _listener(self) -> socket.socket:
        """A socket as systemd holds it, which outlives the workers that read it."""
        sock = self.relay.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((RELAY, PORT))
        return sock

    def start(self, name: str) -> None:
        """Start a service; it will be ready when it is."""
        with self.relay.entered():
            if name in WORKERS:
                activate(self.stack, self.held[name].fileno(), name=name)
            else:
                self.stack.start(name, ready=False)

    def wait_ready(self) -> None:
        """Wait until every service says that it is."""
        for name in SERVICES:
            self.stack[name].wait_for('"event": "ready"', 60)

    def kill(self, name: str, number: signal.Signals) -> None:
        """End a service by this signal; it is started again a moment later."""
        if name == "broker":
            self._away_since = min(self._away_since, time.monotonic())
        self.stack[name].stop(number)
        self.restart_at[name] = time.monotonic() + RESTART_SECONDS

    def tend(self) -> None:
        """Start again what was killed, hear what services report, and look at what collectors have got."""
        for name in [name for name, due_at in self.restart_at.items() if due_at <= time.monotonic()]:
            del self.restart_at[name]
            self.start(name)
        while message := self._subscriber.receive():
            if isinstance(message.body, Status):
                self.reports.add(message.envelope, message.body)
                self.away_seconds += max(0.0, time.monotonic() - self._away_since)
                self._away_since = math.inf
        self.arrived()

    def arrived(self) -> list[int]:
        """Return the datagrams that each collector has got; readable ones are from the source that they name."""
        if self.checked:
            return [sink.arrived for sink in self.checked]
        for number, sink in enumerate(self.sinks):
            with suppress(BlockingIOError):
                while True:
                    payload, source = sink.socket.recvfrom(65536)
                    self._probes[number] += 1
                    if number in self.original:
                        assert source[0] == str(exporter_address(read_mark(payload)[0]))
        return [sink.dropped + self._probes[number] for number, sink in enumerate(self.sinks)]

    def kernel_dropped(self) -> int:
        """Return the kernel's drops at the workers' sockets, from /proc/net/udp of the relay's host."""
        with self.relay.entered():
            text = Path("/proc/thread-self/net/udp").read_text()
        lines = [line.split() for line in text.splitlines()[1:]]
        return sum(int(line[-1]) for line in lines if int(line[1].partition(":")[2], 16) == PORT)

    def ledger(self) -> dict[str, Any]:
        """The accounts, which must add up."""
        with self.relay.entered():
            asked = self.stack.operator("ledger", "--json", "--seconds", "20")
        asked.process.wait(60)
        answer: dict[str, Any] = json.loads(asked.text)
        assert (answer["balanced"], answer["discrepancies"]) == (True, [])
        return answer

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until nothing moves any more."""
        seen, changed_at, deadline = [-1], time.monotonic(), time.monotonic() + seconds
        while time.monotonic() - changed_at < QUIET_SECONDS:
            assert time.monotonic() < deadline, "it never comes to rest"
            self.tend()
            now = [*self.arrived(), self.kernel_dropped()]
            if now != seen or not all(sink.idle for sink in self.checked):
                seen, changed_at = now, time.monotonic()
            time.sleep(0.05)

    def account(self) -> "Account":
        """Everything there is to compare, with nothing on its way."""
        self.traffic.pause()
        self.settle()
        return Account(self)

    def own_mb(self, name: str) -> float:
        """MB that a process takes of its own: borrowed payloads are the workers'."""
        return round(self.stack[name].resident_mb("RssAnon" if name in ("forwarder", "transmitter") else "VmRSS"), 1)

    def descriptors(self, name: str) -> int:
        """Return the number of files that a process has open; 0 of a transmitter's, for who is not root."""
        if os.geteuid() and name.startswith("transmitter"):
            return 0
        return len(list(Path(f"/proc/{self.stack[name].process.pid}/fd").iterdir()))

    def all_own_mb(self) -> dict[str, float]:
        """MB of each process."""
        return {name: self.own_mb(name) for name in SERVICES}

    def all_descriptors(self) -> dict[str, int]:
        """Files of each process."""
        return {name: self.descriptors(name) for name in SERVICES}


def _settings(world: World) -> str:
    collectors = "".join(
        f'[[collector]]\nname = "steady{number}"\nstreams = ["*"]\naddress = "{collector_address(number)}"\n'
        f'port = {collector_port(number)}\nsource = "{"original" if number in world.original else "relay"}"\n'
        f'group = "{"shared" if number in world.grouped else ""}"\n'
        for number in range(len(world.sinks))
    )
    stream = f'[[stream]]\nname = "{STREAM}"\nlisten = ["udp://{RELAY}:{PORT}"]\n'
    gateway = '[gateway]\ndestinations = ["10.82.0.0/24"]\nserve_seconds = 5\npreserve_seconds = 0\n'
    gateway += f"max_clients = {len(world.sinks) + CHURNING // 2}\n"
    return gateway + stream + collectors


class Account:
    """Counts of exporters, kernel, services and collectors at rest; `since` compares with an earlier one."""

    def __init__(self, world: World) -> None:
        services: dict[str, dict[str, dict[str, int]]] = world.ledger()["services"]
        self.collectors = range(len(world.sinks))
        self.values: Counter[str] = Counter()
        self.values["sent"] = world.traffic.sent
        self.values["kernel"] = world.kernel_dropped()
        assert self.values["kernel"] == sum(map(kernel_drops, world.held.values()))
        for name in WORKERS:
            stream = services[name][f"stream/{STREAM}"]
            for counter in ("received", "published", "kernel_dropped"):
                self.values[counter] += stream.get(counter, 0)
            self.values["dropped"] += dropped(stream)
        for number, count in enumerate(world.arrived()):
            service = "transmitter.1" if number in world.original else "forwarder.1"
            account = services[service][f"collector/steady{number}"]
            self.values[f"{number} arrived"] = count
            for counter in ("expected", "sent", "missed", "held", "shared_out", "dropped_unsure", "dropped_unserved"):
                self.values[f"{number} {counter}"] = account.get(counter, 0)
            self.values[f"{number} dropped"] = dropped(account)

    def since(self, earlier: "Account | None" = None) -> Counter[str]:
        """Return the growth of each value, else since the start, which must add up to the datagram all the way."""
        before = earlier.values if earlier else Counter[str]()
        grown = Counter({name: value - before[name] for name, value in self.values.items()})
        print({name: value for name, value in grown.items() if value})
        assert grown["sent"] == grown["received"] + grown["kernel"]
        assert grown["kernel"] == grown["kernel_dropped"]
        assert grown["received"] == grown["published"] + grown["dropped"]
        for number in self.collectors:
            parts = sum(grown[f"{number} {part}"] for part in ("sent", "missed", "dropped", "held", "shared_out"))
            assert grown[f"{number} expected"] == grown["published"] == parts, number
            assert grown[f"{number} sent"] == grown[f"{number} arrived"], number
        return grown


@pytest.fixture
def new_world(open_stack: OpenStack) -> Iterator[Callable[..., World]]:
    """Makes all of it, at rest."""
    with ExitStack() as opened:
        yield lambda **many: World(open_stack, opened.enter_context(site(MIXED.mtu)), opened, **many)


class Churn(threading.Thread):
    """Collectors that join, leave, and die without a word, watchers that do, and routes that move; ends with none left.

    More want to join than there is room for.
    """

    def __init__(self, world: World, draw: random.Random) -> None:
        super().__init__(daemon=True)
        self._world, self._draw = world, draw
        self._ending = threading.Event()
        self._open: dict[str, tuple[socket.socket, int]] = {}
        self.did: Counter[str] = Counter()

    def run(self) -> None:
        """Do something every now and then; a gateway that is not there is no reason to stop."""
        with self._world.relay.entered():
            while not self._ending.wait(self._draw.uniform(0.05, 0.4)):
                action = self._draw.choice((*2 * (self._join,), self._leave, self._die, self._watch, self._move))
                with suppress(OSError, ValueError, LookupError):  # it is killed in the middle, or nobody is there
                    action()
                    self.did[action.__name__.strip("_")] += 1

    def _join(self) -> None:
        number = self._draw.randrange(CHURNING)
        name = f"churn{number}"
        if name in self._open:
            return
        sock = self._world.place.collectors.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._open[name] = sock, 0
        sock.bind((collector_address(20 + number), 9000))
        source = self._draw.choice(("relay", "original"))
        answer = ask_json(
            {
                "op": "register",
                "name": name,
                "streams": [STREAM],
                "address": sock.getsockname()[0],
                "port": 9000,
                "source": source,
                "sample": self._draw.choice((1, 10, 1000)),
                "ttl": 3,
                "take_over": True,
            }
        )
        self._open[name] = sock, answer["client"]["generation"]

    def _leave(self) -> None:
        name = self._draw.choice(sorted(self._open))
        sock, generation = self._open.pop(name)
        sock.close()
        ask_json({"op": "leave", "name": name, "generation": generation})

    def _die(self) -> None:
        self._open.pop(self._draw.choice(sorted(self._open)))[0].close()

    def _move(self) -> None:
        route = [f"{collector_address(self._draw.randrange(len(self._world.sinks)))}/32", "dev", "up"]
        self._world.relay.run("ip", "route", "replace", *route)
        time.sleep(0.05)
        self._world.relay.run("ip", "route", "del", *route)

    def _watch(self) -> None:
        with socket.create_connection(("127.0.0.1", 5000), timeout=1) as watcher:
            watcher.sendall(b'{"op":"watch"}\n')
            time.sleep(0.05)

    def end(self) -> None:
        """Join nobody any more; who is left goes."""
        self._ending.set()
        self.join()
        for sock, _ in self._open.values():
            sock.close()


def chance() -> random.Random:
    """Chance, which is said, and can be had again by FANWIRE_SOAK_SEED."""
    seed = int(os.environ.get("FANWIRE_SOAK_SEED", random.randrange(1 << 32)))
    print(f"FANWIRE_SOAK_SEED={seed}")
    return random.Random(seed)


def slack_mb(name: str) -> float:
    """Return the growth allowed to a process."""
    return SLACK_MB + LENT_MB * (name in WORKERS)


class Spared:
    """Leaves each service alone for its part of the time, in which others die around it and it must not grow."""

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._part = world, seconds / len(SERVICES)
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def victims(self, passed: float) -> list[str]:
        """Return the processes to kill by now."""
        number, within = divmod(passed, self._part)
        spared = SERVICES[min(int(number), len(SERVICES) - 1)]
        started = spared in self._first or '"event": "ready"' in self._world.stack[spared].text
        if within > self._part / 4 and spared not in self._world.restart_at and started:
            size = self._world.own_mb(spared), self._world.descriptors(spared)
            self._first.setdefault(spared, size)
            self._last[spared] = size
        return [name for name in SERVICES if name != spared]

    def assert_steady(self) -> None:
        """No memory and no descriptors were lost, but for those of collectors that come and go."""
        print({name: (self._first[name], self._last[name]) for name in self._first})
        for name, (memory, files) in self._last.items():
            assert memory < self._first[name][0] + slack_mb(name), name
            assert files <= self._first[name][1] + 2 * CHURNING, name


class Once:
    """Kills each service once."""

    def __init__(self) -> None:
        self._left = list(SERVICES)

    def victims(self, _passed: float) -> list[str]:
        """The next one."""
        return [self._left.pop(0)] if self._left else []


def stir(
    world: World,
    draw: random.Random,
    seconds: float,
    pause: float,
    victims: Callable[[float], list[str]],
    how: Sequence[signal.Signals] = (signal.SIGKILL,),
) -> Counter[str]:
    """End one of `victims`, by the time, every `pause` seconds or so, by a signal of `how`; return how often each."""
    killed: Counter[str] = Counter()
    began = next_at = time.monotonic()
    while (passed := time.monotonic() - began) < seconds or world.restart_at:
        world.tend()
        if passed < seconds and time.monotonic() >= next_at:
            alive = [name for name in victims(passed) if name not in world.restart_at]
            if alive:
                victim = draw.choice(alive)
                number = draw.choice(how)
                world.kill(victim, number)
                killed[victim] += 1
            next_at = time.monotonic() + draw.uniform(0.1, 2) * pause
        time.sleep(0.02)
    return killed


def whole_run(world: World, ended: Account, killed: Counter[str], rate: float) -> None:
    """Every datagram sent has arrived at each collector, or is counted by cause, or went with a killed worker.

    Sent and arrived are the test's own counts; `ended` are all of them when nothing was on its way any more.
    """
    taken: Counter[tuple[str, int]] = Counter()
    told: Counter[tuple[str, int]] = Counter()
    for (service, boot), report in world.reports.latest.items():
        assert report.accounts[service.partition(".")[0]]["discrepancies"] == 0, service
        received = report.accounts.get(f"stream/{STREAM}", {}).get("received", 0)
        taken[service, boot] = max(taken[service, boot], received)
        stream = report.accounts.get(f"stream/{STREAM}", {})
        told[service, boot] = dropped(stream) - stream.get("dropped_no_subscriber", 0)
        for name, account in report.accounts.items():
            if is_origin(name):  # what has reached a consumer the worker had taken, whether or not it could say so
                worker, its_boot, _ = parse_origin(name)
                taken[worker, its_boot] = max(taken[worker, its_boot], account[REACHED])
    sent, kernel = world.traffic.sent, world.kernel_dropped()
    gone = sent - kernel - taken.total()
    print(f"sent {sent}, kernel {kernel}, taken {taken.total()}, gone {gone}; killed {dict(killed)}")
    # Nobody knows of what a killed worker had taken and not handed on; nor of what it could not, while the broker was
    # away, since it told last.
    most = MAX_ROWS * sum(killed[name] for name in WORKERS) + rate * (
        world.away_seconds + AWAY_SECONDS * killed["broker"]
    )
    assert 0 <= gone <= most
    members: list[Counter[str]] = []
    for number in ended.collectors:
        own = {name.partition(" ")[2]: value for name, value in ended.values.items() if name.startswith(f"{number} ")}
        mine = Counter(own)
        unknown = sent - kernel - told.total() - mine["expected"]
        print(f"steady{number}: {own}, never taken or in no account {unknown}")
        assert 0 <= unknown <= most
        assert mine["expected"] == mine["sent"] + mine["missed"] + mine["dropped"] + mine["shared_out"]
        assert 0 <= mine["arrived"] - mine["sent"] <= mine["dropped_unsure"]
        if number in world.grouped:
            members.append(mine)
    came = [mine["expected"] - mine["missed"] - mine["dropped_unserved"] for mine in members]
    taken_by_one = sum(came) - sum(mine["shared_out"] for mine in members)
    assert len(set(came)) <= 1
    assert 0 <= taken_by_one - sum(came[:1]) <= sum(mine["dropped_unsure"] for mine in members)
    for sink in world.checked:
        sink.assert_right()


@pytest.mark.parametrize(
    ("seconds", "rate", "pause"), [(5, 2_000, 0.4), pytest.param(SOAK_SECONDS, SOAK_RATE, 3.0, marks=pytest.mark.soak)]
)
@pytest.mark.timeout(1200)
def test_everything_is_killed_again_and_again(
    new_world: Callable[..., World], seconds: float, rate: float, pause: float
) -> None:
    """Services are killed or end, collectors come, go and die, traffic flows: all adds up, and nothing has grown."""
    long = seconds > 10
    world = new_world(relayed=2, preserved=2, grouped=2, checked=True)
    draw = chance()
    spared, once = Spared(world, seconds), Once()
    world.traffic.go(rate)
    time.sleep(10 if long else 1)
    world.traffic.pause()
    world.settle()
    memory, files = world.all_own_mb(), world.all_descriptors()
    churn = Churn(world, random.Random(draw.random()))
    churn.start()
    world.traffic.go(rate)
    how = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM) if long else (signal.SIGKILL,)
    killed = stir(world, draw, seconds, pause, spared.victims if long else once.victims, how)
    churn.end()
    print(f"collectors: {dict(churn.did)}")
    world.wait_ready()
    with world.relay.entered():
        wait_until(lambda: len(ask_json({"op": "list"})["clients"]) == len(world.sinks), "those who came have gone", 60)
    spared.assert_steady()
    before = world.account()
    whole_run(world, before, killed, rate)
    world.traffic.go(rate if long else rate / 4)
    time.sleep(10 if long else 1)
    grown = world.account().since(before)
    assert grown["sent"] > 0
    assert all(grown[f"{number} missed"] == 0 for number in range(len(world.sinks)))
    print(f"MB: {memory} then, {world.all_own_mb()} now; descriptors: {files} then, {world.all_descriptors()} now")
    for name, most in world.all_own_mb().items():
        assert most < memory[name] + slack_mb(name), name
    wait_until(lambda: world.all_descriptors() == files, f"descriptors are {files} again, as {world.all_descriptors()}")
    for running in world.stack.running:
        assert "Traceback" not in running.text, running.text
        assert "do not add up" not in running.text, running.text


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.soak)])
def test_twice_what_can_be_taken(new_world: Callable[..., World], seconds: float) -> None:
    """A flood: each process stays under its ceiling, every drop has its cause, and soon after it nothing is lost."""
    long = seconds > 10
    world = new_world(relayed=32 if long else 12, preserved=4, more="" if long else "high_water_mark = 8\n")
    most: Counter[str] = Counter()

    def flood() -> bool:
        world.traffic.go(0)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            world.tend()
            most.update({name: max(0, int(size) - most[name]) for name, size in world.all_own_mb().items()})
            time.sleep(0.05)
        world.traffic.pause()
        after = world.account()
        grown = after.since()
        arrived = [grown[f"{number} arrived"] for number in after.collectors]
        print(f"a second: offered {grown['sent'] / seconds:.0f}, arrived {min(arrived) / seconds:.0f} each at least")
        # Of the two senders the one with 32 collectors is flooded; at first queues and buffers take a good part.
        return grown["sent"] > (2 if long else 1) * min(arrived)

    wait_until(flood, "more was sent than can be taken")  # on a busy machine who sends may be as slow as who takes
    print(f"MB at most: {dict(most)}")
    for name, size in most.items():
        assert size << 20 < getattr(Settings(), name.partition(".")[0]).memory, name

    def all_arrive() -> bool:
        before = world.account()
        world.traffic.go(CALM if long else CALM / 4)
        time.sleep(1)
        calm = world.account().since(before)
        return all(calm[f"{number} arrived"] == calm["sent"] > 0 for number in before.collectors)

    wait_until(all_arrive, "nothing is lost any more")
