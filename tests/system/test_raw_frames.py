"""Raw frames: byte for byte on the wire, and nothing that the settings do not allow, whoever asks."""

import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Final

from shared.bus.messages import TRANSMIT_TOPIC, TransmitReply, TransmitRequest
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber
from tests.builders import BusEnds, take, wait_wanted
from tests.capabilities import ambient
from tests.capture import Capture
from tests.documents import block
from tests.network import End, Host, veth
from tests.openly import OpenStack
from tests.stack import Running, ask_json, wait_until
from tests.system.test_fan_out import need

SETTINGS = '[gateway]\nallow_transmit = true\n[transmitter]\ninterfaces = ["wire"]\nethertypes = [0x0801, "0x0842"]\n'
ADDRESS = "01:02:03:04:05:06"
PAYLOAD = "[" * 30 + "PAYLOAD" + "]" * 30
DOCUMENTED = bytes.fromhex(ADDRESS.replace(":", "")) * 2 + b"\x08\x01" + PAYLOAD.encode() + bytes.fromhex("1a2b3c4d")
"""The frame of the documented program."""


@contextmanager
def wired(open_stack: OpenStack, settings: str = SETTINGS) -> Iterator[tuple[Host, Host]]:
    """A host with the stack and its transmitter, and another at the other end of interface `wire`."""
    open_stack.configure(settings)
    with Host() as relay, Host() as peer, veth(End(relay, "wire"), End(peer, "far")):
        with relay.entered():
            for name in ("broker", "gateway", "transmitter"):
                open_stack.start(name)
        yield relay, peer


@contextmanager
def tcpdump(open_stack: OpenStack, host: Host) -> Iterator[Running]:
    """Yield the frames that come in at a host's `far`, printed with every byte."""
    with host.entered(), ambient():
        command = f"{need('tcpdump')} -Z root -l -nn -xx -i far ether proto 0x0801".split()
        running = open_stack.spawn("tcpdump", command)
    running.wait_for("listening on")
    yield running


def dumped(text: str) -> bytes:
    """The bytes of the one frame that tcpdump printed."""
    lines = [line.split(":", 1)[1] for line in text.splitlines() if line.startswith("\t0x")]
    return bytes.fromhex("".join(lines))


def fanwire(open_stack: OpenStack, host: Host, *arguments: str) -> tuple[int, str]:
    """Run an operator command on a host; return its exit code and what it said."""
    with host.entered():
        running = open_stack.operator(*arguments)
    return running.process.wait(60), running.text


SHOWN = block("services/transmitter/README.md", "frame").replace("\\\n", "")
DOCUMENTED_ARGUMENTS = shlex.split(SHOWN.replace("eth1", "wire"))[1:]


def test_documented_frame_is_on_the_wire_byte_for_byte(open_stack: OpenStack) -> None:
    """`tcpdump -xx` at the far end shows the documented frame, sent by `fanwire frame` and by the JSON protocol."""
    with wired(open_stack) as (relay, peer):
        with tcpdump(open_stack, peer) as seen:
            assert fanwire(open_stack, relay, *DOCUMENTED_ARGUMENTS) == (0, "1 frame sent on wire\n")
            wait_until(lambda: len(dumped(seen.text)) >= len(DOCUMENTED), "tcpdump prints the frame")
            assert dumped(seen.text) == DOCUMENTED
            seen.stop()
        with tcpdump(open_stack, peer) as seen, relay.entered():
            request = {"op": "transmit", "interface": "wire", "frame": DOCUMENTED.hex()}
            assert ask_json(request) == {"ok": True, "sent": 1}
            wait_until(lambda: len(dumped(seen.text)) >= len(DOCUMENTED), "tcpdump prints the frame")
            assert dumped(seen.text) == DOCUMENTED
            seen.stop()


def test_counted_and_paced_frames_all_leave(open_stack: OpenStack) -> None:
    """The requested number of frames leaves, at once and at a pace, and the answer says how many."""
    with wired(open_stack) as (relay, peer), Capture(peer, "far") as wire:
        paced = fanwire(open_stack, relay, *DOCUMENTED_ARGUMENTS, "--count", "20", "--per-second", "100")
        assert paced == (0, "20 frames sent on wire\n")
        many = fanwire(open_stack, relay, *DOCUMENTED_ARGUMENTS, "--count", "5000")
        assert many == (0, "5000 frames sent on wire\n")
        # On a busy machine the far end's processor may have no room (net.core.netdev_max_backlog): the wire counts it.
        lost = int(relay.link("wire")["stats64"]["tx"]["dropped"])
        assert sum(protocol == 0x0801 for protocol, *_ in wire.frames()) == 5020 - lost


def test_wake_on_lan_frame(open_stack: OpenStack) -> None:
    """`fanwire wake` broadcasts six times ff and sixteen times the address, from the interface's own."""
    with wired(open_stack) as (relay, peer), Capture(peer, "far") as wire:
        assert fanwire(open_stack, relay, "wake", "02:00:00:00:00:07", "--interface", "wire")[0] == 0
        ((_, payload, macs, *_),) = (frame for frame in wire.frames() if frame[0] == 0x0842)
        assert payload == b"\xff" * 6 + bytes.fromhex("020000000007") * 16
        assert macs == (relay.link("wire")["address"], "ff:ff:ff:ff:ff:ff")


class Stranger:
    """Somebody on the bus who asks the transmitter directly."""

    def __init__(self, bus: BusEnds) -> None:
        self._publisher: Publisher = bus.publisher("stranger.1")
        self._requests = Requests("stranger.1", self._publisher.boot)
        self._replies: Subscriber = bus.subscriber(self._requests.topic)
        wait_wanted(self._publisher, TRANSMIT_TOPIC)
        wait_wanted(self._publisher, self._requests.topic)  # our own, come back by the broker

    def ask(self, interface: str, frame: bytes, **fields: object) -> TransmitReply:
        """Ask for a frame and return the answer."""
        number = self._requests.open(60, lambda _: None)
        request = TransmitRequest(number, self._requests.topic, interface, frame, **fields)  # type: ignore[arg-type]
        self._publisher.publish(TRANSMIT_TOPIC, request)
        body = take(self._replies).body
        assert isinstance(body, TransmitReply)
        assert body.id == number
        return body


HEADER = bytes(12)


REFUSED: Final[tuple[tuple[str, bytes, dict[str, object], str, str], ...]] = (
    ("lo", HEADER + b"\x08\x01", {}, "not_permitted", "interfaces"),
    ("wire", HEADER + b"\x08\x00", {}, "not_permitted", "ethertype 0x0800"),
    ("gone", HEADER + b"\x08\x01", {}, "bad_request", "no such interface"),
    ("wire", HEADER + b"\x08", {}, "bad_request", "at least 14 bytes, this one 13"),
    ("wire", HEADER + b"\x08\x01" + bytes(1501), {}, "bad_request", "at most 1514 bytes"),
    ("wire", HEADER + b"\x08\x01abcd", {"own_fcs": True}, "bad_request", "driver"),
    ("wire", HEADER + b"\x08\x01ab", {"own_fcs": True}, "bad_request", "at least 14 bytes, this one 12"),
)


def test_what_the_policy_or_the_link_does_not_allow_is_refused(open_stack: OpenStack) -> None:
    """Asked straight over the bus, the transmitter itself refuses, says why, counts it, and nothing leaves."""
    settings = SETTINGS.replace('["wire"]', '["wire", "gone"]')
    with wired(open_stack, settings) as (_, peer), Capture(peer, "far") as wire, BusEnds(open_stack.bus) as bus:
        stranger = Stranger(bus)
        for interface, frame, fields, error, said in REFUSED:
            answer = stranger.ask(interface, frame, **fields)
            assert (answer.sent, answer.error) == (0, error), (interface, frame, fields)
            assert said in answer.message
            assert stranger.ask("wire", DOCUMENTED).sent == 1
            assert [protocol for protocol, *_ in wire.frames() if protocol in (0, 0x0800, 0x0801)] == [0x0801]


def test_interface_that_is_down_or_comes_back_is_told(open_stack: OpenStack) -> None:
    """While an interface is down the answer is `unavailable`; as soon as it is up again frames leave."""
    with wired(open_stack) as (relay, peer), BusEnds(open_stack.bus) as bus, closing(Capture(peer, "far").sock):
        stranger = Stranger(bus)
        relay.run("ip", "link", "set", "dev", "wire", "down")
        wait_until(lambda: stranger.ask("wire", DOCUMENTED).error == "unavailable", "it is known to be down")
        relay.run("ip", "link", "set", "dev", "wire", "up")
        wait_until(lambda: stranger.ask("wire", DOCUMENTED).sent == 1, "it is known to be up")


def test_without_permission_nothing_is_sent(open_stack: OpenStack) -> None:
    """By default the gateway takes no frames, and the transmitter sends none on any interface."""
    with wired(open_stack, "") as (relay, peer), Capture(peer, "far") as wire:
        with relay.entered():
            refused = ask_json({"op": "transmit", "interface": "wire", "frame": DOCUMENTED.hex()})
        assert (refused["ok"], refused["error"]) == (False, "not_permitted")
        assert "allow_transmit" in refused["message"]
        code, said = fanwire(open_stack, relay, *DOCUMENTED_ARGUMENTS)
        assert code == 77
        assert "interfaces" in said
        assert not [protocol for protocol, *_ in wire.frames() if protocol == 0x0801]
