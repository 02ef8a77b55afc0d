"""Tells which tests start processes, by what their code and their fixtures refer to; proves it of the others."""

import inspect
import multiprocessing
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

import pytest

MARKER: Final = "process"
STARTERS: Final = (subprocess, multiprocessing)
EVENTS: Final = frozenset({"subprocess.Popen", "os.fork", "os.posix_spawn"})
"""Audit events of whatever starts one, see the table in Python's documentation."""

started: Final[list[str]] = []
"""Functions that have started a process in this one, since the list was last cleared."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Mark every test that can start a process."""
    graph, known = _Graph(), dict[object, bool]()
    for item in items:
        if isinstance(item, pytest.Function):
            place = item.parent, item.function  # a class may have it, and fixtures, from another one
            if place not in known:
                known[place] = any(map(graph.starts, _parts(item)))
            if known[place] or any(map(graph.starts, _parameters(item))):
                item.add_marker(MARKER)


def watch() -> None:
    """Note from now on in `started` whatever starts a process."""
    sys.addaudithook(lambda event, _: started.append(event) if event in EVENTS else None)


def _parts(item: pytest.Function) -> Iterator[object]:
    """Yield a test's function, and the functions of its fixtures, also of those others ask for."""
    yield item.function
    for fixtures in item._fixtureinfo.name2fixturedefs.values():
        yield from (fixture.func for fixture in fixtures)


def _parameters(item: pytest.Function) -> Iterator[object]:
    """Yield a test's parameters, but for those that refer to nothing."""
    if hasattr(item, "callspec"):
        yield from (each for each in item.callspec.params.values() if not isinstance(each, str | bytes | int | float))


class _Graph:
    """References from function to function, each found out once."""

    def __init__(self) -> None:
        # Each with what has the id, so that nothing else gets it.
        self._referred: dict[int, tuple[object, list[object]]] = {}
        self._starts: dict[int, bool] = {}

    def starts(self, found: object) -> bool:
        """Return whether `found`, or anything of tests/ that its names lead to, refers to what starts processes."""
        seen, waiting = set[int](), [found]
        while waiting:
            each = waiting.pop()
            if self._starts.get(id(each)) or any(each is starter for starter in STARTERS):
                self._starts[id(found)] = True
                return True
            if id(each) not in seen and id(each) not in self._starts:
                seen.add(id(each))
                waiting += self._refers_to(each)
        self._starts |= dict.fromkeys(seen, False)  # nor does any of those that it leads to
        return False

    def _refers_to(self, found: object) -> list[object]:
        if id(found) not in self._referred:
            self._referred[id(found)] = found, list(_referred(found))
        return self._referred[id(found)][1]


def _referred(found: Any) -> Iterator[object]:
    """Yield what a function, a class or an object of tests/ refers to."""
    found = inspect.unwrap(found)
    if isinstance(found, FunctionType):
        names = set(_names(found.__code__))
        if found.__module__.startswith("tests"):
            named = [value for name, value in found.__globals__.items() if name in names]
            modules = [
                vars(each) for each in named if isinstance(each, ModuleType) and each.__name__.startswith("tests")
            ]
            yield from named
            yield from (value for module in modules for name, value in module.items() if name in names)
            yield from (cell.cell_contents for cell in found.__closure__ or ())
    else:
        kind = found if isinstance(found, type) else type(found)
        if kind.__module__.startswith("tests"):
            yield from kind.__bases__
            yield from (getattr(value, "fget", value) for value in vars(kind).values())


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code refers to, what is defined in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
