"""Writes the results of a command into a page of the documentation."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_section"]

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
