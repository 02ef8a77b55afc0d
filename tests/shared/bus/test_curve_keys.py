import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from shared.bus.curve_keys import ROLES, load_keys, load_roles, write_keys
from shared.settings.explain import SettingsError


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with a key pair of every role."""
    assert len(list(write_keys(tmp_path, ROLES))) == len(ROLES)
    return tmp_path


def test_what_is_written_is_read(keys: Path) -> None:
    """Each role finds its own pair and the broker's public key, and the broker the role of each."""
    roles = load_roles(keys)
    assert sorted(roles.values()) == sorted(ROLES)
    for role in ROLES:
        found = load_keys(keys, role)
        assert roles[found.public] == role
        assert zmq.curve_public(found.secret) == found.public
        assert roles[found.broker] == "broker"
        assert found.secret.decode() not in repr(found)


def test_a_role_may_have_several_keys(keys: Path) -> None:
    """The text between the role and `.public` tells processes apart, and changes no role."""
    public, _ = zmq.curve_keypair()
    (keys / "ingest.branch.office.public").write_bytes(public)
    assert load_roles(keys)[public] == "ingest"


def test_secrets_are_closed_from_the_first_moment(keys: Path) -> None:
    """A secret has mode 0600 whatever the umask; the public key can be read by all."""
    before = os.umask(0)
    try:
        (keys / "more").mkdir()
        list(write_keys(keys / "more", ["ingest"]))
    finally:
        os.umask(before)
    assert (keys / "more" / "ingest.secret").stat().st_mode & 0o777 == 0o600
    assert (keys / "more" / "ingest.public").stat().st_mode & 0o777 == 0o644


def test_nothing_is_made_when_a_key_is_there(keys: Path) -> None:
    """A key that is there keeps the others from being made, so that no half of a set is left."""
    for role in ROLES[:-1]:
        (keys / f"{role}.secret").unlink()
        (keys / f"{role}.public").unlink()
    left = sorted(keys.iterdir())
    with pytest.raises(FileExistsError):
        list(write_keys(keys, ROLES))
    assert sorted(keys.iterdir()) == left


def _replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def _open_up(name: str, mode: int) -> Callable[[Path], object]:
    return lambda directory: (directory / name).chmod(mode)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_remove("ingest.secret"), "ingest.secret: there is no such key; make keys with `fanwire keys"),
        (_remove("broker.public"), "broker.public: there is no such key; make keys with `fanwire keys"),
        (_open_up("ingest.secret", 0o640), "ingest.secret: other users can read this secret key; `chmod"),
        (_open_up("ingest.secret", 0o604), "ingest.secret: other users can read this secret key; `chmod"),
        (_replace("ingest.secret", b""), "ingest.secret: not a key; expected 40 characters"),
        (_replace("ingest.secret", b"x" * 39), "ingest.secret: not a key; expected 40 characters"),
        (_replace("ingest.secret", b"x" * 20 + b"\0" * 20), "ingest.secret: not a key; expected 40 characters"),
        (_replace("broker.public", b"#" * 40), "broker.public: not a key; expected 40 characters"),
        (_replace("broker.public", "ä".encode() * 20), "broker.public: not a key; expected 40 characters"),
        (_replace("broker.public", b"-" * 1_000_000), "broker.public: not a key; expected 40 characters"),
    ],
)  # fmt: skip
def test_spoilt_key_is_one_line(keys: Path, spoil: Callable[[Path], object], said: str) -> None:
    """A key that is missing, malformed or open to others is refused in one line: file, what is wrong, what to do."""
    spoil(keys)
    with pytest.raises(SettingsError) as caught:
        load_keys(keys, "ingest")
    assert str(caught.value).startswith(f"{keys}/{said}")
    assert "\n" not in str(caught.value)


def test_list_of_the_broker_has_roles_alone(keys: Path) -> None:
    """A public key of no role, or of two, is refused: nobody could say what it may do."""
    (keys / "stranger.public").write_bytes(zmq.curve_keypair()[0])
    with pytest.raises(SettingsError, match=r"stranger\.public: 'stranger' is not a role; expected"):
        load_roles(keys)
    (keys / "stranger.public").rename(keys / "gateway.again.public")
    (keys / "gateway.again.public").write_bytes((keys / "ingest.public").read_bytes())
    with pytest.raises(SettingsError, match=r"ingest\.public: the same key as that of gateway"):
        load_roles(keys)
