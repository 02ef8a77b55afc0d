import pytest

from shared.net.connection_shares import AF_UNIX, KEPT, is_this_host, limit_of, origin_of


@pytest.mark.parametrize(
    ("address", "origin", "here"),
    [
        ("", AF_UNIX, True),
        ("127.9.8.7", "127.9.8.7", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("192.0.2.1", "192.0.2.1", False),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64", False),
        ("fe80::1%eth0", "fe80::/64", False),
        ("::2", "::/64", False),
    ],
)
def test_origin(address: str, origin: str, here: bool) -> None:
    """Limits are those of an IPv4 address or of 64 bits of IPv6, and this host's origins are known as such."""
    assert (origin_of(address), is_this_host(origin)) == (origin, here)


def test_the_last_are_for_who_has_none() -> None:
    """An address that has taken all its share leaves room for others that have none, and then for this host."""
    limit, open_now = 10 * KEPT, 0
    while open_now < limit_of("192.0.2.1", limit, first=not open_now):
        open_now += 1
    assert open_now == 8 * 10 - 20
    others = 0
    while open_now + others < limit_of(f"198.51.100.{others}", limit, first=True):
        others += 1
    assert others == 10
    assert limit_of("127.0.0.1", limit, first=False) - open_now - others == 10
