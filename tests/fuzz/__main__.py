"""Fuzzes every target, guided by coverage (atheris), for as long as told; run by `make fuzz`.

Each target gets its share of the time, in a process of its own. What is found is printed as a line for its corpus.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.fuzz.corpus import read_corpus, write_corpus
from tests.fuzz.targets import TARGETS

INPUT_SECONDS: Final = 10
"""One input that takes longer is a finding."""
MEMORY_MB: Final = 1024
"""An input that makes the process larger is a finding too."""
LARGEST: Final = 2048
MEMORY: Final = Path("/dev/shm")
"""Files that a target writes are written thousands of times."""
KEPT_BYTES: Final = 300
KEPT: Final = 60
"""Of the inputs found that reach something new, so many of at most that size are kept."""


def fuzz(name: str, seconds: int, keep: bool) -> bool:
    """Fuzz one target; whether nothing was found."""
    with tempfile.TemporaryDirectory(prefix="fanwire-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as directory:
        inputs = Path(directory, "inputs")
        inputs.mkdir()
        for number, data in enumerate(read_corpus(name)):
            (inputs / f"kept{number}").write_bytes(data)
        options = [f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}"]
        options += [f"-max_len={LARGEST}", f"-artifact_prefix={directory}/found-", "-print_final_stats=1"]
        command = [sys.executable, "-m", "tests.fuzz.guided", name, *options, str(inputs)]
        environment = {**os.environ, "TMPDIR": directory}  # what the target leaves goes with it
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        found = [path.read_bytes() for path in Path(directory).glob("found-*")]
        said = done.stdout + done.stderr
        counts = re.findall(r"number_of_executed_units: (\d+)", said)[-1:] or ["0"]
        reached = re.findall(r"cov: (\d+)", said)[-1:] or ["0"]
        found_any = "FOUND" if done.returncode else "nothing"
        print(f"{name:14} {int(counts[0]):10,} inputs {int(reached[0]):6,} places reached  {found_any}", flush=True)
        for data in found:
            print(f"  corpus/{name}.hex: {data.hex()}")
        if done.returncode:
            print(said.partition("Uncaught Python exception: ===")[2].partition("\n\n")[0] or said[-3000:])
        if keep:
            _keep(name, inputs, found)
        return done.returncode == 0


def _keep(name: str, inputs: Path, found: list[bytes]) -> None:
    """Add what reached something new to the corpus, the smallest of it."""
    reaching = sorted((path.read_bytes() for path in inputs.iterdir()), key=len)
    small = [data for data in reaching if 0 < len(data) <= KEPT_BYTES]
    write_corpus(name, [*read_corpus(name), *small[:KEPT], *found])


def main() -> int:
    """Fuzz all targets, or those named."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=600, help="for all together (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the inputs that reach something new")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    sound = [fuzz(name, max(1, options.seconds // len(targets)), options.keep) for name in targets]
    return int(not all(sound))


if __name__ == "__main__":
    sys.exit(main())
