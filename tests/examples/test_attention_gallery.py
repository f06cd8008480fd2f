"""The ideas of the gallery are what their papers define, and docs/guides/gallery.md says of them what is true."""

import re
from pathlib import Path

import attention_gallery
import gallery_page
import plain_ideas
import pytest

DOCS = Path(__file__).parents[2] / "docs" / "guides"
PAGE = (DOCS / "gallery.md").read_text()
IDEAS = {one.name: one for one in attention_gallery.IDEAS}
QUICK = {"differential_attention", "sink_attention", "forgetting_attention", "big_bird", "tree_attention"}
MOST = 2e-13  # relative, in float64


def cells(one):
    """The cells of an idea in the table of the page."""
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {gallery_page.link(one)} |")]
    return row.strip("| ").split(" | ")


@pytest.mark.parametrize(
    "one",
    [pytest.param(one, id=name, marks=() if name in QUICK else pytest.mark.contract) for name, one in IDEAS.items()],
)
def test_values_and_gradients_are_those_of_the_plain_definition(one):
    assert max(one.exactness(getattr(plain_ideas, one.name))) < MOST


@pytest.mark.thorough
@pytest.mark.parametrize("one", IDEAS.values(), ids=IDEAS)
def test_page_has_the_tiles_the_programs_and_the_caches_of_an_idea(one):
    row = gallery_page.Row(one, (0, 0), one.tiles(), one.runs_on("cpu"), one.runs_on("cuda"), one.caches())
    assert cells(one)[4:] == row.cells[4:]


def test_page_has_the_code_and_the_lines_of_every_idea():
    blocks = re.findall(r"```python\n(.*?)\n```", PAGE, re.DOTALL)
    assert [block for block in blocks if block.startswith(("def ", "class "))] == [one.source for one in IDEAS.values()]
    lines = [one.num_lines for one in IDEAS.values()]
    assert [int(cells(one)[1]) for one in IDEAS.values()] == lines
    assert len(lines) >= 20 and max(lines) <= 30 and 2 * sum(count < 10 for count in lines) >= len(lines)
    assert max(float(number) for one in IDEAS.values() for number in cells(one)[2:4]) < MOST
    assert {kind for one in IDEAS.values() if one.place for kind in cells(one)[7].split(", ")} == {
        "contiguous",
        "ring",
        "paged",
    }


def test_every_idea_has_its_picture_and_its_definition():
    pictures = [DOCS / "gallery" / f"{name}.png" for name in IDEAS]
    assert sorted(pictures) == sorted((DOCS / "gallery").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 300_000
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert all(callable(getattr(plain_ideas, name)) for name in IDEAS)


def test_another_definition_is_noticed():
    def with_lower_sinks(query, key, value, sink):
        return plain_ideas.sink_attention(query, key, value, sink - 0.1)

    values, gradients = IDEAS["sink_attention"].exactness(with_lower_sinks)
    assert min(values, gradients) > 1e-3


@pytest.mark.contract
@pytest.mark.parametrize("main", ["attention_gallery"], indirect=True)
def test_attention_gallery_prints_and_writes(main, tmp_path, capsys):
    [row] = main(["--only", "neighbourhood_attention", "--write", str(tmp_path)])
    assert row.tiles == (176, 512) and max(row.exact) < MOST
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("idea ") and line.split()[:3] == ["Neighbourhood", "attention", "5"]
    assert row.one.source in (tmp_path / "gallery.md").read_text()
    assert (tmp_path / "gallery" / "neighbourhood_attention.png").read_bytes().startswith(b"\x89PNG")
