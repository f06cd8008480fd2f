"""Calls of attention that reach every path of the GPU kernels: a factor for each choice, with its levels.

`kernels(levels)` are the Triton modules of one call, `pairwise()` few calls in which every two levels of two factors
meet, `product()` all.
"""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
from _lowered import kernels_of

from attnax import cached_attention, init_kv_layer_cache, masks, pallas_flash_attention
from attnax.kernels import score_mods
from attnax.kernels.paged import paged_attention
from attnax.paged_cache import init_paged_kv_cache

MASKS = {
    "no mask": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(40),
    "documents": lambda sizes: masks.documents(*(np.arange(size) // 9 for size in sizes)),
    "padding": masks.padding(np.array([11, 5])),
    "function": lambda sizes: lambda b, h, q, kv: jnp.where(h > 1, 3, 2) * (q + kv) % 7 > 2,
}
# Name: the shape of what is learned, from the lengths, and the score mod of it.
MODS = {
    "no mod": (None, None),
    "soft cap": (None, lambda _: score_mods.soft_cap_mod(30.0)),
    "slopes": (lambda sizes: (4,), score_mods.Alibi),
    "keys": (
        lambda sizes: (4, sizes[1]),
        lambda x: lambda s, b, h, q, kv: jax.nn.relu(s + x[h, kv]) * jnp.where(h > 1, 2, 3),
    ),
    "table": (lambda sizes: (8, 4), lambda x: score_mods.relative_bias_mod(x, max_distance=20)),
    "bias": (lambda sizes: (1, 4, *sizes), score_mods.additive_bias_mod),
}
HEADS = {"multi-head": 4, "grouped": 2, "multi-query": 1}  # of keys; 4 of queries
SIZES = {"head 32": (32, 32), "head 20, value 24": (20, 24), "head 80": (80, 80), "head 256": (256, 256)}
LENGTHS = {"aligned": (256, 256), "odd": (257, 259), "one query": (1, 300), "shorter than a tile": (7, 13)}
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
DROPOUT = {"": False, "dropout": True}
SCALE = {"": None, "learned scale": 0.25}
FACTORS = (MASKS, MODS, HEADS, SIZES, LENGTHS, DTYPES, DROPOUT, SCALE)


def kernels(levels):
    """The modules of forward and backward pass with these levels, one of each factor, in the order of `FACTORS`."""
    mask, (learned, mod), kv_heads, (head_dim, value_dim), sizes, dtype, dropout, scale = (
        factor[level] for factor, level in zip(FACTORS, levels, strict=True)
    )
    if callable(mask) and not isinstance(mask, masks.Mask):
        mask = mask(sizes)
    options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.1, "deterministic": False} if dropout else {}
    shape = None if learned is None else learned(sizes)
    arrays = (
        jax.ShapeDtypeStruct((2, 4, sizes[0], head_dim), dtype),
        jax.ShapeDtypeStruct((2, kv_heads, sizes[1], head_dim), dtype),
        jax.ShapeDtypeStruct((2, kv_heads, sizes[1], value_dim), dtype),
        *(() if shape is None else (jax.ShapeDtypeStruct(shape, jnp.float32),)),
        *(() if scale is None else (jax.ShapeDtypeStruct((), jnp.float32),)),
    )

    def loss(query, key, value, *rest):
        rest = list(rest)
        score_mod = None if mod is None else mod(None if shape is None else rest.pop(0))
        given = options if scale is None else {**options, "scale": rest.pop(0)}
        out, lse = pallas_flash_attention(query, key, value, mask=mask, score_mod=score_mod, return_lse=True, **given)
        return out.astype(jnp.float32).sum() + lse.sum()

    return kernels_of(jax.value_and_grad(loss, tuple(range(len(arrays)))), *arrays)


def product():
    """Every combination of most levels; all of them in all combinations would take a day."""
    sizes = "head 32", "head 20, value 24", "head 256"
    lengths = "aligned", "odd", "one query"
    dtypes = "bfloat16", "float32"
    return itertools.product(MASKS, MODS, ("multi-head", "grouped"), sizes, lengths, dtypes, DROPOUT, ("",))


def pairwise():
    """Calls in which each two levels of any two factors meet, found greedily."""
    rng = random.Random(0)
    missing = {
        (i, x, j, y) for i, j in itertools.combinations(range(len(FACTORS)), 2) for x in FACTORS[i] for y in FACTORS[j]
    }

    def met(levels):
        return {(i, levels[i], j, levels[j]) for i, j in itertools.combinations(range(len(FACTORS)), 2)} & missing

    while missing:
        i, x, j, y = min(missing)
        tries = [[rng.choice(list(factor)) for factor in FACTORS] for _ in range(40)]
        for levels in tries:
            levels[i], levels[j] = x, y
        best = max(tries, key=lambda levels: len(met(levels)))
        missing -= met(best)
        yield tuple(best)


def decoding():
    """The modules of few queries against caches of both kinds."""
    options = {"mask": masks.causal() & masks.sliding_window(50), "score_mod": score_mods.alibi_mod(4)}
    for head_dim, dtype, seq_q, given in (
        (16, jnp.float32, 1, {}),
        (64, jnp.bfloat16, 1, options),
        (128, jnp.float16, 3, {"mask": lambda b, h, q, kv: (q + kv + b) % 3 > 0}),
        (256, jnp.bfloat16, 17, options),
    ):
        query, where = jax.ShapeDtypeStruct((2, 4, seq_q, head_dim), dtype), jax.ShapeDtypeStruct((2, seq_q), jnp.int32)
        cache = jax.eval_shape(lambda d=head_dim, t=dtype: init_kv_layer_cache(2, 2, d, max_len=301, dtype=t))
        yield from kernels_of(lambda q, c, p, given=given: cached_attention(q, c, p, **given), query, cache, where)
        pages = jax.eval_shape(
            lambda d=head_dim, t=dtype: init_paged_kv_cache(
                num_blocks=17, block_size=16, num_kv_heads=2, head_dim=d, batch_size=2, max_blocks_per_seq=6, dtype=t
            )
        )
        yield from kernels_of(lambda q, c, given=given: paged_attention(q, c, **given), query, pages)
