"""Rules for the texts of pages: what a figure is, and what a picture of a notebook shows. They need no Sphinx."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"
AMOUNT = rf"((?:({NUMBER})-)?({NUMBER})(?:x|%| ms| s| MiB| GB)?)"  # a number or a range of two, and its unit
# "62%"; "43-48 ms"; "53.3 / 54.6"; "16.5 (16.3)"; "76 (dense mask)"
CELL = rf"{AMOUNT}(?: / {AMOUNT}| \({AMOUNT}\)|( \([^\d()]+\)))?"
LONGEST_FIGURE = 20  # "3474 (dense mask)"; a longer cell may be broken
BROKEN_AT_HYPHENS = re.compile(r"\d[\d.,]*(?:e?-\d[\d.]*)+")  # "1.3e-06" and "43-48", which browsers would break


def is_figure(text: str) -> bool:
    """Whether a cell of a table is a figure, which stays on one line: a `CELL`, which may have a sign."""
    return len(text) <= LONGEST_FIGURE and re.fullmatch(rf"[<>~+-]?{CELL}", text) is not None


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is a number that must not be broken."""
    at = 0
    for match in BROKEN_AT_HYPHENS.finditer(text):
        if match.start() > at:
            yield text[at : match.start()], False
        yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def alt_text(heading: str, before: str) -> str:
    """What a picture of a notebook shows: the heading, and the text before the picture if it announces one."""
    before = " ".join(before.split())
    if not before.endswith(":"):
        return heading
    last_sentences = re.split(r"(?<=[.!?]) ", before.removesuffix(":"))[-2:]
    return f"{heading}: {' '.join(last_sentences)}"


def source_of(page: str, root: Path) -> str:
    """The address of a file of the repository, which `project.urls` of pyproject.toml begins.

    Args:
        page: the path of the file from the root of the repository.
        root: the root of the repository.
    """
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return f"{urls['Source']}/blob/main/{page}"
