from contextlib import closing

from services.offload.kernel_routes import AT_ONCE, KernelRoutes
from tests.network import End, Host, veth
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
        with closing(KernelRoutes()) as routes:
            found = routes.own_among(map(packed, [*others, *own]))
    assert found == {packed(address) for address in own}


def test_frames_are_those_by_which_the_kernel_sends_its_own_packets(lab: None) -> None:
    """Link and link addresses follow the routes, by the source too, also to a gateway that has an IPv6 address."""
    with Host() as relay, Host() as siem:
        ends = [End(relay, f"up{number}", f"10.{number}.0.1/24 fd0{number}::1/64") for number in (1, 2)]
        fars = [End(siem, f"far{number}", f"10.{number}.0.2/24 fd0{number}::2/64") for number in (1, 2)]
        with veth(ends[0], fars[0]), veth(ends[1], fars[1]), relay.entered(), closing(KernelRoutes()) as routes:
            relay.neighbour("fe80::77", fars[0].link_address, "up1")
            relay.neighbour("10.2.0.2", fars[1].link_address, "up2")
            for network in (["10.9.0.0/16", "via", "inet6"], ["fd09::/64", "via"]):
                relay.run("ip", "route", "add", *network, "fe80::77", "dev", "up1")
            relay.run("ip", "route", "add", "10.9.0.0/16", "via", "10.2.0.2", "table", "100")
            relay.run("ip", "rule", "add", "from", "10.2.0.1", "lookup", "100")
            relay.run("ip", "route", "add", "blackhole", "192.0.2.0/24")
            frames = [
                (
                    int(relay.link(end.name)["ifindex"]),
                    *(bytes.fromhex(each.link_address.replace(":", "")) for each in (far, end)),
                )
                for end, far in zip(ends, fars, strict=True)
            ]
            wanted = {
                ("10.9.0.1", ""): frames[0],
                ("10.9.0.1", "10.1.0.1"): frames[0],
                ("10.9.0.1", "10.2.0.1"): frames[1],
                ("fd09::1", ""): frames[0],
                ("10.1.0.77", ""): (frames[0][0], b"", frames[0][2]),
            }
            asked = [*wanted, ("192.0.2.1", ""), ("10.1.0.1", ""), ("10.9.0.1", "10.3.0.1")]
            pairs = {(packed(to), packed(source) if source else b""): (to, source) for to, source in asked}
            assert {pairs[pair]: frame for pair, frame in routes.frames_to(pairs).items()} == wanted
