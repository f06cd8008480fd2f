"""The library mixes no dtypes: all of it runs with strict promotion of dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract_unless
from flax import nnx

from attnax import (
    AttentionType,
    MultiHeadAttention,
    Transformer,
    TransformerConfig,
    TransformerEncoder,
    TransformerLM,
    VisionTransformer,
    additive_bias_mod,
    alibi_mod,
    cached_attention,
    causal_mod,
    compose_score_mods,
    document_mask_mod,
    flash_attention,
    init_kv_layer_cache,
    init_ring_kv_cache,
    linear_attention,
    masks,
    memory_efficient_attention,
    pallas_flash_attention,
    prefix_lm_mod,
    relative_bias_mod,
    relative_table_mod,
    ring_attention,
    sliding_window_mod,
    soft_cap_mod,
    standard_attention,
    update_kv_layer_cache,
)
from attnax.cache import EmptyCache, init_scalar_cache
from attnax.generation import Sampler
from attnax.nn.moe import MixtureOfExperts


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def cached(query, key, value, **options):
    cache = update_kv_layer_cache(init_kv_layer_cache(1, 2, 4, max_len=11, dtype=jnp.bfloat16), key, value)
    few = cached_attention(query[:, :, :2], cache, np.arange(2), **options)
    return few, cached_attention(jnp.tile(query, (1, 1, 4, 1)), cache, np.arange(20), **options)


KERNELS = {
    "standard": standard_attention,
    "flash": flash_attention,
    "tiles": functools.partial(memory_efficient_attention, block_size=2),
    "pallas": functools.partial(pallas_flash_attention, interpret=True),
    "tpu": functools.partial(pallas_flash_attention, interpret="tpu"),
    "ring": ring_attention,
}
IDS = np.array([0, 0, 1, 1, -1])


def options(ids):
    """Options of calls over 5 tokens; `ids` are document ids, one for each possible position."""
    bias = additive_bias_mod(np.ones((1, 2, 1, 1), np.float32).astype(jnp.bfloat16))
    mods = [alibi_mod(2), relative_bias_mod(np.ones((32, 2), np.float32)), soft_cap_mod(3.0), bias, causal_mod()]
    mods += [relative_bias_mod(np.ones((32, 2), np.float32), bidirectional=False), prefix_lm_mod(np.array([2]))]
    mods += [relative_table_mod(np.ones((2, 5), np.float32)), sliding_window_mod(3), document_mask_mod(ids)]
    who = [masks.padding(np.array([3])), masks.at_positions(masks.causal(), np.arange(len(ids)), np.arange(len(ids)))]
    return {
        "score_mod": compose_score_mods(*mods),
        "mask": masks.prefix(np.array([2])) & who[0] & ~who[1] | np.ones(len(ids), bool),
        "scale": 0.3,
        "dropout_rng": jax.random.key(0),
        "dropout_rate": 0.3,
        "deterministic": False,
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [contract_unless(name not in ("pallas", "tpu"), name) for name in KERNELS])
def test_kernels(name, dtype):
    def loss(x):
        out, lse = KERNELS[name](x, x, x, **options(IDS), return_lse=True)
        return out.astype(jnp.float32).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    jax.eval_shape(jax.grad(loss), jax.ShapeDtypeStruct((1, 2, 5, 4), dtype))


@pytest.mark.parametrize("name", ["standard", "tiles"])
def test_kernels_take_float64_scores_of_a_user(name):
    mod = compose_score_mods(lambda scores, b, h, q, kv: 2 * scores, lambda scores, b, h, q, kv: scores + 1.0)
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((1, 2, 5, 4), "float64")
        out = jax.eval_shape(jax.grad(lambda x: KERNELS[name](x, x, x, score_mod=mod).sum()), x)
    assert out.dtype == "float64"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_and_linear_attention(dtype):
    x = jax.ShapeDtypeStruct((1, 2, 5, 4), dtype)
    jax.eval_shape(functools.partial(cached, **options(np.arange(11) // 4)), x, x, x)
    jax.eval_shape(functools.partial(linear_attention, causal=True), x, x, x)
    jax.eval_shape(linear_attention, x, x, x)


SIZES = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 16}
MODELS = {
    "rope": {"pos_emb_type": "rope", "qk_norm": "head", "attention_sinks": True, "attention_soft_cap": 5.0},
    "gate": {"pos_emb_type": "none", "attention_gate": "element"},
    "experts": {"pos_emb_type": "alibi", "num_experts": 4, "num_shared_experts": 1, "router_jitter": 0.1},
    "post-norm": {"pos_emb_type": "learned", "norm_placement": "post", "norm_type": "layer", "attention_window": 3},
    "standard": {"pos_emb_type": "sinusoidal", "attention_type": AttentionType.STANDARD, "dropout_rate": 0.1},
    "linear": {"pos_emb_type": "none", "attention_type": AttentionType.LINEAR, "scan_layers": True},
    "relative": {"pos_emb_type": "relative", "tie_embeddings": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models(name, dtype):
    def run(ids):
        model = TransformerLM(nnx.Rngs(0), dtype=dtype, **SIZES, **MODELS[name])
        out = model.run(ids, padding_mask=ids > 0, deterministic=False, rngs=nnx.Rngs(1))
        return out.logits, out.aux, model.log_probs(ids)

    jax.eval_shape(run, jax.ShapeDtypeStruct((2, 5), jnp.int32))


class ForgetGate(nnx.Module):
    cumulative = True

    def __call__(self, x):
        return -jnp.abs(x[..., :2]).swapaxes(1, 2)

    def mod(self, scores, b, h, q, kv, of_query, of_key):
        return scores + of_query - of_key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hooks_of_attention(dtype):
    def run(x):
        hooks = {"query_fn": lambda heads, x: heads, "token_scalars": ForgetGate(), "attention_gate": "head"}
        sizes = {"d_model": 8, "num_heads": 2, "dtype": dtype, "attention_window": 6}
        layer = MultiHeadAttention(nnx.Rngs(0), **sizes, **hooks)
        cache = EmptyCache(init_scalar_cache(init_ring_kv_cache(1, 2, 4, 11, dtype, window=6), 2))
        options = {"mask": masks.causal(), "mix_values": lambda values: values}
        _, cache = layer(x, kv_cache=cache, **options)
        return [layer(x, **options), layer(x, kv_cache=cache, **options)[0]]

    outs = jax.eval_shape(run, jax.ShapeDtypeStruct((1, 5, 8), dtype))
    assert [out.dtype for out in outs] == [dtype] * 2


def test_statistics_of_experts_in_float64():
    with jax.enable_x64(True):
        moe = lambda x: MixtureOfExperts(nnx.Rngs(0), d_model=8, d_ff=8, num_experts=4, dtype="float64")(x)[1]
        jax.eval_shape(moe, jax.ShapeDtypeStruct((2, 5, 8), jnp.float64))


def test_generation():
    sampler = Sampler(temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.2)

    def run(ids):
        model = TransformerLM(nnx.Rngs(0), dtype="bfloat16", **SIZES, pos_emb_type="rope")
        key = jax.random.key(0)
        return [
            model.generate(ids, max_new_tokens=3, **given).tokens
            for given in (
                {"sampler": sampler, "key": key, "padding_mask": ids > 0, "end_token": 3},
                {"draft": model},
                {"cache": "paged"},
                {"cache_dtype": "int8"},
            )
        ]

    jax.eval_shape(run, jax.ShapeDtypeStruct((2, 4), jnp.int32))


def test_other_models():
    config = TransformerConfig(**SIZES, dtype="bfloat16")
    images = {
        "image_size": 8,
        "patch_size": 4,
        "num_classes": 3,
        "d_model": 8,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 8,
    }

    def run(ids, pixels):
        both = Transformer(nnx.Rngs(0), config, config)
        encoder = TransformerEncoder(nnx.Rngs(0), config)
        return (
            both(ids, ids),
            both.generate(ids, max_length=4, start_token=1).tokens,
            encoder(ids, padding_mask=ids > 0),
            VisionTransformer(nnx.Rngs(0), **images, dtype="bfloat16")(pixels),
        )

    jax.eval_shape(run, jax.ShapeDtypeStruct((2, 4), jnp.int32), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
