"""The TPU kernels without a TPU: run in interpret mode, on several tiles. `cases.py` has their row in the table."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec
from test_ring import SEQ, ring_mesh

from attnax import masks, pallas_flash_attention, standard_attention, why_not_tpu
from attnax.kernels import ring, score_mods
from attnax.kernels._core.dropout import dropout_words, keep_weights
from attnax.kernels._core.tile_codes import EMPTY, FULL, PARTIAL
from attnax.kernels._tpu import launch, tile
from attnax.kernels._tpu.walk import walk_of

interpreted = partial(pallas_flash_attention, interpret="tpu", block_q=128, block_kv=128)

T, S = 150, 263  # two tiles of queries, three of keys, the last ones not whole


def normal(*shape, seed=9):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32))


def arrays(dtype=jnp.float32, seq_q=T, seq_kv=S, head_dim=20, value_dim=24):
    """query, key, value and cotangent of 2 rows, 4 heads and 2 key heads."""
    shapes = (2, 4, seq_q, head_dim), (2, 2, seq_kv, head_dim), (2, 2, seq_kv, value_dim), (2, 4, seq_q, value_dim)
    return tuple(jax.device_put(np.asarray(normal(*shape, seed=i)).astype(dtype)) for i, shape in enumerate(shapes))


def results(attend, *given, **options):
    """out, lse and all gradients."""

    def run(query, key, value, cotangent, *learned):
        (out, lse), pull = jax.vjp(partial(attend, return_lse=True, **options), query, key, value, *learned)
        return out, lse, *pull((cotangent, jnp.full_like(lse, 0.3)))

    return jax.tree.map(np.asarray, jax.jit(run)(*given))


IDS = np.arange(T) // 70, np.arange(S) // 70
DROPOUT = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False}


def scattered(b, h, q, kv):
    return (q * 3 + kv * (h + 1) + b) % 7 < 3


GRIDS = {  # name: (options, who attends whom)
    "documents": ({"mask": masks.documents(*IDS)}, lambda b, h, q, kv: IDS[0][q] == IDS[1][kv]),
    "window": ({"mask": masks.sliding_window(40)}, lambda b, h, q, kv: (kv <= q) & (kv > q - 40)),
    "function of heads": ({"mask": scattered}, scattered),
    "heads that end early": ({"mask": lambda b, h, q, kv: kv < 60 * (h + 1)}, lambda b, h, q, kv: kv < 60 * (h + 1)),
    "nothing": ({}, lambda b, h, q, kv: kv >= 0),
    "causal & dropout": ({"mask": masks.causal(), **DROPOUT}, lambda b, h, q, kv: kv <= q),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", GRIDS)
def test_several_tiles_give_the_gradients_of_the_definition(name):
    options, keep = GRIDS[name]
    given = arrays()
    keep, dropped = np.broadcast_to(keep(*np.indices((2, 4, T, S), sparse=True)), (2, 4, T, S)), {}
    if "dropout_rate" in options:
        draw = jax.jit(lambda key: keep_weights(dropout_words(key), 0.3, *masks.index_grid(2, 4, T, S)))
        dropped = {"keep_weights": np.asarray(draw(DROPOUT["dropout_rng"])), "dropout_rate": 0.3}
    out, lse, *gradients = results(interpreted, *given, **options)
    expected, expected_lse = oracle.attention(*given[:3], keep=keep, **dropped)
    assert oracle.rms_error(out, expected) <= 1e-6
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)
    for x, y in zip(gradients, oracle.gradients(*given, keep=keep, d_lse=0.3, **dropped), strict=True):
        assert oracle.rms_error(x, y) <= 3e-6


def boolean(x):
    allowed = x > 0
    return lambda s, b, h, q, kv: jnp.where(allowed[h, q, kv], s * 0.5, s) + x[h, q, kv] * 0.1


LEARNED = {  # name: (array, function of it that returns a score mod)
    "slopes": (normal(4), score_mods.Alibi),
    "a number": (jax.device_put(np.float32(1.7)), score_mods.soft_cap_mod),
    "bias of heads": (normal(4, T, S), lambda x: lambda s, b, h, q, kv: s + x[h, q, kv]),
    "bias of all": (normal(2, 1, T, S), score_mods.additive_bias_mod),
    "keys first": (normal(S, T), lambda x: lambda s, b, h, q, kv: s * x[kv, q]),
    "T5": (normal(8, 4), lambda x: score_mods.relative_bias_mod(x, max_distance=90)),
    "half of the heads": (normal(2, 5), lambda x: lambda s, b, h, q, kv: s + x[h // 2, (q + kv) % 5]),
    "queries and keys": (normal(4, S), lambda x: lambda s, b, h, q, kv: s * x[h, kv] + x[h, q]),
    "booleans of pairs": (normal(4, T, S), boolean),
    "narrow": (
        jax.device_put(np.asarray(normal(4, 7)).astype(jnp.bfloat16)),
        lambda x: lambda s, b, h, q, kv: s + x[h, q % 7] * abs(q - kv) * 0.01,
    ),
    "rules": (normal(4), lambda x: lambda s, b, h, q, kv: jax.nn.relu(s * x[h]) + jax.nn.gelu(s)),
    "at positions": (
        normal(4, 9),
        lambda x: masks.at_positions(
            lambda s, b, h, q, kv: s * x[h, q % 9] + x[h, kv % 3], np.arange(T) + 5, np.arange(S)[::-1].copy()
        ),
    ),
}
NOT_AT_ONCE = {"keys first", "half of the heads", "narrow", "rules", "at positions"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.thorough if x in NOT_AT_ONCE else pytest.mark.contract) for x in LEARNED],
)
def test_whatever_a_mod_captures_gets_the_gradient_of_the_definition(name):
    captured, make = LEARNED[name]
    given = *arrays(), captured

    def under_mod(attend, query, key, value, captured, **options):
        return attend(query, key, value, score_mod=make(captured), mask=masks.causal(), **options)

    assert why_not_tpu(*given[:3], score_mod=make(captured)) is None
    have, want = (results(partial(under_mod, attend), *given) for attend in (interpreted, standard_attention))
    for x, y in zip(have, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        assert oracle.rms_error(x, y) <= (5e-6 if captured.dtype == jnp.float32 else 5e-3)


OF_QUERIES, OF_KEYS = normal(4, T, seed=5), normal(4, S, seed=6)

PRODUCTS = {  # name: (array, function of it that returns a score mod); each factor meets another behind the arrays' end
    "of a query": (OF_QUERIES, lambda x: lambda s, b, h, q, kv: s * x[h, q] * OF_KEYS[h, kv]),
    "of a key": (OF_KEYS, lambda x: lambda s, b, h, q, kv: s * x[h, kv] * OF_QUERIES[h, q]),
    "of a table": (normal(4, 5), lambda x: lambda s, b, h, q, kv: s * x[h, (q + kv) % 5] * OF_QUERIES[h, q]),
    "of a number": (normal(4), lambda x: lambda s, b, h, q, kv: s * x[h] * jnp.sqrt(T - 1.0 - q) * OF_QUERIES[h, q]),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_lies_behind_the_end_of_arrays_reaches_no_gradient_of_a_factor(name):
    captured, make = PRODUCTS[name]
    query, key, value, _ = (x[:1] for x in arrays(head_dim=3, value_dim=3))

    def gradient(attend):
        return jax.jit(jax.grad(lambda x: attend(query, key, value, score_mod=make(x)).sum()))(captured)

    have, want = gradient(interpreted), gradient(standard_attention)
    assert oracle.rms_error(np.asarray(have), np.asarray(want)) <= 1e-5


def test_whole_numbers_without_sign_are_ordered_as_numbers_with_one():
    """Mosaic has no order of unsigned numbers, so no operation of a kernel may need one."""
    x = jnp.array([3, 2**31 + 5, 2**32 - 1, 0], jnp.uint32)
    functions = {
        "clamp": lambda x: lax.clamp(jnp.uint32(2), x, jnp.uint32(2**31 + 1)),
        "max": lambda x: jnp.maximum(x, x[::-1]),
        "lt": lambda x: x < jnp.uint32(2**31),
    }
    for name, function in functions.items():
        equation = next(eqn for eqn in jax.make_jaxpr(function)(x).jaxpr.eqns if eqn.primitive.name == name)
        given = {"clamp": [jnp.uint32(2), x, jnp.uint32(2**31 + 1)], "max": [x, x[::-1]], "lt": [x, jnp.uint32(2**31)]}
        run = partial(tile._bind, equation)
        np.testing.assert_array_equal(run(given[name]), function(x))
        for eqn in jax.make_jaxpr(run)(given[name]).jaxpr.eqns:
            assert eqn.primitive.name != name or eqn.invars[0].aval.dtype == jnp.int32


def test_kernels_have_no_races_and_read_nothing_that_was_not_written(monkeypatch):
    """Two cores share the programs. Memory that was not written holds NaN: behind the end of arrays too."""
    monkeypatch.setattr(launch, "INTERPRET", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    given = [x[:1, : 2 if x.shape[1] == 4 else 1] for x in arrays(seq_q=130, seq_kv=130)]
    have = results(partial(interpreted, mask=masks.causal()), *given)
    want = oracle.gradients(*given, keep=np.tri(130, dtype=bool), d_lse=0.3)
    for x, y in zip(have[2:], want, strict=True):
        assert oracle.rms_error(x, y) <= 3e-6


CODES = np.array([[[[FULL, EMPTY, EMPTY], [PARTIAL, FULL, EMPTY]], [[EMPTY] * 3, [EMPTY, EMPTY, PARTIAL]]]])


@pytest.mark.parametrize(("inner", "turned"), [(1, False), (1, True), (2, True)])
def test_a_walk_visits_the_tiles_that_hold_allowed_pairs_in_rows(inner, turned):
    outer = 2 // inner
    walk, words, count = walk_of(jnp.asarray(CODES), outer, inner, turned=turned)
    words, count = np.asarray(words), int(count)
    for head in range(outer):
        heads = CODES[0, head * inner : (head + 1) * inner]
        steps = [walk.step(words, 0, head, n, 0) for n in range(count)]
        rows = [(step.place.j, step.place.i) if turned else (step.place.i, step.place.j) for step in steps]
        busy = [step for step in steps if step.is_full or step.is_partial]
        wanted = (heads != EMPTY).any(0)
        wanted = wanted.T if turned else wanted
        at_least_one = wanted | (~wanted.any(1, keepdims=True) & (np.arange(wanted.shape[1]) == 0))
        assert rows[: len(busy)] == list(zip(*np.nonzero(at_least_one), strict=True))
        assert rows[len(busy) :] == [rows[len(busy) - 1]] * (count - len(busy))  # no new blocks
        for step, row in zip(busy, rows, strict=False):
            same = [other for other in rows[: len(busy)] if other[0] == row[0]]
            assert (step.is_first, step.is_last) == (row == same[0], row == same[-1])
            assert bool(step.is_full) == bool((heads[:, step.place.i, step.place.j] == FULL).all())
        assert not any(step.is_first or step.is_last for step in steps[len(busy) :])


def test_full_tiles_are_not_tested():
    class Lying(type(masks.causal())):
        def __call__(self, b, h, q, kv):
            return jnp.equal(q // 128, kv // 128) & (kv <= q)

    jax.tree_util.register_dataclass(Lying, [], [])
    x = normal(1, 1, 256, 3)
    have = jax.jit(partial(interpreted, mask=Lying()))(x, x, x)
    np.testing.assert_allclose(have, oracle.attention(x, x, x, keep=np.tri(256, dtype=bool))[0], atol=2e-6)


@pytest.mark.contract
def test_low_precision_is_no_worse_than_twice_the_dense_computation():
    query, key, value, cotangent = arrays(jnp.bfloat16, seq_q=150, seq_kv=150)
    mask = np.tri(150, dtype=bool)[None, None]

    def densely(query, key, value, **_):
        """With weights cast before the second product, as matrix units want them."""
        key, value = (jnp.repeat(x, 2, axis=1) for x in (key, value))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
        scores = jnp.where(mask, product("BNTH,BNSH->BNTS", query, key) * 20**-0.5, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        out = product("BNTS,BNSH->BNTH", jax.nn.softmax(scores).astype(jnp.bfloat16), value)
        return out.astype(jnp.bfloat16), lse

    given = query, key, value, cotangent
    exact = (
        oracle.attention(query, key, value, keep=mask)[0],
        *oracle.gradients(*given, keep=mask, d_lse=0.3),
    )
    (plain_out, _, *plain), (out, _, *have) = (
        results(attend, *given) for attend in (densely, partial(interpreted, mask=masks.causal()))
    )
    for x, y, z in zip((out, *have), (plain_out, *plain), exact, strict=True):
        assert x.dtype == jnp.bfloat16
        assert oracle.rms_error(x, z) <= 2 * oracle.rms_error(y, z)


@pytest.mark.contract
@pytest.mark.parametrize("zigzag", [False, True])
def test_a_ring_of_devices_gives_values_and_gradients_of_one(zigzag):
    lengths, mesh = (16, 32), ring_mesh(4)
    query, key, value, cotangent = arrays(seq_q=lengths[0], seq_kv=lengths[1])
    bias = normal(4, 32)
    orders = [ring.zigzag_order(n, 4) if zigzag else np.arange(n) for n in lengths]

    def run(attend, query, key, value, cotangent, bias):
        mod = lambda s, b, h, q, kv: s + bias[h, kv]
        (out, _), pull = jax.vjp(
            lambda *arrays: attend(*arrays, mask=masks.sliding_window(11), score_mod=mod), query, key, value
        )
        return out, *pull((cotangent, jnp.zeros(out.shape[:3], jnp.float32)))

    def attend(query, key, value, **options):
        return ring._attend(query, key, value, "seq", zigzag, None, "interpret tpu", **options)

    # Interpreted kernels do not say over which axes their results vary.
    shards = jax.shard_map(
        partial(run, attend),
        mesh=mesh,
        in_specs=(*(SEQ,) * 4, PartitionSpec()),
        out_specs=(SEQ,) * 4,
        check_vma=False,
    )
    given = [x[:, :, orders[n]] for n, x in zip((0, 1, 1, 0), (query, key, value, cotangent), strict=True)]
    have = jax.jit(shards)(*(jax.device_put(x, NamedSharding(mesh, SEQ)) for x in given), bias)
    want = jax.jit(partial(run, partial(standard_attention, return_lse=True)))(query, key, value, cotangent, bias)
    for x, y, which in zip(have, want, (0, 0, 1, 1), strict=True):
        assert oracle.rms_error(np.asarray(x)[:, :, np.argsort(orders[which])], y) <= 3e-6


SHAPE = jax.ShapeDtypeStruct((2, 4, 300, 64), jnp.bfloat16)
TABLE = np.ones((4, 600), np.float32)

DECLINED = {  # words: options
    "no TPU kernel can hold this score mod: asin": {"score_mod": lambda s, b, h, q, kv: jnp.arcsin(s)},
    "no TPU kernel can hold this mask: asin": {"mask": lambda b, h, q, kv: jnp.arcsin(q * 1.0) > kv},
    "neither at \\[q, kv\\] nor at one of at most 256 elements": {
        "score_mod": lambda s, b, h, q, kv: s + jnp.asarray(TABLE)[h, q - kv + 300]
    },
    "of float16": {"score_mod": lambda s, b, h, q, kv: s + q.astype(jnp.float16)},
    "multiples of 128; got 64": {"block_q": 64},
    "mixes keys by reduce_sum": {"score_mod": lambda s, b, h, q, kv: s - s.sum(-1, keepdims=True)},
}


@pytest.mark.parametrize("words", DECLINED)
def test_the_reason_against_a_kernel_is_in_words(words):
    assert re.search(words, why_not_tpu(SHAPE, SHAPE, SHAPE, **DECLINED[words]))


def test_a_mask_that_is_the_same_for_all_rows_and_heads_has_one_list_of_tiles():
    x = jax.ShapeDtypeStruct((16, 32, 8192, 64), jnp.bfloat16)
    assert why_not_tpu(x, x, x, mask=masks.causal(), score_mod=score_mods.alibi_mod(32)) is None
    ids = np.zeros((16, 8192), np.int32)
    assert why_not_tpu(x, x, x, mask=masks.documents(ids) & masks.causal()) is None
    assert "got 131072" in why_not_tpu(x, x, x, mask=lambda b, h, q, kv: (q + kv + b) % (h + 2) > 0)


def test_other_arrays_are_declined_in_words():
    for change, words in (({"dtype": jnp.float16}, "float32 and bfloat16"), ({"shape": (1, 4, 9, 257)}, "at most 256")):
        x = SHAPE.update(**change)
        assert words in why_not_tpu(x, x, x)
    with jax.enable_x64():
        assert "JAX in 64 here" in why_not_tpu(SHAPE, SHAPE, SHAPE)
    with pytest.raises(NotImplementedError, match="no TPU kernel can hold this score mod: asin. Use flash_attention"):
        jax.eval_shape(partial(interpreted, score_mod=lambda s, b, h, q, kv: jnp.arcsin(s)), SHAPE, SHAPE, SHAPE)


@pytest.mark.usefixtures("unchecked_shapes")
def test_another_word_for_interpret_is_refused():
    with pytest.raises(ValueError, match='must be True, False, "cuda" or "tpu"; got interpret=\'gpu\''):
        jax.eval_shape(partial(pallas_flash_attention, interpret="gpu"), SHAPE, SHAPE, SHAPE)
