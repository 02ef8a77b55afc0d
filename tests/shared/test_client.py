import msgspec
import pytest
from msgspec.structs import fields

from services.gateway.protocol.requests import Register
from services.gateway.render import EntryView
from shared.client import DEFAULT_TERMS, Client, CopyTerms, WrittenTerms
from shared.process.registry_client import Entry
from shared.settings.entries import Collector

TERMS = ("streams", "source", "prefixes", "sample", "group", "hop_limit", "dscp")


@pytest.mark.parametrize("kind", [Client, Collector, Register, EntryView, Entry])
def test_terms_have_one_default_everywhere(kind: type[CopyTerms]) -> None:
    """Every struct with the terms of a client has all of them, with the same defaults; only the bus says `prefixes`."""
    declared = {field.name: field for field in fields(kind)}
    for name in TERMS:
        if (kind, name) != (Collector, "streams"):  # a collector of the settings must name some
            assert declared[name].default == getattr(DEFAULT_TERMS, name)
        assert declared[name].encode_name == ("from" if name == "prefixes" and kind is not Client else name)


def test_terms_make_a_client() -> None:
    """The terms of one struct are the keyword arguments of another."""
    asked = WrittenTerms("siem", streams=("syslog",), prefixes=("10.0.0.0/8",), hop_limit=3)
    client = Client(**asked.terms, generation=7, address="192.0.2.1", port=9)
    assert client.terms == asked.terms
    assert client == Client("siem", 7, "192.0.2.1", 9, streams=("syslog",), prefixes=("10.0.0.0/8",), hop_limit=3)


def test_client_on_the_bus_is_what_it_was_in_version_1() -> None:
    """An entry is a map of its fields in this order, without those that have their defaults."""
    bare, full = Client("a", 1, "::1", 9), Client("a", 1, "::1", 9, sample=2, prefixes=("::/0",), streams=("*",))
    assert list(msgspec.to_builtins(bare)) == ["name", "generation", "address", "port"]
    assert list(msgspec.to_builtins(full)) == [*msgspec.to_builtins(bare), "streams", "prefixes", "sample"]
