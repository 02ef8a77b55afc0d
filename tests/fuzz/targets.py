"""Targets that take bytes from outside, a function each: any bytes are accepted, or refused as the docs say.

Anything else that is raised is a finding.
"""

from collections.abc import Callable
from typing import Final

from tests.fuzz.arriving import ipfix, netflow, sflow, tcp_messages, templates
from tests.fuzz.files import capture, environment, keys, pmacct, samplicator, settings, tokens
from tests.fuzz.messages import bus_message, netlink, reports
from tests.fuzz.registry import answers, json_lines, names, registry_file

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        *(answers, bus_message, capture, environment, ipfix, json_lines, keys, names, netflow, netlink),
        *(pmacct, registry_file, reports, samplicator, settings, sflow, tcp_messages, templates, tokens),
    )
}
