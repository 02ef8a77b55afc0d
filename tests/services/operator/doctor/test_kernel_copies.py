import pytest

from services.operator.doctor.kernel_copies import check_interfaces, check_kernel_copies
from shared.bus.bodies.offload_messages import CollectorPath
from shared.ledger.accounts import Accounts
from shared.net.netlink import Link
from shared.settings.model import Settings
from shared.settings.tables import Offload

SETTINGS = Settings(offload=Offload(interfaces=("eth0",)))
PATHS = {
    "a": CollectorPath("a", "kernel"),
    "b": CollectorPath("b", "frames", "it is slow"),
    "c": CollectorPath("c", "relay", "its copies are withheld"),
}


def told(
    settings: Settings, accounts: dict[str, Accounts], paths: dict[str, CollectorPath]
) -> list[tuple[str, str, str]]:
    """Level, subject and sentence of each finding."""
    return [(each.level, each.subject, each.why) for each in check_kernel_copies(settings, accounts, paths)]


def test_ways_are_told_with_their_reasons() -> None:
    """The collectors that the kernel serves are one finding; each other one has its own, with way and reason."""
    accounts: dict[str, Accounts] = {"offload.1": {"offload": {"applier": 1}}}
    assert told(SETTINGS, accounts, PATHS) == [
        ("ok", "", "the kernel makes the copies of a"),
        ("ok", "b", "by frames, not by the kernel: it is slow"),
        ("ok", "c", "by relay, not by the kernel: its copies are withheld"),
    ]
    assert told(SETTINGS, accounts, {}) == [("ok", "", "the kernel makes no copies now")]


def test_offload_that_does_nothing_is_told_where_it_is_asked_for() -> None:
    """Without a report, or without its capability, a warning says so; without interfaces nothing is said."""
    assert told(Settings(), {}, {}) == []
    assert told(SETTINGS, {"ingest.1": {"ingest": {}}}, {}) == [
        ("warning", "", "[offload] interfaces are set, and offload does not report")
    ]
    (silent,) = check_kernel_copies(SETTINGS, {}, {})
    assert silent.cure == "start it; see its log"
    (unfit,) = check_kernel_copies(SETTINGS, {"offload.1": {"offload": {}}}, {})
    assert unfit.cure == "its log has the cure"
    assert told(SETTINGS, {"offload.1": {"offload": {"applier": 0}}}, PATHS) == [
        ("warning", "", "offload has no process with CAP_NET_ADMIN: the kernel makes no copies")
    ]


def test_interfaces_that_stand_upon_one_another_are_told() -> None:
    """A bond that is a port of a bridge has all of its own ports' datagrams there; a VLAN has none of its link's."""
    settings = Settings(offload=Offload(interfaces=("eth0", "br0", "eth1", "eth1.7")))
    links = [
        Link(1, "eth0", True, bytes(6), 1500, True, master=2),
        Link(2, "bond0", True, bytes(6), 1500, True, master=3),
        Link(3, "br0", True, bytes(6), 1500, True),
        Link(4, "eth1", True, bytes(6), 1500, True),
        Link(5, "eth1.7", True, bytes(6), 1500, True),
    ]
    (found,) = check_interfaces(settings, links)
    assert (found.level, found.subject, found.why) == (
        "warning",
        "eth0",
        "what arrives by eth0 arrives by br0, too: the kernel copies it by br0 alone",
    )
    assert found.cure == "take eth0 or br0 out of [offload] interfaces"
    settings = Settings(offload=Offload(interfaces=("bond0", "br0", "eth0")))
    assert [(each.subject, each.cure) for each in check_interfaces(settings, links)] == [
        (lower, f"take {lower} or br0 out of [offload] interfaces") for lower in ("eth0", "bond0")
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_a_link_has_all_that_arrives_by_its_ipvlan(order: int) -> None:
    """An ipvlan has of its link what is for its own addresses, so the link counts, and the bridge that has that."""
    links = [
        Link(1, "eth0", True, bytes(6), 1500, True, master=3),
        Link(2, "ipvlan0", True, bytes(6), 1500, True, below=3, partial=True),
        Link(3, "br0", True, bytes(6), 1500, True),
    ]
    for named, wanted in (
        (("br0", "ipvlan0"), {"ipvlan0": "br0"}),
        (("eth0", "ipvlan0"), {"ipvlan0": "eth0"}),
        (("eth0", "br0", "ipvlan0"), {"eth0": "br0", "ipvlan0": "br0"}),
    ):
        found = check_interfaces(Settings(offload=Offload(interfaces=named)), links[::order])
        assert {each.subject: each.why for each in found} == {
            name: f"what arrives by {name} arrives by {other}, too: the kernel copies it by {other} alone"
            for name, other in wanted.items()
        }


def test_drops_where_copies_leave_are_told() -> None:
    """Nobody knows whose they were, so they are told by interface, as the most that may be lost."""
    egress = {"egress/eth1": {"queue_drops": 7, "link_drops": 2}, "egress/eth2": {"queue_drops": 0, "link_drops": 0}}
    accounts: dict[str, Accounts] = {"offload.1": {"offload": {"applier": 1}, **egress}}
    _, dropped = check_kernel_copies(SETTINGS, accounts, {})
    assert (dropped.level, dropped.why, dropped.cure) == (
        "warning",
        "eth1 and its queues have dropped 9 packets since the kernel's copies leave by it: at most that many copies "
        "are lost there, and no collector's account has them",
        "raise the limit of its queue, or send less by it; see `tc -s qdisc show dev eth1`",
    )
