"""Under the mesh of a layout attention is local to the shards of batch and heads, and goes round over the sequence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from attnax import Layout, alibi_mod, flash_attention, masks, standard_attention

B, N, K, T = 4, 8, 2, 24
IDS = np.sort(np.random.default_rng(1).integers(-1, 4, (B, T)))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


ARRAYS = normal(0, B, N, T, 6), normal(1, B, K, T, 6), normal(2, B, K, T, 5)
TABLE = normal(3, N, 2 * T)
DROPOUT = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False}
KINDS = {
    "causal": lambda table: {"mask": masks.causal()},  # in zigzag order
    "window": lambda table: {"mask": masks.sliding_window(5), "score_mod": alibi_mod(N)},  # in order
    "documents": lambda table: {"mask": masks.documents(IDS) & masks.padding(np.array([24, 7, 3, 19]))},
    "own": lambda table: {
        "mask": lambda b, h, q, kv: (kv <= q + h) | (b == 1),
        "score_mod": lambda s, b, h, q, kv: s + table[h, jnp.abs(q - kv)],
        **DROPOUT,
    },
    "array": lambda table: {"mask": np.random.default_rng(4).random((B, 1, T, T)) > 0.3, "scale": 0.3},
}


def everything(attention_fn, kind, *arrays):
    """(out, lse) and the gradients of all arrays."""

    def loss(query, key, value, table):
        out, lse = attention_fn(query, key, value, **KINDS[kind](table), return_lse=True)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

    (_, results), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
    return results, gradients


@functools.cache
def wanted():
    run = jax.jit(lambda *arrays: {kind: everything(standard_attention, kind, *arrays) for kind in KINDS})
    return run(*ARRAYS, TABLE)


def check(attention_fn, layout, kinds):
    mesh = layout.mesh(jax.devices()[:8])
    run = jax.jit(lambda *arrays: {kind: everything(attention_fn, kind, *arrays) for kind in kinds})
    with jax.set_mesh(mesh):
        have = run(*ARRAYS, TABLE)
    for kind in kinds:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), have[kind], wanted()[kind])


def test_results_and_gradients_are_those_of_one_device():
    check(flash_attention, Layout(fsdp=2, tensor=2, context=2), ["causal", "own"])


@pytest.mark.contract
def test_every_mask_is_read_at_global_indices():
    check(flash_attention, Layout(fsdp=2, tensor=4), KINDS)  # the query heads of a device share one head of the keys
    check(flash_attention, Layout(fsdp=1, tensor=2, context=4), KINDS)
    check(standard_attention, Layout(fsdp=2, tensor=2, context=2), KINDS)


def test_keys_of_another_length_go_round_too():
    mesh = Layout(data=2, fsdp=1, context=4).mesh(jax.devices()[:8])
    query, (_, key, value) = ARRAYS[0][:, :, :12], ARRAYS
    want = jax.jit(standard_attention)(query, key, value)
    with jax.set_mesh(mesh):
        have = jax.jit(flash_attention)(query, key, value)
        uneven = jax.jit(flash_attention)(query[:3, :, :11], key[:3], value[:3])  # nothing divides these
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(uneven, want[:3, :, :11], rtol=2e-5, atol=2e-6)


PLACES = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]] * B)
STARTS = np.cumsum(PLACES == 0, axis=1)
ZIGZAG, IN_ORDER = 5 * 2 + 2, 2  # query, key, value, out and lse in two pieces; keys and values to the next device


@pytest.mark.parametrize(
    ("mask", "permutations"),
    [
        (masks.causal(), ZIGZAG),
        (masks.documents(STARTS) & masks.at_positions(masks.causal(), PLACES, PLACES), ZIGZAG),
        (masks.causal() & masks.sliding_window(5), IN_ORDER),
        (masks.at_positions(masks.sliding_window(5), PLACES, PLACES), IN_ORDER),
        (masks.documents(STARTS), IN_ORDER),
    ],
    ids=["causal", "packed", "window", "window at positions", "both sides"],
)
def test_sequences_are_in_zigzag_order_where_late_queries_have_more_work(mask, permutations):
    with jax.set_mesh(Layout(data=4, fsdp=1, context=2).mesh(jax.devices()[:8])):
        program = str(jax.make_jaxpr(lambda *arrays: flash_attention(*arrays, mask=mask))(*ARRAYS))
    assert len(re.findall(r"ppermute\[", program)) == permutations


def test_no_query_key_or_score_is_gathered():
    mesh = Layout(fsdp=2, tensor=2, context=2).mesh(jax.devices()[:8])
    cut = jax.NamedSharding(mesh, P("fsdp", "tensor", "context"))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut) for x in ARRAYS]
    with jax.set_mesh(mesh):
        text = jax.jit(functools.partial(flash_attention, mask=masks.causal())).lower(*arrays).compile().as_text()
    assert re.search("collective-permute", text) and not re.search("all-gather|all-reduce|all-to-all", text)


def test_a_score_mod_that_mixes_heads_is_refused_in_words():
    mixed = functools.partial(flash_attention, score_mod=lambda s, *_: s - s.mean(1, keepdims=True))
    mesh = Layout(fsdp=2, tensor=2, context=2).mesh(jax.devices()[:8])
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="mixes heads by reduce_sum"):
        jax.eval_shape(mixed, *ARRAYS)


def test_keys_of_explicit_axes_are_shared_by_the_heads_of_a_device():
    values = normal(0, 2, 8, 7, 3), normal(1, 2, 2, 7, 3), normal(2, 2, 2, 7, 3)
    want = jax.jit(standard_attention)(*values)
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"))):
        query, key, value = (
            jax.device_put(x, P("data", cut)) for x, cut in zip(values, ("model", None, None), strict=True)
        )
        have = jax.jit(flash_attention)(query, key, value)
    assert jax.typeof(have).sharding.spec == P("data", "model", None, None)
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)
