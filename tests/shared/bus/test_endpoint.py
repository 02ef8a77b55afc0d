import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

from shared.bus.endpoint import DIRECT, PLACE, QUEUE_SHARE, queue_limit
from tests.stack import wait_until


def test_queue_of_the_bus_fits_its_share() -> None:
    """A queue holds as many messages as set, or as many of the largest as its share of the memory has room for."""
    assert queue_limit(256, QUEUE_SHARE * PLACE * 100) == 100
    assert queue_limit(256, QUEUE_SHARE * PLACE * 300) == 256
    assert queue_limit(256, 1) == 1


def test_without_a_ceiling_the_setting_holds() -> None:
    """Nothing is dropped where no ceiling is set."""
    assert queue_limit(256, 0) == 256


def test_broker_that_stands_still_is_up_and_is_not_waited_for(tmp_path: Path) -> None:
    """It accepts no connection any more, and the kernel has no room for another one: the answer comes all the same."""
    told: list[bool] = []
    with ExitStack() as opened:
        broker = opened.enter_context(socket.socket(socket.AF_UNIX))
        broker.bind(str(tmp_path / "subscribe"))
        assert not DIRECT.is_up(tmp_path)
        broker.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting = opened.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(tmp_path / "subscribe"))
        Thread(target=lambda: told.append(DIRECT.is_up(tmp_path)), daemon=True).start()
        wait_until(lambda: told, "an answer")
    assert told == [True]
