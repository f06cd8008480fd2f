"""A few queries against a cache in the TPU kernel, interpreted, against the loop over chunks; and what it declines."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract_unless
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from attnax import cached_attention, init_kv_layer_cache, masks
from attnax.kernels import _decode_call, score_mods
from attnax.kernels._tpu import decode, launch
from attnax.kernels.paged import paged_attention
from attnax.paged_cache import init_paged_kv_cache

HEADS, KV_HEADS = 6, 2
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jax.device_put(RNG.standard_normal(shape, np.float32).astype(dtype))


def in_one_piece(capacity, *, dtype=jnp.float32, value_dim=13):
    """A cache like a ring: tokens in any order between empty slots that hold NaN, and a row without any token."""
    cache = init_kv_layer_cache(3, KV_HEADS, 11, max_len=capacity, value_head_dim=value_dim, dtype=dtype)
    positions = np.stack([RNG.permutation(capacity) for _ in range(3)]).astype(np.int32)
    positions = np.where(positions < np.array([[capacity * 2 // 3], [5], [0]]), positions, -1)
    empty = positions[:, None, :, None] < 0
    keys, values = (
        jnp.where(empty, jnp.nan, normal(*x.shape, dtype=x.dtype)).astype(x.dtype) for x in (cache.keys, cache.values)
    )
    return dataclasses.replace(
        cache, keys=keys, values=values, positions=jnp.asarray(positions), length=jnp.int32(capacity)
    )


def in_pages(lengths, num_pages, *, page=8, dtype=jnp.float32, head_dim=128):
    """A cache whose rows hold pages in any order, with NaN in all pages that no row holds and behind each row's end."""
    cache = init_paged_kv_cache(
        num_blocks=len(lengths) * num_pages + 2,
        block_size=page,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        batch_size=len(lengths),
        max_blocks_per_seq=num_pages,
        dtype=dtype,
    )
    lengths = np.array(lengths, np.int32)
    shape = len(lengths), num_pages
    table = RNG.permutation(cache.key_pool.shape[0])[: shape[0] * shape[1]].reshape(shape).astype(np.int32)
    table = np.where(np.arange(num_pages) * page < lengths[:, None], table, -1)
    is_held = np.zeros((cache.key_pool.shape[0], 1, page, 1), bool)
    for row, length in zip(table, lengths, strict=True):
        for n, block in enumerate(row[row >= 0]):
            is_held[block, 0, : length - n * page] = True
    keys, values = (
        jnp.where(is_held, normal(*x.shape, dtype=x.dtype), jnp.nan).astype(x.dtype)
        for x in (cache.key_pool, cache.value_pool)
    )
    return dataclasses.replace(
        cache, key_pool=keys, value_pool=values, block_table=jnp.asarray(table), seq_lengths=jnp.asarray(lengths)
    )


TABLE = normal(HEADS, 16)


def bucket_bias(scores, b, h, q, kv):
    return scores + TABLE[h, jnp.clip(abs(q - kv) // 4, 0, 15)]


OPTIONS = {
    "nothing": {},
    "causal & ALiBi": {"mask": masks.causal(), "score_mod": score_mods.alibi_mod(HEADS)},
    "window & soft cap": {"mask": masks.sliding_window(9), "score_mod": score_mods.soft_cap_mod(3.0)},
    "T5 table": {"mask": masks.causal(), "score_mod": bucket_bias},
    "function": {"mask": lambda b, h, q, kv: (q + kv + b + h) % 3 > 0},
}
CACHES = {  # name: (a cache, its number of tiles of keys)
    "one tile": lambda: in_one_piece(37),
    "tiles past the end": lambda: in_one_piece(700),
    "pages": lambda: in_pages([133, 21, 0], 19),  # 16 pages are a tile
    "a few pages": lambda: in_pages([17, 3, 24], 3),
    "large pages of small heads": lambda: in_pages([150, 300, 0], 3, page=128, head_dim=11),
}


def interpret(monkeypatch):
    """Every call by the TPU kernel, as ordinary JAX; True is the cheapest way, and fills nothing with NaN."""
    monkeypatch.setattr(launch, "INTERPRET", True)

    def attend(queries, sources, functions, kernel, *, dropout_rate):
        result = decode.attend(kernel, functions[0].mask, functions[0].score_mod, interpret=True)
        assert result is not None, "the kernel declined"
        return result

    monkeypatch.setattr(_decode_call, "_attend", attend)


def check(monkeypatch, cache, seq_q, options, *, tolerance=3e-6, dtype=jnp.float32):
    query = normal(3, HEADS, seq_q, cache.key_value[0].shape[1], dtype=dtype)
    if hasattr(cache, "seq_lengths"):
        run = partial(paged_attention, return_lse=True, **options)
        arguments = query, cache
    else:
        run = partial(cached_attention, return_lse=True, **options)
        # The first query of row 0 is padding, if it has several.
        positions = np.array([[20], [4], [11]]) + np.arange(seq_q)
        positions[0, : seq_q // 2] = -1
        arguments = query, cache, jnp.asarray(positions, jnp.int32)
    want = jax.jit(run)(*arguments)
    interpret(monkeypatch)
    have = jax.jit(run)(*arguments)
    for x, y in zip(have, want, strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), atol=tolerance)
    assert np.isfinite(np.asarray(want[0], np.float32)).all()
    return want


@pytest.mark.parametrize(
    ("cache", "seq_q", "options"),
    [
        contract_unless(
            (cache, seq_q, options) in (("one tile", 3, "causal & ALiBi"), ("pages", 3, "T5 table")),
            cache,
            seq_q,
            options,
        )
        for i, cache in enumerate(CACHES)
        for j, options in enumerate(OPTIONS)
        for seq_q in (1, 3)
        if (i + j + seq_q // 2) % 2 == 0
    ],
)
def test_the_kernel_gives_what_the_chunks_give(monkeypatch, cache, seq_q, options):
    out, lse = check(monkeypatch, CACHES[cache](), seq_q, OPTIONS[options])
    assert cache == "a few pages" or ((out[2] == 0).all() and (lse[2] == -np.inf).all())


@pytest.mark.contract
@pytest.mark.parametrize("cache", ["one tile", "pages"])
def test_devices_of_a_mesh_with_auto_axes_attend_for_their_rows_and_heads(monkeypatch, cache):
    with jax.set_mesh(jax.make_mesh((3, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)):
        check(monkeypatch, CACHES[cache](), 3, OPTIONS["T5 table"])


@pytest.mark.contract
def test_bfloat16(monkeypatch):
    check(monkeypatch, in_one_piece(37, dtype=jnp.bfloat16), 3, OPTIONS["T5 table"], tolerance=0.03, dtype=jnp.bfloat16)


@pytest.mark.contract
def test_nothing_that_was_not_written_is_read(monkeypatch):
    """This interpreter fills memory with NaN."""
    cache, query = in_one_piece(700), normal(3, HEADS, 2, 11)
    run = partial(cached_attention, query=query, cache=cache, query_positions=np.array([600, 650]), mask=masks.causal())
    want = run()
    interpret(monkeypatch)
    monkeypatch.setattr(launch, "INTERPRET", pltpu.InterpretParams())
    np.testing.assert_allclose(jax.jit(run)(), want, atol=3e-6)


@pytest.mark.contract
def test_a_key_that_is_not_finite_spoils_who_attends_it(monkeypatch):
    cache = init_kv_layer_cache(1, KV_HEADS, 11, max_len=19)
    cache = dataclasses.replace(
        cache,
        keys=normal(1, KV_HEADS, 19, 11).at[0, 1, 5, 3].set(np.inf),
        values=normal(1, KV_HEADS, 19, 11),
        positions=jnp.arange(19, dtype=jnp.int32)[None],
        length=jnp.int32(19),
    )
    interpret(monkeypatch)
    out = cached_attention(normal(1, HEADS, 2, 11), cache, np.array([4, 18]), mask=masks.causal())
    assert (np.isnan(out).any(-1) == (np.arange(HEADS)[:, None] // 3 == 1) * np.array([False, True])).all()


def has_kernel(function, *arguments):
    """Whether a program for a TPU has the kernel."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("TPU v5e", 1, "tpu"))):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == text.count("attnax_decode") <= 1
    return "attnax_decode" in text


def cached(capacity=40, head_dim=11, dtype=jnp.float32, query=None, **options):
    cache = init_kv_layer_cache(2, KV_HEADS, head_dim, max_len=capacity, dtype=dtype)
    run = partial(cached_attention, query_positions=np.arange(1), **options)
    return has_kernel(run, normal(2, HEADS, 1, head_dim, dtype=query or dtype), cache)


def paged(page, dtype=jnp.float32, num_pages=3, head_dim=128):
    cache = in_pages([3], num_pages, page=page, dtype=dtype, head_dim=head_dim)
    return has_kernel(paged_attention, normal(1, HEADS, 1, head_dim, dtype=dtype), cache)


def test_a_program_for_a_tpu_has_the_kernel():
    assert cached(mask=masks.causal(), score_mod=score_mods.alibi_mod(HEADS))
    assert paged(16, jnp.bfloat16)


@pytest.mark.parametrize(
    ("serves", "call"),
    [
        (True, partial(cached, 700)),
        (True, partial(cached, head_dim=256)),
        (True, partial(cached, head_dim=128)),
        (True, partial(paged, 8)),
        (True, partial(paged, 256, head_dim=64)),
        (True, partial(paged, 1000, num_pages=1)),
        (False, partial(cached, head_dim=257)),
        (False, partial(cached, dtype=jnp.float16)),
        (False, partial(cached, dtype=jnp.bfloat16, query=jnp.float32)),
        (False, partial(cached, mask=lambda b, h, q, kv: jnp.ones((40, 40), bool)[q, kv])),
        (False, partial(cached, score_mod=lambda x, b, h, q, kv: x + jnp.cbrt(x))),
        (False, partial(paged, 12)),
        (False, partial(paged, 64, head_dim=64)),  # such pages would be copied
        (False, partial(paged, 8, jnp.bfloat16)),
        (False, partial(paged, 1000)),  # a tile of 16 pages would be too large
    ],
)
@pytest.mark.contract
def test_what_the_kernel_does_not_serve_is_left_to_the_chunks(serves, call):
    assert call() == serves


@pytest.mark.contract
def test_too_many_tiles_are_left_to_the_chunks():
    def serves(rows):
        cache = jax.eval_shape(partial(init_kv_layer_cache, rows, 1, 8, max_len=512 * 1024))
        query = jax.ShapeDtypeStruct((rows, 1, 1, 8), jnp.float32)
        return has_kernel(partial(cached_attention, query_positions=np.arange(1)), query, cache)

    assert serves(64)
    assert not serves(65)
