import errno

import pytest
from structlog.testing import capture_logs

from shared.fanout.sending.gso_fallback import GsoFallback
from shared.fanout.sending.send_errors import RAW_CAUSES, RELAY_CAUSES, SaidErrors, cause_of


@pytest.mark.parametrize(
    ("error", "relay", "raw"),
    [
        (errno.EAGAIN, "dropped_buffer_full", "dropped_buffer_full"),
        (errno.ENOBUFS, "dropped_buffer_full", "dropped_queue_full"),
        (errno.ECONNREFUSED, "dropped_refused", "dropped_econnrefused"),
        (errno.EHOSTUNREACH, "dropped_not_connected", "dropped_no_route"),
        (errno.EACCES, "dropped_not_connected", "dropped_no_route"),
        (errno.ENETDOWN, "dropped_not_connected", "dropped_interface_down"),
        (errno.EPERM, "dropped_eperm", "dropped_eperm"),
        (4095, "dropped_4095", "dropped_4095"),
    ],
)
def test_every_errno_has_a_cause(error: int, relay: str, raw: str) -> None:
    """An errno that a sender knows is counted under what it means, any other under its own name."""
    assert (cause_of(error, RELAY_CAUSES), cause_of(error, RAW_CAUSES)) == (relay, raw)


def test_each_errno_is_said_once() -> None:
    """An error of a collector's copies is logged the first time, with the collector and the errno's name."""
    said = SaidErrors("siem")
    with capture_logs() as logs:
        for error in (errno.EPERM, errno.EACCES, errno.EPERM, 4095):
            said.say("copies fail", error)
    assert [(line["collector"], line["errno"]) for line in logs] == [
        ("siem", "EPERM"),
        ("siem", "EACCES"),
        ("siem", "4095"),
    ]


def test_runs_are_given_up_until_they_are_tried_again() -> None:
    """A refused run ends segmentation until it is tried again; other errors don't; where not offered it never is."""
    gso, never = GsoFallback(offered=True), GsoFallback(offered=False)
    assert (gso.refused_by(errno.EPERM), gso.usable) == (False, True)
    assert (gso.refused_by(errno.EMSGSIZE), gso.usable) == (True, False)
    gso.try_again()
    never.try_again()
    assert (gso.usable, never.usable) == (True, False)
