"""The structure holds: who may import whom, what the wheel contains, what idle processes cost."""

import ast
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from services.console.app import PARTS
from tests.once import wheel
from tests.stack import CHECKOUT, Stack, wait_until

SERVICES = sorted(path.name for path in (CHECKOUT / "services").iterdir() if path.is_dir() and path.name[0] != "_")
SHARED = CHECKOUT / "shared"
LAYERS = (
    ("ledger", "log", "net"),
    ("client", "losses"),
    ("settings", "datagrams"),
    ("process", "capture"),
    ("bus", "nats"),
    ("journal", "serving_nodes"),
    ("fanout",),
    ("monitoring",),
)
"""From the bottom; what stands side by side does not import each other."""
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PURE = (
    "services/broker/publish_rights.py",
    "services/forwarder/plan.py",
    "services/gateway/admission/address_proof.py",
    "services/gateway/admission/decision.py",
    "services/gateway/admission/destinations.py",
    "services/gateway/admission/ownership.py",
    "services/gateway/admission/rights.py",
    "services/gateway/admission/tokens.py",
    "services/gateway/cluster/keys.py",
    "services/gateway/cluster/records.py",
    "services/gateway/cluster/replica.py",
    "services/gateway/cluster/sessions.py",
    "services/gateway/event_feed.py",
    "services/gateway/handler.py",
    "services/gateway/protocol/client_names.py",
    "services/gateway/protocol/decoder.py",
    "services/gateway/protocol/names_answer.py",
    "services/gateway/protocol/requests.py",
    "services/gateway/registry/changes.py",
    "services/gateway/registry/condition.py",
    "services/gateway/registry/entry.py",
    "services/gateway/registry/expiry_pause.py",
    "services/gateway/registry/index.py",
    "services/gateway/registry/leases.py",
    "services/gateway/registry/registry.py",
    "services/gateway/registry/revisions.py",
    "services/gateway/render.py",
    "services/gateway/transport/conversation.py",
    "services/gateway/transport/deadlines.py",
    "services/gateway/transport/push_queue.py",
    "services/gateway/transport/rate_limit.py",
    "services/ingest/flows/exporters.py",
    "services/ingest/flows/ipfix_numbering.py",
    "services/ingest/flows/ipfix_templates.py",
    "services/ingest/flows/sequence_gaps.py",
    "services/ingest/flows/sets.py",
    "services/ingest/flows/template_cache.py",
    "services/ingest/flows/template_reader.py",
    "services/ingest/octet_count_framing.py",
    "services/ingest/trains.py",
    "services/offload/applying/copy_rules.py",
    "services/offload/planning/handover.py",
    "services/offload/kernel_plan.py",
    "services/offload/planning/mark_watch.py",
    "services/offload/applying/nftables/attributes.py",
    "services/offload/applying/nftables/expressions.py",
    "services/offload/applying/nftables/messages.py",
    "services/offload/planning/planner.py",
    "services/offload/applying/rules.py",
    "services/offload/source_classes.py",
    "services/offload/planning/workers.py",
    "services/operator/cli/numbers.py",
    "services/operator/doctor/copies.py",
    "shared/monitoring/finding.py",
    "services/operator/doctor/host.py",
    "services/operator/doctor/journal.py",
    "services/operator/doctor/kernel_copies.py",
    "services/operator/doctor/listening.py",
    "services/operator/doctor/services.py",
    "services/operator/doctor/uplink.py",
    "services/operator/doctor/network_paths.py",
    "services/operator/importing/pmacct.py",
    "services/operator/importing/receivers.py",
    "services/operator/importing/samplicator.py",
    "services/operator/top/state.py",
    "services/operator/top/views.py",
    "services/transmitter/packets/addressing.py",
    "services/transmitter/packets/fragments.py",
    "services/transmitter/packets/headers.py",
    "services/transmitter/plan.py",
    "services/transmitter/policy.py",
    "services/transmitter/sources.py",
    "services/uplink/incoming/arrivals.py",
    "services/uplink/outgoing/cursors.py",
    "services/uplink/incoming/doubles.py",
    "services/uplink/outgoing/outbox.py",
    "services/uplink/packs.py",
    "services/uplink/incoming/readers.py",
    "services/uplink/server_checks.py",
    "services/uplink/subjects.py",
    "shared/bus/continuity.py",
    "shared/bus/frame_requests.py",
    "shared/bus/messages.py",
    "shared/capture/pcapng.py",
    "shared/capture/reader.py",
    "shared/client.py",
    "shared/bus/bodies/fields.py",
    "shared/bus/bodies/journal_messages.py",
    "shared/bus/bodies/health_message.py",
    "shared/datagrams/batch.py",
    "shared/datagrams/export_headers.py",
    "shared/datagrams/gathered.py",
    "shared/datagrams/prefix_index.py",
    "shared/datagrams/prefix_set.py",
    "shared/datagrams/routing.py",
    "shared/datagrams/sampling.py",
    "shared/datagrams/gso_runs.py",
    "shared/fanout/registry_replica.py",
    "shared/fanout/sending/send_errors.py",
    "shared/journal/retention.py",
    "shared/journal/segments.py",
    "shared/ledger/accounts.py",
    "shared/ledger/counters.py",
    "shared/ledger/equations.py",
    "shared/monitoring/balance.py",
    "shared/losses.py",
    "shared/monitoring/observer.py",
    "shared/monitoring/picture.py",
    "shared/monitoring/exporters.py",
    "shared/monitoring/verdict.py",
    "shared/net/printable.py",
)


CLAUSE: Final = re.compile(
    r"(Have|How|However|That|What|Whatever|When|Where|Whether|Which|Who|Whoever|Whom|Whose|Why)\b"
)
"""Beginnings of clauses that stand for a noun, and of orders to others."""
STRING: Final = re.compile(r"""^\s*\w{,2}["']+(?:\\\n)?\s*(\w+)""", re.MULTILINE)
"""Strings with which a line begins, by their first words: docstrings, and some others. To parse all takes seconds."""


def statements(text: str) -> Iterator[ast.AST]:
    """Yield all statements of a module, those inside of others among them; not what they consist of, which is more."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        yield node
        for part in vars(node).values():
            if isinstance(part, list):
                waiting += [each for each in part if isinstance(each, ast.stmt | ast.excepthandler | ast.match_case)]


@cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports, dotted."""
    found = set()
    for node in statements(path.read_text()):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each docstring, those behind constants and attributes among them."""
    for node in statements(text):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.lineno, str(node.value.value).strip()


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_itself_and_shared_only(service: str) -> None:
    """No service knows another one."""
    for path in (CHECKOUT / "services" / service).rglob("*.py"):
        for module in imports(path):
            if module.startswith("services"):
                assert module.startswith(f"services.{service}"), f"{path} imports {module}"


@pytest.mark.parametrize("path", sorted(SHARED.rglob("*.py")), ids=lambda path: str(path.relative_to(SHARED)))
def test_shared_imports_its_own_and_lower_layers_only(path: Path) -> None:
    """A module of `shared/` imports its own layer and those below it, and no service."""
    own = path.relative_to(SHARED).with_suffix("").parts[0]
    for module in imports(path):
        assert not module.startswith("services"), f"{path} imports {module}"
        if module.startswith("shared."):
            used = module.split(".")[1]
            assert used == own or RANKS[used] < RANKS[own], f"{path} imports {module}"


def test_every_module_of_shared_has_a_layer() -> None:
    """Each file in `shared/` belongs to one of the layers, so that no folder grows beside them."""
    found = {path.stem for path in SHARED.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(RANKS)


def test_folders_and_modules_are_small() -> None:
    """No folder has more than 15 modules, and no module more than 400 lines: beyond that it is two."""
    modules = [path for folder in ("services", "shared", "deploy") for path in (CHECKOUT / folder).rglob("*.py")]
    folders = Counter(path.parent for path in modules)
    assert [str(folder) for folder, count in folders.items() if count > 15] == []
    assert [str(path) for path in modules if len(path.read_text().splitlines()) > 400] == []


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_do_no_io(path: str) -> None:
    """Modules that decide do not talk: no socket, ZeroMQ, asyncio or time in them."""
    forbidden = {"socket", "zmq", "asyncio", "time", "selectors", "shared.bus.zmq_sockets", "shared.datagrams.mmsg"}
    if path.endswith("/plan.py"):
        forbidden -= {
            "socket",
            "shared.datagrams.mmsg",
        }  # the layouts and constants they plan for, no socket of their own
    assert not imports(CHECKOUT / path) & forbidden


def test_refusals_of_the_gateway_come_from_the_side_of_the_protocol() -> None:
    """Code of the gateway that talks to the kernel, the disk or the bus raises OSError, not an answer to a client."""
    folder = CHECKOUT / "services" / "gateway"
    raising = {
        str(path.relative_to(folder)).split("/")[0]
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and node.exc and re.search(r"RequestError|no_transmitter", ast.unparse(node))
    }
    assert raising == {"admission", "handler.py", "protocol"}


def test_no_socket_of_the_bus_is_made_elsewhere() -> None:
    """Only the bus module and the broker make ZeroMQ sockets."""
    makers = {
        str(path.relative_to(CHECKOUT))
        for folder in ("services", "shared")
        for path in (CHECKOUT / folder).rglob("*.py")
        if "context.socket(" in path.read_text()
    }
    assert makers == {"shared/bus/zmq_sockets.py", "services/broker/proxy.py"}


@pytest.mark.parametrize("folder", ["services", "shared", "tests"])
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    """No docstring begins with a clause, which readers whose first language is not English have to read twice."""
    texts = {str(path): path.read_text() for path in (CHECKOUT / folder).rglob("*.py")}
    assert sum(len(STRING.findall(text)) for text in texts.values()) > 500
    suspect = {path: text for path, text in texts.items() if any(map(CLAUSE.match, STRING.findall(text)))}
    found = [(path, *each) for path, text in suspect.items() for each in docstrings(text)]
    assert not [each for each in found if CLAUSE.match(each[2])]


def test_structlog_is_loaded_in_one_place() -> None:
    """Everything that logs gets its logger from `shared.log`, which loads structlog without rich."""
    paths = (path for folder in ("services", "shared") for path in (CHECKOUT / folder).rglob("*.py"))
    assert [str(path.relative_to(CHECKOUT)) for path in paths if "structlog" in imports(path)] == ["shared/log.py"]


STARTERS: Final = {
    CHECKOUT / "services/operator/commands/running/run.py",
    CHECKOUT / "services/operator/client/programs.py",
}
"""Those that start programs, and have no ZeroMQ context any more by then."""


def test_no_process_forks() -> None:
    """Nothing starts a process that would share a ZeroMQ context with it: workers are started, and have their own."""
    for folder in ("services", "shared"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            assert path in STARTERS or not imports(path) & {"multiprocessing", "subprocess", "pty", "honcho.manager"}, (
                path
            )
            assert not re.search(r"\bfork(pty)?\(|ProcessPool", path.read_text()), path


@pytest.mark.parametrize("module", ["broker.__main__", "gateway.__main__", "operator.commands.clients"])
def test_numpy_is_for_those_who_see_datagrams(module: str) -> None:
    """Processes that never see a batch of datagrams do not load numpy, a third of their start and of their memory."""
    script = f"import sys, services.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert f"services.{module}" in done.stdout.split()
    assert "numpy" not in done.stdout.split()


def test_the_wheel_holds_one_directory_and_runs(tmp_path: Path) -> None:
    """The built wheel has `fanwire/` alone at its top, and `fanwire --help` runs from it without the checkout."""
    names = zipfile.ZipFile(wheel()).namelist()
    top = {name.split("/")[0] for name in names}
    assert {f"fanwire/services/console/page/{part}" for part in PARTS} <= {*names}
    assert [name for name in names if name.endswith((".md", ".webp"))] == []
    assert {name for name in top if not name.endswith(".dist-info")} == {"fanwire"}
    zipfile.ZipFile(wheel()).extractall(tmp_path / "installed")
    # The dependencies come from this environment; the checkout is kept off the path by -P and another directory.
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); import fanwire.__main__ as m; sys.exit(m.main())"
    for arguments in (["--help"], ["ingest", "--help"], ["config"]):
        command = [sys.executable, "-P", "-c", script, str(tmp_path / "installed"), *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "usage: fanwire" in result.stdout or "[gateway]" in result.stdout


def test_idle_processes_cost_little(stack: Stack) -> None:
    """Idle, each process stays under 80 MB and near no CPU at all."""
    stack.start_all()
    stack.start("transmitter")
    stack.start("console")
    shares: dict[str, float] = {}

    def idle() -> bool:  # on a busy machine what a start has left to do takes its time
        before = {running.name: running.cpu_seconds() for running in stack.running}
        time.sleep(4)
        shares.update({running.name: (running.cpu_seconds() - before[running.name]) / 4 for running in stack.running})
        return max(shares.values()) < 0.03

    wait_until(idle, lambda: f"all use under 3 % of a core doing nothing: {shares}")
    for running in stack.running:
        assert running.resident_mb() < 80, f"{running.name}: {running.resident_mb()} MB"
