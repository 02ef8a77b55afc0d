"""The installed program: puts the directory that holds services/ and shared/ on the import path and starts one.

Installed as fanwire/__main__.py. `fanwire ingest` runs services.ingest; any other word is an operator command.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

INTERRUPTED = 130
"""Exit code that a shell expects of a command that Ctrl-C cut short."""


def main() -> int:
    """Run the service that the first argument names, else hand all arguments to the operator commands."""
    here = Path(__file__).resolve().parent
    if (here / "services").is_dir():
        sys.path.insert(0, str(here))
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name.isidentifier() and name != "operator" and find_spec(f"services.{name}"):
        del sys.argv[1]
    else:
        name = "operator"
    try:
        return int(import_module(f"services.{name}.__main__").main())
    except KeyboardInterrupt:  # while modules load
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
