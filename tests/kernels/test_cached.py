"""Attention to a cache reads only the slots in use; the tests of decoding show that it is exact."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnax import (
    cached_attention,
    flash_attention,
    masks,
    memory_efficient_attention,
    pallas_flash_attention,
    standard_attention,
)
from attnax.cache import InSlots, KVLayerCache, RingKVCache, StoredTokens, StoresTokens
from attnax.pytrees import pytree_dataclass

SLOTS = 400  # four chunks of 128, the last of which overlaps


def filled(kind, count):
    """A cache of 2 rows whose first `count` slots hold tokens, in the second row one fewer."""
    positions = np.arange(SLOTS)
    positions = np.where(positions < np.array([[count], [max(0, count - 1)]]), positions, -1).astype(np.int32)
    rows = np.random.default_rng(0).standard_normal((2, 2, 1, SLOTS, 2), np.float32)
    if kind == "contiguous":
        return KVLayerCache(*rows, np.int32(count), positions, np.bool_(False))
    return RingKVCache(*rows, positions, np.zeros(2, bool), None)


@pytest.mark.parametrize("queries", [3, 19])
def test_a_kind_of_the_user_is_read_as_its_tokens_are(queries):
    @pytree_dataclass
    class OwnCache(InSlots):
        keys: jax.Array
        values: jax.Array
        positions: jax.Array
        overflowed: jax.Array

    rng = np.random.default_rng(2)
    keys, values = jax.device_put(rng.standard_normal((2, 2, 2, 40, 4), np.float32))
    positions = jax.device_put(np.stack([np.arange(40), np.arange(40) - 1]).astype(np.int32))
    query = rng.standard_normal((2, 2, queries, 4), np.float32)
    own = OwnCache(keys, values, positions, jax.device_put(np.zeros(2, bool)))
    results = [
        cached_attention(query, cache, 20 + np.arange(queries), mask=masks.causal())
        for cache in (own, StoredTokens(keys, values, positions))
    ]
    np.testing.assert_array_equal(*results)
    assert own.num_positions == own.max_len == 40


@pytree_dataclass
class Latents(KVLayerCache):
    """A kind with other arrays: values are projected from latents that all heads share, and each token has a weight."""

    weights: jax.Array  # (B, 1, S, 1)
    projection: jax.Array  # (num_kv_heads, size of a latent, value_head_dim)
    slot_names = ("keys", "values", "weights")

    def keys_values(self, slots):
        latents = slots["values"] * slots["weights"]
        return slots["keys"], jnp.einsum("BoSR,KRV->BKSV", latents, self.projection)


@pytest.mark.parametrize("queries", [3, 19])
def test_a_kind_may_keep_other_arrays_of_a_token(queries):
    rng = np.random.default_rng(3)
    new = {
        "keys": rng.standard_normal((2, 2, 150, 4), np.float32),
        "values": rng.standard_normal((2, 1, 150, 3), np.float32),
        "weights": rng.random((2, 1, 150, 1), np.float32),
    }
    new = jax.device_put(new)
    empty = {name: jnp.zeros((*x.shape[:2], 200, x.shape[3])) for name, x in new.items()}
    fields = {"length": jnp.int32(0), "positions": jnp.full((2, 200), -1), "overflowed": jnp.zeros((), bool)}
    projection = jax.device_put(rng.standard_normal((2, 3, 5), np.float32))
    cache, seen = Latents(**empty, **fields, projection=projection).append(new, np.arange(150))
    cache = cache.select_rows(np.array([1, 0]))
    query, positions = rng.standard_normal((2, 4, queries, 4), np.float32), 140 + np.arange(queries)
    out = cached_attention(query, cache, positions, mask=masks.causal())
    keys, values = new["keys"][::-1], jnp.einsum("BoSR,KRV->BKSV", new["values"] * new["weights"], projection)[::-1]
    mask = masks.at_positions(masks.causal(), jnp.asarray(positions)[None], jnp.arange(150)[None])
    np.testing.assert_allclose(out, standard_attention(query, keys, values, mask=mask), atol=3e-6)
    assert out.shape == (2, 4, queries, 5) and cache.arrays() is None and seen.slots.keys() == new.keys()
    with pytest.raises(ValueError, match="new must hold the arrays keys, values, weights by name; got keys"):
        cache.append({"keys": new["keys"]}, np.arange(150))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "name", ["num_rows", "num_positions", "key_value", "append", "chunks", "tokens", "next_positions", "select_rows"]
)
def test_a_kind_without_a_member_says_which_one(name):
    class Bare(StoresTokens):
        pass

    with pytest.raises(NotImplementedError, match=f"Bare: a cache that stores tokens needs {name} here"):
        member = getattr(Bare(), name)
        member(*[None] * len(inspect.signature(member).parameters))


@pytest.mark.parametrize("queries", [3, 19])  # by chunks, and in tiles
def test_an_array_is_about_the_queries_and_the_first_positions(queries):
    rng = np.random.default_rng(1)
    query = rng.standard_normal((2, 1, queries, 2), np.float32)
    array = jax.device_put(rng.random((2, 1, queries, 137)) < 0.5)
    positions = 100 + np.arange(queries)[::-1].astype(np.int32)

    def mask(b, h, q, kv):
        return (kv < 137) & array[b, 0, 99 + queries - q, jnp.minimum(kv, 136)]

    @jax.jit
    def run(cache):
        return [cached_attention(query, cache, positions, mask=each) for each in (array, mask)]

    np.testing.assert_allclose(*run(filled("contiguous", 300)), atol=2e-6)


@pytest.mark.parametrize("kind", ["contiguous", "ring"])
def test_only_chunks_in_use_are_read(kind):
    """The mask is not evaluated for a chunk without tokens, and a chunk that it forbids is not read."""
    tested, read = [], []

    def mask(b, h, q, kv):
        jax.debug.callback(lambda: tested.append(1))
        return kv < 200

    def mod(scores, b, h, q, kv):
        jax.debug.callback(lambda: read.append(1))
        return scores

    run = jax.jit(partial(cached_attention, mask=mask, score_mod=mod))
    query, counts = np.ones((2, 1, 1, 2), np.float32), {}
    for tokens in (0, 1, 128, 129, 300, SLOTS):
        del tested[:], read[:]
        run(query, filled(kind, tokens), np.array([SLOTS], np.int32)).block_until_ready()
        jax.effects_barrier()
        counts[tokens] = len(tested), len(read)
    assert counts == {0: (0, 0), 1: (1, 1), 128: (1, 1), 129: (2, 2), 300: (3, 2), SLOTS: (4, 2)}


@pytest.mark.parametrize("attention_fn", [flash_attention, memory_efficient_attention], ids=lambda f: f.__name__)
def test_a_function_that_reads_caches_in_chunks_gives_what_cached_attention_gives(attention_fn):
    assert attention_fn.reads_cache_in_chunks
    query, cache = (
        np.random.default_rng(1).standard_normal((2, 1, 2, 2), np.float32),
        jax.device_put(filled("contiguous", 300)),
    )
    positions = np.array([[298, 299], [297, 298]], np.int32)
    mask = masks.at_positions(masks.sliding_window(150), jnp.asarray(positions), cache.positions)
    want = attention_fn(query, cache.keys, cache.values, mask=mask)
    np.testing.assert_allclose(
        cached_attention(query, cache, positions, mask=masks.sliding_window(150)), want, atol=2e-6
    )


@pytest.mark.parametrize("attention_fn", [standard_attention, pallas_flash_attention], ids=lambda f: f.__name__)
def test_a_definition_and_an_explicit_kernel_do_not_declare_it(attention_fn):
    assert not hasattr(attention_fn, "reads_cache_in_chunks")
