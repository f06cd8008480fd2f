"""Attention beside jax.nn and PyTorch on the CPU: masks, biases, documents; forward and backward; time and memory.

    python benchmarks/attention.py                                   # with `make bench`'s .venv-torch, or torch here
    python benchmarks/attention.py --cases causal window --lengths 1024 --json figures.json --markdown table.md

The sides are flash_attention and, if asked for, standard_attention of Attnax; jax.nn.dot_product_attention; PyTorch's
scaled_dot_product_attention (SDPA) and compiled flex_attention. All sides compute the same attention in float32 from
the same numbers; a comparison of sums of every result checks this. Each side has its own layout, and masks in the
leanest form that it takes. Masks and biases that a side needs as arrays are made before it is timed, except for the
learned bias. Batch * heads is 8, head_dim 64. The legend under the table explains its columns. A page and a file of
figures hold a section for each kind of machine, with and without AVX-512; a run replaces that of its own kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _cpu_cases import CASES, HEAD_DIM, HEADS, Job, run_side
from _flops import share
from _machine import Machine
from _machine import measure as measure_machine
from _pages import bars, markdown_table, show, write_kind
from _pairs import Side, peer_version, side_command, started, take_turns

SIDES = {
    "attnax": "Attnax",
    "standard": "Attnax standard",
    "jax.nn": "jax.nn",
    "sdpa": "torch SDPA",
    "flex": "torch Flex",
}
TELL_MEMORY = ("attnax", "standard", "jax.nn")


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


def _time_over(job: Job, other: Job) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        times = [_said(which, "median")(figures) for which in (job, other)]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    return value


LONG = [Job("causal", True, 32768, timed=False), Job("causal", True, 32768, heads=1, timed=False)]
WINDOW_16K, WINDOW_32K = Job("window", False, 16384), Job("window", False, 32768)
CAUSAL_16K = Job("causal", False, 16384)
SIDES_OF_GOALS = {
    **{Job(case, False, 16384): {"attnax", "flex"} for case in ("window", "documents", "one line")},
    **{job: {"attnax"} for job in (WINDOW_32K, CAUSAL_16K, *LONG)},
    Job("documents", True, 8192): {"attnax", "sdpa"},
}


def goals_of(kind: str) -> list[Goal]:
    """The goals on a kind of machine; the lines that they need are the same on every kind."""
    forward, both = (1.3, 1.4) if kind == "AVX-512" else (0.95, 0.9)
    against = [
        (Job("causal", False, 2048), "sdpa", forward),
        (Job("causal", False, 4096), "sdpa", forward),
        (Job("causal", False, 4096), "flex", 1.3),
        (Job("causal", False, 4096), "jax.nn", 5.8),
        (Job("causal", True, 2048), "sdpa", both),
        (Job("causal", True, 2048), "jax.nn", 5.0),
        (Job("causal", True, 4096), "sdpa", both),
        (Job("causal", True, 4096), "jax.nn", 6.0),
        *(
            (Job(case, False, length), "flex", 1.0)
            for length in (2048, 16384)
            for case in ("window", "documents", "one line")
        ),
        (Job("documents", True, 8192), "sdpa", 4.0),
    ]
    goals = [
        Goal(job, f"{job.name}: speed against {SIDES[side]}", _ratio(job, side), wanted)
        for job, side, wanted in against
    ]
    goals.append(
        Goal(
            WINDOW_32K,
            "window, forward: time at T=32768 over T=16384",
            _time_over(WINDOW_32K, WINDOW_16K),
            2.3,
            at_least=False,
        )
    )
    goals.append(
        Goal(CAUSAL_16K, "forward, T=16384: time of causal over window", _time_over(CAUSAL_16K, WINDOW_16K), 8.0)
    )
    goals += [
        Goal(job, f"{job.name}: time to compile", _said(job, "compile_seconds"), 2.0, at_least=False, unit=" s")
        for job in LONG
    ]
    memory = _said(LONG[1], "temporary_bytes", 2**-20)
    goals.append(Goal(LONG[1], f"{LONG[1].name}: temporary memory", memory, 64.0, at_least=False, unit=" MiB"))
    return goals


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


LEGEND = (
    "Times are minimum / median of a call; MiB is temporary memory; a ratio is the side's median over that of Attnax, "
    'so above 1 Attnax is faster. "Of peak" is the share of the median that the needed products would take at the '
    "peak: for each pair that the mask allows, 2 products forward and 5 more backward. Everything else that a side "
    "computes, forbidden pairs too, lowers it."
)


def header(sides: Sequence[str]) -> list[str]:
    cells = ["case", "pass", "T"]
    for side in sides:
        cells += [f"{SIDES[side]} ms", "of peak"]
        if side in TELL_MEMORY:
            cells.append(f"{SIDES[side]} MiB")
        if side != "sdpa":
            cells.append("compile s")
        if side != "attnax" and "attnax" in sides:
            cells.append("ratio")
    return cells


def cells_of(job: Job, sides: Sequence[str], rows: Mapping[str, Mapping[str, Any]], peak: float) -> list[str]:
    heads = "" if job.heads == HEADS else f" ({job.heads} head)"
    cells = [job.case + heads, "fwd + bwd" if job.backward else "fwd", str(job.length)]
    for side in sides:
        row = rows.get(side, {"reason": "-"})
        timed = f"{1e3 * row['min']:.1f} / {1e3 * row['median']:.1f}" if "median" in row else "not timed"
        able = "median" in row and "reason" not in row
        cells += [row.get("reason", timed), share(job.flops, row["median"], peak) if able else "-"]
        if side in TELL_MEMORY:
            cells.append(f"{row['temporary_bytes'] / 2**20:.1f}" if "temporary_bytes" in row else "-")
        if side != "sdpa":
            cells.append(f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "-")
        if side != "attnax" and "attnax" in sides:
            ratio = _ratio(job, side)({job: rows})
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
    return cells


def goal_cells(figures: Figures, kind: str) -> list[list[str]]:
    lines = [["goal", "wanted", "reached", ""]]
    for goal in goals_of(kind):
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


def plots(sides: Sequence[str]) -> list[str]:
    """Bars of the medians, and of the memory of the sides that tell it."""
    common = {"labels": "case, pass, T", "scale": "own"}
    if not {"attnax", "standard"} & set(sides):
        common["attnax"] = "all"  # the bars stand beside none of Attnax
    times = bars(*(f"{SIDES[side]} ms" for side in sides), unit="ms, less is better", number=2, **common)
    tell = [f"{SIDES[side]} MiB" for side in sides if side in TELL_MEMORY]
    return [times, bars(*tell, unit="MiB, less is better", **common)] if tell else [times]


def markdown(title: str, sides: Sequence[str], table: Sequence[Sequence[str]], goals: Sequence[Sequence[str]]) -> str:
    """The section of a page; `goals` is empty, or a table with a header."""
    tables = [markdown_table(table), *plots(sides), *([markdown_table(goals)] if goals else [])]
    cases = "\n".join(f"- {name}: {case.words}" for name, case in CASES.items())
    return "\n\n".join([title, *tables, LEGEND, cases]) + "\n"


def write_figures(path: Path, machine: Machine, title: str, figures: Figures) -> None:
    """Writes the figures of this kind of machine into a JSON file; those of other kinds stay."""
    written = json.loads(path.read_text()) if path.exists() else {}
    lines = [{**dataclasses.asdict(job), "sides": rows} for job, rows in figures.items()]
    written[machine.kind] = {"about": title, "machine": dataclasses.asdict(machine), "lines": lines}
    path.write_text(json.dumps(written, indent=2) + "\n")


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
    parser.add_argument("--json", type=Path, help="also write the figures here, under the kind of machine")
    parser.add_argument(
        "--markdown", type=Path, help="also write the table here, into the section of the kind of machine"
    )
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
        for goal in goals_of("AVX-512"):
            jobs.setdefault(goal.job, SIDES_OF_GOALS.get(goal.job, set(options.sides)))
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    if options.side:
        run_side(options.side)
        return 0
    machine = measure_machine()
    sides, torch = list(options.sides), peer_version("torch")
    missing = [side for side in sides if side in ("sdpa", "flex") and torch is None]
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if options.pages == "huge" else {}
    versions = f"jax {version('jax')}, torch {torch or 'not installed'}"
    title = (
        f"{machine.line}; {options.pages} pages, {versions}; float32, "
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
            table.append(cells_of(job, sides, rows, machine.peak))
            print("  ".join(f"{name} {cell}" for name, cell in zip(table[0], table[-1], strict=True)), flush=True)
            if options.json:
                write_figures(options.json, machine, title, figures)
    goals = goal_cells(figures, machine.kind)
    print()
    show(table)
    if len(goals) > 1:
        print()
        show(goals)
    print(f"\n{LEGEND}")
    if options.markdown:
        text = markdown(title, sides, table, goals if len(goals) > 1 else [])
        write_kind(options.markdown, "make bench", machine.kind, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
