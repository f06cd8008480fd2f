"""The blockwise engine: what it visits, keeps and compiles, and gradients of everything that is captured."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, contract_unless
from flax import nnx
from jax import export, lax
from jax.sharding import NamedSharding, PartitionSpec

from attnax import flash_attention, masks, memory_efficient_attention, standard_attention
from attnax.kernels._core.shards import Offset
from attnax.kernels._xla.exponential import exp2
from attnax.kernels._xla.tiles import Tiles, choose_tiles
from attnax.kernels.score_mods import relative_table_mod
from attnax.pytrees import pytree_dataclass

SEQ, TILE = 96, 16
IDS = np.repeat([0, 1, 2], [32, 48, 16])
MASKS = {
    "causal": masks.causal(),
    "window": masks.sliding_window(20),
    "symmetric window": masks.sliding_window(7, causal=False),
    "prefix": masks.prefix(np.array([35])),
    "documents": masks.documents(IDS),
    "causal & documents": masks.causal() & masks.documents(IDS),
    "padding": masks.padding(np.array([41])),
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


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def every_dense():
    def run():
        grid = masks.index_grid(1, 1, SEQ, SEQ)
        return {name: True if mask is None else masks.as_mask(mask)(*grid) for name, mask in MASKS.items()}

    return jax.tree.map(lambda x: np.broadcast_to(x, (1, 1, SEQ, SEQ))[0, 0], jax.jit(run)())


@pytest.mark.parametrize(("length", "size"), [(7, 7), (512, 512), (513, 272), (1025, 352), (1500, 512), (5000, 512)])
def test_a_length_is_cut_into_the_fewest_tiles_as_evenly_as_whole_16s_allow(length, size):
    assert choose_tiles((1, 1, length, length), 1, None, None) == Tiles(1, size, size)
    assert -(-length // size) == -(-length // 512)


WINDOW = masks.sliding_window(256)
DOCUMENTS = masks.documents(np.zeros(4096, int))


@pytest.mark.parametrize(
    ("mask", "size"),
    [
        (None, 512),
        (masks.causal(), 256),
        (WINDOW, 128),
        (masks.causal() & WINDOW, 128),
        (masks.causal() | WINDOW, 256),
        (~WINDOW, 512),
        (masks.sliding_window(512, causal=False), 256),
        (masks.sliding_window(np.array(3000)), 512),
        (masks.sliding_window(np.array(256)), 128),
        (DOCUMENTS, 128),
        (~DOCUMENTS, 128),
        (masks.causal() & DOCUMENTS, 128),
        (masks.padding(np.array([4000])), 512),
        (masks.padding(np.ones((1, 4096), bool)), 512),
        (masks.as_mask(np.ones((1, 4096), bool)), 512),
        (masks.prefix(np.array([100])), 512),
        (masks.as_mask(lambda b, h, q, kv: kv <= q), 128),
        (masks.at_positions(WINDOW, np.arange(4096), np.arange(4096)), 128),
        (masks.at_positions(None, np.arange(4096), np.arange(4096)), 512),
        (Offset(np.array(0), np.array(0)).mask(WINDOW), 128),
    ],
)
def test_tiles_are_smaller_where_a_mask_allows_a_query_fewer_keys(mask, size):
    assert choose_tiles((1, 1, 4096, 4096), 1, None, mask) == Tiles(1, size, size)


def test_tiles_under_a_traced_window_and_of_causal_texts():
    traced = []
    jax.jit(lambda window: traced.append(masks.sliding_window(window).keys_per_query(4096)))(1000)
    assert traced == [None]  # cannot tell
    lengths = 256, 512, 1024, 2048, 8192
    sizes = [choose_tiles((1, 1, length, length), 1, None, masks.causal()).keys for length in lengths]
    assert sizes == [256, 256, 256, 256, 512]


def test_the_heads_of_a_tile_follow_its_size():
    shape = (4, 16, 4096, 4096)
    masks_of_tiles = {512: None, 256: masks.causal(), 128: WINDOW}
    groups = {size: choose_tiles(shape, 16, None, mask).groups for size, mask in masks_of_tiles.items()}
    assert groups == {512: 4, 256: 8, 128: 16}
    assert choose_tiles((4, 16, 64, 64), 16, None, WINDOW).groups == 64  # one tile, whatever the mask
    assert choose_tiles((4, 2, 4096, 4096), 2, None, masks.causal()).groups == 2  # rows skip on their own
    assert choose_tiles((4, 2, 4096, 4096), 2, None, WINDOW).groups == 8  # of two small tiles a row
    assert choose_tiles(shape, 16, (None, None), WINDOW) == choose_tiles(shape, 16, None, WINDOW)
    assert choose_tiles(shape, 16, (128, None), WINDOW) == Tiles(64, 128, 128)  # the user's size


def test_the_exponential_is_exact_to_a_rounding_and_keeps_zero_and_nan():
    x = np.linspace(-126, 20, 200_001, dtype=np.float32)
    error = np.asarray(jax.jit(exp2)(x)) / np.exp2(x.astype(float)) - 1
    assert abs(error).max() < 1.3e-7
    assert np.sqrt(np.mean(error**2)) < 5e-8
    edges = jnp.array([-jnp.inf, -1e30, -127, 0, 127, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(exp2(edges), np.array([0, 0, 0, 1, 2.0**127, np.nan], np.float32))
    np.testing.assert_allclose(jax.grad(exp2)(jnp.float32(3.5)), np.log(2) * 2**3.5, rtol=1e-6)
    with jax.enable_x64():
        assert exp2(jnp.float64(0.5)) == jnp.exp2(jnp.float64(0.5))
        assert exp2(jnp.float32(3)) == 8 and exp2(jnp.float32(3)).dtype == jnp.float32


def dense(name):
    """The mask of that name as an array of all pairs."""
    return every_dense()[name]


QUICK_VISITS = {("function & causal", False), ("causal & documents", True)}


@pytest.mark.parametrize(
    ("name", "traced"),
    [
        contract_unless(both in QUICK_VISITS, *both)
        for both in [*((n, False) for n in MASKS), *((n, True) for n in ("prefix", "causal & documents", "array"))]
    ],
)
def test_visited_tiles_are_those_in_which_something_is_attended(name, traced):
    mask = None if MASKS[name] is None else masks.as_mask(MASKS[name])
    tiles = dense(name).reshape(SEQ // TILE, TILE, SEQ // TILE, TILE)
    expected = sorted((int(i) * TILE, int(j) * TILE) for i, j in np.argwhere(tiles.any((1, 3))))
    query, key, value, cotangent = (normal(i, 1, 1, SEQ, 3) for i in range(4))

    def run(mod):
        def both(query, given):
            attend = partial(memory_efficient_attention, mask=given if traced else mask, score_mod=mod, block_size=TILE)
            return jax.vjp(lambda query: attend(query, key, value), query)[1](jnp.asarray(cotangent))

        return jax.jit(both)(query, mask if traced else None)

    assert visited_tiles(run) == sorted([*expected, *expected])  # once forward, once backward


def test_full_tiles_are_not_tested():
    """A mask whose pointwise reading is wrong in full tiles, by its own bounds, never shows it."""

    class Lying(type(masks.causal())):
        def __call__(self, b, h, q, kv):
            return jnp.equal(q // TILE, kv // TILE) & (kv <= q)

    jax.tree_util.register_dataclass(Lying, [], [])
    x = normal(0, 1, 1, SEQ, 3)
    have = memory_efficient_attention(x, x, x, mask=Lying(), block_size=TILE)
    np.testing.assert_allclose(have, oracle.attention(x, x, x, keep=np.tri(SEQ, dtype=bool))[0], atol=2e-6)


@pytest.mark.contract
def test_rows_of_the_batch_skip_on_their_own():
    visits = visited_tiles(
        lambda mod: memory_efficient_attention(
            *(np.ones((3, 1, SEQ, 3), np.float32),) * 3,
            mask=masks.padding(np.array([16, 96, 0])),
            score_mod=mod,
            block_size=TILE,
        )
    )
    # Small tiles hold all three rows, so that what one needs is computed for all.
    assert len(visits) == 36
    long = np.ones((2, 1, 2048, 2), np.float32)
    visits = visited_tiles(
        lambda mod: memory_efficient_attention(
            long, long, long, mask=masks.padding(np.array([1024, 2048])), score_mod=mod, block_size=1024
        )
    )
    assert len(visits) == 2 * 1 + 2 * 2


def temporary_bytes(seq, head_dim, **options):
    """What output and gradients of one head need beside arguments and results."""
    arrays = [jax.ShapeDtypeStruct((1, 1, seq, head_dim), jnp.float32)] * 3
    loss = lambda *x: flash_attention(*x, **options).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def third(b, h, q, kv):
    return (q + kv) % 3 == 0


def test_memory_does_not_grow_with_the_square_of_the_length():
    short, long = (temporary_bytes(seq, 8, mask=third, block_size=64) for seq in (1024, 4096))
    assert long <= 2**20 and long <= 4 * short  # all scores are 2**26 bytes


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.thorough),
        pytest.param({"mask": masks.causal()}, marks=pytest.mark.thorough),
        pytest.param({"mask": third}, marks=pytest.mark.contract),
    ],
)
def test_memory_of_tiles_that_are_chosen_does_not_grow_with_the_square_of_the_length(options):
    short, long = (temporary_bytes(seq, 64, **options) for seq in (8192, 32768))
    assert long <= 64 * 2**20 and long <= 4 * short


@pytest.mark.parametrize("name", ["causal", "score mod & causal", "cross", "padding"])
@pytest.mark.parametrize("block_size", [1, 5])
@pytest.mark.contract
def test_any_tile_size_gives_values_and_gradients_of_the_definition(name, block_size):
    case = CASES[name]
    arrays = case.arrays()

    def run(query, key, value, cotangent):
        attend = partial(memory_efficient_attention, mask=case.mask(), score_mod=case.score_mod, block_size=block_size)
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(cotangent)

    mod = case.score_mod and (lambda *x: np.asarray(case.score_mod(*x)))
    expected = oracle.attention(*arrays[:3], keep=case.dense(), score_mod=mod)[0]
    exact = oracle.gradients(*arrays, keep=case.dense(), score_mod=mod)
    for have, want in zip(jax.jit(run)(*arrays), (expected, *exact), strict=True):
        np.testing.assert_allclose(have, want, atol=3e-6)


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
    normal = lambda *shape: jax.device_put(np.random.default_rng(9).standard_normal(shape, np.float32))
    return {
        "per head": (normal(6), lambda x: lambda s, b, h, q, kv: s * jnp.exp(x[h])),
        "per key": (normal(6, 13), lambda x: lambda s, b, h, q, kv: s + x[h, kv]),
        "dense": (normal(2, 6, 13, 13), lambda x: lambda s, b, h, q, kv: s + x[b, h, q, kv]),
        "scalar": (jax.device_put(np.float32(-0.7)), lambda x: lambda s, b, h, q, kv: jnp.tanh(s / x) * x),
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


CAPTURED = captured_arrays()


def test_lengths_that_are_not_known_are_refused_in_words():
    (length,) = export.symbolic_shape("length")
    shape = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
    with pytest.raises(
        NotImplementedError, match="all but the batch to be known; got query.shape=.*standard_attention"
    ):
        jax.eval_shape(memory_efficient_attention, shape, shape, shape)


SEVERAL = "dense", "by bucket", "where the score says", "in a loop", "under jit", "module"


def loss_under(attend, names, arrays, query, key, value, cotangent):
    """A causal loss under the mean of the mods of these names, as a function of what they capture."""
    mods = [CAPTURED[name][1](x) for name, x in zip(names, arrays, strict=True)]
    mean = lambda s, b, h, q, kv: sum(mod(s, b, h, q, kv) for mod in mods) / len(mods)
    return (
        attend(query, key, value, mask=masks.causal(), score_mod=mods[0] if len(mods) == 1 else mean) * cotangent
    ).sum()


@pytest.mark.parametrize(
    "names",
    [
        SEVERAL,
        *(pytest.param((n,), marks=pytest.mark.thorough if n in SEVERAL else pytest.mark.contract) for n in CAPTURED),
    ],
    ids=", ".join,
)
def test_whatever_a_mod_captures_gets_the_gradient_of_the_definition(names):
    given = [CAPTURED[name][0] for name in names], *CASES["causal"].arrays()
    have, want = (
        jax.jit(jax.grad(partial(loss_under, attend, names)))(*given)
        for attend in (partial(memory_efficient_attention, block_size=4), standard_attention)
    )
    for name, x, y in zip(names, have, want, strict=True):
        assert np.abs(y).max() > 0, name
        assert oracle.rms_error(x, y) <= 5e-6, name


@pytest.mark.contract
def test_gradients_of_low_precision_tables_are_summed_in_float32():
    query, key, value, cotangent = (normal(i, 1, 2, 256, 5) for i in range(4))
    table = normal(4, 2, 9).astype(jnp.bfloat16)

    def grad(table):
        mod = relative_table_mod(table)
        attend = partial(memory_efficient_attention, query, key, value, score_mod=mod, block_size=32)
        return (attend() * cotangent).sum()

    exact = jax.jit(jax.grad(grad))(table.astype(np.float32))
    have = jax.jit(jax.grad(grad))(table)
    rounded = np.asarray(exact).astype(jnp.bfloat16).astype(np.float64)
    assert have.dtype == jnp.bfloat16
    assert oracle.rms_error(have, exact) <= 1.5 * oracle.rms_error(rounded, exact)


def test_scores_at_places_that_do_not_exist_are_never_met():
    """13 x 11 do not fill tiles of 4; this mod and its derivative are NaN at a score of 0."""
    query, key, value, cotangent = CASES["cross"].arrays()

    def loss(attend, query, key, value, x):
        mod = lambda scores, b, h, q, kv: jnp.sign(scores) * jnp.exp(x[h] * jnp.log(abs(scores)))
        return (attend(query, key, value, score_mod=mod) * cotangent).sum()

    arrays = query, key, value, np.linspace(0.5, 1.0, 6, dtype=np.float32)
    have, want = (
        jax.jit(jax.grad(partial(loss, attend), (0, 1, 2, 3)))(*arrays)
        for attend in (partial(memory_efficient_attention, block_size=4), standard_attention)
    )
    for x, y in zip(have, want, strict=True):
        assert oracle.rms_error(x, y) <= 2e-5


@pytest.mark.parametrize(
    ("dtype", "most"), [(np.float64, 1e-14), pytest.param(np.float32, 2e-6, marks=pytest.mark.contract)]
)
def test_64_bits_work(dtype, most):
    x, ids = normal(0, 2, 2, 11, 3).astype(dtype), np.arange(11) // 4
    mod = lambda s, b, h, q, kv: s - 0.5 * abs(q - kv)

    def run(x):
        attend = partial(memory_efficient_attention, mask=masks.causal() & masks.documents(ids), block_size=4)
        out, pull = jax.vjp(partial(attend, score_mod=mod), x, x, x)
        return out, *pull(2 * out)

    with jax.enable_x64(True):
        out, *grads = map(np.asarray, jax.jit(run)(x))
    options = {"keep": np.tri(11, dtype=bool) & np.equal.outer(ids, ids), "score_mod": mod}
    exact, exact_grads = oracle.attention(x, x, x, **options)[0], oracle.gradients(x, x, x, 2 * out, **options)
    for have, want in ((out, exact), *zip(grads, exact_grads, strict=True)):
        assert have.dtype == dtype and oracle.rms_error(have, want) <= most


def test_a_mask_function_may_return_a_constant_and_must_fit_its_indices():
    x = normal(0, 1, 1, 9, 3)
    have = memory_efficient_attention(x, x, x, mask=lambda b, h, q, kv: True, block_size=4)
    np.testing.assert_allclose(have, oracle.attention(x, x, x)[0], atol=2e-6)
    with pytest.raises(ValueError, match=r"shape that its indices broadcast to; got \(4, 4\)"):
        memory_efficient_attention(x, x, x, mask=lambda b, h, q, kv: jnp.tri(4, dtype=bool), block_size=4)


@pytest.mark.parametrize(
    "how",
    [contract_unless(how == "shard_map", how) for how in ("eager", "vmap", "scan", "remat", "shard_map")],
)
def test_captured_arrays_get_gradients_inside_every_transformation(how):
    query, key, value, cotangent = CASES["causal"].arrays()
    bias = normal(9, 6, 13)

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

    def exact(bias):
        """The gradients of query and sin(bias)."""
        mod = lambda s, b, h, q, kv: s + np.sin(bias[h, kv].astype(np.float64))
        options = {"keep": np.tri(13, dtype=bool), "score_mod": mod}
        _, d_scores = oracle.weights_and_score_gradients(query, key, value, cotangent, **options)
        return oracle.gradients(query, key, value, cotangent, **options)[0], d_scores.sum((0, 2))

    d_query, d_sine = exact(bias)
    want = d_query, d_sine * np.cos(bias)
    if how in ("vmap", "scan"):
        other_query, other_sine = exact(2 * bias)
        want = d_query + other_query, d_sine * np.cos(bias) + 2 * other_sine * np.cos(2 * bias)
    for x, y in zip(have, want, strict=True):
        assert oracle.rms_error(x, y) <= 5e-6


def test_vmapped_masks_equal_a_loop():
    query, key, value, _ = CASES["full"].arrays()
    lengths = np.array([[3, 13], [0, 7], [11, 1]])
    run = lambda lengths: memory_efficient_attention(query, key, value, mask=masks.padding(lengths), block_size=4)
    for have, row in zip(jax.jit(jax.vmap(run))(lengths), lengths, strict=True):
        want, _ = oracle.attention(query, key, value, keep=np.arange(13) < row[:, None, None, None])
        np.testing.assert_allclose(have, want, atol=2e-6)


def test_hessian_vector_products_match_the_definition():
    query, key, value, cotangent = CASES["causal"].arrays()

    def product(attend):
        loss = lambda query: (attend(query, key, value, mask=masks.causal()) * cotangent).sum()
        return jax.jit(lambda query: jax.jvp(jax.grad(loss), (query,), (cotangent[..., :5],)))(query)[1]

    assert oracle.rms_error(product(memory_efficient_attention), product(standard_attention)) <= 5e-6


@pytest.mark.parametrize("transform", ["jvp", "reverse of reverse"])
def test_derivatives_that_do_not_exist_raise(transform):
    x = normal(0, 1, 1, 9, 3)
    run = lambda x: memory_efficient_attention(x, x, x, mask=masks.causal(), block_size=4).sum()
    if transform == "jvp":
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jit(lambda x: jax.jvp(run, (x,), (x,))).lower(x)
    else:
        with pytest.raises(NotImplementedError, match="Use standard_attention, which has every one"):
            jax.eval_shape(jax.grad(lambda x: jax.grad(run)(x).sum()), x)


def test_equal_calls_outside_of_jit_compile_once(count_compilations):
    x = normal(0, 2, 2, 37, 3)

    def call(window, slope):
        mod = lambda scores, b, h, q, kv: scores - slope * abs(q - kv)
        return flash_attention(x, x, x, mask=masks.sliding_window(window), score_mod=mod)

    call(8, jax.device_put(np.float32(1.0)))
    del count_compilations[:]
    call(8, jax.device_put(np.float32(2.0)))
    assert not count_compilations
    call(9, jax.device_put(np.float32(2.0)))
    assert count_compilations


@pytest.mark.parametrize("dtype", [jnp.bfloat16, contract_unless(False, jnp.float16)])
def test_low_precision_gradients_are_close_to_correct_rounding(dtype):
    case = CASES["causal"]
    query, key, value, cotangent = case.arrays(dtype)
    run = lambda *x: jax.vjp(partial(flash_attention, mask=masks.causal()), *x[:3])[1](x[3])
    exact = oracle.gradients(query, key, value, cotangent, keep=case.dense())
    for have, want in zip(jax.jit(run)(query, key, value, cotangent), exact, strict=True):
        rounded = want.astype(np.float32).astype(dtype).astype(np.float64)
        assert have.dtype == dtype
        assert oracle.rms_error(have, want) <= 1.5 * oracle.rms_error(rounded, want)


def test_sinks_are_a_function_of_the_log_sum_exp():
    query, key, value, cotangent = CASES["causal"].arrays()
    sink = normal(3, 1, 6, 1)

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

    both = jax.jit(lambda *x: [jax.grad(f, (0, 1))(*x) for f in (gated, explicit)])(sink, query)
    for have, want in zip(*both, strict=True):
        assert oracle.rms_error(have, want) <= 2e-6


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_wrong_block_size_is_refused(block_size):
    x = np.ones((1, 1, 3, 2), np.float32)
    with pytest.raises(ValueError, match="flash_attention: block_size must be a whole number, at least 1; got"):
        flash_attention(x, x, x, block_size=block_size)


def test_jit_may_be_disabled():
    x = normal(0, 1, 2, 5, 3)
    want = flash_attention(x, x, x, mask=masks.causal())
    with jax.disable_jit():
        np.testing.assert_allclose(flash_attention(x, x, x, mask=masks.causal()), want, atol=1e-6)
