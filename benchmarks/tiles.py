"""Attention on the CPU by the size of its tiles: the figures behind `attnax/kernels/_xla/tiles.py`.

    python benchmarks/tiles.py
    python benchmarks/tiles.py --lengths 2048 --passes backward --sizes 128 256

Each line is a mask of `attention.py`, its best size is marked by a star; "chosen" is what the mask gets without a
`block_size`. Times are medians in ms of alternated calls in one process.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

from _cases import jax_results
from _cpu_cases import CASES, Job, attnax_attention
from _machine import measure
from _pages import show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=["full", "causal", "window"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=("forward", "backward"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    machine = measure()  # before JAX starts its threads

    import jax

    print(f"{machine.line}; jax {jax.__version__}; medians of {options.rounds} calls in turns, in ms\n")
    table = [["case", "pass", "T", *(str(size) for size in options.sizes), "chosen"]]
    for case in options.cases:
        for which in options.passes:
            for length in options.lengths:
                times = medians(Job(case, which == "backward", length), [*options.sizes, None], options.rounds)
                best = min(times[:-1])
                cells = [f"{1e3 * t:.1f}{' *' if t == best else ''}" for t in times[:-1]]
                table.append([case, which, str(length), *cells, f"{1e3 * times[-1]:.1f}"])
    show(table)


def medians(job: Job, sizes: list[int | None], rounds: int) -> list[float]:
    """Median seconds of a job for each size of a tile."""
    import jax

    from attnax.kernels.flash import flash_attention

    def program(size: int | None) -> Any:
        kernel = functools.partial(flash_attention, block_size=size)
        return jax.jit(
            jax_results(attnax_attention(job.case, kernel), backward=job.backward, learn=CASES[job.case].learned)
        )

    operands = jax.device_put((*job.arrays(), job.extra))
    programs = [program(size).lower(*operands).compile() for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(rounds + 1):  # the first round warms up
        for run, times in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


if __name__ == "__main__":
    main()
