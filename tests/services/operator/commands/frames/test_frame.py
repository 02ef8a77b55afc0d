from pathlib import Path

import pytest

from services.operator.client.raw_frames import wait_for_transmitter
from shared.bus.messages import TransmitRequest
from shared.process.lifecycle import OperatorError
from tests.builders import BusEnds
from tests.services.operator.played import PlayedTransmitter, finish, run
from tests.stack import Stack, wait_until

MAC = "01:02:03:04:05:06"
PARTS = ("--destination", MAC, "--source", MAC, "--ethertype", "0x0801")
FRAME = ("frame", "eth1", *PARTS)
PAYLOAD = "[" * 30 + "PAYLOAD" + "]" * 30
HEADER = bytes.fromhex("010203040506 010203040506 0801")


def sent_by(stack: Stack, *arguments: str) -> tuple[TransmitRequest, int, str]:
    """Return the requests of a command to the transmitter, and its exit once all frames are said to have left."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        transmitter = PlayedTransmitter(bus)
        command = stack.operator(*arguments)
        request = transmitter.take()
        transmitter.answer(request, request.count)
        return request, *finish(command)


def test_the_documented_frame_goes_out_byte_for_byte(stack: Stack) -> None:
    """Destination, source, ethertype, payload and checksum follow each other, and nothing else is there."""
    request, code, text = sent_by(stack, *FRAME, "--payload", PAYLOAD, "--checksum", "1a2b3c4d")
    assert request.frame == HEADER + PAYLOAD.encode() + b"\x1a\x2b\x3c\x4d"
    assert (request.interface, request.count, request.per_second, request.own_fcs) == ("eth1", 1, 0.0, False)
    assert (code, text) == (0, "1 frame sent on eth1\n")


def test_pace_count_and_check_sequence_are_passed_on(stack: Stack) -> None:
    """The options besides the frame go along, and the answer counts."""
    options = ("--count", "3", "--per-second", "50.5", "--own-fcs", "--checksum", "0x1A2B3C4D")
    request, code, text = sent_by(stack, *FRAME, "--payload-hex", "00 ff", *options)
    assert request.frame == HEADER + b"\0\xff\x1a\x2b\x3c\x4d"
    assert (request.count, request.per_second, request.own_fcs) == (3, 50.5, True)
    assert (code, text) == (0, "3 frames sent on eth1\n")


def test_payload_from_a_file(stack: Stack, tmp_path: Path) -> None:
    """`@FILE` stands for the bytes of the file."""
    file = tmp_path / "payload"
    file.write_bytes(bytes(range(256)))
    assert sent_by(stack, *FRAME, "--payload", f"@{file}")[0].frame == HEADER + bytes(range(256))


def test_payload_as_it_was_typed(stack: Stack) -> None:
    """Text is sent as the bytes that were typed: UTF-8, or whatever else the terminal made of it."""
    request, _, _ = sent_by(stack, *FRAME, "--payload", "grüß @dich \udcff")
    assert request.frame == HEADER + "grüß @dich ".encode() + b"\xff"


@pytest.mark.parametrize(
    ("error", "exit_code"), [("not_permitted", 77), ("unavailable", 69), ("bad_request", 1), ("newer_word", 69)]
)
def test_a_refusal_is_its_message_and_an_exit_code(stack: Stack, error: str, exit_code: int) -> None:
    """A refusal of the transmitter ends with its sentence, and a code that tells whose fault it is."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        transmitter = PlayedTransmitter(bus)
        command = stack.operator(*FRAME, "--payload", "x")
        transmitter.answer(transmitter.take(), 0, error, "add eth1 to [transmitter] interfaces")
        assert finish(command) == (exit_code, "fanwire frame: add eth1 to [transmitter] interfaces\n")


def test_without_a_transmitter_nothing_is_asked(stack: Stack) -> None:
    """With a broker and no transmitter it ends with 69, and one line that says what to start."""
    stack.start("broker")
    code, text = run(stack, *FRAME, "--payload", "x")
    assert (code, text.count("\n")) == (69, 1)
    assert "say what it lacks" in text


def test_nothing_is_asked_before_an_answer_can_come(stack: Stack) -> None:
    """A transmitter alone is not enough: without our own subscription on the bus its answer would be lost."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        PlayedTransmitter(bus)
        publisher = bus.publisher("operator.1")
        with pytest.raises(OperatorError):
            wait_for_transmitter(publisher, "reply/operator.1.a/")
        bus.subscriber("reply/operator.1.a/")
        wait_for_transmitter(publisher, "reply/operator.1.a/")


def test_a_transmitter_that_does_not_answer(stack: Stack) -> None:
    """It waits for the time that the frames take and two seconds, and then says so and ends with 69."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        transmitter = PlayedTransmitter(bus)
        command = stack.operator(*FRAME, "--payload", "x", "--count", "3", "--per-second", "2")
        transmitter.take()
        with pytest.raises(AssertionError):
            wait_until(lambda: command.process.poll() is not None, "it gives up", 2.5)
        code, text = finish(command)
        assert (code, text.count("\n")) == (69, 1)
        assert "the transmitter did not answer" in text


def test_garbage_behind_the_answer_topic_is_passed_over(stack: Stack) -> None:
    """An answer to somebody else's request is not taken for ours."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        transmitter = PlayedTransmitter(bus)
        command = stack.operator(*FRAME, "--payload", "x")
        request = transmitter.take()
        transmitter.answer(TransmitRequest(request.id + 1, request.reply, "eth1", b""), 7)
        transmitter.answer(request, 1)
        assert finish(command) == (0, "1 frame sent on eth1\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("frame", "eth1", "--payload", "x"),
        (*FRAME,),
        (*FRAME, "--payload", "x", "--payload-hex", "00"),
        (*FRAME, "--payload-hex", "0"),
        (*FRAME, "--payload", "@/does/not/exist"),
        (*FRAME, "--payload", "@/dev/zero"),
        (*FRAME, "--payload", "x", "--checksum", "xy"),
        (*FRAME, "--payload", "x", "--own-fcs"),
        (*FRAME, "--payload", "x", "--count", "0"),
        (*FRAME, "--payload", "x", "--count", "1000001"),
        (*FRAME, "--payload", "x", "--per-second", "nan"),
        (*FRAME, "--payload", "x", "--per-second", "-1"),
        (*FRAME, "--payload", "x", "--source", "01:02:03:04:05"),
        (*FRAME, "--payload", "x", "--ethertype", "0x10000"),
        ("frame", "an interface too long", *PARTS, "--payload", "x"),
        ("frame", "\udcff", *PARTS, "--payload", "x"),
    ],
)
def test_wrong_usage_is_64(stack: Stack, arguments: tuple[str, ...]) -> None:
    """Arguments that make no frame end with 64 before anything is asked, and the line says what was expected."""
    code, text = run(stack, *arguments)
    assert code == 64
    assert "fanwire frame: " in text
    assert "Traceback" not in text
    assert "invalid" not in text  # argparse's word where a type says nothing itself
