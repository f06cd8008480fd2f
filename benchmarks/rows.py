"""A step of decoding for rows of equal and of unequal lengths, by the kind of the cache, in CPU milliseconds.

    python benchmarks/rows.py
    python benchmarks/rows.py --cases "one of 900 among 31 of 60"

The model has 6 layers, d_model 384, 6 heads, SwiGLU of 1024 and RoPE, in float32. Each line has its own process time,
the sum over both cores; medians of 12 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from _machine import measure
from _pages import show

CAPACITY, STEPS, VOCABULARY = 1024, 12, 1024
CASES = {
    "8 of 100": [100] * 8,
    "32 of 100": [100] * 32,
    "32 of 500": [500] * 32,
    "one of 900 among 31 of 60": [900] + [60] * 31,
}
KINDS = "contiguous", "ring", "paged"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=list(CASES))
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args(arguments)
    machine = measure()  # before JAX starts its threads

    import jax
    from flax import nnx

    from attnax import TransformerLM

    fields: dict[str, Any] = {"d_model": 384, "num_heads": 6, "num_layers": options.layers, "d_ff": 1024}
    fields |= {"max_len": CAPACITY}
    fields |= {"norm_type": "rms", "ff_activation": "swiglu", "pos_emb_type": "rope", "tie_embeddings": True}
    model = TransformerLM(nnx.Rngs(0), vocab_size=VOCABULARY, dropout_rate=0.0, use_bias=False, **fields)
    print(f"{machine.line}; jax {jax.__version__}; CPU ms of a step, medians of {STEPS}\n")
    table = [["rows", *KINDS]]
    for case in options.cases:
        table.append([case, *(f"{step(model, kind, CASES[case]):.1f}" for kind in KINDS)])
    show(table)


def step(model: Any, kind: str, lengths: list[int]) -> float:
    """Median CPU milliseconds of a step after texts of these lengths."""
    import jax
    from flax import nnx

    from attnax.cache import init_decoder_kv_caches_from_config
    from attnax.paged_cache import init_paged_kv_caches_from_config

    graphdef, state = nnx.split(model)

    def run(state: Any, ids: Any, positions: Any, caches: Any) -> Any:
        return nnx.merge(graphdef, state)(ids, position_ids=positions, layer_kv_caches=caches, deterministic=True)

    program = jax.jit(run, donate_argnums=3)
    sizes: dict[str, Any] = {"batch_size": len(lengths), "max_len": CAPACITY}
    if kind == "paged":
        caches: Any = init_paged_kv_caches_from_config(model.config, **sizes)
    else:
        caches = init_decoder_kv_caches_from_config(model.config, **sizes, ring=kind == "ring")
    ends = np.array(lengths, np.int32)[:, None]
    index = np.arange(max(lengths), dtype=np.int32)[None]
    _, caches = program(state, np.ones((len(lengths), index.size), np.int32), np.where(index < ends, index, -1), caches)
    seconds = []
    for _ in range(STEPS + 1):  # the first one compiles
        start = time.process_time()
        logits, caches = program(state, np.ones_like(ends), ends, caches)
        jax.block_until_ready((logits, caches))
        seconds.append(time.process_time() - start)
        ends = ends + 1
    return 1e3 * statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
