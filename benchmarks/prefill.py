"""The memory and the time of reading a prompt, at once and in chunks.

    python benchmarks/prefill.py

A decoder in the shape of GPT-2 (12 layers, d_model 768, vocabulary 50,257, RoPE, random weights) reads one prompt by
`prefill`, each cell in a process of its own. "Memory" is the peak of the process's resident memory in the calls after
the first, over what it had before them: caches, the temporary arrays of the program and what the allocator keeps.
"Temporary" is XLA's own figure for the compiled program, without the caches. Times are medians of these calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _machine import measure
from _pages import markdown_table

SHAPE: dict[str, Any] = {"vocab_size": 50257, "d_model": 768, "num_heads": 12, "d_ff": 3072, "pos_emb_type": "rope"}


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def read_prompt(length: int, chunk: int, cache: str, layers: int, calls: int) -> dict[str, float]:
    """The figures of one cell; runs in a process of its own."""
    import jax
    import numpy as np
    from flax import nnx

    from attnax import TransformerLM

    model = TransformerLM(nnx.Rngs(0), num_layers=layers, max_len=2 * length, **SHAPE)
    graphdef, state = nnx.split(model)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, length)).astype(np.int32)
    options: dict[str, Any] = {"cache": cache, "prefill_chunk": chunk}
    program = jax.jit(lambda state, ids: nnx.merge(graphdef, state).prefill(ids, **options)).lower(state, ids).compile()
    jax.block_until_ready(program(state, ids))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        caches = jax.block_until_ready(program(state, ids))
        times.append(time.perf_counter() - begun)
    analysis: Any = program.memory_analysis()
    figures = {"caches": sum(x.nbytes for x in jax.tree.leaves(caches.layers)), "memory": resident("VmHWM") - before}
    return figures | {"temporary": analysis.temp_size_in_bytes, "seconds": statistics.median(times)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Memory and time of reading a prompt.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024], help="beside reading at once")
    parser.add_argument("--cache", default="contiguous", choices=("contiguous", "ring", "paged"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--cell", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cell is not None:
        print(json.dumps(read_prompt(given.cell[0], given.cell[1], given.cache, given.layers, given.calls)))
        return
    rows: list[tuple[str, ...]] = [("prompt", "at a time", "caches, MiB", "temporary, MiB", "memory, MiB", "seconds")]
    for length in given.lengths:
        for chunk in [*(size for size in given.chunks if size < length), length]:
            command = [sys.executable, __file__, "--cell", str(length), str(chunk)]
            command += ["--cache", given.cache, "--layers", str(given.layers), "--calls", str(given.calls)]
            cell = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            sizes = (f"{cell[name] / 2**20:.0f}" for name in ("caches", "temporary", "memory"))
            rows.append((str(length), str(chunk) if chunk < length else "all", *sizes, f"{cell['seconds']:.2f}"))
    print(f"{measure().line}, {given.cache} caches of float32, {given.layers} layers\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
