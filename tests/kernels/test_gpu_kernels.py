"""The GPU kernels without a GPU: run in interpret mode, and lowered for cuda."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from _lowered import gpu_mesh, kernels_of, parse
from cases import CASES, contract_unless
from jax import lax
from test_tile_loop import CAPTURED, MASKS, SEQ, dense

from attnax import (
    cached_attention,
    flash_attention,
    init_kv_layer_cache,
    masks,
    pallas_flash_attention,
    standard_attention,
    update_kv_layer_cache,
    why_not_pallas,
)
from attnax.cache import TokenArrays
from attnax.kernels import score_mods
from attnax.kernels._core import natural
from attnax.kernels._core.decode import DecodeInputs
from attnax.kernels._core.dropout import dropout_words, keep_weights
from attnax.kernels._core.lift import lift_marked
from attnax.kernels._core.natural import examples
from attnax.kernels._core.operands import lift_bounds, lift_functions
from attnax.kernels._core.tile_codes import EMPTY, FULL, PARTIAL
from attnax.kernels._core.tile_grid import TileGrid, tile_codes
from attnax.kernels._gpu import decode
from attnax.kernels._gpu.tile_lists import TileList
from attnax.kernels.paged import paged_attention
from attnax.paged_cache import allocate_rows, append_rows, init_paged_kv_cache

interpreted = partial(pallas_flash_attention, interpret=True, block_q=16, block_kv=16)


T, S = 37, 53


def arrays(dtype=jnp.float32, seq_q=T, seq_kv=S, head_dim=20, value_dim=24):
    """query, key, value and cotangent of 2 rows, 6 heads and 2 key heads, in tiles that do not fit."""
    shapes = (2, 6, seq_q, head_dim), (2, 2, seq_kv, head_dim), (2, 2, seq_kv, value_dim), (2, 6, seq_q, value_dim)
    return tuple(jax.device_put(np.asarray(normal(*shape, seed=i)).astype(dtype)) for i, shape in enumerate(shapes))


def normal(*shape, seed=9):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32))


def lowered(function, *arguments, mesh=None):
    """The names of the kernels in a program that is lowered for NVIDIA GPUs; they are valid and need no atomics."""
    kernels = kernels_of(function, *arguments, mesh=mesh)
    for kernel in kernels:
        assert "atomic" not in str(parse(kernel))
    return {kernel.name.removeprefix("attnax_") for kernel in kernels}


def kernels_in(text):
    """The names of the kernels in the text of a program."""
    return set(re.findall(r"attnax_(\w+)", text)) - {"by_platform"}


def gradient(attend, *options):
    def loss(query, key, value, cotangent, *given):
        out, lse = attend(query, key, value, *given, return_lse=True)
        return (out * cotangent).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * 0.3).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2, *(4 + n for n in range(len(options))))))


IDS = np.arange(T) // 9, np.arange(S) // 9


DROPOUT = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False}


def scattered(b, h, q, kv):
    return (q * 3 + kv * (h + 1) + b) % 7 < 3


GRIDS = {  # name: (options, who attends whom)
    "causal": ({"mask": masks.causal()}, lambda b, h, q, kv: kv <= q),
    "window": ({"mask": masks.sliding_window(11)}, lambda b, h, q, kv: (kv <= q) & (kv > q - 11)),
    "documents": ({"mask": masks.documents(*IDS)}, lambda b, h, q, kv: IDS[0][q] == IDS[1][kv]),
    "function": ({"mask": scattered}, scattered),
    "nothing": ({}, lambda b, h, q, kv: kv >= 0),
    "function & dropout": ({"mask": scattered, **DROPOUT}, scattered),
    "causal & dropout": ({"mask": masks.causal(), **DROPOUT}, lambda b, h, q, kv: kv <= q),
}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        pytest.param(name, blocks, marks=pytest.mark.contract if (i + j) % 2 else pytest.mark.thorough)
        for i, name in enumerate(GRIDS)
        for j, blocks in enumerate(((16, 32), (64, 16)))
    ],
)
def test_tiles_that_do_not_fit_give_the_gradients_of_the_definition(name, blocks):
    options, keep = GRIDS[name]
    given = arrays()
    attend = partial(interpreted, block_q=blocks[0], block_kv=blocks[1], **options)
    keep, dropped = np.broadcast_to(keep(*np.indices((2, 6, T, S), sparse=True)), (2, 6, T, S)), {}
    if "dropout_rate" in options:
        draw = jax.jit(lambda key: keep_weights(dropout_words(key), 0.3, *masks.index_grid(2, 6, T, S)))
        dropped = {"keep_weights": np.asarray(draw(DROPOUT["dropout_rng"])), "dropout_rate": 0.3}
    want = oracle.gradients(*given, keep=keep, d_lse=0.3, **dropped)
    for x, y in zip(gradient(attend)(*given), want, strict=True):
        assert oracle.rms_error(x, y) <= 3e-6


def learned_arrays():
    """Name: (array, function of it that returns a score mod, sizes of the queries and keys)."""
    bias = score_mods.additive_bias_mod
    named = {name: (*both, 13, 13) for name, both in CAPTURED.items()}
    return named | {
        "bias of all": (normal(2, 6, T, S), bias, T, S),
        "bias of heads": (normal(1, 6, T, S), bias, T, S),
        "bias of rows": (normal(2, 1, T, S), bias, T, S),
        "bias of pairs": (normal(T, S), bias, T, S),
        "bias of queries": (normal(6, T, 1), bias, T, S),
        "bias of keys": (normal(2, 1, 1, S), bias, T, S),
        "keys first": (normal(S, 6, T), lambda x: lambda s, b, h, q, kv: s + x[kv, h, q], T, S),
        "T5": (normal(8, 6), lambda x: score_mods.relative_bias_mod(x, max_distance=20), T, S),
        "clipped": (normal(6, 17), score_mods.relative_table_mod, T, S),
        "slopes": (normal(6), score_mods.Alibi, T, S),
        "narrow in a product": (
            jax.device_put(np.asarray(normal(6)).astype(jnp.bfloat16)),
            lambda x: lambda s, b, h, q, kv: s + x[h] * abs(q - kv) * 0.01,
            T,
            S,
        ),
        "distance": (normal(2001), lambda x: lambda s, b, h, q, kv: s + x[q - kv + 1000], T, S),
        "chunks of distances": (normal(6, 5001), lambda x: lambda s, b, h, q, kv: s + x[h, q - kv + 4090], T, S),
        "rules": (
            normal(6),
            lambda x: lambda s, b, h, q, kv: jax.nn.relu(s * x[h]) + jax.nn.log_sigmoid(s - x[h]),
            T,
            S,
        ),
        "cap": (jax.device_put(np.float32(1.7)), score_mods.soft_cap_mod, T, S),
        "half of the heads": (normal(3, 5), lambda x: lambda s, b, h, q, kv: s + x[h // 2, (q + kv) % 5], T, S),
        "bfloat16": (
            jax.device_put(np.asarray(normal(6, 7)).astype(jnp.bfloat16)),
            lambda x: lambda s, b, h, q, kv: s + x[h, q % 7],
            T,
            S,
        ),
        "at positions": (
            normal(6, 9),
            lambda x: masks.at_positions(
                lambda s, b, h, q, kv: s * x[h, q % 9] + x[h, kv % 3], np.arange(T) + 5, np.arange(S)[::-1].copy()
            ),
            T,
            S,
        ),
    }


LEARNED = learned_arrays()


def test_tables_get_gradients_in_kernels_where_64_bits_are_enabled():
    table, *_ = LEARNED["T5"]
    with jax.enable_x64():
        run = gradient(partial(under_mod, "T5", flash_attention), table)
        assert "d_table" in lowered(run, *arrays(jnp.bfloat16), table)


NO_KERNEL = {"complex": "complex|integer_pow|mul|exp", "in a loop": "scan|while", "where the score says": None}


def under_mod(name, attend, query, key, value, captured, **options):
    """Attention under the mod of that name, which captures an array."""
    return attend(query, key, value, score_mod=LEARNED[name][1](captured), **options)


HELD = [name for name in LEARNED if name not in NO_KERNEL]


QUICK = {"bias of heads", "distance", "rules"}


IN_THE_CONTRACT = {
    "narrow in a product",
    "distance",
    "rules",
    "per key",
    "dense",
    "by bucket",
    "keys first",
    "at positions",
}


def mark_of(name, quick=()):
    if name in quick:
        return []
    return [pytest.mark.contract if name in IN_THE_CONTRACT else pytest.mark.thorough]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        *(pytest.param(name, masks.causal(), id=name, marks=mark_of(name, QUICK)) for name in HELD),
        # Queries that two tiles hold count once here too.
        pytest.param("T5", None, id="T5 without a mask", marks=pytest.mark.contract),
        pytest.param("clipped", None, id="clipped without a mask", marks=pytest.mark.thorough),
    ],
)
def test_whatever_a_mod_captures_gets_the_gradient_of_the_definition(name, mask):
    captured, _, seq_q, seq_kv = LEARNED[name]
    given = *arrays(seq_q=seq_q, seq_kv=seq_kv), captured
    have, want = (
        gradient(partial(under_mod, name, attend, mask=mask), captured)(*given)
        for attend in (interpreted, standard_attention)
    )
    for x, y in zip(have, want, strict=True):
        assert x.dtype == y.dtype
        assert oracle.rms_error(x, y) <= (5e-6 if captured.dtype == jnp.float32 else 5e-3)


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark_of(name)) for name in HELD])
def test_whatever_a_mod_captures_lowers_for_cuda_forward_and_backward(name):
    captured, _, seq_q, seq_kv = LEARNED[name]
    run = gradient(partial(under_mod, name, flash_attention, mask=masks.causal()), captured)
    every = lowered(run, *arrays(seq_q=seq_q, seq_kv=seq_kv), captured)
    assert {"forward", "d_query", "d_key_value"} <= every


TABLE = np.ones((6, 2), np.float32)


MASKED = [name for name, mask in MASKS.items() if mask is not None]


@functools.cache
def every_tile_list():
    """(codes, order, numbers visited) of each mask, from one program."""

    def run():
        results = {}
        for name in MASKED:
            mask, grid = masks.as_mask(MASKS[name]), TileGrid(SEQ, SEQ, 16, 32, overlaps=True)
            lifted, bounds = lift_marked(mask), lift_bounds(mask)
            codes = tile_codes(grid, 1, 1, bounds, lifted, is_opaque=mask.is_opaque)
            lists = TileList.of(codes)
            results[name] = codes, lists.order, lists.num_visited
        return results

    return jax.tree.map(np.asarray, jax.jit(run)())


@pytest.mark.parametrize("name", MASKED)
def test_lists_name_the_tiles_in_which_something_is_attended(name):
    codes, order, num_visited = every_tile_list()[name]
    tiles = dense(name).reshape(6, 16, 3, 32)
    want = np.where(tiles.any((1, 3)), np.where(tiles.all((1, 3)), FULL, PARTIAL), 2)
    have = np.broadcast_to(codes, (1, 1, 6, 3))[0, 0]
    np.testing.assert_array_equal(have == EMPTY, want == EMPTY)
    assert (have[have == FULL] == want[have == FULL]).all()
    if masks.as_mask(MASKS[name]).is_opaque:
        np.testing.assert_array_equal(have, want)
    for i in range(codes.shape[2]):
        visited = order[0, 0, i, : num_visited[0, 0, i]]
        assert sorted(visited.tolist()) == np.flatnonzero(have[i % have.shape[0]] != EMPTY).tolist()


def test_full_tiles_are_not_tested():
    class Lying(type(masks.causal())):
        def __call__(self, b, h, q, kv):
            return jnp.equal(q // 16, kv // 16) & (kv <= q)

    jax.tree_util.register_dataclass(Lying, [], [])
    x = normal(1, 1, 64, 3)
    have = jax.jit(partial(interpreted, mask=Lying()))(x, x, x)
    np.testing.assert_allclose(have, oracle.attention(x, x, x, keep=np.tri(64, dtype=bool))[0], atol=2e-6)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(jnp.bfloat16, marks=pytest.mark.contract), pytest.param(jnp.float16, marks=pytest.mark.thorough)],
)
def test_low_precision_is_no_worse_than_twice_the_dense_computation(dtype):
    query, key, value, cotangent = arrays(dtype, seq_q=67, seq_kv=67)
    mask = np.tri(67, dtype=bool)[None, None]

    def densely(query, key, value):
        """With weights cast before the second product, as tensor cores want them."""
        key, value = (jnp.repeat(x, 3, axis=1) for x in (key, value))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
        scores = jnp.where(mask, product("BNTH,BNSH->BNTS", query, key) * 20**-0.5, -jnp.inf)
        return product("BNTS,BNSH->BNTH", jax.nn.softmax(scores).astype(dtype), value).astype(dtype)

    def all_of(attend, *arrays):
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(cotangent.astype(out.dtype))

    options = {"keep": mask, "scale": 20**-0.5}
    exact = (
        oracle.attention(query, key, value, **options)[0],
        *oracle.gradients(query, key, value, cotangent, **options),
    )
    plain = jax.jit(partial(all_of, densely))(query, key, value)
    have = jax.jit(partial(all_of, partial(interpreted, mask=masks.causal())))(query, key, value)
    for x, y, z in zip(have, plain, exact, strict=True):
        assert x.dtype == dtype
        assert oracle.rms_error(x, z) <= 2 * oracle.rms_error(y, z)


LOWERED_IN_THE_CONTRACT = {"cross", "no key", "padding", "array of a head axis", "at positions", "score mod & causal"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.contract if name in LOWERED_IN_THE_CONTRACT else pytest.mark.thorough)
        for name in CASES
    ],
)
def test_every_case_lowers_for_cuda_forward_and_backward(name):
    case = CASES[name]
    query, key, value, cotangent = case.arrays(jnp.bfloat16)
    attend = partial(flash_attention, mask=case.mask(), score_mod=case.score_mod)
    names = lowered(gradient(attend), query, key, value, cotangent)
    assert names == (set() if 0 in (case.seq_q, case.seq_kv) else {"forward", "d_query", "d_key_value"})


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.contract
def test_large_heads_lower_for_cuda(head_dim, dtype):
    query, key, value, cotangent = (jax.ShapeDtypeStruct((1, 2, 1024, head_dim), dtype) for _ in range(4))
    attend = partial(flash_attention, mask=masks.causal(), score_mod=score_mods.soft_cap_mod(30.0))
    assert len(lowered(gradient(attend), query, key, value, cotangent)) == 3


def elementwise():
    """One function of a number for each primitive that kernels are said to hold."""
    whole = lambda function: lambda x: function(jnp.floor(x).astype(jnp.int32)).astype(jnp.float32)
    special = {
        "add_any": lambda x: x + x,
        "atan2": lambda x: lax.atan2(x, 1 + x * x),
        "bitcast_convert_type": lambda x: x * 0 + lax.bitcast_convert_type(x, jnp.int32).astype(jnp.float32),
        "clamp": lambda x: lax.clamp(-0.5, x, 0.5),
        "convert_element_type": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
        "copy": lambda x: x,
        "integer_pow": lambda x: x**3,
        "is_finite": lambda x: jnp.where(jnp.isfinite(x), x, 0),
        "pow": lambda x: (2 + jnp.tanh(x)) ** (1.5 + jnp.tanh(x)),
        "select_n": lambda x: jnp.where(x > 0, x, 2 * x),
        "square": lax.square,
        "not": lambda x: jnp.where(~(x > 0), x, 2 * x),
    }
    binary = ("add", "div", "max", "min", "mul", "rem", "sub")
    compared = ("eq", "ge", "gt", "le", "lt", "ne")
    bits = ("and", "or", "xor")
    shifts = ("shift_left", "shift_right_arithmetic", "shift_right_logical")
    for name in natural.GPU_ELEMENTWISE:
        f = getattr(lax, f"bitwise_{name}" if name in bits else name, None)
        if name in special:
            yield name, special[name]
        elif name in binary:
            yield name, partial(lambda f, x: f(x, 1.5 + x * x), f)
        elif name in compared:
            yield name, partial(lambda f, x: jnp.where(f(x, jnp.full_like(x, 0.25)), x, 3 * x), f)
        elif name in (*bits, *shifts):
            yield name, whole(partial(lambda f, n: f(n, jnp.full_like(n, 3)), f))
        elif name in ("clz", "population_count"):
            yield name, whole(f)
        elif name in ("log", "sqrt", "rsqrt", "cbrt", "log1p", "acosh"):
            yield name, partial(lambda f, x: f(1.5 + x * x), f)
        elif name in ("acos", "asin", "atanh"):
            yield name, partial(lambda f, x: f(0.5 * jnp.tanh(x)), f)
        else:
            yield name, f


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("how", ["scores", "16 bits", "head"])
@pytest.mark.contract
def test_every_operation_that_kernels_hold_lowers_with_its_derivative(how, part):
    query, key, value, cotangent = arrays(jnp.bfloat16, 13, 13, 16, 16)
    some = dict(sorted(elementwise(), key=lambda both: both[0])[part::6])
    if how == "16 bits":  # written for 32
        some = {name: function for name, function in some.items() if name not in ("bitcast_convert_type", "clamp")}

    def mod(scores, b, h, q, kv):
        x = {"scores": scores, "16 bits": scores.astype(jnp.bfloat16), "head": (h - 1) * 0.3}[how]
        return scores * 0.5 + sum(function(x).astype(jnp.float32) for function in some.values())

    assert why_not_pallas(query, key, value, score_mod=mod, platform="cuda") is None, some
    run = gradient(partial(flash_attention, score_mod=mod))
    assert len(lowered(run, query, key, value, cotangent)) == 3, some


def test_the_cotangent_of_a_sum_is_not_looked_through_while_compiling():
    query, key, value, _ = arrays()
    run = jax.jit(jax.grad(lambda *x: flash_attention(*x).sum()))
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        text = run.trace(query, key, value).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"optimization_barrier %\S+ : tensor<2x6x\d+x\d+xf32>", text)


@functools.cache
def tokens():
    """Keys and values of 70 tokens."""
    return normal(2, 2, 70, 16, seed=1), normal(2, 2, 70, 16, seed=2)


@functools.cache
def contiguous():
    """A cache of more room that holds them."""
    return jax.jit(update_kv_layer_cache)(init_kv_layer_cache(2, 2, 16, max_len=101), *tokens())


DECODED = {
    "everything": {},
    "window & ALiBi": {"mask": masks.causal() & masks.sliding_window(50), "score_mod": score_mods.alibi_mod(6)},
    "function": {"mask": lambda b, h, q, kv: (q + kv + b) % 3 > 0},
}


class TestDecode:
    """Few queries against a cache, in parts that are merged."""

    @pytest.mark.parametrize("case", DECODED)
    @pytest.mark.parametrize("seq_q", [1, 3])
    @pytest.mark.contract
    def test_a_contiguous_cache(self, case, seq_q):
        options = DECODED[case]
        query, positions = normal(2, 6, seq_q, 16), np.arange(70 - seq_q, 70)
        stored = TokenArrays(contiguous().keys, contiguous().values, contiguous().positions, None)
        positions = np.broadcast_to(positions, (2, seq_q))
        self.check(query, stored, positions, options, self.exact(query, positions, np.array([70, 70]), options))
        assert lowered(partial(cached_attention, **options), query, contiguous(), positions) == {"decode"}

    @pytest.mark.parametrize("case", [contract_unless(name == "function", name) for name in DECODED])
    def test_a_paged_cache(self, case):
        options = DECODED[case]
        lengths = np.array([70, 33])
        empty = init_paged_kv_cache(
            num_blocks=17, block_size=16, num_kv_heads=2, head_dim=16, batch_size=2, max_blocks_per_seq=6
        )
        cache = jax.jit(lambda cache, *given: append_rows(allocate_rows(cache, lengths), *given))(
            empty, *tokens(), lengths
        )
        query, positions = normal(2, 6, 3, 16), lengths[:, None] - 3 + np.arange(3)
        stored = jax.jit(lambda cache: cache.arrays())(cache)
        self.check(query, stored, positions, options, self.exact(query, positions, lengths, options))
        assert lowered(partial(paged_attention, **options), query, cache) == {"decode"}

    @pytest.mark.contract
    def test_a_key_that_is_not_finite_spoils_who_attends_it(self):
        query, positions = normal(2, 6, 2, 16), np.array([[4, 69], [4, 69]])
        keys = np.array(contiguous().keys)
        keys[0, 1, 5, 3] = np.inf
        stored = TokenArrays(jnp.asarray(keys), contiguous().values, contiguous().positions, None)
        options = {"mask": masks.causal()}
        want = self.exact(query, positions, np.array([70, 70]), options)
        for x in want:
            x[0, 3:, 1] = np.nan
        self.check(query, stored, positions, options, want)

    def test_what_the_kernel_does_not_read_is_left_to_the_chunks(self):
        for head_dim, dtype in ((12, jnp.float32), (16, jnp.int8)):
            cache = init_kv_layer_cache(2, 2, head_dim, max_len=101, dtype=dtype)
            run = partial(cached_attention, query_positions=np.arange(1))
            assert lowered(run, normal(2, 6, 1, head_dim), cache) == set()

    def exact(self, query, positions, lengths, options):
        b, h, q, kv = np.indices((*query.shape[:3], 70), sparse=True)
        keep = kv < lengths[:, None, None, None]
        if "mask" in options:
            keep = keep & np.asarray(masks.as_mask(options["mask"])(b, h, positions[b, q], kv))
        mod = options.get("score_mod")
        if mod is not None:
            slopes = np.asarray(mod.slopes, np.float64)
            mod = lambda s, b, h, q, kv: s - slopes[h] * abs(positions[b, q] - kv)
        return oracle.attention(query, *tokens(), keep=keep, score_mod=mod)

    def check(self, query, stored, positions, options, want):
        mask = options.get("mask")

        @jax.jit
        def run(*arrays):
            keep, mod = None if mask is None else masks.as_mask(mask), options.get("score_mod")
            bounds, is_opaque = (None, False) if keep is None else (lift_bounds(keep), keep.is_opaque)
            functions = lift_functions("test", keep, mod, (2, 3, 5, 7), frozenset(), jnp.float32)(
                *examples(jnp.float32)
            )
            return decode.attend(DecodeInputs(*arrays, bounds, is_opaque), *functions, interpret=True)

        scale = jax.device_put(np.float32(0.25))
        for have, expected in zip(run(query, scale, jnp.asarray(positions), stored), want, strict=True):
            np.testing.assert_allclose(have, expected, atol=2e-6)
