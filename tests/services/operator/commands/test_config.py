import socket

from tests.capabilities import held_by_a_program
from tests.stack import Stack

A = '[[stream]]\nname = "a"\nlisten = ["udp://127.0.0.1:7000", {}]\n'
TLS = '[gateway]\nlisten = ["tls://127.0.0.1:5001"]\n'


def check(stack: Stack, settings: str) -> dict[str, str]:
    """Return the refusal of each service that refuses the settings."""
    stack.configure(settings)
    code, said, complaint = stack.run("config", "--check")
    assert (complaint, code) == ("", 78 if ": " in said else 0)
    assert ": " in said or said == f"no service refuses {stack.directory}/fanwire.toml\n"
    return dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)


def test_what_a_service_would_refuse_is_said_before_it_starts(stack: Stack, lab: None) -> None:
    """`config --check` prints the words of each service, for what no look at the file alone can tell."""
    loop = '[[collector]]\nname = "siem"\nstreams = ["a"]\naddress = "127.0.0.1"\nport = 7000\n'
    keys = stack.directory / "keys"
    tokens = f'[gateway]\ntokens = "{stack.directory}/none"\n'
    elsewhere = '[gateway]\nlisten = ["tcp://192.0.2.1:5000"]\n'
    no_path = '[console]\nlisten = ["unix:///nowhere/x"]\n'
    other = stack.directory / "fanwire.toml"
    twice = '[gateway]\nlisten = ["tcp://127.0.0.1:5000", "tcp://localhost:5000"]\n'
    twice += '[console]\nlisten = ["http://127.0.0.1:8080", "http://127.0.0.1:8080"]\n'
    for settings, refusals in (
        (A.format('"udp://localhost:7000"') + TLS, {
            "ingest": '[[stream]] "a" listen: udp://localhost:7000 is the address of',
            "gateway": "[gateway] certificate and key: expected a PEM file each",
        }),
        (A.format('"udp://192.0.2.1:7001"') + tokens, {
            "ingest": "requested address; no interface of this host has",
            "gateway": "No such file or directory; name a file with",
        }),
        (A.format('"udp://nobody.invalid:7001"') + elsewhere + no_path, {
            "ingest": "name a host that resolves",
            "gateway": "192.0.2.1:5000: Cannot assign requested",
            "console": "unix:///nowhere/x: No such file or directory",
        }),
        (A.format('"unixgram:///nowhere/log"') + loop, {
            "ingest": "No such file or directory; make its directory",
            "gateway": '[[collector]] "siem": ',
        }),
        (A.format("") + twice, {
            "gateway": "tcp://localhost:5000: [gateway] listen has this address twice; remove one",
            "console": "http://127.0.0.1:8080: [console] listen has this address twice; remove one",
        }),
        (A.format(f'"unixgram://{other}"') + f'[gateway]\nlisten = ["unix://{other}"]\n', {
            "ingest": "a file that is no socket is there; remove it, or choose another path",
            "gateway": "a file that is no socket is there; set another [gateway] listen",
        }),
        (A.format('"udp://0.0.0.0:7001"') + 'reply = "x"\n', {"ingest": "a reply on udp://0.0.0.0:7001 would let"}),
    ):  # fmt: skip
        refused = check(stack, settings)
        for service, why in refusals.items():
            assert why in refused.get(service, ""), settings
    (stack.directory / "fanwire.toml").write_text(f'[bus]\ndirectory = "{stack.bus}"\nkeys = "{keys}"\n')
    code, said, _ = stack.run("config", "--check")
    why = f"forwarder: {keys}/forwarder.secret: there is no such key; make keys with `fanwire keys"
    assert (code, why in said, "transmitter: " in said) == (78, True, True)
    assert not stack.bus.exists()


def test_ports_that_others_have_are_refused_only_before_the_start(stack: Stack, lab: None) -> None:
    """A port of another program is refused; one that the running services have is not, and they lose nothing."""
    with (
        socket.create_server(("127.0.0.1", 5000)) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken,
    ):
        taken.bind(("127.0.0.1", 7000))
        with held_by_a_program(listener, taken) as pid:
            refused = check(stack, A.format(""))
        assert f"in use by process {pid} (" in refused["gateway"]
        assert f"Address already in use by process {pid} (" in refused["ingest"]
        assert refused["ingest"].endswith("); stop that, or listen elsewhere")
    assert check(stack, A.format("")) == {}
    stack.start_all()
    assert check(stack, A.format("")) == {}
