"""Text of others (files, servers, logs) -> text that a terminal only shows."""


def in_a_line(what: object, most: int = 100) -> str:
    """Something out of a file, for a message: no line ends, nothing unprintable, not too long."""
    text = " ".join(printable(what).split())
    return text if len(text) <= most else f"{text[:most]}..."


def printable(what: object) -> str:
    """The text with its line ends; every other character that is not printable is a space.

    Terminals obey escapes (title, clipboard), carriage returns, backspaces, C1 controls and
    bidirectional overrides instead of showing them.
    """
    return "".join(c if c.isprintable() or c == "\n" else " " for c in str(what))


def quoted(what: object, most: int = 100) -> str:
    """Something out of a file, in quotes, with what is invisible in it shown as an escape."""
    text = repr(str(what))
    return text if len(text) <= most else f"{text[:most]}..."
