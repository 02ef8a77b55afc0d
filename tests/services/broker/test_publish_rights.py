import re
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.broker.publish_rights import refused_cause
from shared.bus.curve_keys import ROLES
from shared.bus.messages import KINDS, Envelope, MessageError, peek, topic_family
from tests.builders import make_envelope

OWN = {
    "broker": r"status/broker\.1/",
    "gateway": r"registry/|transmit/|serve/relay/|serve/original/|status/gateway\.1/",
    "ingest": r"(datagrams|templates|renewals)/[^/]+/|again/ingest\.1/[^/]+/|exporters/ingest\.1/|status/ingest\.1/",
    "forwarder": r"reply/[^/]+/|journal/|catchup/relay/|health/relay/|status/forwarder\.1/",
    "transmitter": r"reply/[^/]+/|journal/|catchup/original/|health/original/|status/transmitter\.1/",
    "offload": r"offload/relay/|offload/original/|offload/paths/|status/offload\.1/",
    "journal": r"replay/[^/]+/|status/journal\.1/",
    "console": r"status/console\.1/",
    "uplink": r"journal/|datagrams/[^/]+/|again/uplink\.1/[^/]+/|exporters/uplink\.1/|nodes/|status/uplink\.1/",
    "operator": r"transmit/",
}
"""Written out once more, as whole topics."""
TOPICS = (
    "datagrams/messages/",
    "templates/netflow/",
    "renewals/netflow/",
    "registry/",
    "transmit/",
    "serve/relay/",
    "serve/original/",
    "reply/gateway.1.5f/",
    "journal/",
    "catchup/relay/",
    "catchup/original/",
    "replay/forwarder.1.5f/",
    "health/relay/",
    "health/original/",
    "offload/relay/",
    "offload/original/",
    "offload/paths/",
    "nodes/",
    *(f"exporters/{role}.1/" for role in ROLES),
    *(f"status/{role}.1/" for role in ROLES),
)


def envelope_for(role: str, topic: str, number: int = 1) -> Envelope:
    """An envelope of a role, with a kind that is at topic_family on the topic where there is one."""
    kind = next((kind for kind in KINDS if topic.startswith(topic_family(kind))), topic.partition("/")[0])
    return make_envelope(sender=f"{role}.{number}", kind=kind)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("topic", TOPICS)
def test_each_role_has_its_own_topics(role: str, topic: str) -> None:
    """A role may publish its own topics, and none of another's."""
    allowed = re.fullmatch(OWN[role], topic) is not None
    assert refused_cause(role, topic, envelope_for(role, topic)) == ("" if allowed else "topic")


PIECES = st.sampled_from([*TOPICS, *(topic[:-1] for topic in TOPICS), "/", "//", "X", ".", "..", "\0", "\n", " ", ""])


@given(st.sampled_from(ROLES), st.lists(PIECES | st.text(max_size=4), max_size=4).map("".join))
@example("ingest", "datagramsX/")
@example("ingest", "again/ingest.1/forwarder.1/")
@example("ingest", "again/ingest.2/forwarder.1/")
@example("ingest", "datagrams//")
@example("ingest", "datagrams/")
@example("ingest", "datagrams/a/../registry/")
@example("ingest", "status/ingest.10/")
@example("forwarder", "reply//registry/")
@example("gateway", "registry/\n")
@example("operator", "")
def test_no_prefix_trick_lends_a_right(role: str, topic: str) -> None:
    """Of all topics only whole topics of the role's own pass."""
    assert (refused_cause(role, topic, envelope_for(role, topic)) == "") == (re.fullmatch(OWN[role], topic) is not None)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("other", ROLES)
def test_nobody_speaks_in_anothers_name(role: str, other: str) -> None:
    """A message that names another service as its sender is refused on every topic."""
    for topic in TOPICS:
        if role != other:
            assert refused_cause(role, topic, envelope_for(other, topic)) == "sender"


def test_no_status_is_anothers() -> None:
    """A worker reports under its own number alone."""
    assert refused_cause("ingest", "status/ingest.2/", envelope_for("ingest", "status/ingest.2/", 2)) == ""
    assert refused_cause("ingest", "status/ingest.2/", envelope_for("ingest", "status/ingest.2/", 12)) == "topic"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "status"])
def test_no_kind_travels_on_anothers_topic(kind: str) -> None:
    """On a topic of its own a role may not publish what is taken for another's, such as a registry as a status."""
    envelope = make_envelope(sender="ingest.1", kind=kind)
    assert refused_cause("ingest", "status/ingest.1/", envelope) == "topic"
    assert refused_cause("ingest", "datagrams/messages/", envelope) == ("" if kind == "datagrams" else "topic")


@pytest.mark.parametrize("role", ["", "None", "stranger", "Ingest"])
def test_unknown_role_has_no_rights(role: str) -> None:
    """A message without a known role may not be published."""
    for topic in TOPICS:
        for sender in (*ROLES, "stranger"):
            assert refused_cause(role, topic, envelope_for(sender, topic))


@given(st.lists(st.binary(max_size=600), max_size=7))
@example([b"\xff/", b"\x96\x01\xa9datagrams\xa8ingest.1\x01\x00\x00", b""])
@example([b"a/", b"\x91" * 500, b""])
def test_arbitrary_parts_raise_nothing_else(parts: list[bytes]) -> None:
    """All parts have a topic and an envelope, or are refused as malformed."""
    with suppress(MessageError):
        topic, envelope = peek(parts)
        assert refused_cause("ingest", topic, envelope) in ("", "topic", "sender")
