"""The table of libraries: a cell was tried or read, and says which."""

import compare
import pytest

ANSWERS = {"attnax": {"cells": {"mask": "a function"}, "versions": {}}, "flex": {"cells": {}, "versions": {}}}


def test_a_cell_that_was_read_links_its_page():
    header, mask, *rest = compare.table(ANSWERS, link=True)
    assert header == ["", "Attnax", "FlexAttention", "MaxText"]
    assert mask == ["a mask", "a function", compare.NOT, f"[causal, windows, chunks]({compare._CONFIG})"]
    gpu = next(row for row in rest if row[0] == compare.ROWS["gpu"])
    assert gpu[1] == "[no](../understand/accelerators.md)"
    assert {name for name, _ in compare.READ} <= {*compare.PEERS, "maxtext"}
    assert {row for _, row in compare.READ} <= set(compare.ROWS)


def test_a_cell_is_not_both_tried_and_read():
    twice = {"attnax": {"cells": {"gpu": "yes"}, "versions": {}}}
    with pytest.raises(ValueError, match=r"tried or read; got \['gpu'\]"):
        compare.table(twice, link=False)


def test_a_missing_name_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "some_library").mkdir()
    (tmp_path / "some_library" / "__init__.py").write_text("def speak(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert compare.absent("some_library", "sing") == "no"
    with pytest.raises(LookupError, match="has 'speak': try it"):
        compare.absent("some_library", "speak")


def test_a_query_without_keys_and_nan_are_named():
    value = compare.inputs()[2]
    assert compare.of_empty(value[0, :, 0] * 0, value) == "0"
    assert compare.of_empty(value[0].mean(-2), value) == "the mean of all values"
    assert compare.of_nan(compare.with_nan(value)) == "spreads" and compare.of_nan(value) == "stays there"
