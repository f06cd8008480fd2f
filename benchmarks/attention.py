"""Attention beside jax.nn and PyTorch on the CPU: masks, biases, documents; forward and backward; time and memory.

    python benchmarks/attention.py                                   # with `make bench`'s .venv-torch, or torch here
    python benchmarks/attention.py --cases causal window --lengths 1024 --json figures.json --markdown table.md

The sides are flash_attention and, if asked for, standard_attention of Attnax; jax.nn.dot_product_attention; PyTorch's
scaled_dot_product_attention (SDPA) and compiled flex_attention. All sides compute the same attention in float32 from
the same numbers; a comparison of sums of every result checks this. Each side has its own layout, and masks in the
leanest form that it takes. Masks and biases that a side needs as arrays are made before it is timed, except for the
learned bias. Batch * heads is 8, head_dim 64. Times are per call; a ratio is the other side's median over that of
Attnax.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _cpu_cases import CASES, HEAD_DIM, HEADS, Job, run_side
from _pages import markdown_table, show
from _pairs import Side, peer_version, side_command, started, take_turns

SIDES = {
    "attnax": "Attnax",
    "standard": "Attnax standard",
    "jax.nn": "jax.nn",
    "sdpa": "torch SDPA",
    "flex": "torch Flex",
}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A value that one line of the table, or two, should reach."""

    job: Job
    words: str
    value: Callable[[Figures], float | None]
    wanted: float
    at_least: bool = True
    unit: str = "x"


Figures = Mapping[Job, Mapping[str, Mapping[str, Any]]]


def _ratio(job: Job, side: str) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        rows = figures.get(job, {})
        if not all("median" in rows.get(name, {}) for name in ("attnax", side)):
            return None
        return float(rows[side]["median"] / rows["attnax"]["median"])

    return value


def _said(job: Job, key: str, scale: float = 1.0) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        said = figures.get(job, {}).get("attnax", {}).get(key)
        return None if said is None else said * scale

    return value


def _growth(job: Job, longer: Job) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        times = [_said(which, "median")(figures) for which in (longer, job)]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    return value


def _goals() -> list[Goal]:
    forward, step_2k, step_4k = Job("causal", False, 4096), Job("causal", True, 2048), Job("causal", True, 4096)
    window, longer = Job("window", False, 16384), Job("window", False, 32768)
    documents, long = Job("documents", True, 8192), Job("causal", True, 32768, heads=1, timed=False)
    against = [
        (forward, "sdpa", 1.3),
        (forward, "flex", 1.3),
        (forward, "jax.nn", 5.0),
        (step_2k, "sdpa", 1.4),
        (step_2k, "jax.nn", 5.0),
        (step_4k, "sdpa", 1.4),
        (step_4k, "jax.nn", 8.0),
        (window, "flex", 1.5),
        (documents, "sdpa", 4.0),
    ]
    goals = [
        Goal(job, f"{job.name}: faster than {SIDES[side]}", _ratio(job, side), wanted) for job, side, wanted in against
    ]
    goals.append(
        Goal(longer, "window, forward: time at T=32768 over T=16384", _growth(window, longer), 2.3, at_least=False)
    )
    for words, value, wanted, unit in (
        ("time to compile", _said(long, "compile_seconds"), 2.0, "s"),
        ("temporary memory", _said(long, "temporary_bytes", 2**-20), 64.0, "MiB"),
    ):
        goals.append(Goal(long, f"{long.name}: {words}", value, wanted, at_least=False, unit=f" {unit}"))
    return goals


GOALS = _goals()
SIDES_OF_GOALS = {
    Job("window", False, 16384): {"attnax", "flex"},
    Job("window", False, 32768): {"attnax"},
    Job("documents", True, 8192): {"attnax", "sdpa"},
    Job("causal", True, 32768, heads=1, timed=False): {"attnax"},
}


# The table.


def measure(job: Job, sides: Mapping[str, Side], rounds: int) -> dict[str, dict[str, Any]]:
    """For each side: facts about a job, its times, or the reason why there are none."""
    rows = {name: side.ask(json.dumps(dataclasses.asdict(job))) for name, side in sides.items()}
    prints = {name: np.array(row["fingerprint"]) for name, row in rows.items() if "fingerprint" in row}
    for name, values in prints.items():
        first = next(iter(prints.values()))
        if not (abs(values - first) <= 1e-3 * first[:, :1]).all():
            rows[name]["reason"] = "another result"
    if job.timed:
        able = {name: side for name, side in sides.items() if "reason" not in rows[name]}
        for name, seconds in take_turns(able, rounds).items():
            rows[name] |= {"seconds": seconds, "min": min(seconds), "median": statistics.median(seconds)}
    return rows


def header(sides: Sequence[str]) -> list[str]:
    cells = ["case", "pass", "T"]
    for side in sides:
        cells.append(f"{SIDES[side]} ms")
        if side in ("attnax", "standard", "jax.nn"):
            cells.append("MiB")
        if side != "sdpa":
            cells.append("compile s")
        if side != "attnax" and "attnax" in sides:
            cells.append("ratio")
    return cells


def cells_of(job: Job, sides: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    heads = "" if job.heads == HEADS else f" ({job.heads} head)"
    cells = [job.case + heads, "fwd + bwd" if job.backward else "fwd", str(job.length)]
    for side in sides:
        row = rows.get(side, {"reason": "-"})
        timed = f"{1e3 * row['min']:.1f} / {1e3 * row['median']:.1f}" if "median" in row else "not timed"
        cells.append(row.get("reason", timed))
        if side in ("attnax", "standard", "jax.nn"):
            cells.append(f"{row['temporary_bytes'] / 2**20:.1f}" if "temporary_bytes" in row else "-")
        if side != "sdpa":
            cells.append(f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "-")
        if side != "attnax" and "attnax" in sides:
            ratio = _ratio(job, side)({job: rows})
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
    return cells


def goal_cells(figures: Figures) -> list[list[str]]:
    lines = [["goal", "wanted", "reached", ""]]
    for goal in GOALS:
        if goal.job not in figures:
            continue
        value, sign = goal.value(figures), ">=" if goal.at_least else "<="
        met = value is not None and (value >= goal.wanted if goal.at_least else value <= goal.wanted)
        lines.append(
            [
                goal.words,
                f"{sign} {goal.wanted:g}{goal.unit}",
                "-" if value is None else f"{value:.2f}{goal.unit}",
                "" if value is None else "yes" if met else "no",
            ]
        )
    return lines


def markdown(title: str, tables: Sequence[Sequence[Sequence[str]]]) -> str:
    cases = "\n".join(f"- {name}: {case.words}" for name, case in CASES.items())
    legend = (
        "Times are minimum / median of a call; MiB is temporary memory; a ratio is the side's median over that of "
        "Attnax, so above 1 Attnax is faster."
    )
    return "\n\n".join([title, *map(markdown_table, tables), legend, cases]) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="by default 512 2048 4096")
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=("forward", "backward"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=("attnax", "jax.nn", "sdpa", "flex"))
    parser.add_argument(
        "--goals",
        choices=("add", "only", "skip"),
        help="the lines that have a goal; by default added unless --cases or --lengths is given",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--pages", choices=("small", "huge"), default="small", help="size of malloc's pages, for all sides"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here, after each line")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.goals is None:
        options.goals = "add" if options.cases is None and options.lengths is None else "skip"
    if options.rounds < 1 or any(length < 1 for length in options.lengths or ()):
        parser.error("--rounds and --lengths must be at least 1")
    return options


def jobs_of(options: argparse.Namespace) -> dict[Job, set[str]]:
    """The lines of the table, and the sides of each line."""
    jobs: dict[Job, set[str]] = {}
    if options.goals != "only":
        for case in options.cases or CASES:
            for name in options.passes:
                for length in options.lengths or (512, 2048, 4096):
                    jobs[Job(case, name == "backward", length)] = set(options.sides)
    if options.goals != "skip":
        for job in [*(goal.job for goal in GOALS), Job("window", False, 16384)]:
            jobs.setdefault(job, SIDES_OF_GOALS.get(job, set(options.sides)))
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    if options.side:
        run_side(options.side)
        return 0
    sides, torch = list(options.sides), peer_version("torch")
    missing = [side for side in sides if side in ("sdpa", "flex") and torch is None]
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if options.pages == "huge" else {}
    versions = f"jax {version('jax')}, torch {torch or 'not installed'}"
    title = (
        f"{platform.machine()}, 2 threads, {options.pages} pages, {versions}; float32, "
        f"batch * heads {HEADS}, head_dim {HEAD_DIM}; {options.rounds} rounds"
    )
    print(title, flush=True)
    figures: dict[Job, dict[str, dict[str, Any]]] = {}
    table = [header(sides)]
    commands = {name: side_command(__file__, name, torch=name in ("sdpa", "flex")) for name in sides}
    with started({name: commands[name] for name in sides if name not in missing}, tunables) as processes:
        for job, wanted in jobs_of(options).items():
            rows = measure(job, {name: side for name, side in processes.items() if name in wanted}, options.rounds)
            rows |= {name: {"reason": "not installed"} for name in missing}
            figures[job] = rows
            table.append(cells_of(job, sides, rows))
            print("  ".join(f"{name} {cell}" for name, cell in zip(table[0], table[-1], strict=True)), flush=True)
            if options.json:
                lines = [{**dataclasses.asdict(job), "sides": rows} for job, rows in figures.items()]
                options.json.write_text(json.dumps({"about": title, "lines": lines}, indent=2) + "\n")
    goals = goal_cells(figures)
    print()
    show(table)
    if len(goals) > 1:
        print()
        show(goals)
    if options.markdown:
        options.markdown.write_text(markdown(title, [table, goals] if len(goals) > 1 else [table]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
