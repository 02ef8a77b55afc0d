"""The services as programs to start: their command and environment, and their answer whether they could start."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from shared.process.lifecycle import MANAGER_PID

ROOT: Final = Path(__file__).resolve().parents[3]
"""The directory that holds services/ and shared/, installed or in a checkout."""


def command(service: str, config: Path | None, *arguments: str) -> list[str]:
    """Return the command that runs a service, or the commands (`operator`), with these settings."""
    configured = ["--config", str(config)] if config else []
    return [sys.executable, "-P", "-m", f"services.{service}", *arguments, *configured]


def environment(name: str) -> dict[str, str]:
    """Return a service's environment: its name, our code, and the process whose end ends it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "HONCHO_PROCESS_NAME": name, MANAGER_PID: str(os.getpid())}


def refusals(services: Iterable[str], config: Path | None) -> dict[str, str]:
    """Ask each service whether it could use the settings here; return the reasons of those that could not."""
    asked = {
        service: subprocess.Popen(
            command(service, config, "--check"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(f"{service}.1"),
        )
        for service in services
    }
    answers = {service: (*process.communicate(), process.returncode) for service, process in asked.items()}
    return {
        service: (said or complaint or b"?").decode(errors="replace").splitlines()[-1]
        for service, (said, complaint, code) in answers.items()
        if code
    }
