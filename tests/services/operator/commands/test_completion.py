import shutil
import subprocess

import pytest

from tests.stack import Stack

COMPLETE = r"""
source completion.bash
COMP_WORDS=(fanwire "$@") COMP_CWORD=$# COMPREPLY=()
$(complete -p fanwire | sed 's/.*-F \([^ ]*\).*/\1/') fanwire "${@: -1}"
echo "${COMPREPLY[@]}"
"""


def script(stack: Stack, shell: str) -> str:
    """Return the script for a shell."""
    code, said, complaint = stack.run("completion", shell)
    assert (code, complaint) == (0, "")
    return said


def test_bash_completes_commands_services_and_options(stack: Stack) -> None:
    """The script for bash completes what the parsers of commands and services know."""
    (stack.directory / "completion.bash").write_text(script(stack, "bash"))
    for words, expected in (
        (["le"], "leave ledger"),
        (["gateway", "--c"], "--config --check"),
        (["doctor", "--pr"], "--probe"),
        (["completion", "f"], "fish"),
        (["collect", "siem", "--source", "o"], "original"),
    ):
        done = subprocess.run(
            ["bash", "-c", COMPLETE, "bash", *words], cwd=stack.directory, capture_output=True, text=True, check=True
        )
        assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(stack: Stack, shell: str) -> None:
    """The script names every command, and the shell, where it is installed, finds no fault in it."""
    text = script(stack, shell)
    assert all(word in text for word in ("clients", "forwarder", "doctor", "probe"))
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=text, text=True, check=True)
