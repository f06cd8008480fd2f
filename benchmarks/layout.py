"""The time that two layouts save: merged leading axes in `Linear` and in attention, and gradients of tall matrices.

    python benchmarks/layout.py

Times forward + backward on the CPU, compiled, the two layouts in turns; the sizes are those of `benchmarks/train.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _machine import measure

from attnax.nn.linear import wide_gradient

BATCH, LENGTH, WIDTH, HIDDEN, HEADS, KV_HEADS = 8, 256, 384, 1024, 6, 2


def feed_forward(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def merged_feed_forward(x: Any, *weights: Any) -> Any:
    return feed_forward(x.reshape(-1, WIDTH), *weights).reshape(x.shape)


def products(query: Any, key: Any, value: Any) -> Any:
    grouped = query.reshape(BATCH, KV_HEADS, -1, LENGTH, query.shape[-1])
    weights = jax.nn.softmax(jnp.einsum("BKGTH,BKSH->BKGTS", grouped, key))
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, value)


def merged_products(query: Any, key: Any, value: Any) -> Any:
    groups = BATCH * KV_HEADS
    query, key, value = (x.reshape(groups, -1, x.shape[-1]) for x in (query, key, value))
    return jnp.einsum("XMS,XSH->XMH", jax.nn.softmax(jnp.einsum("XMH,XSH->XMS", query, key)), value)


def compare(name: str, first: Callable[..., Any], second: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
    arrays = [jax.random.normal(jax.random.key(index), shape) * 0.1 for index, shape in enumerate(shapes)]
    steps = [
        jax.jit(jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), argnums=tuple(range(len(shapes)))))
        for f in (first, second)
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(12):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            times.append(time.perf_counter() - start)
    ms = [1000 * statistics.median(times[2:]) for times in seconds]  # the first calls compile and warm up
    print(f"{name:32}{ms[0]:6.1f} ms   {ms[1]:6.1f} ms   {ms[0] / ms[1]:.2f}x")


def main() -> None:
    print(f"{measure().line}; jax {jax.__version__}, forward + backward")
    weights = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    compare("feed-forward, apart and merged", feed_forward, merged_feed_forward, (BATCH, LENGTH, WIDTH), *weights)
    head = WIDTH // HEADS
    keys = (BATCH, KV_HEADS, LENGTH, head)
    compare("attention, apart and merged", products, merged_products, (BATCH, HEADS, LENGTH, head), keys, keys)
    down = (BATCH * LENGTH, HIDDEN), (HIDDEN, WIDTH)
    compare("gradient, tall and wide", lambda x, kernel: x @ kernel, lambda x, kernel: x @ wide_gradient(kernel), *down)


if __name__ == "__main__":
    main()
