"""Bounds of a traced mask over tiles, against all pairs of the tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attnax import masks
from attnax.kernels._core.intervals import bounds_of
from attnax.kernels._core.pairs import lift_pairs

SEQ, TILE = 96, 16
IDS = np.sort(np.random.default_rng(0).integers(0, 5, (2, SEQ))).astype(np.int32)
ROWS, ROW, FLAGS = jnp.asarray(IDS), jnp.asarray(IDS[0]), jnp.asarray(IDS[0] % 2 == 0)
TURNED = jnp.zeros((110, SEQ), bool).at[1, 30:].set(True).at[0].set(True)  # more rows than keys
LENGTHS, WINDOWS, WINDOW = jnp.array([40, 90]), jnp.array([8, 64]), jnp.array(20)

NUMBERS = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0, 1), start_index_map=(1, 0))


def turned_gather(b, h, q, kv):
    """`TURNED[b, kv]`, with the index in the order (kv, b)."""
    b, kv = (x[..., None] for x in jnp.broadcast_arrays(b, kv))
    return lax.gather(TURNED, lax.concatenate([kv, b], 4), NUMBERS, (1, 1), mode="clip")


# By name: a function, and whether intervals find every empty tile.
FUNCTIONS = {
    "causal": (lambda b, h, q, kv: kv <= q, True),
    "one line": (lambda b, h, q, kv: (kv <= q) & ((q - kv < 24) | (kv < 8)), True),
    "not": (lambda b, h, q, kv: ~(kv > q), True),
    "distance": (lambda b, h, q, kv: jnp.abs(q - kv) < WINDOW, True),
    "maximum": (lambda b, h, q, kv: jnp.maximum(q - kv, kv - q) < 9, True),
    "clip": (lambda b, h, q, kv: jnp.clip(q - kv, -5, 5) == 5, True),
    "negated": (lambda b, h, q, kv: (-q >= -40) & (kv != 3), True),
    "sign": (lambda b, h, q, kv: jnp.sign(q - kv) == 1, True),
    "blocks": (lambda b, h, q, kv: q // 32 == kv // 32, True),
    "shift": (lambda b, h, q, kv: (q >> 5) == (kv >> 5), True),
    "remainder": (lambda b, h, q, kv: (q % 48 < 10) & (kv % 48 >= 40), True),
    "negative remainder": (lambda b, h, q, kv: jnp.remainder(q - kv, 30) < 3, False),
    "negative quotient": (lambda b, h, q, kv: (q - kv) // 20 == -1, False),
    "product": (lambda b, h, q, kv: 3 * q - kv * 2 < 7, True),
    "of a row": (lambda b, h, q, kv: kv < LENGTHS[b], True),
    "of a head": (lambda b, h, q, kv: q - kv < WINDOWS[h], True),
    "where": (lambda b, h, q, kv: jnp.where(kv < 32, True, q - kv < 10) & (kv <= q), True),
    "documents": (lambda b, h, q, kv: (ROWS[b, q] == ROWS[b, kv]) & (kv <= q), True),
    "documents of one row": (lambda b, h, q, kv: ROW[q] == ROW[kv], True),
    "turned": (turned_gather, True),
    "flags": (lambda b, h, q, kv: FLAGS[kv], True),
    "past the end": (lambda b, h, q, kv: ROW[kv + 1] == 0, False),
    "or of an unknown": (lambda b, h, q, kv: (jnp.sqrt(1.0 * kv) < 3.0) | (q < 32), False),
    "and of an unknown": (lambda b, h, q, kv: (jnp.sqrt(1.0 * kv) < 3.0) & (kv <= q), False),
    "not of an unknown": (lambda b, h, q, kv: ~(~(jnp.sqrt(1.0 * kv) < 3.0) & (kv > q)), False),
    "neither of an unknown": (lambda b, h, q, kv: ~((jnp.sqrt(1.0 * kv) < 3.0) | (kv > q)), False),
    "wraps around": (lambda b, h, q, kv: (q * 2_000_000_000 > kv) & (q + 2_147_483_600 > 0), False),
}


def tiles_of(function):
    """(may, must) by intervals and (any, all) by pairs, each of shape (rows, heads, tiles of queries, of keys)."""
    lifted = lift_pairs("test", masks.as_mask(function), (2, 2, SEQ, SEQ), frozenset())

    @jax.jit
    def both():
        b, h, index = jnp.arange(2)[:, None, None, None], jnp.arange(2)[None, :, None, None], jnp.arange(SEQ)
        first = jnp.arange(0, SEQ, TILE)
        q, kv = (first[None, None, :, None], first[None, None, None])
        found = bounds_of(lifted, b, h, q, q + TILE - 1, kv, kv + TILE - 1)
        return found, function(b, h, index[None, None, :, None], index[None, None, None])

    found, pairs = both()
    pairs = np.broadcast_to(pairs, (2, 2, SEQ, SEQ)).reshape(2, 2, SEQ // TILE, TILE, SEQ // TILE, TILE)
    exact = pairs.any((3, 5)), pairs.all((3, 5))
    return None if found is None else [np.broadcast_to(x, exact[0].shape) for x in found], exact


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds_are_safe_and_find_empty_tiles(name):
    function, finds_all = FUNCTIONS[name]
    (may, must), (some, every) = tiles_of(function)
    assert not (some & ~may).any() and not (must & ~every).any()
    if finds_all:
        np.testing.assert_array_equal(may, some)


def test_nothing_is_told_of_floats_bits_and_unknown_primitives():
    for function in (
        lambda b, h, q, kv: (q - kv) * 0.5 < 3.0,
        lambda b, h, q, kv: (q ^ kv) < 16,
        lambda b, h, q, kv: (q & kv) == 0,
        lambda b, h, q, kv: (q - kv).astype(jnp.uint32) < 9,
    ):
        assert tiles_of(function)[0] is None
