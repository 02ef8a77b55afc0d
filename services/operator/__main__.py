"""Reads the command line, runs the command it names, and turns a failure into one line and an exit code."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from services.operator.cli.output import NO_ROOM, discard_output, escape_what_cannot_be_encoded, say
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.process.lifecycle import (
    BAD_SETTINGS,
    FAILED,
    NOT_PERMITTED,
    OK,
    USAGE,
    OperatorError,
    Parser,
    configure_logging,
)
from shared.settings.explain import SettingsError, did_you_mean
from shared.settings.file import load, load_listeners
from shared.settings.model import Settings
from shared.settings.opt_in import OPT_IN

INTERRUPTED: Final = 130
"""Exit code that a shell expects of a command that Ctrl-C cut short; those that run until Ctrl-C end with 0."""
EVERY_SERVICE: Final = (*SERVICES, *OPT_IN, *OPTIONAL)
COMMANDS: Final = {
    **dict.fromkeys(("clients", "register", "leave"), "commands.clients"),
    **dict.fromkeys(("withhold", "release"), "commands.withhold"),
    "watch": "commands.watch",
    **{name: f"commands.captures.{name}" for name in ("tap", "play", "export", "replay")},
    **{name: f"commands.{name}" for name in ("collect", "config")},
    **{name: f"commands.frames.{name}" for name in ("frame", "wake")},
    "import": "importing.command",
    **{name: f"commands.{name}" for name in ("keys", "token", "streams", "nodes", "ledger")},
    **{name: f"commands.running.{name}" for name in ("ready", "status")},
    "top": "top.command",
    "doctor": "doctor.command",
    "completion": "commands.completion",
    **dict.fromkeys(("run", "stop"), "commands.running.run"),
}
"""The module of each command. Only that one is imported: the imports of another may take long to load."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    escape_what_cannot_be_encoded()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next(iter(arguments), "--help")
    if command not in COMMANDS and not command.startswith("-"):
        say(f"fanwire: no command {command!r}{did_you_mean(command, (*COMMANDS, *EVERY_SERVICE))}; `fanwire` lists all")
        return USAGE
    options = make_parser(command).parse_args(arguments or [command])
    configure_logging()
    try:
        code: int = options.run(options, _settings(options))
        sys.stdout.flush()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS
    except OperatorError as error:
        print(f"fanwire {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"fanwire {options.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return NOT_PERMITTED
    except BrokenPipeError:  # as in `fanwire watch | head -1`; what is still buffered has nowhere to go
        discard_output()
        return OK
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename:
            raise
        discard_output()
        say(f"fanwire {options.command}: standard output: {error.strerror}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _settings(options: argparse.Namespace) -> Settings:
    """Return the settings; if they can't be used, the gateway's address alone, for a command that needs no more."""
    try:
        return load(options.config)
    except SettingsError as error:
        if not options.goes_by_defaults:
            raise
        settings = load_listeners(options.config)
        listen = sorted(settings.gateway.listen, key=lambda text: text.startswith("tls:"))
        say(str(error))
        say(f"these settings can't be used: asking the gateway at {getattr(options, 'gateway', None) or listen[0]}")
        return settings


def make_parser(command: str = "") -> Parser:
    """Return the parser for a command, or for every command when none has that name; each sets `run`."""
    parser = Parser(
        "fanwire",
        "UDP telemetry in; a copy to every collector that signed up.",
        epilog=f"services: fanwire {'|'.join(EVERY_SERVICE)} runs one (--help, --config); `fanwire run` runs all",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    wanted = [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values())
    for module in wanted:
        import_module(f"services.operator.{module}").add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
