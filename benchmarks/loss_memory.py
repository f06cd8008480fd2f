"""The memory of the loss of a language model: logits of a chunk of tokens, beside those of all tokens.

The bytes are XLA's count of the temporary memory of the compiled value and gradients. On a CPU the product that gives
the gradient of the head is not added up in place, so that one such gradient is temporary too. The gradients of both
losses are compared.

    python benchmarks/loss_memory.py [--vocabulary 32000] [--tokens 4096] [--widths 64 256]
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
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    options = parser.parse_args()
    lines = [["width", "loss", "temporary MB", "of it a gradient of the head", "gradients, relative difference"]]
    rng, rows = np.random.default_rng(0), 8
    shape = rows, options.tokens // rows
    for width in options.widths:
        table = rng.normal(size=(options.vocabulary, width)).astype("f") / width**0.5
        hidden = rng.normal(size=(*shape, width)).astype("f")
        targets = rng.integers(0, options.vocabulary, shape, dtype=np.int32)
        arguments, wanted = (table, hidden, targets, np.full(shape, 1 / options.tokens, "f")), None
        for function in (at_once, in_chunks):
            program = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()
            memory = program.memory_analysis()
            assert memory is not None  # the CPU gives it
            _, gradients = program(*arguments)
            wanted = gradients if wanted is None else wanted
            worst = max(
                float(jnp.abs(one - other).max() / jnp.abs(one).max())
                for one, other in zip(wanted, gradients, strict=True)
            )
            sizes = f"{memory.temp_size_in_bytes / 1e6:,.0f}", f"{table.nbytes / 1e6:,.0f}"
            lines.append([str(width), function.__name__, *sizes, f"{worst:.1e}"])
    show(lines)


if __name__ == "__main__":
    main()
