"""Text from elsewhere, on its way to a person: one line, and nothing in it that a terminal would obey."""


def printable(text: str) -> str:
    r"""Return the text with what can't be seen as Python writes it; bytes that were no UTF-8 among it.

    >>> printable("a line\nand \x1b[2J")
    'a line\\nand \\x1b[2J'
    """
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
