"""The tables of `gpu.py`: errors and times, printed and written to files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _flops import FLOPS_OF_PAIR
from _gpu_cases import ATTNAX, CASES, PASSES, SIDES, Job
from _pages import markdown_table

PEERS = tuple(side for side in SIDES if side not in ATTNAX)
RATIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Pallas / best peer": ("pallas", PEERS),
    "automatic / best peer": ("automatic", PEERS),
    "automatic / cuDNN": ("automatic", ("cudnn",)),
    "Pallas / Flex": ("pallas", ("flex",)),
}
Sides = dict[str, dict[str, dict[str, Any]]]
"""For each side and pass: seconds and their median, or the reason why there are none."""


def rows_of(job: Job, sides: Sides) -> list[dict[str, Any]]:
    """A row for each pass, also for the backward pass alone, with milliseconds, TFLOP/s and ratios."""
    rows = []
    for name in FLOPS_OF_PAIR:
        cells = {side: _cell(job, name, passes) for side, passes in sides.items()}
        ratios = {words: _ratio(cells, side, peers) for words, (side, peers) in RATIOS.items()}
        rows.append({**dataclasses.asdict(job), "pass": name, "sides": cells, "ratios": ratios})
    return rows


def _cell(job: Job, name: str, passes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    needed = PASSES if name == "backward" else (name,)
    for each in needed:
        if "reason" in passes[each]:
            return {"reason": passes[each]["reason"]}
    seconds = passes[needed[-1]]["median"] - (passes["forward"]["median"] if name == "backward" else 0.0)
    if seconds <= 0.0:
        return {"reason": "lost in noise"}
    return {"ms": 1e3 * seconds, "tflops": job.flops(name) / seconds / 1e12}


def _ratio(cells: Mapping[str, Mapping[str, Any]], side: str, peers: Sequence[str]) -> float | None:
    times = [cells[peer]["ms"] for peer in peers if "ms" in cells.get(peer, {})]
    return min(times) / cells[side]["ms"] if times and "ms" in cells.get(side, {}) else None


def in_short(row: Mapping[str, Any], notes: Notes) -> str:
    cells = [f"{side} {_figures(cell, notes)}" for side, cell in row["sides"].items()]
    ratios = [f"{words} {ratio:.2f}" for words, ratio in row["ratios"].items() if ratio is not None]
    sizes = f"H{row['head_dim']} N{row['heads']}/{row['kv_heads']} T{row['length']}"
    return "  ".join([f"{row['case']} {sizes} {row['pass']}:", *cells, *ratios])


def _figures(cell: Mapping[str, Any], notes: Notes) -> str:
    return f"{cell['ms']:.3f} ({cell['tflops']:.0f})" if "ms" in cell else notes.mark(cell["reason"])


class Notes:
    """Reasons, numbered in order."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        return f"- [{self.numbers.setdefault(reason, len(self.numbers) + 1)}]"


def table_of(lines: Mapping[Job, Sides], sides: Sequence[str], notes: Notes) -> list[list[str]]:
    ratios = [words for words, (side, peers) in RATIOS.items() if side in sides and set(peers) & set(sides)]
    table = [["case", "H", "N/K", "B", "T", "pass", *(f"{SIDES[side]} ms (TFLOP/s)" for side in sides), *ratios]]
    for job, measured in lines.items():
        for row in rows_of(job, measured):
            cells = [job.case, str(job.head_dim), f"{job.heads}/{job.kv_heads}", str(job.batch), str(job.length)]
            cells.append(row["pass"])
            cells += [_figures(row["sides"].get(side, {"reason": "not asked for"}), notes) for side in sides]
            cells += ["-" if row["ratios"][words] is None else f"{row['ratios'][words]:.2f}" for words in ratios]
            table.append(cells)
    return table


def check_table(checks: Sequence[Mapping[str, Any]], notes: Notes) -> list[list[str]]:
    table = [["case", "H", *(SIDES[side] for side in ATTNAX)]]
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for line in checks:
        words = notes.mark(line["reason"]) if "reason" in line else f"{line['ratio']:.2f} ({line['worst']})"
        row = cells.setdefault((line["case"], line["head_dim"]), {})
        row[line["side"]] = words if line["passed"] else f"FAILED: {words}"
    for (case, head_dim), row in cells.items():
        table.append([case, str(head_dim), *(row.get(side, "") for side in ATTNAX)])
    return table


@dataclasses.dataclass
class Report:
    """All results so far, written to files after every line."""

    about: dict[str, Any]
    sides: Sequence[str]
    json: Path | None
    markdown: Path | None
    checks: dict[tuple[str, str, int], dict[str, Any]] = dataclasses.field(default_factory=dict)
    lines: dict[Job, Sides] = dataclasses.field(default_factory=dict)

    def resume(self) -> None:
        """Reads the results in the file.

        Raises:
            SystemExit: they were measured on another machine or with other versions.
        """
        if self.json is None or not self.json.exists():
            return
        found = json.loads(self.json.read_text())
        if {**found["about"], "date": ""} != {**self.about, "date": ""}:
            raise SystemExit(f"gpu.py: {self.json} was measured on {found['about']}, this is {self.about}.")
        self.add_checks(found["checks"])
        names = [field.name for field in dataclasses.fields(Job)]
        self.lines |= {Job(**{name: line[name] for name in names}): line["sides"] for line in found["lines"]}

    def add_checks(self, checks: Sequence[dict[str, Any]]) -> None:
        self.checks |= {(line["side"], line["case"], line["head_dim"]): line for line in checks}

    def failures(self) -> list[str]:
        """The wrong results of Attnax, and the reasons why it has none."""
        wrong = [
            f"{SIDES[side]}, {case}, H={head_dim}: {line.get('reason') or 'too large an error'}"
            for (side, case, head_dim), line in self.checks.items()
            if not line["passed"]
        ]
        for job, sides in self.lines.items():
            for side in ATTNAX:
                reasons = {row["reason"] for row in sides.get(side, {}).values() if "reason" in row}
                wrong += [f"{SIDES[side]}, {job}: {reason}" for reason in sorted(reasons)]
        return wrong

    def title(self) -> str:
        """Machine, versions and date in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.about.items())

    def write(self) -> None:
        if self.json is not None:
            found = {
                "about": self.about,
                "checks": list(self.checks.values()),
                "lines": [{**dataclasses.asdict(job), "sides": sides} for job, sides in self.lines.items()],
                "rows": [row for job, sides in self.lines.items() for row in rows_of(job, sides)],
            }
            self.json.write_text(json.dumps(found, indent=1) + "\n")
        if self.markdown is not None:
            self.markdown.write_text(self.text())

    def text(self) -> str:
        notes = Notes()
        checked = markdown_table(check_table(list(self.checks.values()), notes))
        timed = markdown_table(table_of(self.lines, self.sides, notes))
        reasons = "\n".join(f"- [{number}] {reason}" for reason, number in notes.numbers.items())
        cases = "\n".join(f"- {name}: {case.words}" for name, case in CASES.items())
        title = f"# Attention on a GPU\n\nWritten by `benchmarks/gpu.py`. bfloat16; {self.title()}."
        return "\n\n".join(filter(None, [title, _CHECKED, checked, _TIMED, timed, reasons, cases])) + "\n"


_CHECKED = """\
The error of the worst value or gradient of each function, divided by the error of a dense computation in bfloat16. Both
errors are against float32. At most 2 is allowed, and 4 for the gradient of ALiBi's few slopes."""
_TIMED = """\
Milliseconds of a call, and TFLOP/s of the pairs that the mask allows. A ratio is the peer's time over that of Attnax:
above 1 Attnax is faster. FlexAttention's block mask and cuDNN's bias for ALiBi are made before anything is timed;
Attnax makes its lists of tiles in every call, and `flash_attention` transposes its arrays for cuDNN."""
