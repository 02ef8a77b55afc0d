"""The viewer's choices in `top`, and how keys change them. No I/O."""

from dataclasses import dataclass, field
from typing import Final

from services.operator.top.views import VIEWS, Mode, TableView

KEYS: Final = (
    ("1 to 5, Tab", "streams, exporters, collectors, journal, nodes; the next of them"),
    ("s S", "sort by the next column, by the one before"),
    ("r", "turn the order round"),
    ("/", "filter: type some text, then Enter; Esc shows all again"),
    ("t", "totals, or rates"),
    ("p", "pause, and go on"),
    ("arrows, j k", "scroll by a row; Page Up and Down by a screen; Home and End"),
    ("? h", "this help"),
    ("q", "end; so does Ctrl-C"),
)
SCROLLS: Final = {"up": -1, "k": -1, "down": 1, "j": 1}
BACKSPACES: Final = ("\x7f", "\x08")


@dataclass(slots=True)
class Sorting:
    """The column that a view is sorted by, and whether the largest comes first."""

    by: int
    descending: bool = True


@dataclass(slots=True)
class ScreenState:
    """The state of the screen."""

    view_number: int = 0
    mode: Mode = "rates"
    filter: str = ""
    typing: bool = False
    """The keys are text of the filter."""
    paused: bool = False
    helping: bool = False
    ended: bool = False
    top: int = 0
    """The first row that is shown."""
    page: int = 1
    """Rows that the screen has room for; it is set by who draws."""
    rows: int = 0
    """Rows that there are; it is set by who draws."""
    sortings: dict[str, Sorting] = field(default_factory=lambda: {view.name: Sorting(view.by) for view in VIEWS})

    @property
    def view(self) -> TableView:
        """The view that is shown."""
        return VIEWS[self.view_number]

    @property
    def sorting(self) -> Sorting:
        """The order of the view that is shown."""
        return self.sortings[self.view.name]

    def press(self, key: str) -> None:
        """Do what a key stands for; keys that stand for nothing are ignored."""
        if self.typing:
            self._type(key)
        elif self.helping:
            self.helping = False
            self.ended = key == "q"
        elif key in ("1", "2", "3", "4", "5", "\t"):
            self.view_number = (self.view_number + 1) % len(VIEWS) if key == "\t" else int(key) - 1
            self.top = 0
        elif key in ("s", "S"):
            self._sort_by_next(1 if key == "s" else -1)
        elif key == "r":
            self.sorting.descending = not self.sorting.descending
        elif key == "/":
            self.typing, self.top = True, 0
        elif key == "escape":
            self.filter = ""
        elif key == "t":
            self._switch_mode()
        elif key == "p":
            self.paused = not self.paused
        elif key in ("?", "h"):
            self.helping = True
        elif key == "q":
            self.ended = True
        else:
            self._scroll(key)

    def _type(self, key: str) -> None:
        if key == "\n":
            self.typing = False
        elif key == "escape":
            self.typing, self.filter = False, ""
        elif key in BACKSPACES:
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self.filter += key

    def _sort_by_next(self, step: int) -> None:
        shown = self.view.shown(self.mode)
        at = shown.index(self.sorting.by) if self.sorting.by in shown else 0
        self.sorting.by = shown[(at + step) % len(shown)]
        self.sorting.descending = self.view.columns[self.sorting.by].show is not None

    def _switch_mode(self) -> None:
        """Show totals instead of rates or the reverse; the order stays by what is in the same place."""
        self.mode = "totals" if self.mode == "rates" else "rates"
        for view in VIEWS:
            sorting = self.sortings[view.name]
            if sorting.by not in view.shown(self.mode):
                sorting.by += 1 if self.mode == "totals" else -1

    def _scroll(self, key: str) -> None:
        pages = {"page up": -self.page, "page down": self.page, "home": -self.rows, "end": self.rows}
        self.top += SCROLLS.get(key, 0) + pages.get(key, 0)
        self.keep_in_range()

    def keep_in_range(self) -> None:
        """Scroll back where there are fewer rows than there were."""
        self.top = max(0, min(self.top, self.rows - self.page))
