import pytest

from tests.builders import BusEnds
from tests.network import HERE, End, Host, veth
from tests.services.operator.played import PlayedTransmitter, finish, run
from tests.stack import Stack

SLEEPER = "00:11:22:33:44:55"
SLEEPER_BYTES = bytes.fromhex("001122334455")


@pytest.mark.parametrize("password", ["", "a1-a2-a3-a4-a5-a6"])
def test_the_magic_frame(stack: Stack, password: str) -> None:
    """It goes to everybody from the interface's own address: six times ff, sixteen times the MAC, and the password."""
    stack.start("broker")
    options = ("--password", password) if password else ()
    with (
        Host() as far,
        veth(End(HERE, "wol0", mac="02:00:00:00:00:07"), End(far, "wol1")),
        BusEnds(stack.bus) as bus,
    ):
        transmitter = PlayedTransmitter(bus)
        command = stack.operator("wake", SLEEPER, "--interface", "wol0", *options)
        request = transmitter.take()
        transmitter.answer(request, 1)
        assert finish(command) == (0, "1 frame sent on wol0\n")
    header = bytes.fromhex("ffffffffffff 020000000007 0842")
    assert request.frame == header + b"\xff" * 6 + SLEEPER_BYTES * 16 + bytes.fromhex(password.replace("-", ""))
    assert (request.interface, request.count) == ("wol0", 1)


@pytest.mark.parametrize(("name", "reason"), [("nosuch0", "No such device"), ("lo", "not Ethernet")])
def test_an_interface_that_has_no_address(stack: Stack, name: str, reason: str) -> None:
    """One that is not there, or is not Ethernet, is one line and 1."""
    code, text = run(stack, "wake", SLEEPER, "--interface", name)
    assert (code, text.count("\n")) == (1, 1)
    assert text.startswith(f"fanwire wake: interface {name}")
    assert reason in text


@pytest.mark.parametrize("arguments", [("00:11:22:33:44",), (SLEEPER,), (SLEEPER, "--interface", "")])
def test_wrong_usage_is_64(stack: Stack, arguments: tuple[str, ...]) -> None:
    """An argument that is no MAC, or no interface, ends with 64."""
    assert run(stack, "wake", *arguments)[0] == 64
