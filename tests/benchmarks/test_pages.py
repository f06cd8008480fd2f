"""Commands write their tables into pages, and the bars of these."""

import contextlib
import re
import sys
from pathlib import Path

import _machine
import _pairs
import attention
import decode
import first_token
import models
import pytest
import speculative
from _pages import bars, write_section

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import bar_plot  # noqa: E402

MACHINE = _machine.Machine("A Processor", 2, "AVX2", ("avx2",), False, {"JAX": 1.0, "torch": 2.0})


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


def test_bars_are_a_directive():
    want = "```{bars}\n:values: a ms, b ms\n:unit: ms, less is better\n:number: 2\n```"
    assert bars("a ms", "b ms", unit="ms, less is better", number=2) == want


def plots(text):
    """The HTML of every plot of a page, each from the table before it."""
    lines = [line for line in text.splitlines() if line]
    table = []
    while lines:
        line = lines.pop(0)
        if line.startswith("|"):
            table = [line]
            while lines and lines[0].startswith("|"):
                table.append(lines.pop(0))
        elif line == "```{bars}":
            options = {}
            while (line := lines.pop(0)) != "```":
                name, value = re.fullmatch(r":(\w+): (.*)", line).groups()
                options[name] = {"number": int, "full": float}.get(name, str)(value)
            cells = [[cell.strip() for cell in row.replace("`", "").strip("|").split("|")] for row in table]
            yield bar_plot.draw(bar_plot.Plot(**options), cells[0], cells[2:])
        else:
            table = []


def test_the_bars_of_speculative_decoding_fit_its_tables():
    model = {"layers": 1, "width": 2, "parameters": 3, "tokens": 4, "seconds": 5.0, "bits": 6.0}
    runs = [
        {"name": name, "seconds": [0.5], "tokens": 60, "steps": 30, "distinct": 0.5, "same": 6}
        for name in (speculative.PLAIN, "2", speculative.ALONE)
    ]
    storage = dict.fromkeys(("largest", "rms", "exact_bits", "stored_bits"), 0.1)
    about = {"target": model, "draft": model, "written": {"0.0": runs, "1.0": runs}, "storage": storage}
    found = list(plots("\n".join(speculative.tables(speculative.Plan(), about))))
    assert len(found) == 2 and all(html.count("bars-label") == 2 for html in found)


def test_the_bars_of_first_tokens_fit_their_tables(monkeypatch):
    phases = dict.fromkeys(("tracing", "lowering", "XLA", "all"), 0.5)
    tokens = {name: {**phases, "programs": 1} for name in ("first token", "64 tokens")}
    step = {**phases, "equations": 7}
    monkeypatch.setattr(first_token, "run", lambda *arguments, cache=None: tokens if "tokens" in arguments else step)
    found = list(plots(first_token.report(MACHINE, 1)))
    assert [html.count("bars-label") for html in found] == [4, 4]


def test_the_bars_of_decoding_fit_its_tables(monkeypatch):
    monkeypatch.setattr(decode, "measure", lambda names, cases, rounds: [{name: [0.5] for name in names}] * len(cases))
    monkeypatch.setattr(decode, "ask", lambda case, side="": {"bytes": 2**21, "max": 0.1, "rms": 0.1})
    tables = {name: "\n".join(make(decode.QUICK, 1, 1.0)) for name, make in decode.PARTS.items()}
    assert {name: len(list(plots(text))) for name, text in tables.items()} == {"generate": 2, "steps": 1, "storage": 2}
    times = next(plots(tables["generate"].partition("Time to")[2]))
    assert times.count("a0") == times.count("a1") == times.count("o0") == 1 + len(decode.QUICK.batches)


def test_the_bars_of_models_fit_their_tables(monkeypatch, tmp_path):
    class Answers:
        def ask(self, line):
            return {"compile_s": 1.0}

    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["models.py", "--markdown", str(page)])
    monkeypatch.setattr(_machine, "measure", lambda: MACHINE)
    monkeypatch.setattr(_pairs, "peer_version", lambda package: "2.13")
    monkeypatch.setattr(_pairs, "take_turns", lambda sides, rounds: {name: [0.5] for name in sides})
    monkeypatch.setattr(
        _pairs, "started", lambda commands, environment: contextlib.nullcontext(dict.fromkeys(commands, Answers()))
    )
    models.main()
    forward, step = plots(page.read_text())
    assert forward.count("bars-label") == len(models.CASES) and step.count("bars-label") == 2


def test_pages_have_the_bars_that_the_commands_write():
    texts = {page.name: page.read_text() for page in (DOCS / "understand").glob("*-cpu.md")}
    for plot in attention.plots(attention.parse([]).sides):
        assert texts["attention-cpu.md"].count(plot) == 2
    for page in ("accuracy", "attention", "decode", "models", "speculative", "first-token"):
        assert len(list(plots(texts[f"{page}-cpu.md"]))) == {"accuracy": 6, "attention": 4, "decode": 5}.get(page, 2)


def test_bars_of_attention_fit_a_table_of_any_sides():
    jobs = list(attention.jobs_of(attention.parse(["--lengths", "64"])))[:2]
    row = {"min": 0.5, "median": 0.6, "temporary_bytes": 2**20, "compile_seconds": 1.0}
    for sides in (["attnax", "standard", "sdpa"], ["sdpa"]):
        cells = [attention.cells_of(job, sides, dict.fromkeys(sides, row), 1.0) for job in jobs]
        text = attention.markdown("A machine", sides, [attention.header(sides), *cells], [])
        assert len(list(plots(text))) == (2 if "attnax" in sides else 1)
