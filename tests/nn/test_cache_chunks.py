"""Decoding reads the slots of a cache that are in use, with every kernel that declares it."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import MultiHeadAttention, TransformerConfig, TransformerLM, flash_attention, masks, standard_attention

SLOTS, CHUNK, LENGTH = 200, 128, 5  # a chunk is 128 slots
X = jax.device_put(np.random.default_rng(0).normal(size=(2, LENGTH + 1, 12)).astype(np.float32))
KERNELS = {
    "automatic": {},
    "tiles of 4": {"attention_block_size": 4},
    "memory efficient": {"attention_type": "memory_efficient"},
    "memory efficient, tiles of 4": {"attention_type": "memory_efficient", "attention_block_size": 4},
    "scaled": {"attention_fn": partial(partial(flash_attention, block_size=4), scale=0.3)},
}


def decode(**options):
    """The last token of X through a cache whose unused slots hold NaN, and its row without a cache."""
    attn = build(lambda rngs: MultiHeadAttention(rngs, num_heads=4, num_kv_heads=2, in_features=12, **options))

    @nnx.jit
    def run(attn, x):
        whole = attn(x, mask=masks.causal())
        cache = attnax.init_kv_layer_cache(2, 2, 3, SLOTS)
        _, cache = attn(x[:, :LENGTH], mask=masks.causal(), kv_cache=cache)
        unused = dataclasses.replace(
            cache, keys=cache.keys.at[:, :, CHUNK:].set(np.nan), positions=cache.positions.at[:, CHUNK:].set(0)
        )
        return attn(x[:, LENGTH:], mask=masks.causal(), kv_cache=unused)[0][:, 0], whole[:, -1]

    return run(attn, X)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_reads_the_chunks_in_use_only(kernel):
    np.testing.assert_allclose(*decode(**KERNELS[kernel]), atol=2e-6)


def test_a_kernel_that_does_not_declare_it_reads_the_whole_cache():
    through_cache, _ = decode(attention_fn=standard_attention)
    assert np.isnan(through_cache).all()


def test_tile_sizes_and_kernels_write_the_same_tokens():
    config = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=6, dropout_rate=0.0)
    ids = np.random.default_rng(0).integers(0, 11, (2, LENGTH))
    written = [
        build(lambda rngs, fields=fields: TransformerLM(rngs, dataclasses.replace(config, **fields)))
        .generate(ids, max_new_tokens=7).tokens
        for name, fields in KERNELS.items() if name != "scaled"
    ]  # fmt: skip
    for tokens in written[1:]:
        np.testing.assert_array_equal(tokens, written[0])
