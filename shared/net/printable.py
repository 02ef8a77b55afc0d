"""Text from elsewhere, made fit for a person: one line, with nothing in it that a terminal would obey."""


def printable(text: str) -> str:
    r"""Return the text with unprintable characters escaped as Python writes them, bytes that were no UTF-8 among them.

    >>> printable("a line\nand \x1b[2J")
    'a line\\nand \\x1b[2J'
    """
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
