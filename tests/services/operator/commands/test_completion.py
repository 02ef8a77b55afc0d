import shutil
import subprocess

import pytest

from tests.stack import Stack, ask_json

COMPLETE = {
    "bash": r"""
source ./script
COMP_WORDS=($1)
[[ $1 == *' ' ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$1 COMPREPLY=()
$(complete -p fanwire | sed 's/.*-F \([^ ]*\).*/\1/') fanwire "${COMP_WORDS[-1]}"
printf '%s\n' "${COMPREPLY[@]}"
""",
    "fish": r"""source ./script; complete -C "$argv[1]" | string replace -r '\t.*' '' """,
}
"""Each prints the completions of a line; zsh completes nothing without a terminal."""


def script(stack: Stack, shell: str) -> str:
    """Return the script for a shell."""
    code, said, complaint = stack.run("completion", shell)
    assert (code, complaint) == (0, "")
    return said


def complete(stack: Stack, shell: str, line: str) -> list[str]:
    """Return the completions of the last word."""
    command = [shell, "-c", COMPLETE[shell], *(["bash"] if shell == "bash" else []), line]
    environment = stack.environment | {"HOME": str(stack.directory)}
    done = subprocess.run(command, cwd=stack.directory, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return sorted(done.stdout.split())


@pytest.mark.parametrize("shell", COMPLETE)
def test_shells_complete_commands_options_and_names(stack: Stack, shell: str) -> None:
    """A shell completes what the parsers know, and names of streams and clients, of the gateway that the line names.

    A name that the shell would expand is left out. Where nothing runs, no name is offered, and nothing is said.
    """
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    (stack.directory / "script").write_text(script(stack, shell))
    for line, expected in (
        ("fanwire le", ["leave", "ledger"]),
        ("fanwire gateway --c", ["--check", "--config"]),
        ("fanwire completion f", ["fish"]),
        ("fanwire collect siem --source o", ["original"]),
        ("fanwire frame l", ["lo"]),
        ("fanwire leave s", []),
    ):
        assert complete(stack, shell, line) == expected
    elsewhere = stack.directory / "gateway.socket"
    stack.configure(f'[gateway]\nlisten = ["unix://{elsewhere}", "tcp://127.0.0.1:5000"]')
    stack.start("broker")
    stack.start("gateway")
    for port, name in enumerate(("siem", "$(touch${IFS}x)", "-s"), 9000):
        assert ask_json({"op": "register", "name": name, "streams": ["messages"], "port": port})["ok"]
    assert complete(stack, shell, "fanwire leave ") == ["siem"]
    assert complete(stack, shell, "fanwire watch m") == ["messages"]
    stack.configure("[gateway]\nlisten = ['tcp://127.0.0.1:1']")
    assert complete(stack, shell, "fanwire tap s") == []
    assert complete(stack, shell, f"fanwire clients --gateway unix://{elsewhere} --help") != ["siem"]
    assert complete(stack, shell, f"fanwire leave --gateway unix://{elsewhere} s") == ["siem"]
    assert not (stack.directory / "x").exists()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(stack: Stack, shell: str) -> None:
    """The script names every command, and the shell, where it is installed, finds no fault in it."""
    text = script(stack, shell)
    assert all(word in text for word in ("clients", "forwarder", "doctor", "probe"))
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=text, text=True, check=True)
