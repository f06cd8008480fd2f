"""The code of the pages fits the column of the site, and a reader need not scroll to see the end of a line."""

import ast
import re

import pytest
from shell_lines import BEGINS, FENCE, ROOT, SHELLS

WIDTH = 88  # at 1400 pixels about 107 fit, and fewer on narrower screens
EXAMPLES = {line for path in (ROOT / "examples").glob("*.py") for line in path.read_text().splitlines()}


def too_wide(text):
    """The lines of a page's Python and commands that are wider than `WIDTH`.

    What a program prints is as wide as it is: the comment behind an expression, and the lines below a command. Lines
    that a page takes from a file of examples/ have the width of that file.
    """
    for block in FENCE.finditer(text):
        language, code = block[3].strip(), block[4]
        if language in ("python", "py"):
            lines = code.splitlines()
            for statement in ast.parse(code).body:
                if isinstance(statement, ast.Expr):
                    end = statement.end_lineno - 1
                    lines[end] = lines[end][: statement.end_col_offset]
            yield from (line for line in lines if len(line) > WIDTH and line not in EXAMPLES)
        elif language in SHELLS:
            for command in re.findall(r"(?:.*\\\n)*.+", code):
                if BEGINS.search(command.replace("\\\n", " ")) or command.startswith("#"):
                    yield from (line for line in command.splitlines() if len(line) > WIDTH)


def test_code_fits_the_column():
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    assert {str(page.relative_to(ROOT)): wide for page in pages if (wide := list(too_wide(page.read_text())))} == {}


LONG = "x" * 40


@pytest.mark.parametrize(
    ("language", "code", "count"),
    [
        ("python", f"{LONG} = {LONG}, {LONG}", 1),
        ("python", f"{LONG} = 1  # {LONG} {LONG}", 1),
        ("python", f"def f():\n    {LONG}  # {LONG} {LONG}", 1),
        ("python", f"{LONG}  # {LONG} {LONG}", 0),
        ("python", f"{LONG}, {LONG}, {LONG}  # 1", 1),
        ("python", f"# {LONG} {LONG} {LONG}", 1),
        ("py", f"f(\n    {LONG}, {LONG}, {LONG}\n)", 1),
        ("", f"attnax train --data {LONG} --out {LONG}", 1),
        ("", f"attnax train \\\n    --data {LONG} --out {LONG}", 1),
        ("", f"attnax train --data {LONG} \\\n    --out {LONG}", 0),
        ("", f"$ attnax train\n{LONG} {LONG} {LONG}", 0),
        ("", f"# {LONG} {LONG} {LONG}", 1),
        ("yaml", f"run: |\n  exec attnax train --data {LONG} --out {LONG}", 1),
        ("text", f"{LONG} {LONG} {LONG}", 0),
    ],
)
def test_wide_lines_are_found_and_printed_ones_are_not(language, code, count):
    assert len(list(too_wide(f"Text.\n\n```{language}\n{code}\n```\n"))) == count
