import random
import socket
from contextlib import ExitStack, closing

from tests.network import HERE, End, Host, veth
from tests.openly import OpenStack
from tests.services.uplink.nats import NatsServer
from tests.services.uplink.sites import Site, away, flows
from tests.stack import sign_up, wait_until

EXPORTER, LISTENER, SERVER = "10.3.0.2", "10.3.0.1", "10.4.0.1"
SIZES = (1, 100, 100, 100, 1464, 1464, 1473, 4000, 9001)


def test_copies_of_another_sites_exporters_keep_their_address(open_stack: OpenStack) -> None:
    """A collector elsewhere with `source = "original"` gets each datagram from the exporter's own address and port."""
    directory, more = open_stack.directory, "plain_beyond_loopback = true"
    listener = f'[[stream]]\nname = "flows"\nlisten = ["udp://{LISTENER}:2055"]\n'
    elsewhere = '[transmitter]\ninterfaces = ["siem"]\n'
    with ExitStack() as stack:
        field, relay, siem = (stack.enter_context(Host()) for _ in range(3))
        for one, other in (
            (End(HERE, "field", f"{LISTENER}/24"), End(field, "eth", f"{EXPORTER}/24")),
            (End(HERE, "relay", f"{SERVER}/24"), End(relay, "here", "10.4.0.2/24")),
            (End(relay, "siem", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")),
        ):
            stack.enter_context(veth(one, other))
        server = stack.enter_context(NatsServer(directory, host=SERVER))
        a = stack.enter_context(Site(directory / "a", "a", server, listener, f'send = ["flows"]\n{more}'))
        b = stack.enter_context(
            Site(directory / "b", "b", server, away("flows"), f'receive = ["a/flows"]\n{more}', elsewhere)
        )
        a.begin("broker", "ingest", "uplink")
        wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
        with relay.entered():
            b.begin()
            flows(b)
            b.start("transmitter")
            request = {"name": "siem", "streams": ["flows"], "source": "original", "address": "10.2.0.2", "port": 2055}
            sign_up(request, b.gateway)
        collector = stack.enter_context(closing(siem.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        collector.bind(("10.2.0.2", 2055))
        collector.settimeout(60)
        exporters = [stack.enter_context(closing(field.socket(socket.AF_INET, socket.SOCK_DGRAM))) for _ in range(3)]
        for exporter in exporters:
            exporter.bind((EXPORTER, 0))
        draw = random.Random(1)
        sent: dict[tuple[str, int], list[bytes]] = {}
        got: dict[tuple[str, int], list[bytes]] = {}
        for size in SIZES:
            for exporter in exporters:
                exporter.sendto(payload := draw.randbytes(size), (LISTENER, 2055))
                sent.setdefault(exporter.getsockname(), []).append(payload)
        for _ in range(len(SIZES) * len(exporters)):
            payload, source = collector.recvfrom(65_536)
            got.setdefault(source, []).append(payload)
        assert got == sent
