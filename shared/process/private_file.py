"""Files with secrets: read only where no other user can read them, which would show it, or write them."""

import os
import stat
from pathlib import Path

from shared.process.lifecycle import BAD_SETTINGS, OperatorError


def read_private(path: Path, setting: str, most: int) -> bytes:
    """Return a file's content, up to a number of bytes. OperatorError when other users can read or write it; OSError.

    A group may be able to read a file of root's: systemd gives a service its credentials this way.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        others = 0o077 if status.st_uid == os.geteuid() else 0o037
        if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & others:
            raise OperatorError(
                BAD_SETTINGS,
                f"{setting}: {path}: file is accessible to other users; make it mode 600, owned by root or this "
                f"service's user: `chmod 600 {path}`",
            )
        return file.read(most)
