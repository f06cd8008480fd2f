"""The notebooks of docs/learn are stored as they ran: every code cell in its turn, without errors, warnings and paths.

`make notebooks` runs them.
"""

import copy
import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))

import notebooks  # noqa: E402

PATHS = sorted((DOCS / "learn").glob("*.ipynb"))
GOOD = {
    "cells": [
        {"cell_type": "markdown", "source": ["# A title\n", "It takes 3 s."]},
        {
            "cell_type": "code",
            "execution_count": 1,
            "source": ["1 + 1"],
            "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["2"]}}],
        },
    ]
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(path):
    text = path.read_text()
    notebook = json.loads(text)
    assert list(notebooks.problems(notebook)) == []
    assert notebook["metadata"] == notebooks.METADATA
    assert {key for cell in notebook["cells"] for key in cell["metadata"]} <= {"mystnb"}
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    assert "It takes" in sources[0] and "\n## Where to go on\n" in "\n" + sources[-1]
    assert len(text) < 300 * 1024


def test_every_notebook_is_listed():
    listed = (DOCS / "learn" / "index.md").read_text()
    assert len(PATHS) == 9
    assert [path.name for path in PATHS if f"({path.name})" not in listed] == []


def output(**changes):
    return {"output_type": "stream", "name": "stdout", "text": ["fine\n"]} | changes


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([output(output_type="error", ename="ValueError")], "ends in an error"),
        ([output(name="stderr", text=["UserWarning: no\n"])], "warns: UserWarning: no"),
        ([output(text=["saved /home/me/run\n"])], "a path of the machine"),
        ([output(), output(data={"text/html": ["<a href='/tmp/x'>"]})], "a path of the machine"),
    ],
)
def test_problems_of_outputs_are_found(outputs, words):
    assert list(notebooks.problems(GOOD)) == []
    spoilt = copy.deepcopy(GOOD)
    spoilt["cells"][1]["outputs"] = outputs
    (found,) = notebooks.problems(spoilt)
    assert words in found


def test_a_cell_that_did_not_run_and_a_missing_title_are_found():
    spoilt = copy.deepcopy(GOOD)
    spoilt["cells"][0]["source"] = ["No title"]
    spoilt["cells"][1] |= {"execution_count": None, "outputs": []}
    title, outputs, turn = notebooks.problems(spoilt)
    assert "title" in title and "no cell has an output" in outputs and "not executed in its turn" in turn


def test_cells_with_other_text_are_named_and_pictures_may_change():
    other, drawn = copy.deepcopy(GOOD), copy.deepcopy(GOOD)
    other["cells"][1]["outputs"][0]["data"]["text/plain"] = ["3"]
    drawn["cells"][1]["outputs"][0]["data"]["image/png"] = "iVBOR"
    assert notebooks.changed(GOOD, other) == [1]
    assert notebooks.changed(GOOD, drawn) == []
