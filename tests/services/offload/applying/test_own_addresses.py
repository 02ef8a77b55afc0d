from contextlib import closing

from services.offload.applying.own_addresses import AT_ONCE, OwnAddresses
from tests.network import Host
from tests.services.offload.site import packed


def test_own_addresses_are_those_that_the_kernel_takes_in(lab: None) -> None:
    """Each of many addresses is judged by its route, though a socket could be bound to any of them."""
    own = ["127.0.0.1", "::1", "10.2.0.1", "fd00:2::1"]
    others = ["0.0.0.0", "::", "10.2.0.2", "fd00:2::2", "192.0.2.1", *(f"10.3.0.{n}" for n in range(2 * AT_ONCE))]
    with Host() as host, host.entered():
        for address in ("10.2.0.1/32", "fd00:2::1/128"):
            host.add_address(address, "lo")
        host.run("ip", "route", "add", "blackhole", "192.0.2.0/24")
        for version in (4, 6):
            host.sysctl(f"net.ipv{version}.ip_nonlocal_bind", 1)
        with closing(OwnAddresses()) as addresses:
            found = addresses.among(map(packed, [*others, *own]))
    assert found == {packed(address) for address in own}
