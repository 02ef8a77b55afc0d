from dataclasses import replace
from typing import Any

import pytest

from services.operator.doctor.host import (
    BACKLOG_NAME,
    BUDGET_NAME,
    RELEASED,
    HostFacts,
    ListeningSocket,
    Softnet,
    check_host,
)
from shared.monitoring.finding import Finding
from shared.settings.entries import Stream
from shared.settings.model import Settings

ASKED = Settings().streams[0].receive_buffer
FINE = HostFacts(
    sysctls={
        "net.core.rmem_max": ASKED,
        "net.core.wmem_max": 4 << 20,
        BACKLOG_NAME: 10_000,
        BUDGET_NAME: 300,
        "net.netfilter.nf_conntrack_count": 80,
        "net.netfilter.nf_conntrack_max": 100,
    },
    counters={"UdpRcvbufErrors": 0, "IPReversePathFilter": 0},
    softnet=Softnet(1_000_000, 0, 1000),
    reverse_path={"eth0": 2, "eth1": 0},
    listeners={"messages": [ListeningSocket(ASKED, 0)]},
    time=RELEASED,
    synchronised=True,
)


def findings(facts: HostFacts) -> dict[str, Finding]:
    """By name; the last where there are several."""
    return {finding.name: finding for finding in check_host(facts, Settings())}


def test_a_host_that_is_fit() -> None:
    """Each check is there once, and finds nothing to cure."""
    found = list(check_host(FINE, Settings()))
    assert {finding.level for finding in found} == {"ok"}
    assert not any(finding.cure for finding in found)
    assert sorted(finding.name for finding in found) == sorted({finding.name for finding in found})


def sysctl(name: str, value: int) -> dict[str, Any]:
    """The facts in which one sysctl is not as it should be, and no listener is there yet."""
    return {"sysctls": {**FINE.sysctls, name: value}, "listeners": {}}


@pytest.mark.parametrize(
    ("name", "changes", "why", "cure"),
    [
        ("receive_buffer", sysctl("net.core.rmem_max", ASKED - 1), "33554431 of", f"net.core.rmem_max={ASKED}"),
        (
            "receive_buffer",
            {"listeners": {"messages": [ListeningSocket(ASKED, 0), ListeningSocket(9, 0)]}},
            "9 of",
            "rmem_max",
        ),
        (
            "kernel_drops",
            {"listeners": {"messages": [ListeningSocket(ASKED, 3), ListeningSocket(ASKED, 4)]}},
            "7 data",
            "worker",
        ),
        ("send_buffer", sysctl("net.core.wmem_max", 1000), "1000 of 65536", "net.core.wmem_max=65536"),
        ("backlog", sysctl(BACKLOG_NAME, 1000), "is 1000, and 0", f"{BACKLOG_NAME}=10000"),
        ("backlog", {"softnet": Softnet(9, 5, 0)}, "5 packets were dropped", f"{BACKLOG_NAME}=20000"),
        ("budget", {"softnet": Softnet(9999, 0, 10)}, "10 times in 9999", f"{BUDGET_NAME}=600"),
        ("udp_errors", {"counters": {"UdpRcvbufErrors": 2, "Udp6RcvbufErrors": 3}}, "5 datagrams", "ss -uamn"),
        ("udp_errors", {"counters": {"UdpInCsumErrors": 1}}, "wrong checksums", "ethtool -S"),
        ("reverse_path", {"reverse_path": {"eth0": 1, "eth1": 0}}, "strict", "net.ipv4.conf.eth0.rp_filter=2"),
        (
            "reverse_path",
            {"reverse_path": {"e.1": 1}, "counters": {"IPReversePathFilter": 9}},
            "9 packets",
            "conf.e/1.",
        ),
        ("conntrack", sysctl("net.netfilter.nf_conntrack_count", 81), "81 of 100", "nf_conntrack_max=200"),
        ("clock", {"time": RELEASED - 1}, "never set", "timedatectl"),
        ("clock", {"synchronised": False}, "not synchronised", "chrony"),
    ],
)
def test_what_needs_a_cure(name: str, changes: dict[str, Any], why: str, cure: str) -> None:
    """Each fault is a warning with its figures and its cure, and no other check is touched."""
    found = findings(replace(FINE, **changes))
    assert {each.name for each in found.values() if each.level != "ok"} == {name}
    assert why in found[name].why
    assert cure in found[name].cure


def test_strict_filter_on_the_only_interface_is_fine() -> None:
    """Strict mode drops nobody who could be answered, where there is one way in and out."""
    assert findings(replace(FINE, reverse_path={"eth0": 1}))["reverse_path"].level == "ok"


def test_streams_without_udp_have_no_receive_buffer() -> None:
    """Of a stream by TCP alone nothing is asked that UDP sockets have."""
    settings = Settings(streams=(Stream(name="tcp", listen=("tcp://127.0.0.1:514",)),))
    assert not [each for each in check_host(FINE, settings) if each.subject]


def test_what_cannot_be_seen_is_told_as_that() -> None:
    """Without any fact each check that needs one says that it can't be seen, and nothing fails."""
    found = findings(HostFacts())
    unseen = {name for name, finding in found.items() if "can't be seen" in finding.why}
    assert unseen == {"receive_buffer", "send_buffer", "backlog", "budget", "udp_errors", "clock"}
    assert {found[name].level for name in unseen} == {"warning"}
