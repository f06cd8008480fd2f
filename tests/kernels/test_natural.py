"""A user's function is traced once a call, at sizes that no array has, and runs at any shapes."""

import collections
import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_pairs import ELEMENTWISE, MIXED, MIXED_MASKS

from attnax import (
    cached_attention,
    flash_attention,
    init_kv_layer_cache,
    masks,
    memory_efficient_attention,
    pallas_flash_attention,
    standard_attention,
    update_kv_layer_cache,
)
from attnax.kernels._core.natural import MARKS
from attnax.kernels._core.pairs import lift_pairs
from attnax.kernels._core.reads_sizes import could_read_sizes
from attnax.kernels.paged import paged_attention
from attnax.kernels.score_mods import compose_score_mods, soft_cap_mod
from attnax.paged_cache import allocate_rows, append_rows, init_paged_kv_cache

SHAPE = 2, 3, 5, 7
SLOPES = np.float32([0.5, 0.25, 0.125])
TABLE = np.arange(27, dtype=np.float32).reshape(3, 9)


class Counted:
    """A function that counts the calls of Python; what it captures is an argument."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def near(b, h, q, kv):
    return (q >= kv) & (q - kv < 100)


def biased(s, b, h, q, kv):
    return jnp.tanh(s) + jnp.asarray(TABLE)[h, jnp.clip(q - kv, 0, 8)]


def as_in_a_row(s, b, h, q, kv):
    return s + 0 * jnp.sort(jnp.stack([s, s * 2], -1), -1)[..., 0]  # features: no natural shapes


def as_large(s, b, h, q, kv):
    return jnp.broadcast_to(jnp.asarray(SLOPES)[h], s.shape) + s  # names a size, to no effect


def program(platform, seq_len, dtype, **options):
    x = jax.ShapeDtypeStruct((1, 3, seq_len, 16), dtype)
    step = jax.grad(lambda x: flash_attention(x, x, x, **options).astype(jnp.float32).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where this JAX lowers no kernel for the card, tiles run
        return jax.jit(step).trace(x).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")])
@pytest.mark.parametrize("seq_len", [64, 1024])
def test_a_users_mask_and_mod_are_called_once(platform, dtype, seq_len):
    mask, mod = Counted(near), Counted(biased)
    program(platform, seq_len, jnp.dtype(dtype), mask=mask, score_mod=mod)
    assert (mask.calls, mod.calls) == (1, 1)


@pytest.mark.parametrize(("function", "calls"), [(as_in_a_row, 2), (as_large, 4)])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_mod_of_no_natural_shapes_is_called_again_for_its_tile_and_one_that_names_sizes_to_compare(
    platform, function, calls
):
    mod = Counted(function)
    program(platform, 64, jnp.float32, score_mod=mod)
    assert mod.calls == calls


@pytest.mark.parametrize("form", ["cached", "paged", "paged and new"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_users_mask_and_mod_are_called_once_for_a_cache(platform, form):
    mask, mod, x = Counted(near), Counted(biased), jnp.ones((2, 3, 5, 16))
    if form == "cached":
        cache = update_kv_layer_cache(init_kv_layer_cache(2, 3, 16, max_len=8), x, x)
        arguments = x[:, :, :1], cache, jnp.array([4])
        attention = cached_attention
    else:
        sizes = {"num_blocks": 5, "block_size": 16, "max_blocks_per_seq": 2}
        cache = init_paged_kv_cache(**sizes, num_kv_heads=3, head_dim=16, batch_size=2)
        cache = append_rows(allocate_rows(cache, jnp.array([5, 5])), x, x, jnp.array([5, 5]))
        arguments = (x[:, :, :1], cache) if form == "paged" else (x, x, x)
        attention = paged_attention if form == "paged" else functools.partial(paged_attention, cache=cache)
    step = jax.jit(lambda *x: attention(*x, mask=mask, score_mod=mod)).trace(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step.lower(lowering_platforms=(platform,))
    assert (mask.calls, mod.calls) == (1, 1)


def test_a_mod_that_replaces_the_scores_has_their_shape():
    x = jax.random.normal(jax.random.key(2), (2, 3, 37, 8))

    def mod(s, b, h, q, kv):
        return jnp.broadcast_to(jnp.asarray(SLOPES)[h] * kv, s.shape)

    want = standard_attention(x, x, x, score_mod=mod)
    for kernel in (flash_attention, functools.partial(flash_attention, block_size=16)):
        np.testing.assert_allclose(kernel(x, x, x, score_mod=mod), want, atol=2e-6)
    cache = update_kv_layer_cache(init_kv_layer_cache(2, 3, 8, max_len=37), x, x)
    last = cached_attention(x[:, :, -1:], cache, jnp.array([36]), score_mod=mod)
    np.testing.assert_allclose(last, want[:, :, -1:], atol=2e-6)


def test_an_error_that_no_size_causes_rises():
    def broken(b, h, q, kv):
        raise RuntimeError("broken")

    x = jnp.ones((1, 3, 5, 8))
    with pytest.raises(RuntimeError, match="broken"):
        flash_attention(x, x, x, mask=broken)


def test_the_librarys_own_functions_are_traced_once(monkeypatch):
    calls = []
    cap, causal = soft_cap_mod(3.0), masks.causal()

    def count(kind):
        own = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, *x: calls.append(kind) or own(self, *x))

    count(type(cap))
    count(type(causal))
    program("cuda", 64, jnp.float32, mask=causal, score_mod=cap)
    assert (calls.count(type(cap)), calls.count(type(causal))) == (1, 1)


@pytest.mark.parametrize("name", ["cond", "table", "rounded"])
def test_a_function_at_any_shapes_is_what_it_was_at_its_own(name):
    lifted = lift_pairs("here", ELEMENTWISE[name], SHAPE, frozenset(), scores=jnp.float32)
    b, h, q, kv = masks.index_grid(*SHAPE)
    scores = jax.random.normal(jax.random.key(0), SHAPE)
    want = jax.jit(ELEMENTWISE[name])(scores, b, h, q, kv)
    np.testing.assert_array_equal(np.broadcast_to(jax.jit(lifted.__call__)(scores, b, h, q, kv), SHAPE), want)


def test_derivatives_at_any_shapes_are_those_of_the_definition():
    x = jax.random.normal(jax.random.key(1), (2, 3, 37, 8))

    def loss(attention, x, slopes, table):
        mod = lambda s, b, h, q, kv: jax.nn.relu(s * slopes[h]) + table[h, jnp.clip(q - kv, 0, 8)] - jnp.abs(q - kv) / 9
        return (attention(x, x, x, score_mod=mod) * x.cumsum(2)).sum()

    arguments = x, jax.device_put(SLOPES), jax.device_put(TABLE)
    kernels = (
        standard_attention,
        functools.partial(flash_attention, block_size=8),
        functools.partial(pallas_flash_attention, interpret=True),
    )
    want, *have = (jax.jit(jax.grad(functools.partial(loss, kernel), (0, 1, 2)))(*arguments) for kernel in kernels)
    for gradients in have:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4), gradients, want)


def test_an_array_as_long_as_a_mark_is_refused_as_any_other():
    whole = jnp.zeros((1, 1, 1, MARKS[3]))
    x = jax.ShapeDtypeStruct((1, 1, MARKS[3], 4), jnp.float32)
    for run in (lambda s, *_: s + whole, lambda s, b, h, q, kv: s + whole[0, 0, 0, kv] + whole):
        with pytest.raises(NotImplementedError, match="uses an array as a whole along the keys"):
            jax.eval_shape(functools.partial(flash_attention, score_mod=run), x, x, x)
    read = lambda s, b, h, q, kv: s + whole[0, 0, 0, kv]
    jax.eval_shape(functools.partial(flash_attention, score_mod=read), x, x, x)


class Looking:
    """A mod with a method that looks at sizes."""

    def __call__(self, s, *indices):
        return self.change(s)

    def change(self, s):
        return s * s.shape[-1]


class Pair(NamedTuple):
    """A mod that is a tuple."""

    factor: float

    def __call__(self, s, *indices):
        return as_long(s)


class Table(dict):
    """A mod that is a dictionary."""

    def __call__(self, s, *indices):
        return as_long(s)


class Decorated:
    """A mod around a function that names no size."""

    def __init__(self):
        functools.update_wrapper(self, near)

    def __call__(self, s, *indices):
        return as_long(s)


class OfClass:
    """A mod with a class method."""

    @classmethod
    def longer(cls, s):
        return as_long(s)

    def __call__(self, s, *indices):
        return self.longer(s)


class Box:
    """Attributes from a dictionary."""

    def __init__(self, values):
        self.__dict__["values"] = values

    def __getattr__(self, name):
        return self.__dict__["values"][name]


def as_long(s):
    return 2 * s if s.shape[-1] > 100 else s


def with_attribute(s, *indices):
    return with_attribute.change(s)


with_attribute.change = as_long
sequential = nnx.Sequential(as_long)
box = Box({"factor": 2.0})


def in_a_loop(s, b, h, q, kv):
    return 2 * s if sum(1 for _ in kv[0, 0, 0]) > 100 else s


def caught(s, *indices):
    try:
        s.reshape(2, -1)
    except TypeError:
        return 2 * s
    return s


@jax.custom_jvp
def same(x):
    return x * 1.0


@same.defjvp
def _(primals, tangents):
    return primals[0] * 1.0, as_long(tangents[0])


@jax.custom_jvp
def first(x, y):
    return x * 1.0


@first.defjvp
def _(primals, tangents):
    return primals[0] * 1.0, tangents[0] * primals[1]


BRANCHING = {
    "tuple": Pair(1.0),
    "dictionary": Table(),
    "wrapper": Decorated(),
    "class method": OfClass(),
    "layer": lambda s, *_: sequential(s),
    "attribute of a function": with_attribute,
    "loop": in_a_loop,
    "exception": caught,
    "attributes from a dictionary": lambda s, *_: s * box.factor,
    "larger than the call": lambda s, b, h, q, kv: 2 * s if kv.shape[-1] > 512 else s,
    "derivative by size": lambda s, *_: same(s),
    "derivative wider than the result": lambda s, b, h, q, kv: (
        s + first(*(jnp.broadcast_to(x, s.shape) for x in (jnp.asarray(TABLE)[h % 2, 0], kv * 0.1)))
    ),
}


@pytest.mark.parametrize("name", BRANCHING)
def test_a_branch_by_size_is_that_of_the_call_not_of_a_marked_size(name):
    def gradient(attention):
        return jax.grad(lambda x: (attention(x, x, x, score_mod=BRANCHING[name]) ** 2).sum())(x)

    tiles = functools.partial(memory_efficient_attention, block_size=8)
    with jax.enable_x64(True):  # in float32 the two round differently, by the processor
        x = jax.random.normal(jax.random.key(0), (1, 2, 11, 4))
        np.testing.assert_allclose(gradient(tiles), gradient(standard_attention), rtol=1e-12, atol=1e-12)


def test_what_names_no_size_is_not_looked_into_further():
    nested = lambda s, b, h, q, kv: jax.tree.map(lambda x: x * len(kv), s)
    reads = {**MIXED, **MIXED_MASKS}
    for name in ("number of keys", "shape", "places", "fill value", "whole array", "whether there are many"):
        assert could_read_sizes(reads[name]), name
    for function in (nested, Looking(), functools.partial(nested, 1), jax.jit(nested), masks.causal() & nested):
        assert could_read_sizes(function)
    plain = lambda s, *_: s + jnp.asarray(TABLE)[0, 0]
    counts = collections.Counter()

    def counting(s, *_):
        counts["calls"] += 1
        return s

    for function in (
        plain,
        counting,
        functools.partial(biased),
        jax.jit(plain),
        compose_score_mods(soft_cap_mod(3.0), plain),
    ):
        assert not could_read_sizes(function)
