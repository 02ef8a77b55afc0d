"""`fanwire completion`: a script by which a shell completes commands, options, and names of what runs.

The script asks `fanwire completion streams` and the like for names. Those come from the gateway, within a second.
"""

import argparse
import re
import shlex
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.client.gateway_options import access, add_gateway_arguments
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.process.lifecycle import OK, UNAVAILABLE, OperatorError, Parser, add_config_argument, add_service_arguments
from shared.process.registry_client import RegistryClient
from shared.settings.file import load
from shared.settings.model import Settings
from shared.settings.opt_in import OPT_IN

SHELLS: Final = ("bash", "zsh", "fish")
NAMED: Final = {"STREAM": "streams", "CLIENT": "clients", "STREAM|COLLECTOR": "sources", "IFACE": "interfaces"}
"""The names to complete where an argument has this metavar; a source is a stream or a collector."""
ANSWER_SECONDS: Final = 1
"""A user waits for this at the prompt."""
SAFE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
"""Names that no shell expands. Others are left out: clients choose their names, and bash would run `$(...)` in one."""
FUNCTIONS: Final = {
    "bash": '{name}() {{ compgen -W "$("${{COMP_WORDS[0]}}" completion {kind} "$COMP_LINE" 2>/dev/null)" -- "$1"; }}',
    # There the words have lost the program by then; it may stand behind sudo.
    "zsh": """{name}() {{
  compadd -- ${{(f)"$(${{${{(z)BUFFER}}[(r)*fanwire]}} completion {kind} "$BUFFER" 2>/dev/null)"}}
}}""",
    "fish": """function {name}
  set -l words (commandline -opc)
  command $words[1] completion {kind} (commandline -p | string collect) 2>/dev/null
end""",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "completion", run, "print a script that completes commands, options and names")
    parser.add_argument(
        "what", choices=(*SHELLS, *NAMED.values()), help="a shell, for its script; else names of what runs, one a line"
    )
    parser.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the script for a shell, or names."""
    if arguments.what in SHELLS:
        import shtab

        print(shtab.complete(completed_parser(), arguments.what))
    else:
        print(*sorted(filter(SAFE.fullmatch, _names(arguments.what, arguments.line, settings))), sep="\n")
    return OK


def whole_parser() -> Parser:
    """Return the parser of every command and every service."""
    from services.operator.__main__ import make_parser

    parser = make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in (*SERVICES, *OPT_IN, *OPTIONAL):
        add_service_arguments(commands.add_parser(name, help=f"run the {name}", description=f"Run the {name}."))
    return parser


def completed_parser() -> Parser:
    """Return the parser of everything, whose arguments know how a shell completes them."""
    import shtab

    parser = whole_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for action in (action for each in commands.choices.values() for action in each._actions):
        if action.type is Path:
            action.complete = shtab.FILE
        elif action.metavar in NAMED:
            action.complete = _asking(NAMED[str(action.metavar)])
    return parser


def _asking(kind: str) -> dict[str, Any]:
    """Return the shells' ways to ask for names, as shtab wants them told."""
    name = f"_fanwire_{kind}"
    functions = {shell: text.format(name=name, kind=kind) for shell, text in FUNCTIONS.items()}
    return {"bash": name, "zsh": name, "fish": f"({name})", "preamble": functions}


def _names(kind: str, line: str, settings: Settings) -> Iterator[str]:
    """Yield names. `line` is what the user has typed: its options say which settings and gateway are meant."""
    if kind == "interfaces":
        yield from (name for _, name in socket.if_nameindex())
        return
    parser = argparse.ArgumentParser(add_help=False)
    add_config_argument(parser)
    add_gateway_arguments(parser)
    typed, _ = parser.parse_known_args(shlex.split(line))
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(ANSWER_SECONDS)
    with RegistryClient(access(typed, load(typed.config) if typed.config else settings), ANSWER_SECONDS) as registry:
        if kind != "clients":
            yield from registry.ask("streams").listeners()
        if kind != "streams":
            yield from (
                name for name, each in registry.ask("list").entries().items() if kind == "clients" or each.streams
            )


def _give_up(*_: object) -> None:
    raise OperatorError(UNAVAILABLE, f"no answer from the gateway within {ANSWER_SECONDS} s")
