"""Troubles with the servers: each is said once, when it begins or becomes another, and once when it is over."""

from shared.log import get_logger

log = get_logger()


class Troubles:
    """The present troubles, by the thing that they are with: a word, or a word and a particular such as a server."""

    def __init__(self) -> None:
        self.now: dict[str, str] = {}

    def say(self, what: str, told: str) -> None:
        """Log a trouble, unless it is known."""
        if self.now.get(what) != told:
            self.now[what] = told
            log.warning(told, uplink=what)

    def end(self, what: str, told: str) -> None:
        """Log that a trouble is over, if there was one; `what` stands for all its particulars."""
        over = [each for each in self.now if each == what or each.startswith(f"{what} ")]
        for each in over:
            del self.now[each]
        if over:
            log.info(told, uplink=what)
