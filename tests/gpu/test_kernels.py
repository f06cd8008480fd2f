"""The contract on an NVIDIA GPU, compiled: `make test-gpu`. Needs jax, numpy and pytest only."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES

from attnax import (
    cached_attention,
    flash_attention,
    init_kv_layer_cache,
    masks,
    memory_efficient_attention,
    pallas_flash_attention,
    standard_attention,
    update_kv_layer_cache,
    why_not_cudnn,
    why_not_pallas,
)
from attnax.kernels import score_mods
from attnax.kernels._core.platform import has_nvidia_gpu

if not has_nvidia_gpu():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

BACKENDS = {
    "pallas": pallas_flash_attention,
    "tiles of 16": partial(pallas_flash_attention, block_q=16, block_kv=16),
    "flash": flash_attention,
    "blockwise": memory_efficient_attention,
}
backends = pytest.mark.parametrize("backend", BACKENDS)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def everything(attend, *arrays):
    """(out, lse, and all gradients)."""
    *arrays, cotangent = arrays

    def run(*arrays):
        (out, lse), pull = jax.vjp(attend, *arrays)
        return out, lse, *pull((cotangent, jnp.cos(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)))

    return jax.jit(run)(*arrays)


@backends
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_the_definition(backend, case):
    case = CASES[case]
    query, key, value, cotangent = case.arrays()
    options = {"mask": case.mask(), "score_mod": case.score_mod, "return_lse": True}
    have = everything(partial(BACKENDS[backend], **options), query, key, value, cotangent)
    want = everything(partial(standard_attention, **options), query, key, value, cotangent)
    keep = case.dense()
    mod = None if case.score_mod is None else lambda s, b, h, q, kv: np.asarray(case.score_mod(s, b, h, q, kv))
    exact, _ = oracle.attention(query, key, value, keep=keep, score_mod=mod)
    assert have[0].size == 0 or oracle.rms_error(have[0], exact) <= 1e-6
    for x, y in zip(have, want, strict=True):
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        np.testing.assert_allclose(np.nan_to_num(x), np.nan_to_num(y), atol=1e-5)


@backends
@pytest.mark.parametrize("non_finite", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_only_rows_that_may_attend_a_non_finite_number_are_contaminated(backend, non_finite, where):
    query, key, value, cotangent = CASES["full"].arrays()
    document = jnp.arange(13) >= 6
    mask = lambda b, h, q, kv: document[q] == document[kv]
    attend = partial(BACKENDS[backend], mask=mask, return_lse=True)
    clean = everything(attend, query, key, value, cotangent)
    inputs = [x.at[:, :, 2, 1].set(non_finite) if n == where else x for n, x in enumerate((query, key, value))]
    have = everything(attend, *inputs, cotangent)
    for x, y in zip(have, clean, strict=True):
        np.testing.assert_array_equal(x[:, :, 6:], y[:, :, 6:])
    assert jnp.isnan(have[0][:, :, 2] if where == 0 else have[0][:, :, :6]).all()


LEARNED = {
    "slopes": (lambda: normal(9, 6), score_mods.Alibi),
    "bias": (lambda: normal(9, 1, 6, 131, 131), score_mods.additive_bias_mod),
    "T5": (lambda: normal(9, 8, 6), partial(score_mods.relative_bias_mod, max_distance=20)),
    "clipped": (lambda: normal(9, 6, 17), score_mods.relative_table_mod),
    "per key": (lambda: normal(9, 6, 131), lambda x: lambda s, b, h, q, kv: s + x[h, kv]),
    "cap": (lambda: jnp.float32(1.7), score_mods.soft_cap_mod),
    "large table": (lambda: normal(9, 3000), lambda x: lambda s, b, h, q, kv: s + x[q - kv + 1500]),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_captured_array_gets_the_gradient_of_the_definition(name):
    array, mod = LEARNED[name][0](), LEARNED[name][1]
    arrays = *(normal(n, 2, heads, 131, 24) for n, heads in enumerate((6, 2, 2))), array, normal(3, 2, 6, 131, 24)

    def run(attend, query, key, value, array):
        return attend(query, key, value, mask=masks.causal(), score_mod=mod(array), return_lse=True)

    have = everything(partial(run, flash_attention), *arrays)
    with jax.enable_x64():
        want = everything(partial(run, standard_attention), *(x.astype(jnp.float64) for x in arrays))
    for x, y in zip(have, want, strict=True):
        assert oracle.rms_error(x, y) <= 2e-5
    again = everything(partial(run, flash_attention), *arrays)
    if name != "large table":
        for x, y in zip(have, again, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_no_worse_than_twice_the_dense_computation(head_dim, dtype):
    arrays = [normal(n, 2, heads, 515, head_dim, dtype=dtype) for n, heads in enumerate((4, 2, 2, 4))]
    mask = jnp.tri(515, dtype=bool)[None, None]

    def densely(query, key, value):
        key, value = (jnp.repeat(x, 2, axis=1) for x in (key, value))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, product("BNTH,BNSH->BNTS", query, key) * head_dim**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(dtype)
        return product("BNTS,BNSH->BNTH", weights, value).astype(dtype), jax.nn.logsumexp(scores, -1)

    exact = partial(standard_attention, mask=mask, return_lse=True)
    wide = everything(exact, *(x.astype(jnp.float32) for x in arrays))
    plain = everything(densely, *arrays)
    for attend in (pallas_flash_attention, flash_attention):
        have = everything(partial(attend, mask=masks.causal(), return_lse=True), *arrays)
        np.testing.assert_allclose(have[1], wide[1], atol=1e-5)
        for x, y, z in zip((have[0], *have[2:]), (plain[0], *plain[2:]), (wide[0], *wide[2:]), strict=True):
            assert oracle.rms_error(x, z) <= 2 * oracle.rms_error(y, z)


def test_dropout_drops_the_weights_that_the_tiles_drop():
    arrays = *(normal(n, 2, heads, 131, 24) for n, heads in enumerate((6, 2, 2))), normal(3, 2, 6, 131, 24)
    options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False, "return_lse": True}
    have, want = (
        everything(partial(f, mask=masks.causal(), **options), *arrays)
        for f in (pallas_flash_attention, memory_efficient_attention)
    )
    for x, y in zip(have, want, strict=True):
        assert oracle.rms_error(x, y) <= 1e-5


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(100)])
def test_cudnn_serves_the_plain_cases(mask):
    query, key, value = (normal(n, 2, heads, 512, 64, dtype=jnp.bfloat16) for n, heads in enumerate((4, 2, 2)))
    assert why_not_cudnn(query, key, value, mask=mask) is None
    assert why_not_pallas(query, key, value, mask=mask) is None
    have = jax.jit(partial(flash_attention, mask=mask))(query, key, value)
    want = jax.jit(partial(pallas_flash_attention, mask=mask))(query, key, value)
    np.testing.assert_allclose(have.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)


@pytest.mark.parametrize("seq_q", [1, 3])
def test_decoding_from_a_cache_equals_the_full_forward(seq_q):
    keys, values = normal(0, 2, 2, 700, 64), normal(1, 2, 2, 700, 64)
    cache = update_kv_layer_cache(init_kv_layer_cache(2, 2, 64, max_len=1000), keys, values)
    query = normal(2, 2, 6, 700, 64)
    options = {"mask": masks.causal() & masks.sliding_window(300), "score_mod": score_mods.alibi_mod(6)}
    positions = jnp.arange(700 - seq_q, 700)
    run = jax.jit(functools.partial(cached_attention, **options))
    want = standard_attention(query, keys, values, **options)[:, :, -seq_q:]
    np.testing.assert_allclose(run(query[:, :, -seq_q:], cache, positions), want, atol=1e-5)
