"""Relays side by side: fanwire and the peers found on PATH, each configured as its users would."""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import summarize_address_range
from pathlib import Path
from typing import Final, Literal

from tests.benchmarks.site import COLLECTOR_PORT, PORT, RELAY, Site, collector_address, collector_port
from tests.benchmarks.workloads import BY_NAME, exporter_address
from tests.openly import OpenStack, open_stack
from tests.stack import Running

RESTING: Final = ["journal", "offload", "console", "uplink"]
"""Services that `make run` starts too. Here they have nothing to do, but the console follows the others' reports."""
Way = Literal["relay", "original"]
WAYS: Final[tuple[Way, ...]] = ("relay", "original")


@dataclass(frozen=True)
class Task:
    """The task of a program: a workload for a number of collectors, the source address, and the receive buffer."""

    workload: str
    fan_out: int
    way: Way
    buffer: int
    exporters: int = 0
    """Not 0: so many, of which each collector wants its own share; only for fanwire, as what follows."""
    streams: int = 1
    workers: int = 1
    whole: bool = False
    """True if everything that `make run` starts is there, and counts."""
    settings: str = ""
    """More settings for fanwire."""
    journal: bool = False
    """True if fanwire keeps the streams."""

    @property
    def collectors(self) -> list[str]:
        """The collectors' addresses."""
        return [collector_address(number) for number in range(self.fan_out)]


@dataclass(frozen=True)
class Program:
    """A relay that is running; `processes` are those whose CPU counts, by name."""

    name: str
    processes: dict[str, int]

    def signal(self, number: int) -> None:
        """Send a signal to all of it."""
        for pid in self.processes.values():
            os.kill(pid, number)

    def cpu_ns(self) -> dict[str, int]:
        """CPU time of all threads of each process so far (proc(5), schedstat)."""
        return {name: _cpu_ns(pid) for name, pid in self.processes.items()}

    def wakeups(self) -> int:
        """Return how often threads of any process have begun to wait: each was woken as often (proc(5), status)."""
        return sum(_waits(pid) for pid in self.processes.values())

    def resident_mb(self) -> float:
        """Memory of all processes together."""
        return sum(_resident_kb(pid) for pid in self.processes.values()) / 1024


def _cpu_ns(pid: int) -> int:
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def _waits(pid: int) -> int:
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in texts)


def _resident_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


Command = Callable[[Task, Path], Sequence[str] | None]


def samplicate(task: Task, _: Path) -> Sequence[str]:
    """Run samplicator, which relays a datagram at a time."""
    spoof = ["-S"] if task.way == "original" else []
    receivers = [f"{address}/{COLLECTOR_PORT}" for address in task.collectors]
    return ["samplicate", *spoof, "-s", RELAY, "-p", str(PORT), "-b", str(task.buffer), *receivers]


def nfacctd(task: Task, directory: Path) -> Sequence[str] | None:
    """Run pmacct's collector as a tee of what it knows: NetFlow and, by a daemon of its own, sFlow."""
    if task.workload not in ("netflow", "sflow", "jumbo"):
        return None
    receivers = directory / "receivers.lst"
    receivers.write_text("".join(f"id={n + 1} ip={a}:{COLLECTOR_PORT}\n" for n, a in enumerate(task.collectors)))
    program = "sfacctd" if task.workload == "sflow" else "nfacctd"
    settings = directory / "tee.conf"
    settings.write_text(
        f"daemonize: false\n{program}_ip: {RELAY}\n{program}_port: {PORT}\n{program}_pipe_size: {task.buffer}\n"
        f"plugins: tee[a]\ntee_receivers[a]: {receivers}\ntee_transparent: {str(task.way == 'original').lower()}\n"
        "plugin_pipe_size: 67108864\nplugin_buffer_size: 131072\ntee_pipe_size: 4194304\n"
    )
    return [program, "-f", str(settings)]


def socat(task: Task, _: Path) -> Sequence[str] | None:
    """socat, which relays one to one."""
    if task.fan_out > 1 or task.way == "original":
        return None
    listen = f"UDP4-RECV:{PORT},bind={RELAY},rcvbuf={task.buffer}"
    return ["socat", "-u", "-b65535", listen, f"UDP4-DATAGRAM:{task.collectors[0]}:{COLLECTOR_PORT}"]


def rsyslogd(task: Task, directory: Path) -> Sequence[str] | None:
    """Run rsyslog with raw messages; omudpspoof, where it is there, keeps the source."""
    spoof = any(path for root in ("/usr/lib", "/usr/local/lib") for path in Path(root).glob("**/omudpspoof.so"))
    if task.workload != "syslog" or (task.way == "original" and not spoof):
        return None
    kind = "omudpspoof" if task.way == "original" else "omfwd"
    protocol = ' protocol="udp"' if kind == "omfwd" else ""
    actions = [
        f'action(type="{kind}" target="{address}" port="{COLLECTOR_PORT}"{protocol} template="raw")'
        for address in task.collectors
    ]
    settings = directory / "rsyslog.conf"
    modules = ['module(load="imudp" BatchSize="256" TimeRequery="8")']
    modules += ['module(load="omudpspoof")'] if kind == "omudpspoof" else []
    settings.write_text(
        "\n".join(
            [
                f'global(workDirectory="{directory}")',
                *modules,
                'template(name="raw" type="string" string="%rawmsg%")',
                'main_queue(queue.type="LinkedList" queue.size="200000" queue.dequeueBatchSize="1024")',
                f'input(type="imudp" address="{RELAY}" port="{PORT}" rcvbufSize="{task.buffer}" ruleset="relay")',
                f'ruleset(name="relay") {{ {" ".join(actions)} }}',
            ]
        )
    )
    return ["rsyslogd", "-n", "-f", str(settings), "-i", str(directory / "rsyslog.pid")]


def nfcapd(task: Task, directory: Path) -> Sequence[str] | None:
    """Run nfcapd as a repeater: at most 8, from its own address; it also stores what it takes for flows."""
    if task.workload != "netflow" or task.fan_out > 8 or task.way == "original":
        return None
    repeaters = [word for address in task.collectors for word in ("-R", f"{address}/{COLLECTOR_PORT}")]
    return ["nfcapd", "-b", RELAY, "-p", str(PORT), "-B", str(task.buffer), "-w", str(directory), *repeaters]


FANWIRE: Final = ("fanwire", "offload", "unseen", "journaled")
"""fanwire as it is, and with what its task adds."""
PEERS: Final[dict[str, Command]] = {
    "samplicate": samplicate,
    "nfacctd": nfacctd,
    "socat": socat,
    "rsyslogd": rsyslogd,
    "nfcapd": nfcapd,
}


def available(task: Task, names: Sequence[str]) -> Iterator[str]:
    """The programs that can do a task and are here."""
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            if name == "fanwire" or (shutil.which(name) and PEERS[name](task, Path(directory)) is not None):
                yield name


@contextmanager
def running(name: str, task: Task, site: Site) -> Iterator[Program]:
    """A program at work on the relay's host."""
    with ExitStack() as opened:
        stack = opened.enter_context(open_stack())
        stack.by_exec = True  # as users start them
        opened.enter_context(site.relay.entered())
        program = _fanwire(stack, task) if name in FANWIRE else _peer(stack, name, task)
        # What is stopped, after an error, would not end by itself, nor end its own children.
        opened.callback(program.signal, signal.SIGCONT)
        yield program


def _fanwire(stack: OpenStack, task: Task) -> Program:
    streams = "".join(
        f'[[stream]]\nname = "bench{number}"\nlisten = ["udp://{RELAY}:{PORT + number}"]\n'
        f"receive_buffer = {task.buffer}\ntrains = {str(BY_NAME[task.workload].trains).lower()}\n"
        f"journal = {str(task.journal).lower()}\n"
        for number in range(task.streams)
    )
    collectors = "".join(
        f'[[collector]]\nname = "c{number}"\naddress = "{collector_address(number)}"\nport = {collector_port(number)}\n'
        f'source = "{task.way}"\nstreams = ["*"]\nfrom = {json.dumps(_share(task, number))}\n'
        for number in range(task.fan_out)
    )
    kept = f'[journal]\ndirectory = "{stack.directory / "journal"}"\n'
    stack.configure(task.settings + (kept if task.journal else "") + streams + collectors)
    sender = "transmitter" if task.way == "original" else "forwarder"
    workers = [f"ingest.{number + 1}" for number in range(task.workers)]
    others = ["gateway", *(["forwarder" if sender == "transmitter" else "transmitter"] if task.whole else [])]
    offload = ["offload"] if "[offload]" in task.settings else []
    others += [each for each in RESTING if each not in offload] if task.whole else []
    for each in ("broker", *others, sender, *workers, *offload):
        stack.start(each)
    counted = [*workers, "broker", sender, *(others if task.whole else []), *offload]
    pids = {name: stack[name].process.pid for name in counted}
    if offload:
        (applier,) = Path(f"/proc/{pids['offload']}/task/{pids['offload']}/children").read_text().split()
        pids["applier"] = int(applier)
    return Program("fanwire", pids)


def _share(task: Task, collector: int) -> list[str]:
    """The prefixes of the exporters that a collector wants; none: all of them."""
    if not task.exporters:
        return []
    first, stop = (task.exporters * number // task.fan_out for number in (collector, collector + 1))
    return [str(network) for network in summarize_address_range(exporter_address(first), exporter_address(stop - 1))]


def _peer(stack: OpenStack, name: str, task: Task) -> Program:
    command = PEERS[name](task, stack.directory)
    assert command is not None
    started: Running = stack.spawn(name, list(command))
    return Program(name, {name: started.process.pid})
