from pathlib import Path

import msgspec
import pytest

from shared.settings.explain import SettingsError
from shared.settings.file import load
from shared.settings.model import Settings
from shared.settings.uplink import Uplink
from tests.documents import block

STREAMS = '[[stream]]\nname = "flows"\nlisten = ["udp://127.0.0.1:2055"]\n[[stream]]\nname = "far"\nlisten = []\n'
ON = '[uplink]\nservers = ["nats://127.0.0.1:4222"]\nsite = "berlin"\n'


def read(tmp_path: Path, text: str) -> Settings:
    """Return the settings in a file of this text."""
    (tmp_path / "fanwire.toml").write_text(text)
    return load(tmp_path / "fanwire.toml", {})


def test_a_shared_registry_needs_servers() -> None:
    """The registry of a cluster has a name that can be a bucket's, and servers that keep it."""
    for registry, servers, said in (
        ("a b", ["nats://127.0.0.1:4222"], "registry: expected up to 32 letters"),
        ("berlin", [], "registry: needs servers, which keep it"),
    ):
        with pytest.raises(ValueError, match=said):
            msgspec.convert({"servers": servers, "site": "a", "registry": registry}, Uplink)


def test_uplink_is_off_by_default() -> None:
    """Without servers nothing leaves and nothing comes."""
    assert Settings().uplink == Uplink()
    assert not Uplink().servers


def test_stream_of_another_site_alone_has_no_listener(tmp_path: Path) -> None:
    """A stream may be without listeners where the uplink receives it, by name or with all of a site's."""
    for receive in ('["bonn/far"]', '["bonn/*"]'):
        uplink = read(tmp_path, f"{ON}receive = {receive}\n{STREAMS}").uplink
        expected = ("flows", "far") if "*" in receive else ("far",)
        assert uplink.received(("flows", "far")) == {"bonn": expected}
    assert read(tmp_path, f'{ON}send = ["*"]\nreceive = ["bonn/far"]\n{STREAMS}').uplink.sent(("a", "b")) == ("a", "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f'{ON}send = ["flow"]\nreceive = ["bonn/far"]\n{STREAMS}',
            "[uplink] send: there is no stream 'flow' (did you mean 'flows'?)",
        ),
        (f'{ON}receive = ["bonn/fra", "bonn/far"]\n{STREAMS}', "[uplink] receive: there is no stream 'fra'"),
        (f'{ON}receive = ["berlin/far"]\n{STREAMS}', "receive: 'berlin/far' is this site's own"),
        (f'{ON}receive = ["bonn"]\n{STREAMS}', "receive: 'bonn': expected SITE/STREAM or SITE/*"),
        (f"{ON}{STREAMS}", '[[stream]] "far" listen: expected a listener'),
        ('[uplink]\nservers = ["nats://127.0.0.1:4222"]\n', "[uplink] site: expected up to 32 letters"),
        ('[uplink]\nsite = "a"\nservers = ["nats://192.0.2.1:4222"]\n', "leaves this host without TLS; use tls://"),
        ('[uplink]\nsite = "a"\nservers = ["tls://me:secret@host:4222"]\n', "a name or password does not go into the"),
        (
            '[uplink]\nsite = "a.b"\n',
            "[uplink] site: expected up to 32 letters, digits, and behind the first also _ and -",
        ),
        ('[uplink]\ncertificate = "a.pem"\n', "[uplink] certificate: expected both a certificate and its key"),
        ('[uplink]\nnkey = "a"\ncredentials = "b"\n', "[uplink] nkey: expected this or credentials"),
        (f'{ON}nodes = ["bonn"]\n', "nodes: expected each site once, and this one among them"),
        (f'{ON}nodes = ["berlin", "a.b"]\n', "'a.b': expected the name of a site"),
        ('[uplink]\nsite = "a"\nnodes = ["a", "b"]\n', "[uplink] nodes: expected servers too"),
        (
            f'{ON}nodes = ["berlin", "bonn"]\n[offload]\ninterfaces = ["eth0"]\n',
            "[offload] interfaces: the kernel's rules can't follow [uplink] nodes",
        ),
    ],
)
def test_bad_uplink_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """Each setting of the uplink that can't work is refused with its name and what to do; no password is repeated."""
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, text)
    assert expected in str(refused.value)
    assert "secret" not in str(refused.value)


def test_plain_connection_beyond_loopback_is_a_decision() -> None:
    """nats:// to another host is allowed where the settings say so."""
    found = msgspec.convert({"servers": ["nats://192.0.2.1:4222"], "site": "a", "plain_beyond_loopback": True}, Uplink)
    assert [str(each) for each in found.endpoints] == ["nats://192.0.2.1:4222"]


def test_settings_of_the_readme_fit_together(tmp_path: Path) -> None:
    """By the settings shown, Bonn receives what Berlin sends."""
    berlin = read(tmp_path, block("services/uplink/README.md", "uplink-berlin"))
    bonn = read(tmp_path, block("services/uplink/README.md", "uplink-bonn"))
    assert berlin.uplink.sent(("netflow",)) == ("netflow",)
    assert bonn.uplink.received(("netflow",)) == {"berlin": ("netflow",)}


def test_node_of_the_readme(tmp_path: Path) -> None:
    """By the settings shown, three nodes share their collectors."""
    node = read(tmp_path, block("services/uplink/nodes/README.md", "nodes")).uplink
    assert set(node.received(("netflow",))) == {"b", "c"}
    assert node.minority == "serve"


def test_nodes_send_and_receive_all_streams(tmp_path: Path) -> None:
    """A node sends all its streams and receives those of each other node, also such that have no listener here."""
    uplink = read(tmp_path, f'{ON}nodes = ["bonn", "berlin"]\n{STREAMS}').uplink
    assert uplink.sent(("flows", "far")) == ("flows", "far")
    assert uplink.received(("flows", "far")) == {"bonn": ("flows", "far")}
