"""Names in JetStream: the stream of a site, and the subject of what one of its workers publishes. No I/O."""

import re
from typing import Final, NamedTuple

ROOT: Final = "fanwire"
DOT: Final = "%2E"
"""The form of a dot in a token: NATS parts tokens by dots, and names of fanwire's streams may have some."""
_FORM: Final = re.compile(ROOT + r"\.([A-Za-z0-9_-]{1,32})\.([A-Za-z0-9_%-]{1,190})\.([a-z]{1,32})-([0-9]{1,9})")


class Origin(NamedTuple):
    """The place that batches come from: a site, one of its streams, and a worker, as in `ingest.2`."""

    site: str
    stream: str
    worker: str


def kept_stream(site: str) -> str:
    """Return the name of the stream in which JetStream keeps what a site sends."""
    return f"{ROOT}-{site}"


def site_subjects(site: str) -> str:
    """Return the subjects of a site, all together."""
    return f"{ROOT}.{site}.>"


def stream_subjects(site: str, stream: str) -> str:
    """Return the subjects of one stream of a site, of all its workers together."""
    return f"{ROOT}.{site}.{stream.replace('.', DOT)}.*"


def unparse_subject(origin: Origin) -> str:
    """Return the subject on which an origin's batches are published; `parse_subject` is the way back.

    >>> unparse_subject(Origin("berlin", "flow.v9", "ingest.2"))
    'fanwire.berlin.flow%2Ev9.ingest-2'
    """
    return f"{ROOT}.{origin.site}.{origin.stream.replace('.', DOT)}.{origin.worker.replace('.', '-')}"


def parse_subject(subject: str) -> Origin:
    """Return the origin that a subject stands for. ValueError when it stands for none."""
    found = _FORM.fullmatch(subject)
    if found is None:
        raise ValueError("not one of fanwire's subjects")
    site, stream, service, number = found.groups()
    return Origin(site, stream.replace(DOT, "."), f"{service}.{number}")
