from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from services.broker.proxy import Proxy
from shared.bus.messages import offload_topic
from tests.builders import (
    BusEnds,
    PlayedGateway,
    PlayedOffload,
    PlayedWorker,
    accounts_when,
    flow,
    kill_all,
    wait_unwanted,
)
from tests.services.forwarder.test_service import Collector
from tests.stack import Stack, wait_until


class Site:
    """A forwarder with two collectors of all datagrams; gateway, worker and offload are played by the test."""

    def __init__(self, stack: Stack, bus: BusEnds, opened: ExitStack) -> None:
        self.stack, self.bus = stack, bus
        self.gateway, self.worker, self.offload = PlayedGateway(bus), PlayedWorker(bus), PlayedOffload(bus)
        self.one, self.other = (opened.enter_context(Collector(name)) for name in ("a", "b"))

    def flow(self) -> None:
        """Let both be served."""
        flow(self.gateway, self.worker, 1, self.one.client, self.other.client)


@pytest.fixture
def site(stack: Stack) -> Iterator[Site]:
    """A site whose broker is in this process."""
    with Proxy(stack.bus, 256), ExitStack() as opened:
        stack.start("forwarder")
        with BusEnds(stack.bus) as bus:
            yield Site(stack, bus, opened)
        kill_all(stack)


def test_what_the_kernel_has_copied_is_not_sent_again(site: Site) -> None:
    """A collector gets from us what has no mark, or that of rules that do not serve it; the rest is by the kernel."""
    site.flow()
    site.offload.wait_known(site.offload.tell(3, site.one.client))
    for number, generation in enumerate((0, 3, 3, 0, 3)):
        site.worker.publish([b"%d" % number] * 3, generation=generation)
    assert site.other.take(15) == [b"%d" % number for number in range(5) for _ in range(3)]
    assert site.one.take(6) == [b"0"] * 3 + [b"3"] * 3
    accounts = accounts_when(site.bus, "forwarder.1", lambda told: told["collector/a"].get("by_kernel") == 9)
    assert accounts["collector/a"]["sent"] == 6
    assert accounts["collector/b"].get("by_kernel", 0) == 0
    assert not site.one.waiting()


def test_answer_to_offload_waits_for_the_registry(site: Site) -> None:
    """No rules go in before the sender knows each collector of theirs: its account has all that the kernel copies."""
    flow(site.gateway, site.worker, 1, site.one.client)
    boot = site.gateway.publisher.boot
    later = site.offload.tell(3, site.one.client, site.other.client, registry=boot, revision=2)
    site.offload.wait_known(site.offload.tell(4, site.one.client, registry=boot, revision=1))
    site.gateway.change(2, [site.other.client])
    site.offload.wait_known(later)
    site.worker.publish([b"x"] * 5, generation=3)
    accounts = accounts_when(site.bus, "forwarder.1", lambda told: told["collector/a"].get("by_kernel") == 5)
    assert accounts["collector/b"]["by_kernel"] == accounts["collector/b"]["expected"] == 5


def test_forwarder_waits_to_be_told_of_rules(site: Site) -> None:
    """Datagrams that were copied by rules that it has not heard of are not sent before it has; if never, not at all."""
    site.flow()
    site.worker.publish([b"copied"] * 2, generation=9)
    site.worker.publish([b"not copied"])
    site.worker.report()
    site.offload.wait_known(site.offload.tell(9, site.one.client))
    assert site.other.take(3) == [b"copied"] * 2 + [b"not copied"]
    assert site.one.take(1) == [b"not copied"]
    site.worker.publish([b"never told"] * 4, generation=10)
    site.worker.publish([b"behind"])
    assert (site.one.take(1), site.other.take(1)) == ([b"behind"], [b"behind"])
    accounts = accounts_when(site.bus, "forwarder.1", lambda told: told["collector/b"].get("dropped_unplanned") == 4)
    assert accounts["collector/a"]["by_kernel"] == 2
    assert accounts["collector/a"]["dropped_unplanned"] == 4
    forwarder = site.stack["forwarder"]
    wait_until(lambda: "rules that offload has not told of" in forwarder.text, "it says so in its log")


def test_successor_of_a_forwarder_counts_on(site: Site) -> None:
    """Counts of the kernel's copies outlive a process that is killed, and the accounts add up after it."""
    site.flow()
    site.offload.wait_known(site.offload.tell(3, site.one.client))
    site.worker.publish([b"x"] * 7, generation=3)
    assert len(site.other.take(7)) == 7
    accounts_when(site.bus, "forwarder.1", lambda told: told["collector/a"].get("by_kernel") == 7)
    site.stack["forwarder"].process.kill()
    site.stack["forwarder"].process.wait()
    wait_unwanted(site.offload.publisher, offload_topic("relay"))
    site.stack.start("forwarder", ready=False)
    site.offload.wait_known(site.offload.tell(3, site.one.client))
    site.flow()
    site.worker.publish([b"y"] * 2, generation=3)
    assert site.other.take(2) == [b"y"] * 2
    accounts = accounts_when(site.bus, "forwarder.1", lambda told: told["collector/a"].get("by_kernel") == 9)
    assert accounts["collector/a"]["expected"] == 9
