import hashlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from services.gateway.transport.tls import make_context
from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.process.tokens_file import read_tokens
from shared.settings.entries import Token
from shared.settings.model import Settings
from shared.settings.tables import Gateway
from tests.certificates import Authority
from tests.stack import Stack

HASH = f"sha256:{hashlib.sha256(b'secret').hexdigest()}"
ENTRY = f'[[token]]\nname = "siem"\nhash = "{HASH}"\nscopes = ["list"]\n'
TOKEN = Token(name="first", hash=HASH.replace("sha256:2", "sha256:3"), scopes=("list",))


def refusal(action: Callable[..., object], *arguments: object) -> str:
    """The line with which settings are refused."""
    with pytest.raises(OperatorError) as refused:
        action(*arguments)
    assert refused.value.exit_code == BAD_SETTINGS
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of tokens that only its owner can read."""
    path = tmp_path / "tokens.toml"
    path.write_text(ENTRY)
    path.chmod(0o600)
    return path


def settings(file: Path) -> Settings:
    """Settings with one token, and more in a file."""
    return Settings(gateway=Gateway(tokens=str(file)), tokens=(TOKEN,))


def test_tokens_of_the_settings_and_of_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both count; the file may be named by a variable, as systemd names credentials."""
    assert [token.name for token in read_tokens(settings(file))] == ["first", "siem"]
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(file.parent))
    assert len(read_tokens(settings(Path("$CREDENTIALS_DIRECTORY/tokens.toml")))) == 2
    assert read_tokens(Settings(tokens=(TOKEN,))) == (TOKEN,)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o666])
def test_file_that_others_may_use(file: Path, mode: int) -> None:
    """A file of tokens that others can read or write is refused, with the cure."""
    file.chmod(mode)
    assert f"`chmod 600 {file}`" in refusal(read_tokens, settings(file))


def test_file_of_another_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may hand a file of tokens to the group of an unprivileged gateway; anybody else may not."""
    monkeypatch.setattr("shared.process.tokens_file.os.geteuid", lambda: file.stat().st_uid + 1)
    for mode in (0o600, 0o640, 0o660, 0o644):
        file.chmod(mode)
        if file.stat().st_uid == 0 and mode in (0o600, 0o640):
            assert len(read_tokens(settings(file))) == 2
        else:
            assert "file is accessible to other users" in refusal(read_tokens, settings(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[token", "tokens.toml: "),
        ("\xff", "tokens.toml: "),
        ("[bus]\n", "line 1: [bus]: unknown table; expected one of [[token]]"),
        (
            ENTRY.replace("list", "read"),
            "[[token]] \"siem\" scopes: 'read' is not allowed; expected one of list, collect",
        ),
        (ENTRY.replace(HASH, "secret"), "expected a text in quotes: as `fanwire token` prints it"),
        (ENTRY.replace("hash", "# "), "hash: expected this or certificate, and not both"),
        (ENTRY + 'certificate = "siem"\n', "hash: expected this or certificate, and not both"),
        (ENTRY + ENTRY, '[[token]] "siem" name: another one has it'),
        (ENTRY + ENTRY.replace("siem", "b"), '[[token]] "b" hash: another one has it'),
        (ENTRY.replace("siem", "first"), '[[token]] "first" name: another one has it'),
        (ENTRY + 'streams = ["nothing"]\n', "there is no stream 'nothing'; name a [[stream]]"),
        (ENTRY + 'destinations = ["10.0.0.1/8"]\n', "has host bits set"),
    ],
)
def test_file_that_is_wrong(file: Path, text: str, expected: str) -> None:
    """A fault in the file of tokens is reported in one line that names the file."""
    file.write_bytes(text.encode("latin-1"))
    assert expected in refusal(read_tokens, settings(file))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A file of tokens that can't be read is named."""
    said = refusal(read_tokens, settings(tmp_path / "none"))
    assert "none: No such file or directory; name a file with lines that `fanwire token` prints" in said


def test_tls_files(tmp_path: Path) -> None:
    """The certificate's files are read and fit each other; what does not is named."""
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    certificate, key = map(str, authority.sign("gateway"))
    context = make_context(Gateway(certificate=certificate, key=key), ())
    assert (context.minimum_version, context.verify_mode) == (ssl.TLSVersion.TLSv1_2, ssl.CERT_NONE)
    other_key = str(other.sign("else")[1])
    for wrong in (
        Gateway(certificate=certificate, key=other_key),
        Gateway(certificate=certificate, key=certificate),
        Gateway(certificate=certificate, key=str(tmp_path / "none")),
        Gateway(certificate=certificate, key=key, client_authorities=key),
        Gateway(certificate=certificate, key=key, client_authorities=str(tmp_path)),
    ):
        assert f"{tmp_path}" in refusal(make_context, wrong, ())


def test_certificates_are_asked_for(tmp_path: Path) -> None:
    """A certificate has to be shown where nobody has a token, and may be where somebody has; it takes authorities."""
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.sign("gateway"))
    bare = Gateway(certificate=certificate, key=key)
    asking = Gateway(certificate=certificate, key=key, client_authorities=str(authority.certificate))
    shows = Token(name="router", certificate="router 7", scopes=("collect",))
    assert make_context(asking, [shows]).verify_mode is ssl.CERT_REQUIRED
    assert make_context(asking, [shows, TOKEN]).verify_mode is ssl.CERT_OPTIONAL
    assert "client_authorities" in refusal(make_context, bare, [shows, TOKEN])


@pytest.mark.parametrize(
    ("gateway", "expected"),
    [
        ('listen = ["tcp://0.0.0.0:5000"]', ["tcp://0.0.0.0:5000 is not loopback", "tls://"]),
        ('listen = ["tcp://127.0.0.1:5000", "tcp://[::]:5002"]', ["tcp://[::]:5002 is not loopback"]),
        ('listen = ["tls://127.0.0.1:5001"]', ["[gateway] certificate and key"]),
        ('listen = ["tls://0.0.0.0:5001"]\n{tls}', ["tls://0.0.0.0:5001 is not loopback", "[[token]]"]),
        ('listen = ["tls://0.0.0.0:5001"]\n{tls}\ntokens = "{open}"', ["chmod 600"]),
    ],
)
def test_start_that_would_let_anybody_in(stack: Stack, gateway: str, expected: list[str]) -> None:
    """A listener beyond loopback that anybody or nobody could use ends the start with 78 and a line."""
    certificate, key = Authority(stack.directory).sign("gateway")
    too_open = stack.directory / "open.toml"
    too_open.write_text(ENTRY)
    too_open.chmod(0o644)
    tls = f'certificate = "{certificate}"\nkey = "{key}"'
    stack.configure("[gateway]\n" + gateway.replace("{tls}", tls).replace("{open}", str(too_open)))
    running = stack.start("gateway", ready=False)
    assert running.process.wait(60) == 78
    (line,) = running.text.replace("Starting server...\n", "").splitlines()
    assert all(each in line for each in expected), line


def test_tls_on_loopback_needs_no_token(stack: Stack) -> None:
    """A client by loopback is on this host, by TLS too."""
    authority = Authority(stack.directory)
    certificate, key = authority.sign("gateway")
    stack.configure(f'[gateway]\nlisten = ["tls://127.0.0.1:5001"]\ncertificate = "{certificate}"\nkey = "{key}"\n')
    stack.start("broker")
    stack.start("gateway")
    where = ["--gateway", "tls://localhost:5001", "--authority", str(authority.certificate)]
    command = stack.operator("clients", *where)
    assert command.process.wait(60) == 0, command.text
