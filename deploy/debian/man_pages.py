"""Writes the man pages of fanwire, its commands and its services into a directory, from their own parsers.

Run it where fanwire and argparse-manpage are installed: `python -I man_pages.py DIRECTORY`.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import fanwire
from argparse_manpage.manpage import Manpage

sys.path.insert(0, fanwire.__path__[0])  # as the installed program does

from services.operator.commands.completion import whole_parser
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.process.installed_version import release
from shared.process.lifecycle import Parser
from shared.settings.location import SYSTEM, VARIABLE
from shared.settings.opt_in import OPT_IN

COMMAND, SERVICE = 1, 8
"""Sections of the manual."""
COMMON = (
    ("environment", f".TP\n.B {VARIABLE}\nthe settings file, where \\-\\-config names none"),
    ("files", f".TP\n.I {SYSTEM}\nthe settings, where no file is named"),
    (
        "exit status",
        "0, or as sysexits.h names it: 64 wrong usage, 69 something needed does not run, 73 something runs already, "
        "77 not permitted, 78 the settings can't be used. Else 1.",
    ),
)


class _MadeError(Exception):
    """Carries the parser that a service has made for itself."""


def service_parser(name: str) -> Parser:
    """Return the parser of a service: its `main` is run until it parses."""
    module = f"{name}.unprivileged" if name in ("transmitter", "offload") else f"{name}.__main__"

    def stop(parser: Parser, _: object) -> None:
        raise _MadeError(parser)

    try:
        with mock.patch.object(Parser, "parse_args", stop):
            import_module(f"services.{module}").main([])
    except _MadeError as made:
        parser: Parser = made.args[0]
        return parser
    raise AssertionError(f"{name} has no parser")


def page(parser: argparse.ArgumentParser, section: int, summary: str, see: str) -> Manpage:
    """Return the page of a parser."""
    made = Manpage(parser)
    made.prog = parser.prog.replace(" ", "-")
    made.description = summary.rstrip(".")
    made.source, made.manual, made.section = f"fanwire {release()}", "fanwire", section
    for heading, content in COMMON:
        made.add_section(heading, ">", content)
    made.add_section("see also", ">", see)
    return made


def references(names: list[str], section: int) -> str:
    """Return references to pages, one a line."""
    return " ,\n".join(f".BR fanwire\\-{name} ({section})" for name in names)


def main(directory: Path) -> None:
    """Write all pages."""
    whole = whole_parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    services = [*SERVICES, *OPT_IN, *OPTIONAL]
    own = [name for name in commands.choices if name not in services]
    about = ".BR fanwire (1)\n.br\nSettings, protocol and counters: /usr/share/doc/fanwire"
    pages = {}
    for name in own:
        parser = commands.choices[name]
        pages[f"fanwire-{name}.{COMMAND}"] = page(parser, COMMAND, parser.description or "", about)
    for name in services:
        parser = service_parser(name)
        pages[f"fanwire-{name}.{SERVICE}"] = page(parser, SERVICE, parser.description or "", about)
    everything = f"{references(own, COMMAND)} ,\n{references(services, SERVICE)}"
    pages[f"fanwire.{COMMAND}"] = page(whole, COMMAND, whole.description or "", everything)
    for name, each in pages.items():
        (directory / name).write_text(str(each))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
