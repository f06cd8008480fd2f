"""The blockwise engine: what it visits, keeps and compiles, and gradients of everything that is captured."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from attnax import flash_attention, masks, memory_efficient_attention, standard_attention, why_not_cudnn
from attnax.kernels.score_mods import relative_table_mod
from attnax.typing import pytree_dataclass

SEQ, TILE = 96, 16
IDS = jnp.asarray(np.repeat([0, 1, 2], [32, 48, 16]))
MASKS = {
    "causal": masks.causal(),
    "window": masks.sliding_window(20),
    "symmetric window": masks.sliding_window(7, causal=False),
    "prefix": masks.prefix(jnp.array([35])),
    "documents": masks.documents(IDS),
    "causal & documents": masks.causal() & masks.documents(IDS),
    "padding": masks.padding(jnp.array([41])),
    "not a window": ~masks.sliding_window(40, causal=False),
    "function": lambda b, h, q, kv: (q // 32 == kv // 16) | (kv == q),
    "function & causal": masks.causal() & (lambda b, h, q, kv: (q + kv) % 64 < 20),
    "array": np.kron(np.random.default_rng(0).random((6, 6)) < 0.4, np.ones((16, 16))) > 0,
    "positions": masks.at_positions(
        masks.causal() & masks.sliding_window(24), np.arange(SEQ), np.where(np.arange(SEQ) < 60, np.arange(SEQ), -1)
    ),
    "everything": None,
}


def visited_tiles(run):
    """The tiles (first query, first key) whose scores are computed, each as often as it is, by a mod that reports."""
    visits = []

    def mod(scores, b, h, q, kv):
        jax.debug.callback(lambda q, kv: visits.append((int(q), int(kv))), q[0, 0, 0, 0], kv[0, 0, 0, 0])
        return scores

    jax.block_until_ready(run(mod))
    jax.effects_barrier()
    return sorted(visits)


def dense(mask, seq=SEQ):
    grid = masks.index_grid(1, 1, seq, seq)
    return np.broadcast_to(True if mask is None else masks.as_mask(mask)(*grid), (1, 1, seq, seq))[0, 0]


@pytest.mark.parametrize(
    ("name", "traced"),
    [*((name, False) for name in MASKS), *((name, True) for name in ("prefix", "causal & documents", "array"))],
)
def test_visited_tiles_are_those_in_which_something_is_attended(name, traced):
    mask = None if MASKS[name] is None else masks.as_mask(MASKS[name])
    tiles = dense(mask).reshape(SEQ // TILE, TILE, SEQ // TILE, TILE)
    expected = sorted((int(i) * TILE, int(j) * TILE) for i, j in np.argwhere(tiles.any((1, 3))))
    query, key, value, cotangent = (jax.random.normal(jax.random.key(i), (1, 1, SEQ, 3)) for i in range(4))

    def run(mod):
        def both(query, given):
            attend = partial(memory_efficient_attention, mask=given if traced else mask, score_mod=mod, block_size=TILE)
            return jax.vjp(lambda query: attend(query, key, value), query)[1](cotangent)

        return jax.jit(both)(query, mask if traced else None)

    assert visited_tiles(run) == sorted([*expected, *expected])  # once forward, once backward


def test_full_tiles_are_not_tested():
    """A mask whose pointwise reading is wrong in full tiles, by its own bounds, never shows it."""

    class Lying(type(masks.causal())):
        def __call__(self, b, h, q, kv):
            return jnp.equal(q // TILE, kv // TILE) & (kv <= q)

    jax.tree_util.register_dataclass(Lying, [], [])
    x = jax.random.normal(jax.random.key(0), (1, 1, SEQ, 3))
    have = memory_efficient_attention(x, x, x, mask=Lying(), block_size=TILE)
    np.testing.assert_allclose(have, standard_attention(x, x, x, mask=masks.causal()), atol=2e-6)


def test_rows_of_the_batch_skip_on_their_own():
    visits = visited_tiles(
        lambda mod: memory_efficient_attention(
            *(jnp.ones((3, 1, SEQ, 3)),) * 3,
            mask=masks.padding(jnp.array([16, 96, 0])),
            score_mod=mod,
            block_size=TILE,
        )
    )
    # Small tiles hold all three rows, so that what one needs is computed for all.
    assert len(visits) == 36
    long = jnp.ones((2, 1, 2048, 2))
    visits = visited_tiles(
        lambda mod: memory_efficient_attention(
            long, long, long, mask=masks.padding(jnp.array([1024, 2048])), score_mod=mod, block_size=1024
        )
    )
    assert len(visits) == 2 * 1 + 2 * 2


@pytest.mark.parametrize("options", [{}, {"mask": masks.causal()}, {"mask": lambda b, h, q, kv: (q + kv) % 3 == 0}])
def test_memory_does_not_grow_with_the_square_of_the_length(options):
    def temporary(seq):
        arrays = [jax.ShapeDtypeStruct((1, 1, seq, 64), jnp.float32)] * 3
        loss = lambda *x: flash_attention(*x, **options).sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(8192), temporary(32768)
    assert long <= 64 * 2**20 and long <= 4 * short


@pytest.mark.parametrize("name", ["causal", "score mod & causal", "cross", "padding"])
def test_tile_sizes_agree(name):
    case = CASES[name]
    query, key, value, cotangent = case.arrays()

    def run(block_size):
        attend = partial(memory_efficient_attention, mask=case.mask(), score_mod=case.score_mod, block_size=block_size)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    expected = run(None)
    for block_size in (1, 5):
        for have, want in zip(run(block_size), expected, strict=True):
            np.testing.assert_allclose(have, want, atol=3e-6)


@pytest.mark.parametrize("block_size", [3, None])
def test_dropout_drops_the_same_weights_at_every_tile_size_and_in_the_backward_pass(block_size):
    query, key, value, cotangent = CASES["causal"].arrays()

    def run(attend, query, key, value):
        return attend(
            query,
            key,
            value,
            mask=masks.causal(),
            dropout_rng=jax.random.key(5),
            dropout_rate=0.4,
            deterministic=False,
        )

    out, pull = jax.vjp(partial(run, standard_attention), query, key, value)
    expected = out, *pull(cotangent)
    out, pull = jax.vjp(partial(run, partial(memory_efficient_attention, block_size=block_size)), query, key, value)
    for have, want in zip((out, *pull(cotangent)), expected, strict=True):
        assert oracle.rms_error(have, want) <= 2e-6


@pytree_dataclass
class Slope:
    slope: jax.Array

    def __call__(self, scores, b, h, q, kv):
        return scores - self.slope[h] * abs(q - kv)


class Bias(nnx.Module):
    def __init__(self, table):
        self.table = nnx.Param(table)

    def __call__(self, scores, b, h, q, kv):
        return scores + self.table[...][h, q % 3, kv % 5]


def captured_arrays():
    """Name: (array, function of it that returns a score mod)."""
    normal = lambda *shape: jax.random.normal(jax.random.key(9), shape)
    return {
        "per head": (normal(6), lambda x: lambda s, b, h, q, kv: s * jnp.exp(x[h])),
        "per key": (normal(6, 13), lambda x: lambda s, b, h, q, kv: s + x[h, kv]),
        "dense": (normal(2, 6, 13, 13), lambda x: lambda s, b, h, q, kv: s + x[b, h, q, kv]),
        "scalar": (normal(), lambda x: lambda s, b, h, q, kv: jnp.tanh(s / x) * x),
        "by bucket": (normal(6, 4), lambda x: lambda s, b, h, q, kv: s + x[h, jnp.clip(q - kv, 0, 3)]),
        "where the score says": (normal(3), lambda x: lambda s, b, h, q, kv: s + x[jnp.where(s > 0, 1, 2)]),
        "complex": (
            normal(6),
            lambda x: lambda s, b, h, q, kv: s * jnp.real(lax.complex(x, 2 * x)[h] * jnp.exp(1j * kv)),
        ),
        "in a loop": (normal(3), lambda x: lambda s, b, h, q, kv: lax.fori_loop(0, 3, lambda i, s: s * x[i], s)),
        "under jit": (normal(6), lambda x: jax.jit(lambda s, b, h, q, kv: s * x[h] + x[0] * kv)),
        "dataclass": (normal(6), Slope),
        "module": (normal(6, 3, 5), Bias),
        "slice": (normal(6, 20), lambda x: lambda s, b, h, q, kv: s * lax.dynamic_slice(x, (0, 3), (6, 1))[h, 0]),
    }


@pytest.mark.parametrize("name", captured_arrays())
def test_whatever_a_mod_captures_gets_the_gradient_of_the_definition(name):
    array, mod = captured_arrays()[name]
    query, key, value, cotangent = CASES["causal"].arrays()

    def loss(attend, array):
        return (attend(query, key, value, mask=masks.causal(), score_mod=mod(array)) * cotangent).sum()

    have = jax.jit(jax.grad(partial(loss, partial(memory_efficient_attention, block_size=4))))(array)
    want = jax.jit(jax.grad(partial(loss, standard_attention)))(array)
    assert oracle.rms_error(have, want) <= 5e-6


def test_gradients_of_low_precision_tables_are_summed_in_float32():
    query, key, value, cotangent = (jax.random.normal(jax.random.key(i), (1, 2, 256, 5)) for i in range(4))
    table = jax.random.normal(jax.random.key(4), (2, 9))

    def grad(table):
        mod = relative_table_mod(table)
        attend = partial(memory_efficient_attention, query, key, value, score_mod=mod, block_size=32)
        return (attend() * cotangent).sum()

    exact = jax.jit(jax.grad(grad))(table.astype(jnp.bfloat16).astype(jnp.float32))
    have = jax.jit(jax.grad(grad))(table.astype(jnp.bfloat16))
    rounded = np.asarray(exact.astype(jnp.bfloat16), np.float64)
    assert have.dtype == jnp.bfloat16
    assert oracle.rms_error(have, exact) <= 1.5 * oracle.rms_error(rounded, exact)


def test_scores_at_places_that_do_not_exist_are_never_met():
    """13 x 11 do not fill tiles of 4; this mod and its derivative are NaN at a score of 0."""
    query, key, value, cotangent = CASES["cross"].arrays()

    def loss(attend, query, key, value, x):
        mod = lambda scores, b, h, q, kv: jnp.sign(scores) * jnp.exp(x[h] * jnp.log(abs(scores)))
        return (attend(query, key, value, score_mod=mod) * cotangent).sum()

    arrays = query, key, value, jnp.linspace(0.5, 1.0, 6)
    have = jax.grad(partial(loss, partial(memory_efficient_attention, block_size=4)), (0, 1, 2, 3))(*arrays)
    want = jax.grad(partial(loss, standard_attention), (0, 1, 2, 3))(*arrays)
    for x, y in zip(have, want, strict=True):
        assert oracle.rms_error(x, y) <= 2e-5


def test_64_bits_work():
    code = """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
from attnax import flash_attention, memory_efficient_attention, masks, standard_attention
for dtype, most in ((jnp.float64, 1e-14), (jnp.float32, 2e-6)):
    x = jax.random.normal(jax.random.key(0), (2, 2, 11, 3), dtype)
    ids = jnp.arange(11) // 4
    mod = lambda s, b, h, q, kv: s - 0.5 * abs(q - kv)
    run = lambda f, x: (f(x, x, x, mask=masks.causal() & masks.documents(ids), score_mod=mod) ** 2).sum()
    have = jax.grad(lambda x: run(lambda *a, **k: memory_efficient_attention(*a, block_size=4, **k), x))(x)
    want = jax.grad(lambda x: run(standard_attention, x))(x)
    assert have.dtype == dtype and abs(have - want).max() < most * abs(want).max()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mask_function_may_return_a_constant_and_must_fit_its_indices():
    x = jax.random.normal(jax.random.key(0), (1, 1, 9, 3))
    have = memory_efficient_attention(x, x, x, mask=lambda b, h, q, kv: True, block_size=4)
    np.testing.assert_allclose(have, standard_attention(x, x, x), atol=2e-6)
    with pytest.raises(ValueError, match=r"shape that its indices broadcast to; got \(4, 4\)"):
        memory_efficient_attention(x, x, x, mask=lambda b, h, q, kv: jnp.tri(4, dtype=bool), block_size=4)


@pytest.mark.parametrize("how", ["eager", "jit", "vmap", "scan", "remat", "shard_map"])
def test_captured_arrays_get_gradients_inside_every_transformation(how):
    query, key, value, cotangent = CASES["causal"].arrays()
    bias = jax.random.normal(jax.random.key(9), (6, 13))

    def loss(attend, query, bias):
        out = attend(query, key, value, mask=masks.causal(), score_mod=lambda s, b, h, q, kv: s + jnp.sin(bias)[h, kv])
        return (out * cotangent).sum()

    def transformed(attend):
        one = partial(loss, attend)
        if how == "vmap":
            return lambda q, bias: jax.vmap(one, (None, 0))(q, jnp.stack([bias, bias * 2])).sum()
        if how == "scan":
            return lambda q, bias: lax.scan(lambda c, x: (c + one(q, x), None), 0.0, jnp.stack([bias, bias * 2]))[0]
        if how == "remat":
            return jax.checkpoint(one)
        if how == "shard_map":  # each device has its own rows of the queries, and all of the bias
            mesh, rows = jax.make_mesh((2,), ("rows",)), PartitionSpec("rows")

            def local(q, k, v, cotangent, bias):
                mod = lambda s, b, h, q, kv: s + jnp.sin(bias)[h, kv]
                return lax.psum((attend(q, k, v, mask=masks.causal(), score_mod=mod) * cotangent).sum(), "rows")

            sharded = jax.shard_map(
                local, mesh=mesh, in_specs=(*(rows,) * 4, PartitionSpec()), out_specs=PartitionSpec()
            )
            placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in (key, value, cotangent)]
            return lambda q, bias: sharded(jax.sharding.reshard(q, NamedSharding(mesh, rows)), *placed, bias)
        return one

    attend = partial(memory_efficient_attention, block_size=4)
    gradient = jax.grad(transformed(attend), (0, 1))
    have = (gradient if how == "eager" else jax.jit(gradient))(query, bias)
    want = jax.jit(jax.grad(partial(loss, standard_attention), (0, 1)))(query, bias)
    if how in ("vmap", "scan"):
        other = jax.jit(jax.grad(lambda q, b: loss(standard_attention, q, 2 * b), (0, 1)))(query, bias)
        want = tuple(x + y for x, y in zip(want, other, strict=True))
    for x, y in zip(have, want, strict=True):
        assert oracle.rms_error(x, y) <= 5e-6


def test_vmapped_masks_equal_a_loop():
    query, key, value, _ = CASES["full"].arrays()
    lengths = jnp.array([[3, 13], [0, 7], [11, 1]])
    run = lambda lengths: memory_efficient_attention(query, key, value, mask=masks.padding(lengths), block_size=4)
    for have, row in zip(jax.vmap(run)(lengths), lengths, strict=True):
        np.testing.assert_allclose(have, run(row), atol=2e-6)


def test_hessian_vector_products_match_the_definition():
    query, key, value, cotangent = CASES["causal"].arrays()

    def product(attend):
        loss = lambda query: (attend(query, key, value, mask=masks.causal()) * cotangent).sum()
        return jax.jit(lambda query: jax.jvp(jax.grad(loss), (query,), (cotangent[..., :5],)))(query)[1]

    assert oracle.rms_error(product(memory_efficient_attention), product(standard_attention)) <= 5e-6


@pytest.mark.parametrize("transform", ["jvp", "reverse of reverse"])
def test_derivatives_that_do_not_exist_raise(transform):
    x = jax.random.normal(jax.random.key(0), (1, 1, 9, 3))
    run = lambda x: memory_efficient_attention(x, x, x, mask=masks.causal(), block_size=4).sum()
    if transform == "jvp":
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(run, (x,), (x,))
    else:
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            jax.grad(lambda x: jax.grad(run)(x).sum())(x)


def test_equal_calls_outside_of_jit_compile_once(count_compilations):
    x = jax.random.normal(jax.random.key(0), (2, 2, 37, 3))

    def call(window, slope):
        mod = lambda scores, b, h, q, kv: scores - slope * abs(q - kv)
        return flash_attention(x, x, x, mask=masks.sliding_window(window), score_mod=mod)

    call(8, jnp.float32(1.0))
    del count_compilations[:]
    call(8, jnp.float32(2.0))
    assert not count_compilations
    call(9, jnp.float32(2.0))
    assert count_compilations


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_gradients_are_close_to_correct_rounding(dtype):
    case = CASES["causal"]
    query, key, value, cotangent = case.arrays(dtype)
    _, pull = jax.vjp(jax.jit(partial(flash_attention, mask=masks.causal())), query, key, value)
    for have, want in zip(
        pull(cotangent), oracle.gradients(query, key, value, cotangent, keep=case.dense()), strict=True
    ):
        rounded = np.asarray(jnp.asarray(want, jnp.float32).astype(dtype), np.float64)
        assert have.dtype == dtype
        assert oracle.rms_error(have, want) <= 1.5 * oracle.rms_error(rounded, want)


def test_sinks_are_a_function_of_the_log_sum_exp():
    query, key, value, cotangent = CASES["causal"].arrays()
    sink = jax.random.normal(jax.random.key(3), (1, 6, 1))

    def gated(sink, query):
        out, lse = flash_attention(query, key, value, mask=masks.causal(), return_lse=True)
        return (out * jax.nn.sigmoid(lse - sink)[..., None] * cotangent).sum()

    def explicit(sink, query):
        keys, values = (jnp.repeat(x, 3, axis=1) for x in (key, value))
        scores = jnp.einsum("BNTH,BNSH->BNTS", query, keys) * 5**-0.5
        scores = jnp.where(jnp.tri(13, dtype=bool)[None, None], scores, -jnp.inf)
        column = jnp.broadcast_to(sink[..., None], (2, 6, 13, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1))[..., :-1]
        return (jnp.einsum("BNTS,BNSH->BNTH", weights, values) * cotangent).sum()

    for have, want in zip(jax.grad(gated, (0, 1))(sink, query), jax.grad(explicit, (0, 1))(sink, query), strict=True):
        assert oracle.rms_error(have, want) <= 2e-6


class TestCudnnChoice:
    """What keeps cuDNN away is said in words; without a GPU something always does."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"score_mod": lambda s, b, h, q, kv: s}, "score mod"),
            ({"dropout_rate": 0.1, "deterministic": False, "dropout_rng": jax.random.key(0)}, "drops"),
            ({"return_lse": True}, "log-sum-exp"),
            ({"dtype": jnp.float32}, "float16 and bfloat16"),
            ({"shape": (1, 2, 128, 20)}, "head sizes"),
            ({"shape": (1, 2, 128, 256)}, "head sizes"),
            ({"shape": (1, 2, 127, 64)}, "even lengths"),
            ({"shape": (1, 2, 192, 64), "mask": masks.causal()}, "64 beyond a multiple of 128"),
            ({"mask": masks.padding(np.array([5]))}, "rows empty"),
            ({"mask": masks.sliding_window(5, causal=False)}, "rows empty"),
            ({"mask": masks.causal()}, "no NVIDIA GPU"),
            ({"mask": masks.sliding_window(32)}, "no NVIDIA GPU"),
            ({}, "no NVIDIA GPU"),
        ],
    )
    def test_reasons(self, change, words):
        change = dict(change)
        x = jnp.ones(change.pop("shape", (1, 2, 128, 64)), change.pop("dtype", jnp.bfloat16))
        assert words in why_not_cudnn(x, x, x, **change)


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_wrong_block_size_is_refused(block_size):
    x = jnp.ones((1, 1, 3, 2))
    with pytest.raises(ValueError, match="flash_attention: block_size must be a whole number, at least 1; got"):
        flash_attention(x, x, x, block_size=block_size)
