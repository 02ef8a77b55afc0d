"""Datagrams at the edge of UDP, sent to the whole stack: each is copied as it is, or refused for a counted cause."""

import socket
from collections import Counter
from contextlib import ExitStack

from tests.capture import Collector
from tests.forging import forging
from tests.network import Host
from tests.openly import OpenStack
from tests.stack import PATIENCE_SECONDS
from tests.system.test_source_preserving import register, small_site
from tests.system.test_workers import reports

RELAY = ("10.1.0.1", 6667)
MARK = b"GARGOYLE"
MADE_UP = {
    "10.1.0.1": ("240.0.0.1", "0.1.2.3", "0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.1.0.1"),
    "fd00:1::1": ("::", "::1", "ff02::1", "::ffff:192.0.2.1", "::ffff:127.0.0.1"),
}
"""Sources that no datagram can have come from, by the address they are sent to; some of them the kernel lets in."""
NASTY = [
    b"%s%n%x {0} {mark} $(reboot) `reboot` " + MARK,
    MARK + b"\0\0\n\r\n\x1b[2J\x1b]0;owned\x07\xff\xfe",
    b'{"op":"register","name":"' + MARK + b'"}\n',
    b"[" * 10_000 + MARK + b"]" * 10_000,
    MARK + b'", "level": "critical", "event": "',
]


def sign_up(open_stack: OpenStack, relay: Host, opened: ExitStack, siem: Host) -> tuple[Collector, Collector]:
    """Collectors of relayed copies and of those with the exporter's address."""
    with relay.entered():
        open_stack.start("transmitter")
    relayed, original = (opened.enter_context(Collector(siem, "10.2.0.2", port)) for port in (9500, 9501))
    register(relay, "10.2.0.2", 9500, "relayed", source="relay")
    register(relay, "10.2.0.2", 9501, "original")
    return relayed, original


def test_what_udp_can_carry_is_carried(open_stack: OpenStack) -> None:
    """Nothing, one byte, 65,507, from port 0, without a checksum, or made to be parsed: all arrive as they were sent.

    No payload shows in any log.
    """
    sent = [
        (("10.1.0.2", 5000), b""),
        (("10.1.0.2", 5000), b"x"),
        (("10.1.0.3", 0), b"from port 0"),
        (("10.1.0.3", 0), b""),
        (("10.1.0.3", 65_535), b"from the last port"),
        *((("10.1.0.3", 4000), payload) for payload in NASTY if len(payload) < 1400),
    ]
    large = [NASTY[3], bytes(range(256)) * 255 + b"z" * 227]
    with small_site(open_stack) as (field, relay, siem), ExitStack() as opened:
        relayed, original = sign_up(open_stack, relay, opened, siem)
        forger = opened.enter_context(forging(field))
        for number, (source, payload) in enumerate(sent):
            forger.send(source, RELAY, payload, checksum=number % 3 > 0)
        with field.socket(socket.AF_INET, socket.SOCK_DGRAM) as exporter:
            exporter.bind(("10.1.0.2", 5001))
            for payload in large:
                exporter.sendto(payload, RELAY)
        assert len(large[1]) == 65_507
        sent += [(("10.1.0.2", 5001), payload) for payload in large]
        copies = relayed.read(len(sent))
        assert Counter(each.payload for each in copies) == Counter(payload for _, payload in sent)
        assert {each.source for each in copies} == {"10.2.0.1"}
        copies = original.read(len(sent))
        assert Counter(((each.source, each.source_port), each.payload) for each in copies) == Counter(sent)
        for running in open_stack.running:
            running.process.terminate()
        for running in open_stack.running:
            assert running.process.wait(PATIENCE_SECONDS) == 0
            assert MARK.decode() not in running.text, running.name
            assert all(line.startswith("{") for line in running.text.splitlines()[1:])


def test_sources_that_nobody_has_are_claimed_towards_nobody(open_stack: OpenStack) -> None:
    """Loopback, this network, groups, reserved, our own, IPv4 inside of IPv6: no copy leaves with such a source.

    What the kernel lets in of them is relayed, and refused for copies with the exporter's address: all is counted.
    """
    with small_site(open_stack) as (field, relay, siem), ExitStack() as opened:
        field.add_address("fd00:1::2/64", "eth")
        for host, interface, address in (
            (relay, "field", "fd00:1::1/64"),
            (relay, "siem", "fd00:2::1/64"),
            (siem, "eth", "fd00:2::2/64"),
        ):
            host.add_address(address, interface)
        relayed, original = sign_up(open_stack, relay, opened, siem)
        original6 = opened.enter_context(Collector(siem, "fd00:2::2", 9502))
        register(relay, "fd00:2::2", 9502, "original6")
        forger = opened.enter_context(forging(field))
        true = {"10.1.0.1": "10.1.0.2", "fd00:1::1": "fd00:1::2"}
        for address, sources in MADE_UP.items():
            for source in (*sources, true[address]):
                forger.send((source, 514), (address, 6667), source.encode())
        for collector, address in ((original, "10.1.0.1"), (original6, "fd00:1::1")):
            (copy,) = collector.read(1)
            assert (copy.source, copy.payload) == (true[address], true[address].encode())
        account = accounts_of(open_stack, relay)
        came = {each.payload.decode() for each in relayed.read(account["relayed"]["sent"])}
        assert came - set(true.values()) <= {"240.0.0.1", "0.1.2.3", "10.1.0.1", "::"}
        assert {"240.0.0.1", *true.values()} <= came
        for name, family in (("original", "."), ("original6", ":")):
            counts = account[name]
            assert counts["offered"] == account["relayed"]["offered"] == len(came)
            assert counts["sent"] == 1
            assert counts.get("dropped_source_refused", 0) == sum(family in source for source in came) - 1
        for collector in (relayed, original, original6):
            collector.assert_quiet(0.1)


def accounts_of(open_stack: OpenStack, relay: Host) -> dict[str, dict[str, int]]:
    """The accounts of all collectors."""
    with relay.entered():
        services = reports(open_stack)
    accounts = services["forwarder.1"] | services["transmitter.1"]
    return {name.removeprefix("collector/"): account for name, account in accounts.items() if "collector/" in name}
