"""Starts offload in two steps: first the opener, with privilege; then the planner without any, and its applier.

The opener runs this file as a script, in Python's isolated mode: its path has only the installed packages.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the steps; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Imported here, each in its step: no third-party code runs before the privileges are reduced.
    if given[:1] not in (["--inherited"], ["--applier"]):
        from services.offload.opener import open_and_exec

        return open_and_exec(given)
    from shared.process.privileges import harden

    harden()  # an exec made this process dumpable again: one of the same user could take its socket
    if given[0] == "--applier":
        from services.offload.applying.applier import main as apply

        return apply(given)
    from services.offload.unprivileged import main as serve

    return serve(given)


if __name__ == "__main__":
    sys.exit(main())
