"""Tables of results: printed, as Markdown, and in a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["markdown_table", "show", "write_section"]

_END = "<!-- end -->"


def write_section(page: Path, command: str, text: str) -> None:
    """Replaces the text between `<!-- command -->` and the next `<!-- end -->` of a page.

    Raises:
        ValueError: the page has no such place.
    """
    before, begin, rest = page.read_text().partition(f"<!-- {command} -->\n")
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for a table: <!-- {command} --> and, on a later line, {_END}.")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header."""
    header, *rest = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *rest])


def show(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)
