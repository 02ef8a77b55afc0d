"""Runs a module with system calls refused by seccomp, as containers do: `RULES -m MODULE ARGUMENT...`.

RULES are separated by commas. `recvmmsg=ENOSYS` refuses a call; `socket:0:10=EAFNOSUPPORT` if argument 0 is 10.
"""

import errno
import runpy
import sys


def refuse(rules: str) -> None:
    """Let the kernel refuse these calls to this process, and to those that it starts, for good."""
    from tests.deploy.confined import SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, SCMP_CMP_EQ, Comparison, Filter

    refusing = Filter(SCMP_ACT_ALLOW)
    for rule in rules.split(","):
        call, _, name = rule.partition("=")
        call, *condition = call.split(":")
        comparisons = [Comparison(int(condition[0]), SCMP_CMP_EQ, int(condition[1]), 0)] if condition else []
        refusing.add(SCMP_ACT_ERRNO | getattr(errno, name), call, *comparisons)
    refusing.load()


def refused(rules: str) -> list[str]:
    """The interpreter under these rules, to be continued by `-m` and a module."""
    return [sys.executable, "-m", "tests.refusing", rules]


if __name__ == "__main__":
    refuse(sys.argv[1])
    del sys.argv[:3]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
