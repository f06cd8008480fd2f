"""Going on from the caches of an earlier call: the tokens of one long prompt, without reading it again."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import build

from attnax import Sampler, TransformerConfig, TransformerLM
from attnax.cache import (
    EmptyCache,
    grow,
    init_decoder_kv_caches_from_config,
    init_kv_layer_cache,
    init_linear_layer_cache,
    init_ring_kv_cache,
    update_kv_layer_cache,
)
from attnax.generation import TextCaches
from attnax.paged_cache import init_paged_kv_cache

CONFIG = TransformerConfig(
    vocab_size=31, d_model=12, num_heads=3, num_kv_heads=1, num_layers=1, d_ff=20, max_len=256, pos_emb_type="rope"
)
RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.integers(1, CONFIG.vocab_size, (2, length)).astype(np.int32) for length in (7, 5))
BOTH = np.concatenate([FIRST, SECOND], axis=1)
# All tokens of a text count, so a text that is not whole gives other tokens.
DRAWN = {"sampler": Sampler(1.0, repetition_penalty=1.5, no_repeat_ngram=2), "key": jax.random.key(3)}


def lm(**fields):
    return build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **fields)))


def assert_same(have, want):
    np.testing.assert_array_equal(have.tokens, want.tokens)
    np.testing.assert_allclose(have.log_probs, want.log_probs, atol=1e-4)


MODELS = {
    "contiguous": {"pos_emb_type": "learned"},
    "ring": {"num_layers": 2, "layer_pattern": ({"attention_window": 4}, {})},
    "paged": {"pos_emb_type": "alibi"},
    "linear": {"attention_type": "linear"},
    "standard": {"attention_type": "standard", "pos_emb_type": "relative"},
    "block size": {"attention_block_size": 8},
    "experts": {"num_experts": 3, "experts_per_token": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_call_goes_on_as_if_it_had_read_one_long_prompt(name):
    model, cache = lm(**MODELS[name]), name if name in ("ring", "paged") else None
    first = model.generate(FIRST, max_new_tokens=6, cache=cache, return_caches=True, **DRAWN)
    whole = np.concatenate([FIRST, first.tokens, SECOND], axis=1)
    want = model.generate(whole, max_new_tokens=6, cache=cache, **DRAWN)
    for _ in range(2):  # the caches stay as they are
        assert_same(model.generate(SECOND, max_new_tokens=6, caches=first.caches, **DRAWN), want)
