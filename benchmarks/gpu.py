"""Attention on one NVIDIA GPU in bfloat16: Attnax checked, then timed beside cuDNN and PyTorch, forward and backward.

    python benchmarks/gpu.py --quick                                    # less than 5 minutes
    python benchmarks/gpu.py --limit-seconds 540 --json figures.json --markdown table.md
    python benchmarks/gpu.py --resume --json figures.json --markdown table.md    # only the missing lines
    python benchmarks/gpu.py --tiles                                    # the table of attnax/kernels/_gpu/tile_sizes.py
    python benchmarks/gpu.py --rehearse                                 # tiny, on a CPU, kernels interpreted

Needs jax and numpy, and torch for its two sides. Before anything is timed, values and gradients of both functions of
Attnax are compared with a dense computation in float32. Their error may be twice the error of the dense computation in
bfloat16. A case that fails is not timed, and the exit code is 1. The results of all sides are compared too, at random
indices.

Each side has a process of its own. All processes prepare a case at once, then take turns. Batch * length is constant,
and so is heads * head_dim. A time is the median over rounds of the mean of consecutive calls on several sets of inputs;
the time of the backward pass is the difference of two medians. Pairs that the mask forbids do not count as work.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from _cases import jax_results
from _gpu_cases import (
    ATTNAX,
    CASES,
    PASSES,
    SETS,
    SIDES,
    Job,
    Run,
    Runs,
    about,
    attnax_attention,
    attnax_kernel,
    check,
    jax_inputs,
    prepare,
    why,
)
from _gpu_report import Notes, Report, Sides, check_table, in_short, rows_of
from _pages import show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # attnax need not be installed

LENGTHS, HEAD_DIMS = (2048, 4096, 8192, 16384, 32768), (128, 64, 256)
TOKENS, WIDTH = 32768, 2048  # batch * length, heads * head_dim
ROUNDS, BLOCK, ENOUGH = 7, 0.05, 3.0  # seconds of a block, and the total of a pass that ends its rounds
AGREE = 0.05  # largest relative difference of the results of two sides, in bfloat16


# A side's process.


def run_side(side: str, *, rehearse: bool) -> None:
    """Answers every line of JSON with a line of JSON."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to standard error, so that standard output has answers only

    def say(answer: Any) -> None:
        print(json.dumps(answer), file=channel, flush=True)

    say(about(side, rehearse=rehearse))
    runs: Runs = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "check" in request:
            say({"checks": _check_all(side, [Job(**job) for job in request["check"]], rehearse=rehearse)})
        elif "prepare" in request:
            runs.clear()  # frees memory first
            runs = prepare(side, Job(**request["prepare"]), rehearse=rehearse)
            say({name: _said(run) for name, run in runs.items()})
        else:
            run = runs[request["time"]]
            assert isinstance(run, Run)
            try:
                say({"seconds": run.seconds(0.0 if rehearse else BLOCK)})
            except RuntimeError as error:  # out of memory
                say({"reason": why(error)})


def _said(run: Run | str) -> dict[str, Any]:
    if isinstance(run, str):
        return {"reason": run}
    return {"sample": run.sample, "compile_seconds": run.compile_seconds}


def _check_all(side: str, jobs: Sequence[Job], *, rehearse: bool) -> list[Any]:
    def check_one(job: Job) -> Any:
        try:
            return check(side, job, rehearse=rehearse)
        except (ValueError, RuntimeError) as error:
            return {"reason": why(error)}

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # most of the time is compilation
        return list(pool.map(check_one, jobs))


class Process:
    """The handle of a side's process. If the process ends, the answer is a reason, and the next request restarts it."""

    def __init__(self, side: str, *, rehearse: bool) -> None:
        self.command = [sys.executable, __file__, "--side", side, *(["--rehearse"] if rehearse else [])]
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONWARNINGS": "ignore"}
        self.environment = {**os.environ, **own, **({"JAX_PLATFORMS": "cpu"} if rehearse else {})}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )

    def send(self, **request: Any) -> None:
        if self.process.poll() is not None:
            self.start()
            self.answer()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` returns the reason
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"reason": f"its process ended with exit code {self.process.wait()}"}
        return dict(json.loads(line))

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.answer()


@contextlib.contextmanager
def started(sides: Sequence[str], *, rehearse: bool) -> Iterator[dict[str, Process]]:
    """The processes of the sides while the context lasts."""
    processes = {side: Process(side, rehearse=rehearse) for side in sides}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.process.kill()
            process.process.communicate()


def ask_all(processes: Mapping[str, Process], **request: Any) -> dict[str, dict[str, Any]]:
    """The answers of all processes, which work at the same time."""
    for process in processes.values():
        process.send(**request)
    return {side: process.answer() for side, process in processes.items()}


# Checks and times.


def check_jobs(jobs: Sequence[Job], *, rehearse: bool) -> list[Job]:
    """One modest length for each case and head size: not a multiple of a tile, longer than the window, shared keys."""
    length = 70 if rehearse else 1530
    pairs = dict.fromkeys((job.case, job.head_dim) for job in jobs)
    return [Job(case, length, head_dim, heads=8, kv_heads=2, batch=2) for case, head_dim in pairs]


def run_checks(processes: Mapping[str, Process], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """A line for each job and side of Attnax: the worst result and its error, or the reason why there is none."""
    sides = {side: process for side, process in processes.items() if side in ATTNAX}
    lines = []
    for side, answer in ask_all(sides, check=[dataclasses.asdict(job) for job in jobs]).items():
        for job, results in zip(jobs, answer.get("checks", [answer] * len(jobs)), strict=True):
            line = {"side": side, "case": job.case, "head_dim": job.head_dim}
            if isinstance(results, dict):
                lines.append({**line, **results, "passed": False})
                continue
            passed = all(result["ratio"] <= result["allowed"] for result in results)  # False for NaN
            worst = results[int(np.argmax([result["ratio"] / result["allowed"] for result in results]))]  # NaN first
            lines.append({**line, "worst": worst["result"], "ratio": worst["ratio"], "passed": passed, "all": results})
    return sorted(lines, key=lambda line: (list(CASES).index(line["case"]), line["head_dim"]))


def measure(job: Job, processes: Mapping[str, Process], rounds: int) -> Sides:
    """Seconds of every block of each side and pass."""
    rows: Sides = {side: {name: {} for name in PASSES} for side in processes}
    for side, answer in ask_all(processes, prepare=dataclasses.asdict(job)).items():
        rows[side] = {name: dict(answer.get(name, answer)) for name in PASSES}
    for name in PASSES:
        able = [side for side in rows if "sample" in rows[side][name]]
        for side in able:
            row, first = rows[side][name], rows[able[0]][name]
            differs = float(np.max([*map(_difference, row["sample"], first["sample"])]))  # NaN if any is NaN
            row["seconds"] = []
            if not differs <= AGREE:
                row["reason"] = f"another result than {SIDES[able[0]]}, by {differs:.1%}"
        for _ in range(rounds):
            for side in able:
                row = rows[side][name]
                if "reason" not in row and sum(row["seconds"]) < ENOUGH:
                    answer = processes[side].ask(time=name)
                    row["seconds"] += [answer["seconds"]] if "seconds" in answer else []
                    row |= {key: value for key, value in answer.items() if key == "reason"}
    for row in (row for passes in rows.values() for row in passes.values()):
        row.pop("sample", None)
        if "reason" not in row:
            row["median"] = statistics.median(row["seconds"])
    return rows


def _difference(sample: Sequence[float], other: Sequence[float]) -> float:
    """The rms of the difference, relative to the rms of `other`."""
    x, y = np.array(sample), np.array(other)
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


# Tile sizes.


def candidates(kind: str, *, rehearse: bool) -> list[Any]:
    from attnax.kernels._gpu.tile_sizes import Tile

    if rehearse:
        return [Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)]
    queries, stages = ((64, 128), (2, 3, 4)) if kind == "forward" else ((32, 64, 128), (1, 2, 3))
    sizes = itertools.product(queries, (32, 64, 128), (4, 8), stages)
    return [Tile(*tile) for tile in sizes if tile[0] * tile[1] >= 64 * 32]


def measure_tiles(options: argparse.Namespace) -> int:
    """Prints the fastest tile for each pass and head size, as a line of the table; backward uses the best forward tile.

    A tile of `LARGER` is one that `fits` does not allow for an unknown card.
    """
    from attnax.kernels._gpu.tile_sizes import LARGER, TILES

    for job in jobs_of(options):
        for kind in ("forward", "backward"):
            key = min(key for key in TILES if key[:2] == (kind, 16) and key[2] >= job.head_dim)
            times = time_tiles(job, key, candidates(kind, rehearse=options.rehearse), rehearse=options.rehearse)
            for tile, seconds in times.items():
                words = seconds if isinstance(seconds, str) else f"{1e3 * seconds:.3f} ms"
                print(f"    # {tuple(tile)}: {words}")
            able = {tile: seconds for tile, seconds in times.items() if isinstance(seconds, float)}
            if not able:
                print(f"gpu.py: no candidate works for {key}", file=sys.stderr)
                return 1
            TILES[key] = LARGER[key] = min(able, key=lambda tile: able[tile])
            print(f'    ("{kind}", 16, {key[2]}): Tile{tuple(TILES[key])},', flush=True)
    return 0


def time_tiles(job: Job, key: tuple[str, int, int], tiles: Sequence[Any], *, rehearse: bool) -> dict[Any, float | str]:
    """Seconds of the Pallas kernels with each tile, or the reason why the tile does not work on this device."""
    import jax

    from attnax.kernels._gpu.tile_sizes import LARGER, TILES

    sets, extra = [jax_inputs(job, n) for n in range(SETS)], jax.device_put(job.extra)
    attend = attnax_attention(job, attnax_kernel("pallas", interpret=rehearse))
    before, lowered = (dict(TILES), dict(LARGER)), []
    for tile in tiles:
        TILES[key] = LARGER[key] = tile
        jax.clear_caches()  # the caches do not depend on the table
        lowered.append(jax.jit(jax_results(attend, backward=key[0] == "backward")).lower(*sets[0], extra))
    for table, entries in zip((TILES, LARGER), before, strict=True):
        table.clear()
        table.update(entries)

    def compiled(program: Any) -> Any:
        try:
            return program.compile()
        except RuntimeError as error:  # too much shared memory
            return why(error)

    def seconds(program: Any) -> float | str:
        if isinstance(program, str):
            return program
        run = Run(lambda n: program(*sets[n], extra), jax.block_until_ready, [], 0.0)
        try:
            run.wait(run.start(0))
            return statistics.median(run.seconds(0.0 if rehearse else BLOCK) for _ in range(3))
        except RuntimeError as error:
            return why(error)

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        programs = list(pool.map(compiled, lowered))
    return dict(zip(tiles, map(seconds, programs), strict=True))


# The command.


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T")
    parser.add_argument("--head-dims", nargs="+", type=int, metavar="H")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="start no new line after that")
    parser.add_argument("--json", type=Path, help="write figures here, after each line")
    parser.add_argument("--markdown", type=Path, help="write tables here, after each line")
    parser.add_argument("--resume", action="store_true", help="keep the lines of --json, measure only missing lines")
    parser.add_argument("--tiles", action="store_true", help="measure tile sizes instead")
    parser.add_argument("--rehearse", action="store_true", help="run everything tiny on a CPU: times mean nothing")
    options = parser.parse_args(arguments)
    small = (40,) if options.rehearse else (8192,) if options.quick or options.tiles else LENGTHS
    options.lengths = options.lengths or small
    options.head_dims = options.head_dims or ((16,) if options.rehearse else (128,) if options.quick else HEAD_DIMS)
    options.cases = options.cases or list(CASES)
    if options.tiles:
        options.cases, options.lengths = ["causal"], options.lengths[:1]
    if min(*options.lengths, *options.head_dims) < 1:
        parser.error("--lengths and --head-dims must be at least 1")
    return options


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The jobs, the most important first: by head size, then by case; then causal with keys shared by 4 heads."""
    tokens, width = (80, 64) if options.rehearse else (TOKENS, WIDTH)

    def job(case: str, length: int, head_dim: int, shared: int = 1) -> Job:
        heads = max(shared, width // head_dim)
        return Job(case, length, head_dim, heads, heads // shared, max(1, tokens // length))

    jobs = [
        job(case, length, head_dim)
        for head_dim, case, length in itertools.product(options.head_dims, options.cases, options.lengths)
    ]
    if "causal" in options.cases and not options.tiles:
        jobs += [job("causal", length, options.head_dims[0], shared=4) for length in options.lengths]
    return jobs


def machine(hello: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The versions and the device that the figures depend on."""
    found = {key: value for answer in hello for key, value in answer.items() if key != "reason"}
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return {**found, "date": time.strftime("%Y-%m-%d")}


def run(options: argparse.Namespace, report: Report, processes: Mapping[str, Process], barred: Sides) -> None:
    """Checks and times the jobs that the report lacks; `barred` has sides that cannot run, with their reasons."""
    begin, rehearse, notes = time.monotonic(), options.rehearse, Notes()
    jobs = [job for job in jobs_of(options) if job not in report.lines]
    report.add_checks(run_checks(processes, check_jobs(jobs, rehearse=rehearse)))
    report.write()
    show(check_table(list(report.checks.values()), notes))
    for number, job in enumerate(jobs):
        if time.monotonic() - begin > options.limit_seconds:
            print(f"stopped after {options.limit_seconds:g} s, {len(jobs) - number} of {len(jobs)} lines are left")
            break
        wrong = {side for side in processes if not report.checks.get((side, job.case, job.head_dim), _FINE)["passed"]}
        chosen = {side: process for side, process in processes.items() if side not in wrong}
        rows = {**barred, **_without_times(dict.fromkeys(wrong, "FAILED its check"))}
        rows |= measure(job, chosen, rounds=2 if rehearse else ROUNDS)
        report.lines[job] = {side: rows[side] for side in report.sides}
        report.write()
        for row in rows_of(job, report.lines[job]):
            print(in_short(row, notes), flush=True)
    for reason, mark in notes.numbers.items():
        print(f"[{mark}] {reason}")


_FINE = {"passed": True}


def _without_times(reasons: Mapping[str, str]) -> Sides:
    return {side: {name: {"reason": reason} for name in PASSES} for side, reason in reasons.items()}


def _without_gpu(reason: str) -> int:
    print(f"gpu.py: needs an NVIDIA GPU, but {reason}; --rehearse runs it tiny on a CPU.", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    if options.side:
        run_side(options.side, rehearse=options.rehearse)
        return 0
    if options.tiles:
        reason = about("pallas", rehearse=options.rehearse).get("reason")
        return _without_gpu(reason) if reason else measure_tiles(options)
    sides = [side for side in SIDES if side in options.sides]
    with started(sides, rehearse=options.rehearse) as processes:
        hello = {side: process.answer() for side, process in processes.items()}
        barred = {side: answer["reason"] for side, answer in hello.items() if "reason" in answer}
        if len(barred) == len(sides) or set(barred) & set(ATTNAX):
            return _without_gpu(" and ".join(sorted(set(barred.values()))))
        report = Report(machine(hello.values()), sides, options.json, options.markdown)
        print(report.title(), flush=True)
        if options.resume:
            report.resume()
        able = {side: process for side, process in processes.items() if side not in barred}
        run(options, report, able, _without_times(barred))
    failures = report.failures()
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
