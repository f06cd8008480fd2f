"""The ideas of the gallery are what their papers define, and docs/gallery.md says of them what is true."""

import re
from pathlib import Path

import attention_gallery
import gallery_page
import plain_ideas
import pytest

DOCS = Path(__file__).parents[2] / "docs"
QUICK = {"differential_attention", "sink_attention", "forgetting_attention", "big_bird", "tree_attention"}
PAGE = (DOCS / "gallery.md").read_text()
IDEAS = {one.name: one for one in attention_gallery.IDEAS}


def cells(one):
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {gallery_page.link(one)} |")]
    return row.strip("| ").split(" | ")


def each(quick):
    """Every idea; those that are not in `quick` run in `make contract`."""
    return [
        pytest.param(one, id=name, marks=() if name in quick else pytest.mark.contract) for name, one in IDEAS.items()
    ]


@pytest.mark.parametrize("one", each(QUICK))
def test_values_and_gradients_are_those_of_the_plain_definition(one):
    assert max(gallery_page.exactness(one, getattr(plain_ideas, one.name))) < 2e-13


@pytest.mark.parametrize("one", each(set()))
def test_page_has_the_tiles_and_the_places_where_an_idea_runs(one):
    row = gallery_page.Row(
        one, (0, 0), gallery_page.visited_tiles(one), gallery_page.runs_in_tiles(one), gallery_page.runs_on_cuda(one)
    )
    assert cells(one)[4:] == row.cells[4:]


def test_page_has_the_code_and_the_lines_of_every_idea():
    blocks = re.findall(r"```python\n(.*?)\n```", PAGE, re.DOTALL)
    assert [block for block in blocks if block.startswith(("def ", "class "))] == [one.source for one in IDEAS.values()]
    lines = [one.num_lines for one in IDEAS.values()]
    assert [int(cells(one)[1]) for one in IDEAS.values()] == lines
    assert max(lines) <= 30 and 2 * sum(count < 10 for count in lines) >= len(lines)
    assert max(float(x) for one in IDEAS.values() for x in cells(one)[2:4]) < 2e-13
    pictures = [DOCS / "gallery" / f"{name}.png" for name in IDEAS]
    assert sum(path.stat().st_size for path in pictures) < 300_000
    assert sorted(pictures) == sorted((DOCS / "gallery").iterdir())


def test_every_plain_definition_has_an_idea_and_another_one_is_noticed():
    assert {name for name in vars(plain_ideas) if name in IDEAS} == set(IDEAS)
    one = IDEAS["sink_attention"]
    without = lambda query, key, value, sink: plain_ideas.sink_attention(query, key, value, sink - 0.1)
    values, gradients = gallery_page.exactness(one, without)
    assert min(values, gradients) > 1e-3


@pytest.mark.contract
@pytest.mark.parametrize("main", ["attention_gallery"], indirect=True)
def test_attention_gallery_prints_and_writes(main, tmp_path, capsys):
    [row] = main(["--only", "neighbourhood_attention", "--write", str(tmp_path)])
    assert row.tiles == (176, 512) and max(row.exact) < 2e-13
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("idea ") and line.split()[:3] == ["Neighbourhood", "attention", "5"]
    assert row.one.source in (tmp_path / "gallery.md").read_text()
    assert (tmp_path / "gallery" / "neighbourhood_attention.png").read_bytes().startswith(b"\x89PNG")
