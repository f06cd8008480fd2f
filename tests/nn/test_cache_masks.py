"""Arrays as masks of calls with a cache: rows are the call's queries, columns the positions so far."""

import functools

import jax
import numpy as np
import pytest
from cases import contract_unless
from flax import nnx
from tiny import build

import attnax
from attnax import (
    MultiHeadAttention,
    TransformerConfig,
    TransformerLM,
    cached_attention,
    init_kv_layer_cache,
    masks,
    standard_attention,
    update_kv_layer_cache,
)
from attnax.cache import EmptyCache

SLOTS, CALLS, PADS = 16, (4, 6, 7), 2  # the second row has padding on the left
SIZES = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "in_features": 12,
    "qkv_features": 16,
    "use_rope": True,
    "dropout_rate": 0.0,
}
RNG = np.random.default_rng(0)
X = jax.device_put(RNG.normal(size=(2, 7, 12)).astype(np.float32))
POSITIONS = np.stack([np.arange(7), np.maximum(np.arange(7) - PADS, -1)]).astype(np.int32)
# By query and position; each query attends itself.
SEEN = (RNG.random((2, 1, 7, 7)) < 0.6) & (np.arange(7) <= POSITIONS[:, None, :, None])
SEEN |= np.arange(7) == POSITIONS[:, None, :, None]

CACHES = {
    "contiguous": functools.partial(attnax.init_kv_layer_cache, 2, 2, 4, SLOTS),
    "8 bits": functools.partial(attnax.init_kv_layer_cache, 2, 2, 4, SLOTS, "int8"),
    "ring": functools.partial(attnax.init_ring_kv_cache, 2, 2, 4, SLOTS),
    "window": functools.partial(attnax.init_ring_kv_cache, 2, 2, 4, 5, window=5),
    "paged": functools.partial(
        attnax.init_paged_kv_cache,
        num_blocks=8, block_size=4, num_kv_heads=2, head_dim=4, batch_size=2, max_blocks_per_seq=4,
    ),
}  # fmt: skip


@functools.cache
def without_a_cache(window):
    attn = build(lambda rngs: MultiHeadAttention(rngs, **SIZES, attention_window=window))
    rows = [attn(X[:1], mask=SEEN[:1]), attn(X[1:, PADS:], mask=SEEN[1:, :, PADS:, :-PADS])]
    return [np.asarray(row[0]) for row in rows]


@pytest.mark.parametrize(
    ("kind", "attention_type"),
    [
        *(contract_unless(kind in ("contiguous", "paged"), kind, "flash") for kind in CACHES),
        ("ring", "standard"),
        contract_unless(False, "window", "standard"),
    ],
)
def test_an_array_over_the_tokens_so_far_masks_as_without_a_cache(kind, attention_type):
    window = 5 if kind == "window" else None
    attn = build(lambda rngs: MultiHeadAttention(rngs, **SIZES, attention_window=window, attention_type=attention_type))

    @nnx.jit
    def run(attn, seen):
        cache, out, start = CACHES[kind](), [], 0
        for end in CALLS:
            part, mask = slice(start, end), seen[:, :, start:end, :end]
            rows, cache = attn(X[:, part], position_ids_q=POSITIONS[:, part], mask=mask, kv_cache=cache)
            out.append(rows)
            start = end
        return jax.numpy.concatenate(out, axis=1)

    out, tolerance = np.asarray(run(attn, jax.device_put(SEEN))), 2e-2 if kind == "8 bits" else 2e-6
    for row, expected, first in zip(out, without_a_cache(window), (0, PADS), strict=True):
        np.testing.assert_allclose(row[first:], expected, atol=tolerance)


def test_nothing_beyond_an_array_is_attended_whatever_is_made_of_it():
    x = jax.device_put(np.random.default_rng(0).standard_normal((1, 2, 3, 4), np.float32))
    cache = update_kv_layer_cache(init_kv_layer_cache(1, 2, 4, max_len=9), x, x)
    none = masks.as_mask(np.zeros((1, 1, 1, 2), bool))  # knows two positions of the three that are held
    have = cached_attention(x[:, :, :1], cache, np.array([2]), mask=~none)
    want = standard_attention(x[:, :, :1], x[:, :, :2], x[:, :, :2])
    np.testing.assert_allclose(have, want, atol=1e-6)


def test_a_mask_of_a_call_goes_with_the_caches_of_a_model():
    config = TransformerConfig(
        vocab_size=11, d_model=8, num_heads=2, num_layers=2, d_ff=6, max_len=16, dropout_rate=0.0, scan_layers=True
    )
    model = build(lambda rngs: TransformerLM(rngs, config))
    ids, seen = RNG.integers(0, 11, (2, 7)), SEEN[:1]

    @nnx.jit
    def run(model, seen):
        caches = tuple(map(EmptyCache, attnax.init_decoder_kv_caches_from_config(config, batch_size=2)))
        out, start = [], 0
        for end in CALLS:
            mask = seen[:, :, start:end, :end]
            logits, caches = model(ids[:, start:end], mask=mask, layer_kv_caches=caches)
            out.append(logits)
            start = end
        return jax.numpy.concatenate(out, axis=1), model(ids, mask=seen)

    np.testing.assert_allclose(*run(model, jax.device_put(seen)), atol=2e-6)
