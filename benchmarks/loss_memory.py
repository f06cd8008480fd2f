"""The memory of the loss of a language model: logits of a chunk of tokens, beside those of all tokens.

The bytes are XLA's count of the temporary memory of the compiled value and gradients. The gradients of both are
compared.

    python benchmarks/loss_memory.py [--vocabulary 32000] [--tokens 4096] [--width 256]
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _pages import show

from attnax.training.loss import weighted_cross_entropy


def logits_of(table: Any, hidden: Any) -> Any:
    return jnp.einsum("BTD,VD->BTV", hidden, table)


def in_chunks(table: Any, hidden: Any, targets: Any, weights: Any) -> Any:
    return weighted_cross_entropy(logits_of, table, hidden, targets, weights)


def at_once(table: Any, hidden: Any, targets: Any, weights: Any) -> Any:
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits_of(table, hidden), targets)).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    rng, rows = np.random.default_rng(0), 8
    shape = rows, options.tokens // rows
    table = rng.normal(size=(options.vocabulary, options.width)).astype("f") / options.width**0.5
    hidden = rng.normal(size=(*shape, options.width)).astype("f")
    targets = rng.integers(0, options.vocabulary, shape, dtype=np.int32)
    arguments = table, hidden, targets, np.full(shape, 1 / options.tokens, "f")
    found, lines = [], [["loss", "temporary MB", "value"]]
    for function in (at_once, in_chunks):
        program = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()
        memory = program.memory_analysis()
        assert memory is not None  # the CPU gives it
        found.append(program(*arguments))
        lines.append([function.__name__, f"{memory.temp_size_in_bytes / 1e6:,.0f}", f"{float(found[-1][0]):.6f}"])
    show(lines)
    for name, one, other in zip(("table", "hidden"), found[0][1], found[1][1], strict=True):
        largest = float(jnp.abs(one).max())
        print(f"greatest difference of the gradients of {name}: {float(jnp.abs(one - other).max()) / largest:.1e}")


if __name__ == "__main__":
    main()
