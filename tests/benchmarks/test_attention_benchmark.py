"""The benchmark of attention, which `attnax bench` runs, with made-up times."""

import contextlib
import dataclasses
import json
import re

import attention
import pytest
from _machine import Machine
from _pairs import Side

MACHINE = Machine("A Processor", 2, "AVX2", ("avx2",), False, {"JAX": 1.0, "torch": 2.0})
# 8 heads of 2080 causal pairs and 64 numbers each, 2 products: 4.26 MFLOP, 2.13 ms at 2 GFLOP/s.
SECONDS = {"attnax": 8 * 2080 * 64 * 4 / 2e9 / 0.5, "sdpa": 8 * 2080 * 64 * 4 / 2e9 / 0.25}


class MadeUp(Side):
    """Answers like a side's process."""

    def __init__(self, seconds):
        self.seconds = seconds

    def ask(self, line=""):
        return {"temporary_bytes": 2**20, "compile_seconds": 1.5} if line else {"seconds": self.seconds}


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(machine, *options, seconds=SECONDS):
        started = contextlib.nullcontext({name: MadeUp(seconds[name]) for name in seconds})
        monkeypatch.setattr(attention, "started", lambda commands, environment: started)
        monkeypatch.setattr(attention, "measure_machine", lambda: machine)
        monkeypatch.setattr(attention, "peer_version", lambda package: "2.13")
        files = ["--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "page.md")]
        lines = ["--cases", "causal", "--lengths", "64", "--passes", "forward", "--sides", *seconds]
        assert attention.main([*lines, *files, *options]) == 0
        return json.loads((tmp_path / "figures.json").read_text()), (tmp_path / "page.md").read_text()

    return run


def test_every_time_has_its_share_of_the_peak(run, capsys):
    _, page = run(MACHINE)
    printed = capsys.readouterr().out
    columns = ["case", "pass", "T", "Attnax ms", "of peak", "Attnax MiB", "compile s"]
    columns += ["torch SDPA ms", "of peak", "ratio"]
    cells = ["causal", "fwd", "64", "4.3 / 4.3", "50%", "1.0", "1.5", "8.5 / 8.5", "25%", "2.00x"]
    assert f"| {' | '.join(columns)} |" in page and f"| {' | '.join(cells)} |" in page
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert columns in rows and cells in rows
    for text in (printed, page):
        assert MACHINE.line in text and "at the peak" in text


def test_a_run_replaces_the_figures_of_its_own_kind(run, tmp_path):
    wide = dataclasses.replace(MACHINE, kind="AVX-512", flags=("avx512f",))
    (tmp_path / "page.md").write_text(
        "# Attention\n\nBy hand.\n\n<!-- make bench, AVX2 -->\n\nold\n\n<!-- end -->\n\nMore.\n"
    )
    first, page = run(MACHINE)
    assert list(first) == ["AVX2"] and "old" not in page
    assert page.startswith("# Attention\n\nBy hand.\n") and page.endswith("<!-- end -->\n\nMore.\n")
    both, longer = run(wide)
    assert both["AVX2"] == first["AVX2"] and both["AVX-512"]["machine"]["flags"] == ["avx512f"]
    assert longer.startswith(page) and "<!-- make bench, AVX-512 -->" in longer
    slower = {name: 2 * seconds for name, seconds in SECONDS.items()}
    again, last = run(MACHINE, seconds=slower)
    assert again["AVX-512"] == both["AVX-512"] and "| 8.5 / 8.5 | 25% |" in last
    assert last.split("<!-- make bench, AVX-512 -->")[1] == longer.split("<!-- make bench, AVX-512 -->")[1]


def test_every_goal_has_the_lines_that_it_compares():
    jobs = attention.jobs_of(attention.parse(["--goals", "only"]))
    said = {"median": 1.0, "compile_seconds": 1.0, "temporary_bytes": 1}
    figures = {job: dict.fromkeys(sides, said) for job, sides in jobs.items()}
    for kind in ("AVX-512", "AVX2"):
        for goal in attention.goals_of(kind):
            assert goal.value(figures) is not None, goal.words
    assert jobs.keys() == {goal.job for goal in attention.goals_of("AVX2")}


def test_goals_against_sdpa_depend_on_the_kind_of_machine():
    wanted = {
        kind: {goal.wanted for goal in attention.goals_of(kind) if re.match("causal.*torch SDPA", goal.words)}
        for kind in ("AVX-512", "AVX2")
    }
    assert wanted == {"AVX-512": {1.3, 1.4}, "AVX2": {0.95, 0.9}}
