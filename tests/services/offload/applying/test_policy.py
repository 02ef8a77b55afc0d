import random
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from services.offload.applying.policy import Policy, RefusedError, sources_of
from services.offload.kernel_plan import Copy, KernelPlan, Listener, StreamCopies
from services.offload.kernel_routes import Frame, Pair
from shared.datagrams.limits import BUCKETS
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Offload, Transmitter
from tests.services.offload.site import packed, prefix

SETTINGS = Settings(
    streams=(
        Stream(name="netflow", listen=("udp://0.0.0.0:2055", "tcp://0.0.0.0:601")),
        Stream(name="ordered", listen=("udp://0.0.0.0:2056",), offload=False),
        Stream(name="syslog", listen=("udp://0.0.0.0:514",)),
    ),
    offload=Offload(interfaces=("eth0",), destinations=("10.0.0.0/8", "fd00::/8")),
    transmitter=Transmitter(destinations=("10.2.0.0/16",), sources=("10.0.0.0/8", "2001:db8::/32")),
)
COPY = Copy(
    "siem", 0, 3, b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2", packed("10.2.0.1"), 9, prefixes=(prefix("10.1.0.0/16"),)
)
RELAYED = msgspec.structs.replace(COPY, address=packed("10.9.0.1"), source=packed("10.9.0.254"), source_port=4000)
OWN = packed("10.2.0.254")
LISTENER = Listener(packed("10.1.0.1"), 2055)
STREAM = StreamCopies("netflow", 1, 1, (LISTENER,), (0,))
NO_PORT = "port {} is not one of a udp:// listener of stream netflow"
PLAN = KernelPlan(("eth0",), (COPY, RELAYED), (STREAM,))


def frames_to(pairs: Iterable[Pair]) -> dict[Pair, Frame]:
    """The way of all copies; there is none to this host."""
    frame = COPY.link_index, COPY.next_hop, COPY.link_address
    return {pair: frame for pair in pairs if pair[0] != OWN}


def check(plan: KernelPlan) -> None:
    """Ask the policy of these settings, on a host with three addresses."""
    ours = {OWN, packed("10.9.0.254"), packed("10.1.0.1")}
    Policy(SETTINGS, ours.intersection, frames_to).check(plan)


def test_plan_within_the_settings_passes() -> None:
    """A plan within the settings passes, and so does one of no copies."""
    check(PLAN)
    check(KernelPlan((), (), ()))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"address": packed("192.0.2.1")}, "destination 192.0.2.1 is not in [offload] destinations"),
        ({"address": packed("10.3.0.1")}, "destination 10.3.0.1 is not in [transmitter] destinations"),
        ({"address": OWN}, "copies to 10.2.0.254 do not go the way of the kernel's routes"),
        ({"address": packed("10.2.0.1") + b"\0"}, "addresses of 5 and 0 bytes"),
        ({"source": packed("fd00::1"), "source_port": 1}, "addresses of 4 and 16 bytes"),
        ({"source": packed("10.9.0.253"), "source_port": 1}, "source 10.9.0.253 is not an address of this host"),
        ({"source_port": 1}, "source port 1 of 0 bytes of address"),
        ({"source": packed("10.9.0.254")}, "source port 0 of 4 bytes of address"),
        ({"next_hop": b"\xff" * 6}, "next hop ff:ff:ff:ff:ff:ff is no station's"),
        ({"next_hop": b"\x01\0\x5e\0\0\1"}, "next hop 01:00:5e:00:00:01 is no station's"),
        ({"next_hop": bytes(6)}, "next hop 00:00:00:00:00:00 is no station's"),
        ({"next_hop": b"\x02\0\0\0\0\3"}, "copies to 10.2.0.1 do not go the way of the kernel's routes"),
        ({"link_address": b"\x02\0\0\0\0\3"}, "copies to 10.2.0.1 do not go the way of the kernel's routes"),
        ({"link_index": 4}, "copies to 10.2.0.1 do not go the way of the kernel's routes"),
        ({"prefixes": (prefix("fd00::/8"),)}, "a prefix of another IP version"),
        ({"prefixes": (prefix("10.0.0.0/33"),)}, "a prefix of another IP version"),
    ],
)
def test_copy_beyond_the_settings_is_refused(fields: dict[str, Any], reason: str) -> None:
    """No copy goes where the settings do not allow, to many or to another station, or from another host's address."""
    with pytest.raises(RefusedError) as refused:
        check(msgspec.structs.replace(PLAN, copies=(msgspec.structs.replace(COPY, **fields), RELAYED)))
    assert str(refused.value) == reason


@pytest.mark.parametrize("address", ["0.0.0.1", "127.0.0.1", "224.0.0.1", "255.255.255.255", "::1", "ff02::1"])
def test_no_setting_allows_what_is_nobodys(address: str) -> None:
    """Loopback, multicast and broadcast are refused even where the settings name everything."""
    everywhere = ("0.0.0.0/0", "::/0")
    settings = Settings(offload=Offload(destinations=everywhere), transmitter=Transmitter(destinations=everywhere))
    plan = KernelPlan((), (msgspec.structs.replace(COPY, address=packed(address), prefixes=()),), ())
    with pytest.raises(RefusedError, match=r"is not in \[offload\] destinations"):
        Policy(settings, set, frames_to).check(plan)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "unknown"}, "stream unknown is not in the settings, or kept from offload"),
        ({"name": "ordered"}, "stream ordered is not in the settings, or kept from offload"),
        ({"listeners": (Listener(packed("10.1.0.1"), 2056),)}, NO_PORT.format(2056)),
        ({"listeners": (Listener(packed("10.1.0.1"), 514),)}, NO_PORT.format(514)),
        (
            {"listeners": (LISTENER, Listener(packed("10.1.0.2"), 2055))},
            "listener 10.1.0.2 is not an address of this host",
        ),
        ({"unseen": True}, "stream netflow is not in [offload] unseen"),
        ({"generation": 4096}, "generation 4096 is not within [offload] mark_mask"),
        ({"listeners": (Listener(packed("10.1.0.1"), 601),)}, NO_PORT.format(601)),
        ({"listeners": (Listener(packed("10.1.0.1"), 22),)}, NO_PORT.format(22)),
        ({"listeners": (LISTENER, Listener(packed("fd00::1"), 2055))}, "listeners with addresses of 4 and 16 bytes"),
        ({"copies": (0, 2)}, "copies that the plan has not"),
        ({"listeners": (Listener(packed("fd00::1"), 2055),)}, "copies that the plan has not"),
    ],
)
def test_stream_beyond_the_settings_is_refused(fields: dict[str, Any], reason: str) -> None:
    """Only what comes to listeners of the stream on this host is copied, and only marks of our own are set."""
    with pytest.raises(RefusedError) as refused:
        check(msgspec.structs.replace(PLAN, streams=(msgspec.structs.replace(STREAM, **fields),)))
    assert str(refused.value) == reason


def test_interface_beyond_the_settings_is_refused() -> None:
    """A chain is made on the interfaces of the settings alone."""
    with pytest.raises(RefusedError, match=r"interface eth1 is not in \[offload\] interfaces"):
        check(msgspec.structs.replace(PLAN, interfaces=("eth0", "eth1")))


def test_plan_that_grows_in_the_kernel_is_refused() -> None:
    """Prefixes that overlap have a chain for each set of copies: their number is bounded before any is made."""
    drawn, nets = random.Random(1), [prefix(f"10.0.{number}.0/24") for number in range(256)]
    copies = tuple(msgspec.structs.replace(COPY, prefixes=tuple(drawn.sample(nets, 128))) for _ in range(400))
    stream = msgspec.structs.replace(STREAM, copies=tuple(range(400)))
    with pytest.raises(RefusedError, match="more than 40000 copies in chains"):
        check(KernelPlan(("eth0",), copies, (stream,)))


def test_groups_beyond_the_bound_are_refused() -> None:
    """Each group has a map, however many streams and sets of prefixes lead to it; their size is bounded."""
    share = msgspec.structs.replace(COPY, share=bytes([255] * (BUCKETS // 8)))
    copies = tuple(msgspec.structs.replace(share, port=9000 + number) for number in range(257))
    check(KernelPlan(("eth0",), copies[:256], (msgspec.structs.replace(STREAM, copies=tuple(range(256))),)))
    with pytest.raises(RefusedError, match="more than 262144 buckets of groups"):
        check(KernelPlan(("eth0",), copies, (msgspec.structs.replace(STREAM, copies=tuple(range(257))),)))


def test_sources_are_those_that_the_transmitter_may_claim() -> None:
    """Its `sources` are the only ones, and what is true on one link alone is left to it."""
    found = sources_of(SETTINGS)
    assert found.allowed == (prefix("10.0.0.0/8"), prefix("2001:db8::/32"))
    assert prefix("169.254.0.0/16") in found.local
    assert prefix("127.0.0.0/8") in found.nobodys
