import signal
from collections.abc import Iterator

import pytest

from services.operator.checksum_offload import checksum_offload, switch_checksum_offload
from tests.builders import BusEnds
from tests.capabilities import NET_RAW, ambient
from tests.network import HERE, End, Host, veth
from tests.services.operator.played import PlayedTransmitter, finish
from tests.stack import Running, Stack

MAC = "01:02:03:04:05:06"
FRAME = ("--destination", MAC, "--source", MAC, "--ethertype", "0x0801", "--payload", "x", "--no-checksum-offload")
LONG = ("--count", "1000", "--per-second", "1")


@pytest.fixture
def interface(lab: None) -> Iterator[str]:
    """An interface with checksum offload."""
    with Host() as far, veth(End(HERE, "off0"), End(far, "off1"), checksum_offload=True):
        assert checksum_offload("off0")
        yield "off0"


@pytest.fixture
def transmitter(stack: Stack) -> Iterator[PlayedTransmitter]:
    """The transmitter that takes the requests."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        yield PlayedTransmitter(bus)


def privileged(stack: Stack, *arguments: str) -> Running:
    """Start the command with every capability that there is here."""
    with ambient():
        return stack.operator(*arguments)


@pytest.mark.parametrize(("error", "exit_code"), [("", 0), ("not_permitted", 77)])
def test_off_while_frames_are_sent(
    stack: Stack, interface: str, transmitter: PlayedTransmitter, error: str, exit_code: int
) -> None:
    """The offload is off by the time the transmitter is asked, and on when the command has ended, however it ended."""
    command = privileged(stack, "frame", interface, *FRAME)
    request = transmitter.take()
    assert not checksum_offload(interface)
    transmitter.answer(request, 1, error, "no")
    assert finish(command)[0] == exit_code
    assert checksum_offload(interface)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)]
)
def test_a_signal_puts_it_back(
    stack: Stack, interface: str, transmitter: PlayedTransmitter, number: signal.Signals, exit_code: int
) -> None:
    """A signal ends the command as it would any other, once the offload is on again; a second one changes nothing."""
    command = privileged(stack, "frame", interface, *FRAME, *LONG)
    transmitter.take()
    assert not checksum_offload(interface)
    command.process.send_signal(number)
    assert command.stop(number) == exit_code
    assert checksum_offload(interface)
    assert "Traceback" not in command.text


def test_what_was_off_stays_off(stack: Stack, interface: str, transmitter: PlayedTransmitter) -> None:
    """An interface that had no offload has none afterwards, and then it takes no privilege."""
    switch_checksum_offload(interface, on=False)
    with ambient(NET_RAW):
        command = stack.operator("frame", interface, *FRAME)
    transmitter.answer(transmitter.take(), 1)
    assert finish(command) == (0, f"1 frame sent on {interface}\n")
    assert not checksum_offload(interface)


def test_without_the_privilege(stack: Stack, interface: str) -> None:
    """Without CAP_NET_ADMIN it ends with 77 before anything else, and says how to do the same by hand."""
    with ambient(NET_RAW):
        command = stack.operator("frame", interface, *FRAME)
    code, text = finish(command)
    assert (code, text.count("\n")) == (77, 1)
    assert f"`sudo ethtool -K {interface} tx off`" in text
    assert checksum_offload(interface)


@pytest.mark.parametrize(("name", "reason"), [("nosuch0", "no such interface"), ("lo", "not supported")])
def test_an_interface_that_cannot_be_switched(stack: Stack, name: str, reason: str) -> None:
    """One that is not there, or always has it, is one line and 1."""
    code, text = finish(privileged(stack, "frame", name, *FRAME))
    assert (code, text.count("\n")) == (1, 1)
    assert f"checksum offload of {name}: " in text
    assert reason in text
