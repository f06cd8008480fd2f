"""What strangers wrote, made fit for a terminal."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """The text on one line, with what a terminal would obey or cannot show spelled as Python spells it.

    Names and values of a checkpoint come from files of others: an escape code in one could rewrite what was printed
    before, a line end could pass for a line of ours, and half a surrogate pair cannot be printed at all.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
