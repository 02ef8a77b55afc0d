import socket

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
    for settings, service, why in (
        (A.format('"udp://localhost:7000"'), "ingest", '[[stream]] "a" listen: udp://localhost:7000 is the address of'),
        (A.format('"udp://192.0.2.1:7001"'), "ingest", "requested address; no interface of this host has"),
        (A.format('"udp://nobody.invalid:7001"'), "ingest", "name a host that resolves"),
        (A.format('"unixgram:///nowhere/log"'), "ingest", "No such file or directory; make its directory"),
        (A.format('"udp://0.0.0.0:7001"') + 'reply = "x"\n', "ingest", "a reply on udp://0.0.0.0:7001 would let"),
        (A.format("") + loop, "gateway", '[[collector]] "siem": '),
        (TLS, "gateway", "[gateway] certificate and key: expected a PEM file each"),
        (f'[gateway]\ntokens = "{stack.directory}/none"\n', "gateway", "No such file or directory; name a file with"),
        ('[gateway]\nlisten = ["tcp://192.0.2.1:5000"]\n', "gateway", "192.0.2.1:5000: Cannot assign requested"),
        ('[console]\nlisten = ["unix:///nowhere/x"]\n', "console", "unix:///nowhere/x: No such file or directory"),
        ("", "forwarder", f"{keys}/forwarder.secret: there is no such key; make keys with `fanwire keys"),
    ):  # fmt: skip
        if service == "forwarder":
            (stack.directory / "fanwire.toml").write_text(f'[bus]\ndirectory = "{stack.bus}"\nkeys = "{keys}"\n')
            code, said, _ = stack.run("config", "--check")
            assert (code, f"{service}: {why}" in said, "transmitter: " in said) == (78, True, True)
        else:
            assert why in check(stack, settings).get(service, ""), settings
    assert not stack.bus.exists()


def test_ports_that_others_have_are_refused_only_before_the_start(stack: Stack, lab: None) -> None:
    """A port of another program is refused; one that the running services have is not, and they lose nothing."""
    with socket.create_server(("127.0.0.1", 5000)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 7000))
        refused = check(stack, A.format(""))
        assert "in use; see by which process" in refused["gateway"]
        assert "Address already in use; see what holds it with `ss -ulnp`" in refused["ingest"]
    assert check(stack, A.format("")) == {}
    stack.start_all()
    assert check(stack, A.format("")) == {}
