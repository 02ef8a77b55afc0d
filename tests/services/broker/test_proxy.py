import signal

from tests.stack import Stack


def test_second_broker_on_the_same_directory_is_refused(stack: Stack) -> None:
    """A second broker exits with 73 and says what to do, and the first one keeps its endpoints."""
    first = stack.start("broker")
    second = stack.start("broker", ready=False)
    assert second.process.wait(10) == 73
    assert "another broker runs on" in second.text
    assert first.process.poll() is None
    assert (stack.bus / "publish").is_socket()


def test_broker_leaves_nothing_behind(stack: Stack) -> None:
    """SIGTERM ends it with 0 and takes its socket files away; its directory is for its owner alone."""
    broker = stack.start("broker")
    assert stack.bus.stat().st_mode & 0o777 == 0o700
    assert broker.stop(signal.SIGTERM) == 0
    assert [path.name for path in stack.bus.iterdir()] == ["lock"]


def test_broker_starts_again_after_being_killed(stack: Stack) -> None:
    """Socket files that a killed broker left do not keep the next one from starting."""
    stack.start("broker").stop(signal.SIGKILL)
    assert (stack.bus / "publish").is_socket()
    stack.start("broker")


def test_directory_that_cannot_be_made_is_one_line(stack: Stack) -> None:
    """A bus directory that can't be had ends the broker with 73 and one line that names it."""
    stack.bus.write_text("in the way")
    broker = stack.start("broker", ready=False)
    assert broker.process.wait(10) == 73
    assert len(broker.text.splitlines()) == 1
    assert str(stack.bus) in broker.text
