"""The code of the site, without Sphinx: every public name has a place, and what is loaded from outside is noticed.

`make docs` builds the site and checks the rest.
"""

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import offline  # noqa: E402
import public_names  # noqa: E402

TOCTREE = re.compile(r"^```\{toctree\}\n:caption: (.+)\n(?::\w+:\n)*\n((?:.+\n)+)```$", re.MULTILINE)
NAMES = re.compile(r"^\.\. names:: (\S+)\n\n((?:   \w+\n)+)", re.MULTILINE)


def names_of_pages():
    """The names that the pages of the reference list, in full."""
    for page in sorted((DOCS / "reference").glob("*.rst")):
        for module, names in NAMES.findall(page.read_text()):
            yield from (f"{module}.{name}" for name in names.split())


def test_every_public_name_has_one_place_in_the_reference():
    listed = list(names_of_pages())
    assert len(listed) == len(set(listed)) > 250
    assert public_names.undocumented(listed) == []
    assert set(listed) == set(public_names.public_objects())
    assert public_names.undocumented(listed[1:]) == listed[:1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.html", '<script src="https://cdn.example/x.js"></script>'),
        ("page.html", '<link rel="stylesheet" href="//fonts.example/css">'),
        ("page.html", '<link rel="preconnect" href="https://fonts.example">'),
        ("page.html", "<img alt='' src='http://example.org/a.png'>"),
        ("page.html", '<img srcset="a.png 1x, https://example.org/b.png 2x">'),
        ("page.html", '<p style="background: url(https://example.org/a.png)">'),
        ("page.html", "<style>@import 'https://example.org/a.css';</style>"),
        ("page.html", '<script>fetch("https://example.org/data.json")</script>'),
        ("page.html", '<iframe src="https://example.org"></iframe>'),
        ("style.css", '@font-face { src: url("https://example.org/a.woff2") }'),
        ("style.css", "@import url(//example.org/a.css);"),
        ("script.js", "import('https://example.org/a.js')"),
        ("script.js", 'script.src = "https://example.org/a.js"'),
        ("picture.svg", '<svg><image href="https://example.org/a.png"/></svg>'),
    ],
)
def test_what_is_loaded_from_outside_is_found(name, text):
    assert len(offline.loaded_from_outside(name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.html", '<a href="https://example.org">a link</a> <code>fetch("https://example.org")</code>'),
        ("page.html", '<link rel="canonical" href="https://example.org"><script src="../_static/x.js"></script>'),
        ("page.html", '<svg xmlns="http://www.w3.org/2000/svg"></svg><img src="data:image/png;base64,AA">'),
        ("style.css", "a { background: url(a.png) } /* https://example.org */"),
        ("script.js", "// https://example.org\nconst name = 'https://example.org'"),
    ],
)
def test_links_and_own_files_are_not(name, text):
    assert offline.loaded_from_outside(name, text) == []


def test_no_page_has_the_name_of_its_part_of_the_navigation():
    parts = TOCTREE.findall((DOCS / "index.md").read_text())
    assert len(parts) > 5
    for caption, pages in parts:
        firsts = [DOCS / f"{page}.md" for page in pages.split() if (DOCS / f"{page}.md").exists()]
        assert caption not in [page.read_text().splitlines()[0].removeprefix("# ") for page in firsts]
