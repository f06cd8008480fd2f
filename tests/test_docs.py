"""The pages under docs/ and the examples run, and what a page says that a line gives is what it gives."""

import ast
import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if PYTHON.search(page.read_text())]


def run_page(page):
    """Runs the page's blocks in one namespace; returns (line, what its comment says, what it gave) where there is one.

    A comment after an expression says what it prints, or else what it is.
    """
    text, namespace, said = page.read_text(), {"__name__": page.stem}, []
    for block in PYTHON.finditer(text):
        before = text.count("\n", 0, block.start(1))
        source = "\n" * before + block[1]  # so that errors name the line of the page
        for statement in ast.parse(source, page).body:
            if not isinstance(statement, ast.Expr):
                exec(compile(ast.Module([statement], []), page, "exec"), namespace)
                continue
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                value = eval(compile(ast.Expression(statement.value), page, "eval"), namespace)
            comment = source.splitlines()[statement.end_lineno - 1][statement.end_col_offset :].strip()
            if comment:
                gave = printed.getvalue().strip() or repr(value)
                said.append((statement.end_lineno, comment.removeprefix("# "), gave))
    return said


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_and_gives_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run_page(page)
    assert said
    assert [(line, gave) for line, _, gave in said] == [(line, comment) for line, comment, _ in said]


def test_component_demo_shows_every_piece(capsys):
    load_example("component_demo").main()
    *table, last = capsys.readouterr().out.splitlines()
    shapes = {line[:38].strip(): line[line.rindex("(") :] for line in table}
    assert len(shapes) == 16
    assert shapes["scaled dot-product attention"] == "(2, 4, 5, 8)"
    assert shapes["encoder"] == "(2, 7, 32)" and shapes["decoder"] == "(2, 5, 32)"
    assert shapes["encoder-decoder, log-probabilities"] == shapes["language model, log-probabilities"] == "(2, 5, 100)"
    assert last.endswith("are finite: True")


def test_seq2seq_skeleton_learns_to_reverse_a_little(capsys):
    options = {"steps": 120, "batch_size": 128, "max_length": 3, "vocab_size": 6, "d_model": 32, "num_layers": 1}
    right = load_example("seq2seq_skeleton").main(**options, learning_rate=1e-2)
    printed = capsys.readouterr().out
    assert printed.count("loss") == 10 and f"{256 * right:.0f} of 256 right" in printed
    assert right > 0.5
