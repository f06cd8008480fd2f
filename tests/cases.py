"""The table of tests of every attention function: BACKENDS x CASES. Sizes are unequal primes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnax import flash_attention, masks, memory_efficient_attention, pallas_flash_attention, standard_attention


def contract_unless(is_quick, *values):
    """Values for `pytest.mark.parametrize`, with the mark `contract` unless `is_quick`."""
    return pytest.param(*values, marks=() if is_quick else pytest.mark.contract)


BACKENDS: dict[str, Callable[..., Any]] = {
    "standard": standard_attention,
    "flash": flash_attention,
    "tiles of 4": functools.partial(memory_efficient_attention, block_size=4),
    "pallas": functools.partial(pallas_flash_attention, interpret=True, block_q=16, block_kv=16),
    "tpu": functools.partial(pallas_flash_attention, interpret="tpu"),
}
INTERPRETED = "pallas", "tpu"  # by JAX, which does not interpret kernels inside of shard_map


def _alibi(scores, b, h, q, kv):
    return scores - 0.3 * (h + 1) * abs(q - kv)


def _checker(b, h, q, kv):
    return (q + kv + h) % 2 == 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call, and the formula of its mask."""

    batch: int = 2
    num_heads: int = 6
    num_kv_heads: int = 2
    seq_q: int = 13
    seq_kv: int = 13
    head_dim: int = 5
    value_dim: int = 7
    mask: Callable[[], Any] = lambda: None
    keep: Callable[..., Any] | None = None  # (b, h, q, kv) -> bool in NumPy
    score_mod: Callable[..., Any] | None = None

    @property
    def score_shape(self):
        return self.batch, self.num_heads, self.seq_q, self.seq_kv

    def arrays(self, dtype=jnp.float32, seed=0):
        """query, key, value, cotangent: unit normal."""
        rng = np.random.default_rng(seed)
        shapes = (
            (self.batch, self.num_heads, self.seq_q, self.head_dim),
            (self.batch, self.num_kv_heads, self.seq_kv, self.head_dim),
            (self.batch, self.num_kv_heads, self.seq_kv, self.value_dim),
            (self.batch, self.num_heads, self.seq_q, self.value_dim),
        )
        return tuple(jax.device_put(rng.standard_normal(shape, np.float32).astype(dtype)) for shape in shapes)

    def dense(self):
        """The mask as a NumPy array (B, N, T, S), or None."""
        if self.keep is None:
            return None
        return np.broadcast_to(np.vectorize(self.keep)(*np.indices(self.score_shape)), self.score_shape)


_LENGTHS = np.array([11, 5])

CASES: dict[str, Case] = {
    "full": Case(),
    "multi-head": Case(num_kv_heads=6),
    "multi-query": Case(num_kv_heads=1),
    "cross": Case(seq_q=7, seq_kv=17),
    "one query": Case(seq_q=1, seq_kv=11),
    "no query": Case(seq_q=0, seq_kv=11),
    "no key": Case(seq_q=5, seq_kv=0),
    "one of everything": Case(1, 1, 1, 1, 1, 1, 1),
    "long head": Case(seq_q=3, seq_kv=5, head_dim=131, value_dim=3),
    "causal": Case(mask=masks.causal, keep=lambda b, h, q, kv: kv <= q),
    "causal, more keys": Case(seq_q=7, seq_kv=11, mask=masks.causal, keep=lambda b, h, q, kv: kv <= q),
    "causal, more queries": Case(seq_q=11, seq_kv=7, mask=masks.causal, keep=lambda b, h, q, kv: kv <= q),
    "padding": Case(mask=lambda: masks.padding(_LENGTHS), keep=lambda b, h, q, kv: kv < _LENGTHS[b]),
    "causal & left padding": Case(
        mask=lambda: masks.causal() & masks.padding(np.arange(13) >= _LENGTHS[:, None]),
        keep=lambda b, h, q, kv: kv <= q and kv >= _LENGTHS[b],
    ),
    "function": Case(mask=lambda: _checker, keep=lambda b, h, q, kv: (q + kv + h) % 2 == 0),
    "function & padding": Case(
        mask=lambda: _checker & masks.padding(_LENGTHS),
        keep=lambda b, h, q, kv: (q + kv + h) % 2 == 0 and kv < _LENGTHS[b],
    ),
    "array of a head axis": Case(
        mask=lambda: np.indices((6, 1, 13)).sum(0) % 3 > 0,
        keep=lambda b, h, q, kv: (h + kv) % 3 > 0,
    ),
    "array of two axes": Case(
        mask=lambda: np.indices((13, 13)).sum(0) % 3 > 0, keep=lambda b, h, q, kv: (q + kv) % 3 > 0
    ),
    "nothing allowed": Case(mask=lambda: np.zeros((1, 1), bool), keep=lambda b, h, q, kv: False),
    "at positions": Case(
        seq_q=3,
        seq_kv=7,
        mask=lambda: masks.at_positions(
            masks.causal(), np.array([[4, 5, -1], [2, 3, 4]]), np.array([0, 1, 2, 3, 4, 5, -1])
        ),
        keep=lambda b, h, q, kv: 0 <= [0, 1, 2, 3, 4, 5, -1][kv] <= [[4, 5, -1], [2, 3, 4]][b][q],
    ),
    "score mod": Case(score_mod=_alibi),
    "score mod & causal": Case(score_mod=_alibi, mask=masks.causal, keep=lambda b, h, q, kv: kv <= q),
}
