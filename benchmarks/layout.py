"""The time that merged leading axes save in `Linear` and in attention: the same mathematics in both layouts.

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


def compare(name: str, apart: Callable[..., Any], merged: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
    arrays = [jax.random.normal(jax.random.key(index), shape) * 0.1 for index, shape in enumerate(shapes)]
    steps = [
        jax.jit(jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), argnums=tuple(range(len(shapes)))))
        for f in (apart, merged)
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(12):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            times.append(time.perf_counter() - start)
    ms = [1000 * statistics.median(times[2:]) for times in seconds]  # the first calls compile and warm up
    print(f"{name:14}apart {ms[0]:6.1f} ms   merged {ms[1]:6.1f} ms   {ms[0] / ms[1]:.2f}x")


def main() -> None:
    print(f"{measure().line}; jax {jax.__version__}, forward + backward")
    weights = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    compare("feed-forward", feed_forward, merged_feed_forward, (BATCH, LENGTH, WIDTH), *weights)
    head = WIDTH // HEADS
    keys = (BATCH, KV_HEADS, LENGTH, head)
    compare("attention", products, merged_products, (BATCH, HEADS, LENGTH, head), keys, keys)


if __name__ == "__main__":
    main()
