"""One text in bfloat16 on the CPU: tokens a second and memory, with and without the row of zeros of `Linear`.

    python benchmarks/one_row.py

GPT-2's shape, random weights, 64 tokens after a prompt of 64. `generate` writes in one program, `stream` calls one for
each token. Each side is a process, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from _machine import measure
from flax import nnx

from attnax import TransformerConfig, TransformerLM
from attnax.nn import embeddings, linear

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "d_model": 768,
    "num_heads": 12,
    "num_layers": 12,
    "d_ff": 3072,
    "max_len": 128,
}
TOKENS = 64


def side(name: str) -> None:
    """Prints a line of the table."""
    if name == "without":
        linear.product = embeddings.product = jax.lax.dot_general  # type: ignore[assignment, attr-defined]
    model = TransformerLM(nnx.Rngs(0), TransformerConfig(**SIZES, dtype="bfloat16", param_dtype="bfloat16"))
    prompt = np.ones((1, TOKENS), np.int32)
    rates = []
    writers = (
        lambda: jax.block_until_ready(model.generate(prompt, max_new_tokens=TOKENS).tokens),
        lambda: list(model.stream(prompt, max_new_tokens=TOKENS)),
    )
    for write in writers:
        write()  # compiles
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            write()
            seconds.append(time.perf_counter() - start)
        rates.append(f"{TOKENS / statistics.median(seconds):.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"| {name} | {' | '.join(rates)} | {peak} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["with", "without"], help=argparse.SUPPRESS)
    if name := parser.parse_args().side:
        side(name)
        return
    print(f"{measure().line}; jax {jax.__version__}\n")
    print("| row of zeros | generate, tokens a second | stream, tokens a second | peak of the process, MB |")
    print("|---|---|---|---|", flush=True)
    for name in ("with", "without"):
        subprocess.run([sys.executable, __file__, "--side", name], check=True)


if __name__ == "__main__":
    main()
