"""Collectors that catch up from the journal while the kernel still serves them: they get each datagram once."""

import pytest

from shared.ledger.equations import dropped
from tests.openly import OpenStack
from tests.stack import wait_until
from tests.system.offload_relay import relay
from tests.traffic import pause

pytestmark = pytest.mark.usefixtures("lab")
SINCE_SECONDS = 0.5


@pytest.mark.parametrize("source", ["relay", "original"])
def test_what_rules_have_copied_does_not_come_from_the_journal_again(open_stack: OpenStack, source: str) -> None:
    """The rules still serve a collector when it begins to catch up: from then on it gets each datagram once."""
    with relay(open_stack, source) as (site, exporting, came):
        site.register()
        exporting.start()
        again: list[range] = []
        for since in (SINCE_SECONDS, SINCE_SECONDS, SINCE_SECONDS, "left"):
            site.wait_for_rules()
            earlier = site.received()
            pause(SINCE_SECONDS)
            site.register(since=since)
            if since != "left":
                again.append(range(earlier, exporting.sent))
            site.wait_level()
        exporting.stop()
        sent = exporting.sent
        wait_until(lambda: len(came.came) == sent, lambda: f"{sent} come, not {len(came.came)}")
        most = {number: 1 + sum(number in asked for asked in again) for number in came.came}
        too_many = [number for number, count in came.came.items() if count > most[number]]
        assert not too_many, f"{len(too_many)} came too often, from {too_many[0]} on; asked for again: {again}"
        account = site.account(came.came.total())
        assert account["by_kernel"] > sent // 20
        assert dropped(account) == 0
        assert open_stack.run("ledger")[0] == 0
