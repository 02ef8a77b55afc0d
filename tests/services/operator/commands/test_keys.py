from shared.bus.curve_keys import ROLES, load_keys
from tests.services.operator.played import run
from tests.stack import Stack


def test_keys_makes_a_pair_a_role(stack: Stack) -> None:
    """`keys` makes the directory and every pair, the secret ones closed to others, and says which files."""
    directory = stack.directory / "made" / "keys"
    code, text = run(stack, "keys", str(directory))
    assert code == 0
    assert text.splitlines()[:-1] == [f"{directory}/{role}.secret  {directory}/{role}.public" for role in ROLES]
    for role in ROLES:
        assert (directory / f"{role}.secret").stat().st_mode & 0o777 == 0o600
        assert load_keys(directory, role)


def test_keys_replaces_nothing(stack: Stack) -> None:
    """`keys` ends with 73 and one line when a key is there, and leaves all as it was; other roles can be had."""
    directory = stack.directory / "keys"
    assert run(stack, "keys", str(directory), "ingest", "ingest")[0] == 0
    before = {path: path.read_bytes() for path in directory.iterdir()}
    assert len(before) == 2
    code, text = run(stack, "keys", str(directory))
    assert (code, len(text.splitlines())) == (73, 1)
    assert f"{directory}/ingest.secret exists" in text
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert run(stack, "keys", str(directory), "gateway")[0] == 0


def test_keys_of_unknown_roles_are_64(stack: Stack) -> None:
    """A role that is none is wrong usage, and the roles are named."""
    code, text = run(stack, "keys", str(stack.directory / "keys"), "clerk")
    assert code == 64
    assert "no 'clerk'; expected one of: broker, gateway" in text


def test_keys_that_cannot_be_made_are_73(stack: Stack) -> None:
    """One line names the directory that can't be made."""
    (stack.directory / "file").touch()
    code, text = run(stack, "keys", str(stack.directory / "file" / "keys"))
    assert (code, len(text.splitlines())) == (73, 1)
    assert str(stack.directory / "file") in text
