"""The time in which a `Sampler` draws a token for each row.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --rows 1 8 --vocabularies 50257 --cases greedy "top_k=50"

Logits fall with the logarithm of a token's rank, times 1.5 in "peaked" rows and 1 in "flat" ones, with noise; the
temperature is 0.8. "Sorted" is the same draw where every row sorts the vocabulary, as it does where no few candidates
decide. Figures are medians of alternated calls in one process: milliseconds of all cores, and of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
from _machine import measure
from _pages import show

SLOPES = {"peaked": 1.5, "flat": 1.0}
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "greedy": ("peaked", {"temperature": 0.0}),
    "no cut": ("peaked", {}),
    "top_k=50": ("peaked", {"top_k": 50}),
    "top_p=0.9": ("peaked", {"top_p": 0.9}),
    "min_p=0.05": ("peaked", {"min_p": 0.05}),
    "top_k=50, top_p=0.95, min_p=0.02": ("peaked", {"top_k": 50, "top_p": 0.95, "min_p": 0.02}),
    "top_p=0.9, flat": ("flat", {"top_p": 0.9}),
    "no cut in half of the rows": ("peaked", {"top_k": 50}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[32])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[8192, 50257])
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    machine = measure()  # before JAX starts its threads

    import jax

    print(f"{machine.line}; jax {jax.__version__}; medians of {options.rounds} calls in turns, in ms\n")
    table = [["rows", "vocabulary", "sampler", "CPU", "clock", "sorted, CPU", "sorted, clock"]]
    for rows in options.rows:
        for size in options.vocabularies:
            for name in options.cases:
                times = medians(name, rows, size, options.rounds)
                table.append([str(rows), str(size), name, *(f"{1e3 * t:.1f}" for t in times)])
    show(table)


def medians(name: str, rows: int, size: int, rounds: int) -> list[float]:
    """Median seconds of all cores and of the clock: of a draw, and of one that sorts."""
    import jax

    from attnax.generation import Sampler, candidates

    kind, fields = CASES[name]
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(size) for _ in range(rows)]) + 1
    logits = (-SLOPES[kind] * np.log(ranks) + rng.normal(0, 0.3, (rows, size))).astype(np.float32)
    given: dict[str, Any] = {"temperature": 0.8, **fields}
    if "half" in name:
        given["top_k"] = np.where(np.arange(rows) % 2, size, given["top_k"])
    operands = jax.device_put((Sampler(**given).as_arrays(size), logits, jax.random.split(jax.random.key(0), rows)))

    def program() -> Callable[..., Any]:
        return jax.jit(lambda sampler, logits, keys: sampler(logits, keys)).lower(*operands).compile()

    programs = [program()]
    with mock.patch.object(candidates, "_LARGE", size + 1):
        programs.append(program())
    seconds: list[list[tuple[float, float]]] = [[] for _ in programs]
    for _ in range(rounds + 1):  # the first round warms up
        for run, times in zip(programs, seconds, strict=True):
            before = time.process_time(), time.perf_counter()
            jax.block_until_ready(run(*operands))
            times.append((time.process_time() - before[0], time.perf_counter() - before[1]))
    return [statistics.median(column) for times in seconds for column in zip(*times[1:], strict=True)]


if __name__ == "__main__":
    main()
