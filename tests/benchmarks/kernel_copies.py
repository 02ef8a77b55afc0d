"""The kernel copying by itself, by nftables at the relay's interface: what is left when no program is on the way.

Rules rewrite MAC and IP address, port and checksums; there are no accounts, filters or leases, and no datagram larger
than the MTU gets through. All of it happens on the sender's time, so it is what the sender's CPU is more than when the
interface drops everything.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.benchmarks.paced import Load, Measured, Reading
from tests.benchmarks.programs import Program, Task
from tests.benchmarks.site import COLLECTOR_PORT, PORT, RELAY, Site

NAME: Final = "nft"
ETHTOOL_STXCSUM: Final = 0x17
RULES: Final = """table netdev copies {{ chain taken {{
  type filter hook ingress device "{device}" priority 0;
  ip daddr {relay} udp dport {port} {statements}
}}
}}"""


def available(task: Task) -> bool:
    """Return whether it can do a task here: it always keeps the exporter's address."""
    return task.way == "original" and bool(shutil.which("nft"))


class KernelCopies(Measured):
    """A rule in the place of a program."""

    def idle(self, seconds: float) -> Reading:
        """A rule costs nothing while nothing comes."""
        return replace(super().idle(seconds), cpu={"kernel": 0.0})

    def run(self, load: Load, seconds: float) -> Reading:
        """Send with the rule that copies, then with one that drops, and return the difference."""
        copying = super().run(load, seconds)
        put_rule(self.site, "drop")
        dropping = super().run(load, seconds)
        put_rule(self.site, copies(self.site, len(self.sinks)))
        least = dropping.cpu["kernel"] * copying.offered / dropping.offered
        return replace(copying, cpu={"kernel": max(0.0, copying.cpu["kernel"] - least)})

    def _watched(self, sender: subprocess.Popen[bytes]) -> Program:
        return Program(NAME, {"kernel": sender.pid})


@contextmanager
def copying(task: Task, site: Site, tool: Path) -> Iterator[Measured]:
    """The kernel of the relay's host copying to so many collectors."""
    with site.sinks(task.fan_out) as sinks, closing(KernelCopies(Program(NAME, {}), site, sinks, tool)) as here:
        site.exporters_end.ethtool(ETHTOOL_STXCSUM, 0)  # a rule rewrites complete checksums, as they come by a wire
        put_rule(site, copies(site, task.fan_out))
        try:
            here.begin()
            yield here
        finally:
            site.relay.run("nft", "flush", "ruleset")
            site.exporters_end.ethtool(ETHTOOL_STXCSUM, 1)


def copies(site: Site, fan_out: int) -> str:
    """The statements of a rule that copies to so many collectors."""
    ethernet = site.ethernet_to_collectors
    to, by, up = ethernet[:6].hex(":"), ethernet[6:].hex(":"), site.up_name
    first, *others = Task("", fan_out, "original", 0).collectors
    words = [f"ether daddr set {to} ether saddr set {by} udp dport set {COLLECTOR_PORT} ip daddr set {first}"]
    words += [f'dup to "{up}" ip daddr set {address}' for address in others]
    return " ".join([*words, f'fwd to "{up}"'])


def put_rule(site: Site, statements: str) -> None:
    """Put a rule in the place of the last one."""
    text = RULES.format(device=site.in_name, relay=RELAY, port=PORT, statements=statements)
    site.relay.run("nft", "-f", "-", text=f"flush ruleset\n{text}")
