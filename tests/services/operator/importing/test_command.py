from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.operator.importing import pmacct, samplicator
from services.operator.importing.receivers import ForeignReceiver, Line, ParseLine, parse, parse_number, to_settings
from shared.settings.file import load, render
from shared.settings.model import DEFAULT_STREAM
from tests.stack import Stack

PARSERS = (samplicator.parse_line, pmacct.parse_line)
EVERYBODY = ("192.0.2.1", 2000)


class Known:
    """Names that are known without a resolver."""

    def address(self, host: str) -> str:
        known = {"collector.example": "192.0.2.7", "router.example": "10.1.2.3"}
        if host not in known and not set(host) <= set("0123456789abcdef.:"):
            raise LookupError(f"host {host!r} has no address: not known")
        return known.get(host, host)

    def receiver(self, host: str) -> str:
        return host

    def port(self, service: str) -> int:
        return 514 if service == "syslog" else parse_number(service, 1, 65_535, "port")


def lines_of(text: str, parse_line: ParseLine) -> list[Line]:
    """The lines of a file that say anything."""
    return [line for line in parse(text, parse_line, Known()) if line.receivers or line.left_out or line.notes]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  # a comment\n\n", []),
        ("10.0.0.0/255.0.0.0: 192.0.2.1", [ForeignReceiver("192.0.2.1", 2000, ("10.0.0.0/8",))]),
        ("10.0.0.0/8:192.0.2.1/9 # why", [ForeignReceiver("192.0.2.1", 9, ("10.0.0.0/8",))]),
        ("  10.1.2.3 : 192.0.2.1/9/10\r", [ForeignReceiver("192.0.2.1", 9, ("10.1.2.3/32",), 10)]),
        ("router.example: collector.example/syslog", [ForeignReceiver("collector.example", 514, ("10.1.2.3/32",))]),
        ("0.0.0.0/0: 192.0.2.1/9/10,3", [ForeignReceiver("192.0.2.1", 9, (), 10, 3)]),
        ("0.0.0.0: 192.0.2.1/9/,255", [ForeignReceiver("192.0.2.1", 9, (), 1, 255)]),
        (
            "[::]/0: [2001:db8::1]/9 2001:db8::2",
            [ForeignReceiver("2001:db8::1", 9), ForeignReceiver("2001:db8::2", 2000)],
        ),
        ("0.0.0.0/0: 192.0.2.1/7-9/2", [ForeignReceiver("192.0.2.1", port, (), 2) for port in (7, 8, 9)]),
        ("0.0.0.0/0: 192.0.2.1/7+2", [ForeignReceiver("192.0.2.1", port) for port in (7, 8)]),
    ],
)
def test_samplicator_line(text: str, expected: list[ForeignReceiver]) -> None:
    """Sources, masks, defaults, intervals, times to live and port ranges are read as samplicator reads them."""
    lines = lines_of(text, samplicator.parse_line)
    assert [receiver for line in lines for receiver in line.receivers] == expected
    assert not any(line.left_out for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1/8: 192.0.2.1", "10.0.0.1/8 matches no source"),
        ("10.0.0.1/0.0.0.0: 192.0.2.1", "10.0.0.1/0 matches no source"),
        ("10.0.0.1/255.0.0.255: 192.0.2.1", "the mask 255.0.0.255 is not a prefix's"),
    ],
)
def test_source_that_is_no_prefix_is_left_out(text: str, expected: str) -> None:
    """A rule that samplicator never applies, or that no prefix can say, has no collector and says why."""
    (line,) = lines_of(text, samplicator.parse_line)
    assert not line.receivers
    assert line.left_out[0].startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.0/8: [2001:db8::1]:8000", "[2001:db8::1]:8000: samplicator reads no port without a slash"),
        ("[2001:db8::]/32: 192.0.2.1", "samplicator compares an IPv6 source's first byte alone"),
        ("10.0.0.0/8:", "it names no receiver"),
    ],
)
def test_surprise_of_samplicator_is_told(text: str, expected: str) -> None:
    """An unexpected habit of samplicator is reported, and nothing is left out for it."""
    (line,) = lines_of(text, samplicator.parse_line)
    assert line.notes[0].startswith(expected)
    assert not line.left_out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("! id=1\n\n", []),
        ("id=1\tip=192.0.2.1:2100", [ForeignReceiver("192.0.2.1", 2100)]),
        ("ip='collector.example:syslog' id=1", [ForeignReceiver("collector.example", 514)]),
        ("id=1 ip='192.0.2.1:9, 192.0.2.2:9'", [ForeignReceiver("192.0.2.1", 9), ForeignReceiver("192.0.2.2", 9)]),
        ("id=3 ip=[2001:db8::1]:9,192.0.2.1:9", [ForeignReceiver("2001:db8::1", 9), ForeignReceiver("192.0.2.1", 9)]),
    ],
)
def test_pmacct_line(text: str, expected: list[ForeignReceiver]) -> None:
    """A pool's receivers are read in any order of keys."""
    lines = lines_of(text, pmacct.parse_line)
    assert [receiver for line in lines for receiver in line.receivers] == expected
    assert not any(line.left_out or line.shared for line in lines)


@pytest.mark.parametrize(
    ("keys", "shared", "receivers", "said"),
    [
        ("balance-alg=hash-agent", True, 2, "each exporter goes to one receiver"),
        ("balance-alg=hash-crc32", True, 2, "each exporter goes to one receiver"),
        ("balance-alg=unheard-of", False, 2, "pmacct ignores balance-alg=unheard-of"),
        ("balance-alg=rr", True, 2, "left out: pool 4: balance-alg=rr; receivers share by hash"),
        ("balance-alg=hash-tag", True, 2, "left out: pool 4: balance-alg=hash-tag; receivers share by hash"),
        ("src_port=9", False, 2, "left out: pool 4: src_port"),
        ("tag=100,-150", False, 0, "left out: pool 4: tag=100,-150; a pre_tag_map says"),
        ("kafka_broker=192.0.2.1:9092", False, 0, "left out: pool 4: kafka_broker; copies go out by UDP alone"),
        ("zmq_address=192.0.2.1:9", False, 0, "left out: pool 4: zmq_address; copies go out by UDP alone"),
        ("tags=1", False, 0, "left out: pool 4: 'tags' is not a known key"),
    ],
)
def test_pmacct_key(keys: str, shared: bool, receivers: int, said: str) -> None:
    """Hashing becomes a group; what can't be is left out by name, and with it the pool where that would be wrong."""
    (line,) = lines_of(f"id=4 ip=192.0.2.1:9,192.0.2.2:9 {keys}", pmacct.parse_line)
    assert (line.shared, len(line.receivers)) == (shared, receivers)
    assert said in "\n".join([*line.notes, *(f"left out: {text}" for text in line.left_out)])


@pytest.mark.parametrize(
    ("parse_line", "text", "expected"),
    [
        (samplicator.parse_line, "10.0.0.0/8 192.0.2.1", "expected SOURCE/MASK: RECEIVER/PORT"),
        (samplicator.parse_line, "10.0.0.0/33: 192.0.2.1", "prefix length: expected a whole number from 0 to 32"),
        (samplicator.parse_line, "10.0.0.0/255.0.0: 192.0.2.1", "255.0.0"),
        (samplicator.parse_line, "[2001:db8::/32: 192.0.2.1", "the bracket is not closed"),
        (samplicator.parse_line, "10.0.0.0/8: [::1/9", "the bracket is not closed"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/9/0", "interval: expected a whole number from 1"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/9/1,256", "TTL: expected a whole number from 1 to 255"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/9/1,", "TTL: expected a whole number from 1 to 255"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/0", "port: expected a whole number from 1 to 65535"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/9-8", "port range: expected a whole number from 9"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/65535+2", "port range: expected a whole number from 1 to 1"),
        (samplicator.parse_line, "10.0.0.0/8: 192.0.2.1/9+99999999999", "port range: "),
        (samplicator.parse_line, f"10.0.0.0/8: 192.0.2.1/7-{99999:025}", "port range: "),
        (pmacct.parse_line, "ip=192.0.2.1:9", "id: expected a whole number from 1"),
        (pmacct.parse_line, "id=0 ip=192.0.2.1:9", "id: expected a whole number from 1"),
        (pmacct.parse_line, "id=1", "expected ip=HOST:PORT"),
        (pmacct.parse_line, "id=1 ip=,", "ip: expected at least one HOST:PORT"),
        (pmacct.parse_line, "id=1 ip=192.0.2.1", "expected HOST:PORT"),
        (pmacct.parse_line, "id=1 ip=192.0.2.1:", "port: expected a whole number"),
        (pmacct.parse_line, "id = 1", "expected KEY=VALUE without spaces"),
        (pmacct.parse_line, "id=1 id=2", "duplicate key id"),
    ],
)
def test_wrong_line_is_named(parse_line: ParseLine, text: str, expected: str) -> None:
    """A line that can't be understood is named by number, and what was expected in it."""
    with pytest.raises(ValueError, match=r"^line 2: ") as refused:
        parse(f"# first\n{text}\n", parse_line, Known())
    assert expected in str(refused.value)


words = st.sampled_from(
    [
        *(
            "10.0.0.0",
            "0.0.0.0",
            "/8",
            "/255.0.0.0",
            "[2001:db8::]",
            "/32",
            ":",
            ": ",
            " ",
            "\n",
            "#",
            "!",
            "192.0.2.1",
        ),
        *(
            "/2000",
            "/10",
            ",64",
            "-",
            "+",
            "7",
            "id=1",
            "ip=",
            "192.0.2.1:9",
            ",",
            "balance-alg=hash-agent",
            "tag=",
            "=",
        ),
    ]
)
sources = st.sampled_from(["10.0.0.0/8", "10.0.0.0/255.255.0.0", "0.0.0.0/0", "[2001:db8::]/32", "10.1.2.3"])
receivers = st.tuples(st.ip_addresses(v=4), st.integers(1, 65_000), st.integers(1, 99), st.integers(1, 255)).map(
    lambda each: "{}/{}/{},{}".format(*each)
)
rules = st.tuples(sources, st.lists(receivers, max_size=3)).map(lambda rule: f"{rule[0]}: {' '.join(rule[1])}")
addresses = st.lists(st.ip_addresses(v=4).map(lambda address: f"{address}:9"), min_size=1, max_size=3).map(",".join)
pools = st.tuples(addresses, st.sampled_from(["", " balance-alg=rr", " balance-alg=hash-crc32", " tag=1"])).map(
    lambda pool: f"id=1 ip={pool[0]}{pool[1]}"
)
files = st.text() | st.lists(words).map("".join) | st.lists(rules | pools).map("\n".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PARSERS), files, st.sampled_from(["relay", "original"]))
def test_any_text_is_settings_or_a_line(tmp_path: Path, parse_line: ParseLine, text: str, source: str) -> None:
    """Any text comes to settings that are printed so that they load the same, or to an error that names a line."""
    try:
        made = to_settings(
            parse(text, parse_line, Known()), DEFAULT_STREAM, "relay" if source == "relay" else "original"
        )
    except ValueError as error:
        assert str(error).startswith("line ")  # noqa: PT017
        return
    path = tmp_path / "fanwire.toml"
    path.write_text(render(made, defaults=False))
    assert load(path, {}) == made


@given(st.lists(rules, min_size=1).map("\n".join))
def test_every_receiver_of_a_rule_is_a_collector(text: str) -> None:
    """Rules that are all right give a collector a receiver, in order, however often one is named."""
    made = to_settings(parse(text, samplicator.parse_line, Known()), DEFAULT_STREAM, "relay")
    named = [word.partition("/")[0] for rule in text.split("\n") for word in rule.partition(": ")[2].split()]
    assert [collector.address for collector in made.collectors] == named


def imported(stack: Stack, tool: str, text: str, *options: str) -> tuple[int, str, str]:
    """Return the results of `fanwire import` on a file: exit code, settings, and its other lines."""
    path = stack.directory / f"{tool}.conf"
    path.write_text(text, "latin-1")
    return stack.run("import", tool, str(path), *options)


def test_whole_import_is_0(stack: Stack) -> None:
    """A file that is taken over whole ends with 0, says nothing, and notes what host names came to."""
    text = "# \xfcber\n10.0.0.0/8: localhost/9/4\n"
    options = ("--stream", "flows", "--listen", "udp://0.0.0.0:2055", "--source", "original")
    code, printed, said = imported(stack, "samplicator", text, *options)
    assert (code, said) == (0, "")
    assert printed.startswith("# 'localhost' was ")
    stack.configure(printed)
    found = load(stack.directory / "fanwire.toml", {})
    assert [(stream.name, stream.listen) for stream in found.streams] == [("flows", ("udp://0.0.0.0:2055",))]
    (collector,) = found.collectors
    assert (collector.streams, collector.source, collector.port) == (("flows",), "original", 9)
    assert (collector.sample, collector.prefixes) == (4, ("10.0.0.0/8",))


def test_hosts_without_an_address_are_named(stack: Stack) -> None:
    """A receiver keeps its name, to be looked up later; a rule whose source has none is left out; the rest is there."""
    text = "10.0.0.0/8: siem.invalid/9 127.0.0.1/7\nrouter.invalid: 127.0.0.1/8\n0.0.0.0: localhost/9 0x7f000001/6\n"
    code, printed, said = imported(stack, "samplicator", text, "--source", "original")
    assert code == 1
    (left_out, unknown) = said.splitlines()
    assert left_out.startswith("line 2: left out: host 'router.invalid' has no address: ")
    assert unknown.startswith("host 'siem.invalid' has no address now: ")
    assert unknown.endswith("fanwire looks it up again while it runs; add its address to [transmitter] destinations")
    stack.configure(printed)
    found = load(stack.directory / "fanwire.toml", {})
    places = [(each.address, each.port) for each in found.collectors]
    assert places == [("siem.invalid", 9), ("127.0.0.1", 7), ("localhost", 9), ("127.0.0.1", 6)]


def test_original_may_go_where_the_file_says(stack: Stack) -> None:
    """With exporters' addresses, receivers beyond the default destinations become destinations."""
    _, printed, _ = imported(stack, "pmacct", "id=1 ip=198.51.100.7:9,10.1.1.1:9\n", "--source", "original")
    stack.configure(printed)
    destinations = load(stack.directory / "fanwire.toml", {}).transmitter.destinations
    assert destinations[-1] == "198.51.100.7/32"
    assert not any("10.1.1.1" in each for each in destinations)


def test_what_is_left_out_is_said_and_1(stack: Stack) -> None:
    """An entry that is left out is a line on stderr with its number, and the exit code is 1; the rest is there."""
    text = "id=1 ip=127.0.0.1:9\nid=2 ip=127.0.0.1:10 tag=7\n"
    code, printed, said = imported(stack, "pmacct", text)
    assert code == 1
    assert "port = 9" in printed
    assert said.startswith("line 2: left out: pool 2: tag=7; ")
    assert len(said.splitlines()) == 1
    code, printed, said = imported(stack, "samplicator", "# nothing\n")
    assert (code, said) == (1, "the imported lines name no receiver\n")


@pytest.mark.parametrize("text", ["10.0.0.0/8: 127.0.0.1/9\nwhat\n", "10.0.0.0/8: 127.0.0.1/9\n\0: \0/9\n"])
def test_wrong_file_is_78(stack: Stack, text: str) -> None:
    """A file that is wrong, or not there, ends with 78 and one line that names it, and prints no settings."""
    code, printed, said = imported(stack, "samplicator", text)
    assert (code, printed, len(said.splitlines())) == (78, "", 1)
    assert said.startswith(f"{stack.directory}/samplicator.conf: line 2: ")
    (stack.directory / "samplicator.conf").unlink()
    assert stack.run("import", "samplicator", "missing.conf") == (78, "", "missing.conf: No such file or directory\n")
