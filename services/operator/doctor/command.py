"""`fanwire doctor`: checks this host before production; prints findings, each with its cure."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.text_tables import print_table
from services.operator.client.cluster import KnownNodes, heard_nodes
from services.operator.client.gateway_options import access, add_gateway_arguments
from services.operator.client.offload_paths import heard_paths
from services.operator.client.programs import refusals
from services.operator.client.running_streams import CURE, difference, running_streams, stream_named
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from services.operator.doctor.facts import by_service, host_facts, listen, network_facts, service_facts
from services.operator.doctor.host import check_host
from services.operator.doctor.host_names import check_host_names, look_up
from services.operator.doctor.kernel_copies import check_interfaces, check_kernel_copies
from services.operator.doctor.listening import check_listening
from services.operator.doctor.listening_facts import listening_facts
from services.operator.doctor.network_paths import check_network_paths
from services.operator.doctor.nodes import check_nodes
from services.operator.doctor.services import check_services, senders_of_original
from services.operator.doctor.uplink import check_uplink
from shared.client import ALL_STREAMS
from shared.ledger.accounts import Accounts
from shared.monitoring.finding import Finding, error, ok, unseen, warning
from shared.monitoring.probe import Ledger, probe
from shared.net.addresses import begin_lookups
from shared.net.host_lookups import Host
from shared.net.netlink import Netlink
from shared.process.lifecycle import FAILED, OK, OperatorError
from shared.process.registry_client import Access, Entry, RegistryClient
from shared.settings.entries import Collector, Stream
from shared.settings.model import Settings
from shared.settings.opt_in import OPT_IN

COLUMNS: Final = ("check", "level", "of", "why", "cure")
LEVELS: Final = ("error", "warning", "ok")
ANSWER_SECONDS: Final = 5.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "doctor", run, "check this host before production (exit 1 on errors)")
    add_gateway_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--probe",
        metavar="STREAM",
        help="send a marked datagram to the stream and wait for its copy; its other collectors get one too",
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Check everything; return 1 when there are errors."""
    probed = None if arguments.probe is None else stream_named(arguments.probe, settings)
    findings = list(_examine(settings, access(arguments, settings), probed, arguments.config))
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode({**counts, "findings": findings}), indent=2).decode())
    else:
        findings.sort(key=lambda finding: LEVELS.index(finding.level))
        rows = ((each.name.replace("_", " "), each.level, each.subject, each.why, each.cure) for each in findings)
        print_table("doctor", COLUMNS, rows)
        print(f"errors: {counts['error']}, warnings: {counts['warning']}")
    return FAILED if counts["error"] else OK


def _check_settings(config: Path | None, *, runs: bool) -> Iterator[Finding]:
    """Yield what a service would refuse at its start. Those that run may do so as a user who may do more."""
    refused = refusals((*SERVICES, *OPT_IN, *OPTIONAL), config)
    found = warning if runs else error
    for service, why in refused.items():
        yield found("settings", f"at its start it would say: {why}", "see `fanwire config --check`", service)
    if not refused:
        yield ok("settings", "no service would refuse them")


def _examine(settings: Settings, gateway: Access, probed: Stream | None, config: Path | None) -> Iterator[Finding]:
    def open_registry() -> RegistryClient:
        return RegistryClient(gateway, ANSWER_SECONDS + settings.gateway.serve_seconds)

    def read_ledger() -> Ledger:
        return by_service(listen(settings))

    begin_lookups(endpoint.host for stream in settings.streams for endpoint in stream.endpoints)
    hosts = look_up(settings)
    collectors, silent = _collectors(settings, open_registry, hosts)
    facts = service_facts(settings, listen(settings), silent, config)
    yield from _check_settings(config, runs=facts.broker is not False)
    yield from check_services(facts, settings, collectors)
    yield from check_kernel_copies(settings, facts.accounts, heard_paths(settings))
    yield from check_uplink(facts.accounts, settings)
    if settings.uplink.nodes and facts.broker:
        yield from check_nodes(_nodes(settings))
    if (running := running_streams(settings)) is not None and (found := difference(running, settings)):
        yield warning("streams", found, CURE)
    yield from check_host_names(settings, hosts, None if silent else collectors)
    try:
        netlink = Netlink()
    except OSError:
        yield unseen("network", "routes, links and addresses (AF_NETLINK is refused)")
        yield from check_listening(listening_facts(settings, None), facts.accounts, settings)
        yield from check_host(host_facts(settings, []), settings)
    else:
        with closing(netlink):
            yield from _examine_network(netlink, settings, facts.accounts, collectors)
    if probed is not None:
        wanting = (each for each in collectors if {probed.name, ALL_STREAMS} & {*each.streams})
        neighbours = list(dict.fromkeys(each.address for each in wanting))
        yield probe(open_registry, probed, "relay", read_ledger, neighbours)
        if senders_of_original(facts.accounts):
            yield probe(open_registry, probed, "original", read_ledger, neighbours)


def _nodes(settings: Settings) -> KnownNodes | str:
    """Return the nodes of the cluster, or the reason for which they are not known."""
    try:
        return heard_nodes(settings)
    except OperatorError as silent:
        return str(silent).partition(";")[0]


def _examine_network(
    netlink: Netlink, settings: Settings, accounts: Mapping[str, Accounts], collectors: Sequence[Entry]
) -> Iterator[Finding]:
    yield from check_listening(listening_facts(settings, netlink.is_local), accounts, settings)
    links = netlink.links()
    yield from check_host(host_facts(settings, links), settings)
    yield from check_interfaces(settings, links)
    seen = network_facts(settings, netlink, links, [collector.address for collector in collectors])
    yield from check_network_paths(seen, collectors, settings.transmitter.destinations)


def _collectors(
    settings: Settings, open_registry: Callable[[], RegistryClient], hosts: Mapping[str, Host]
) -> tuple[list[Entry], str]:
    """Return the collectors of the registry; if it does not answer, those of the settings, and the reason."""
    try:
        with open_registry() as registry:
            entries = registry.ask("list").entries().values()
    except OperatorError as silent:
        reason = str(silent).partition(";")[0]
        return [entry for collector in settings.collectors for entry in _entry(collector, hosts)], reason
    return [entry for entry in entries if entry.streams], ""


def _entry(collector: Collector, hosts: Mapping[str, Host]) -> Iterator[Entry]:
    """Yield the entry that the gateway would make of a collector; none where its host name has no address."""
    address = next(iter(hosts[collector.host].addresses), "") if collector.host else collector.address
    if address:
        yield msgspec.convert({**msgspec.to_builtins(collector), "address": address}, Entry)
