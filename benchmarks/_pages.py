"""Tables of results: printed, as Markdown, as bars, and in a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["bars", "markdown_table", "show", "write_kind", "write_section"]

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


def write_kind(page: Path, command: str, kind: str, text: str) -> None:
    """Replaces the text of a kind of machine, between `<!-- command, kind -->` and the next `<!-- end -->`.

    A page without that place, or no page yet, gets it at the end.
    """
    name = f"{command}, {kind}"
    written = page.read_text() if page.exists() else ""
    if f"<!-- {name} -->\n" not in written:
        page.write_text(f"{written}\n<!-- {name} -->\n{_END}\n".lstrip())
    write_section(page, name, text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header."""
    header, *rest = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *rest])


def bars(*values: str, **options: object) -> str:
    """The directive that draws some columns of the table before it; `docs/_ext/bar_plot.py` describes the options."""
    given = {"values": ", ".join(values), **options}
    return "\n".join(["```{bars}", *(f":{name}: {value}" for name, value in given.items()), "```"])


def show(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)
