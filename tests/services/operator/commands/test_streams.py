from dataclasses import replace

from services.operator.commands.streams import _rows
from shared.settings.entries import Stream
from shared.settings.model import Settings
from tests.services.operator.top.test_screen import picture


def test_streams_of_settings_and_of_the_bus() -> None:
    """Streams that run come first, with `unknown` where no worker tells; others that somebody has follow."""
    quiet = Stream(name="netflow", listen=("udp://0.0.0.0:2055", "udp://[::]:2055"), protocol="netflow")
    heard, settings = picture(), Settings(streams=(quiet,))
    assert list(_rows(heard, {"netflow": quiet}, settings)) == [
        ("netflow", "udp://0.0.0.0:2055, udp://[::]:2055", "netflow", *["unknown"] * 4, "nobody"),
        ("syslog", "no listener", None, 1, 4000, 12, 3, "c1, c2"),
    ]
    nobody_tells = picture(collectors=None, streams=())
    assert [row[-1] for row in _rows(nobody_tells, {"netflow": quiet}, settings)] == ["unknown"]


def test_takers_are_named_as_far_as_there_is_room() -> None:
    """Of many collectors the first are named, and the others counted."""
    (stream,) = picture().streams
    many = picture(streams=(replace(stream, takers=tuple(f"c{number}" for number in range(9))),))
    assert [row[-1] for row in _rows(many, {}, Settings()) if row[0] == "syslog"] == ["c0, c1, c2 and 6 more"]
