"""Commands write their tables into pages."""

import pytest
from _pages import write_section


def test_a_table_replaces_the_old_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- make b -->\nold\n<!-- end -->\n\n<!-- make c -->\nother\n<!-- end -->\nrest\n")
    write_section(page, "make b", "new\n")
    write_section(page, "make b", "newer")
    want = "# A\n\n<!-- make b -->\n\nnewer\n\n<!-- end -->\n\n<!-- make c -->\nother\n<!-- end -->\nrest\n"
    assert page.read_text() == want
    with pytest.raises(ValueError, match=r"page\.md has no place for a table: <!-- make d -->"):
        write_section(page, "make d", "x")
    assert page.read_text() == want
