import pytest

from services.gateway.admission.host_addresses import choose_address
from shared.client import Source
from shared.settings.entries import Collector, Stream
from shared.settings.model import Settings

FOUND = ("2001:db8::9", "192.0.2.9", "192.0.2.10")


def chosen(
    found: tuple[str, ...] = FOUND,
    present: str = "",
    source: Source = "relay",
    listen: str = "udp://0.0.0.0:514",
    prefixes: tuple[str, ...] = (),
) -> str:
    """Return the address of a collector of one stream."""
    collector = Collector("siem", ("syslog",), "siem.example.net", 9, source=source, prefixes=prefixes)
    other = Stream(name="other", listen=("udp://0.0.0.0:2055",))
    settings = Settings(streams=(Stream(name="syslog", listen=(listen,)), other), collectors=(collector,))
    return choose_address(collector, found, present, settings)


def test_first_address_is_taken_and_kept() -> None:
    """It is the resolver's best; a name that has many in turns does not move the collector, nor does silence."""
    assert chosen() == "2001:db8::9"
    assert chosen(present="192.0.2.10") == "192.0.2.10"
    assert chosen(present="192.0.2.11") == "2001:db8::9"
    assert chosen(found=(), present="192.0.2.11") == "192.0.2.11"
    assert chosen(found=()) == ""


@pytest.mark.parametrize(
    ("listen", "prefixes", "expected"),
    [
        ("udp://0.0.0.0:514", (), "192.0.2.9"),
        ("udp://[::]:514", (), "192.0.2.9"),
        ("udp://[::]:514", ("2001:db8::/32",), "2001:db8::9"),
        ("udp://[2001:db8::1]:514", (), "2001:db8::9"),
        ("udp://[2001:db8::1]:514", ("10.0.0.0/8",), "192.0.2.9"),
        ("unixgram:///run/log.sock", (), "192.0.2.9"),
    ],
)
def test_source_preserving_copies_get_the_exporters_family(
    listen: str, prefixes: tuple[str, ...], expected: str
) -> None:
    """It is that of the collector's prefixes, else of its streams' listeners; IPv4 where both may come."""
    assert chosen(source="original", listen=listen, prefixes=prefixes) == expected
    with pytest.raises(ValueError, match="address, and with source"):
        chosen(
            found=tuple(each for each in FOUND if (":" in each) != (":" in expected)),
            source="original",
            listen=listen,
            prefixes=prefixes,
        )
