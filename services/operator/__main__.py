"""Reads the command line, runs the command it names, and turns what went wrong into one line and an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final

from services.operator.commands import clients, collect, config, frame, keys, ledger, ready, token, wake, watch
from services.operator.doctor import command as doctor
from services.operator.importing import command as importing
from shared.process.lifecycle import BAD_SETTINGS, NOT_PERMITTED, OK, OperatorError, Parser, configure_logging
from shared.settings.file import load
from shared.settings.model import SettingsError

INTERRUPTED: Final = 130
"""What a shell expects of a command that Ctrl-C cut short; those that run until Ctrl-C end with 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = make_parser().parse_args(arguments)
    configure_logging()
    try:
        code: int = options.run(options, load(options.config))
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def make_parser() -> Parser:
    """Every command with its arguments; each sets `run`."""
    parser = Parser(
        "fanwire",
        "UDP telemetry in; a copy to every collector that signed up.",
        epilog=f"services: fanwire {'|'.join(ready.SERVICES)} runs one (--help, --config); `honcho start` runs all",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in (clients, watch, collect, frame, wake, config, importing, keys, token, ledger, doctor, ready):
        module.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
