"""The code of the site, without Sphinx: names have places, loads from outside are noticed, bars are as long as numbers,
numbers are not broken.

`make docs` builds the site and checks the rest.
"""

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import bar_plot  # noqa: E402
import offline  # noqa: E402
import public_names  # noqa: E402
import words  # noqa: E402

PART = re.compile(r"^(.+) <(.+)>$", re.MULTILINE)
TOCTREE = re.compile(r"^```\{toctree\}\n(?::.+:.*\n)+\n((?:.+\n)+)```$", re.MULTILINE)
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


TABLE = [
    ["case", "T", "Attnax ms", "a, b ms", "of peak", "of peak"],
    ["full", "64", "2.0 / 4.0", "1.0 / 5.0", "50%", "-"],
    ["causal", "64", "3.0 / 6.0", "2.0 / 3.0", "20%", "-"],
    ["one line", "128", "not timed", "-", "-", "-"],
]


@pytest.mark.parametrize(
    ("cell", "number", "text", "value"),
    [
        ("53.3 / 54.6", 1, "53.3", 53.3),
        ("53.3 / 54.6", 2, "54.6", 54.6),
        ("16.5 (16.3)", 1, "16.5", 16.5),
        ("1.63x", 1, "1.63x", 1.63),
        ("62%", 1, "62%", 62),
        ("1377 ms", 1, "1377 ms", 1377),
        ("25,437,696", 1, "25,437,696", 25437696),
        ("3.2e-07", 1, "3.2e-07", 3.2e-7),
        ("3474 (dense mask)", 1, "3474 (dense mask)", 3474),
        ("43-48", 1, "43-48", 48),
        ("43-48 ms", 1, "43-48 ms", 48),
        ("1e-07-2e-07 (3e-07)", 1, "1e-07-2e-07", 2e-7),
        ("5 / 43-48 ms", 2, "43-48 ms", 48),
        ("76 ms (dense mask)", 1, "76 ms (dense mask)", 76),
        ("no backward on CPU", 2, "no backward on CPU", None),
        ("-", 1, "", None),
        ("", 1, "", None),
    ],
)
def test_a_cell_is_a_figure_or_words(cell, number, text, value):
    assert bar_plot.read_cell(cell, number) == bar_plot.Figure(text, value)


@pytest.mark.parametrize(
    "cell", ["6 of 6", "PyTorch: 1322 ms", "about 5", "5 / 6 / 7", "-3", "1,23", "1e", "<1", "43 ms-48"]
)
def test_another_cell_with_digits_is_refused(cell):
    with pytest.raises(bar_plot.BarsError, match=f'words without digits; got "{re.escape(cell)}"'):
        bar_plot.read_cell(cell)


def drawn(table=TABLE, **options):
    """For each group: its label, and the lengths, names of colours and texts of its bars."""
    html = bar_plot.draw(bar_plot.Plot(**options), table[0], table[1:])
    bar = re.compile(r'bars-bar (\w+)"><i style="--part: ([\d.]+)"></i>([^<]*)')
    groups = html.split('bars-label">')[1:]
    return html, [(each.partition("</div>")[0], bar.findall(each)) for each in groups]


def test_bars_are_as_long_as_the_numbers_and_a_loss_is_marked():
    plot = {"values": "Attnax ms, a, b ms", "labels": "case, T", "unit": "ms, less is better", "number": 2}
    html, groups = drawn(**plot)
    assert groups == [
        ("full, T 64", [("a0", "0.6667", "4.0"), ("o0", "0.8333", "5.0")]),
        ("causal, T 64 <em>slower</em>", [("a0", "1.0000", "6.0"), ("o0", "0.5000", "3.0")]),
        ("one line, T 128", []),
    ]
    assert "Attnax: not timed" in html and "</i>a, b</span>" in html and "<details" not in html
    assert "Attnax is slower in 1 of 2" in html.partition(">")[0]
    assert drawn(**plot, scale="own")[1][0][1] == [("a0", "0.8000", "4.0"), ("o0", "1.0000", "5.0")]
    assert drawn(**plot | {"unit": "more is better"})[1][0][0] == "full, T 64 <em>worse</em>"
    assert drawn([TABLE[0], *20 * TABLE[1:3]], **plot)[0].startswith('<details class="bars-folded"><summary>Bars: ms')


def test_columns_are_groups_on_request():
    html, groups = drawn(values="Attnax ms, a, b ms", by="column", without="one line", attnax="full", full=4)
    assert "the full width is 4" in html
    assert groups == [
        ("Attnax ms", [("a0", "0.5000", "2.0"), ("o0", "0.7500", "3.0")]),
        ("a, b ms", [("a0", "0.2500", "1.0"), ("o0", "0.5000", "2.0")]),
    ]


def test_a_logarithmic_scale_begins_below_the_least():
    table = [["", "error"], ["first", "1e-07"], ["second", "1e-06"], ["third", "0"]]
    html, groups = drawn(table, values="error", scale="log", attnax="all")
    assert [bars[0][1:] for _, bars in groups] == [("0.5000", "1e-07"), ("1.0000", "1e-06"), ("0.0000", "0")]
    assert "logarithmic, from 1e-08" in html and 'from <span class="numeral">1e-08</span>' in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "torch"}, "the table has no column \"torch\"; it has 'case', 'T', 'Attnax ms'"),
        ({"values": "Attnax ms,"}, 'the table has no column ""'),
        ({"values": "Attnax ms,, a, b ms"}, 'the table has no column ", a, b ms"'),
        ({"values": "Attnax ms of peak"}, 'has no column "Attnax ms of peak"'),
        ({"values": "of peak"}, 'the table has 2 columns "of peak"'),
        ({"values": "Attnax ms", "labels": "name"}, 'has no column "name"'),
        ({"values": "Attnax ms", "without": "padding"}, 'has no row "padding"'),
        ({"values": "Attnax ms", "attnax": "ours"}, 'has no bar "ours"'),
        ({"values": "T", "number": 2}, 'number=2, but a cell has 1 of them: "64"'),
        ({"values": "case"}, 'the columns "case" have no number above 0'),
        ({"values": "a, b ms"}, "no bar starts with \"Attnax\"; got 'a, b ms'. Set attnax"),
        ({"values": "Attnax ms", "full": 1.9}, "at least the largest number, 3; got full=1.9 and scale=linear"),
        ({"values": "Attnax ms", "full": 0.0}, "at least the largest number, 3; got full=0 and scale=linear"),
        ({"values": "Attnax ms", "full": 9.0, "scale": "own"}, "full needs a linear scale"),
        ({"values": "Attnax ms", "full": 9.0, "scale": "log"}, "full needs a linear scale"),
    ],
)
def test_what_cannot_be_drawn_is_named(options, message):
    with pytest.raises(bar_plot.BarsError, match=re.escape(message)):
        drawn(**options)


def test_bars_beside_nothing_are_all_attnax_on_request():
    html, groups = drawn(values="Attnax ms, a, b ms", attnax="all", unit="ms, less is better")
    assert groups[1] == ("causal", [("a0", "1.0000", "3.0"), ("a1", "0.6667", "2.0")])
    assert "Attnax is slower" not in html


def test_there_are_colours_for_four():
    table = [["", *"abcde"], ["x", *"12345"]]
    with pytest.raises(bar_plot.BarsError, match="colours for 4 bars of Attnax and 4 others"):
        drawn(table, values="a, b, c, d, e", attnax="all")
    assert len(drawn(table, values="a, b, c, d, e", attnax="a")[1][0][1]) == 5


@pytest.mark.parametrize(
    "cell", ["171", "1377 ms", "3474 (dense mask)", "2.9e-04 (1.9e-03)", "<1", "-3", "53.3 / 54.6", "43-48 ms"]
)
def test_a_cell_that_bars_can_read_is_a_figure_with_or_without_a_sign(cell):
    assert words.is_figure(cell)


@pytest.mark.parametrize(
    "cell", ["", "-", "T=4096", "none on the CPU", "8 packed documents", "6 of 6", "1377 ms (with no mask at all)"]
)
def test_words_and_long_cells_are_no_figures(cell):
    assert not words.is_figure(cell)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3e-6 absolute and 1.3e-06 relative", ["3e-6", "1.3e-06"]),
        ("43-48 tokens in 2026-01-02", ["43-48", "2026-01-02"]),
        ("AVX-512, T-5 and 16-bit, 0.96x", []),
        ("", []),
    ],
)
def test_numbers_with_hyphens_are_pieces(text, numbers):
    pieces = list(words.pieces(text))
    assert [piece for piece, is_number in pieces if is_number] == numbers
    assert "".join(piece for piece, _ in pieces) == text


def test_a_picture_has_the_words_before_it():
    assert words.alt_text("Caches", "They grow.") == words.alt_text("Caches", "") == "Caches"
    before = "A first one. A mask is\ndrawn. This one is near, 0.5 of all:"
    assert words.alt_text("Masks", before) == "Masks: A mask is drawn. This one is near, 0.5 of all"


def test_the_source_of_a_page_is_in_the_repository_of_the_project():
    address = words.source_of("docs/learn/masks.ipynb", DOCS.parent)
    assert address.startswith("https://") and address.endswith("/blob/main/docs/learn/masks.ipynb")


def test_parts_of_the_navigation_fold_and_have_names_of_their_own():
    """A folder's first page lists the others, so that the sidebar shows only the part that a reader is in."""
    for name, first in (parts := PART.findall((DOCS / "index.md").read_text())):
        page = DOCS / f"{first}.md"
        (listed,) = TOCTREE.findall(page.read_text())
        pages = [page, *(page.parent / f"{other}.md" for other in listed.split())]
        assert len(pages) > 2
        assert name not in [each.read_text().splitlines()[0].removeprefix("# ") for each in pages if each.exists()]
    assert len(parts) > 5
