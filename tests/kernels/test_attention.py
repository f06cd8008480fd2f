"""Every attention function keeps the contract, on every case."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BACKENDS, CASES
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from attnax import masks

QUICK = "tiles of 4"  # the others see the same cases in CI
backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=() if name == QUICK else pytest.mark.thorough) for name in BACKENDS]
)
cases = pytest.mark.parametrize("case", CASES)


def call(backend, case, query, key, value, **options):
    """The backend on a case, compiled."""
    mask = case.mask()
    run = partial(BACKENDS[backend], score_mod=case.score_mod, **options)
    if mask is not None:
        run = partial(run, mask=mask)
    return jax.jit(run)(query, key, value)


def numpy_mod(case):
    if case.score_mod is None:
        return None
    return lambda scores, b, h, q, kv: np.asarray(case.score_mod(scores, b, h, q, kv))


@backends
@cases
def test_values_and_gradients_match_float64(backend, case):
    case = CASES[case]
    query, key, value, cotangent = case.arrays()

    def run(query, key, value):
        attend = partial(BACKENDS[backend], mask=case.mask(), score_mod=case.score_mod, return_lse=True)
        (out, lse), pull = jax.vjp(attend, query, key, value)
        return out, lse, *pull((cotangent, jnp.zeros_like(lse)))

    out, lse, *grads = jax.jit(run)(query, key, value)
    expected, expected_lse = oracle.attention(query, key, value, keep=case.dense(), score_mod=numpy_mod(case))
    assert out.shape == expected.shape and out.dtype == query.dtype and lse.dtype == jnp.float32
    assert out.size == 0 or oracle.rms_error(out, expected) <= 1e-6
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)
    exact = oracle.gradients(query, key, value, cotangent, keep=case.dense(), score_mod=numpy_mod(case))
    for have, want in zip(grads, exact, strict=True):
        assert have.shape == want.shape
        assert have.size == 0 or oracle.rms_error(have, want) <= 2e-6


@backends
@pytest.mark.parametrize("seq", [257, 4096])
def test_float32_error_stays_small_for_many_keys(backend, seq):
    query, key, value = (jax.random.normal(jax.random.key(i), (1, 1, n, 64)) for i, n in enumerate((5, seq, seq)))
    expected, _ = oracle.attention(query, key, value)
    assert oracle.rms_error(BACKENDS[backend](query, key, value), expected) <= 1e-6


@backends
def test_lse_has_the_gradient_of_logsumexp(backend):
    query, key, value, _ = CASES["causal"].arrays()

    def total(query, key):
        _, lse = BACKENDS[backend](query, key, value, mask=masks.causal(), return_lse=True)
        return lse.sum()

    def dense(query, key):
        keys = jnp.repeat(key, 3, axis=1)
        scores = jnp.einsum("BNTH,BNSH->BNTS", query, keys) * 5**-0.5
        return jax.nn.logsumexp(jnp.where(jnp.tri(13, dtype=bool)[None, None], scores, -jnp.inf), axis=-1).sum()

    for have, want in zip(jax.grad(total, (0, 1))(query, key), jax.grad(dense, (0, 1))(query, key), strict=True):
        assert oracle.rms_error(have, want) <= 2e-6


@backends
def test_rows_with_nothing_to_attend_are_exactly_zero(backend):
    query, key, value, cotangent = CASES["full"].arrays()
    lengths = jnp.array([0, 5])

    def run(query, key, value):
        return BACKENDS[backend](query, key, value, mask=masks.padding(lengths), return_lse=True)

    (out, lse), pull = jax.vjp(run, query, key, value)
    assert (out[0] == 0).all() and jnp.isneginf(lse[0]).all() and jnp.isfinite(lse[1]).all()
    for grad in pull((cotangent, jnp.ones_like(lse))):
        assert (grad[0] == 0).all() and jnp.isfinite(grad).all() and (grad[1] != 0).any()


@functools.cache
def two_documents(backend):
    """(out beside lse, gradients) of two documents side by side, compiled."""
    document = jnp.arange(13) >= 6

    def run(query, key, value):
        mask = lambda b, h, q, kv: document[q] == document[kv]
        out, lse = BACKENDS[backend](query, key, value, mask=mask, return_lse=True)
        return jnp.concatenate([out, lse[..., None]], axis=-1)

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(run, query, key, value)
        # The cotangent of a row that is NaN is usually NaN itself.
        return out, pull(jnp.where(jnp.isnan(out), jnp.nan, cotangent))

    return jax.jit(both)


@backends
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "all"])
def test_poison_reaches_only_the_rows_that_may_attend_it(backend, bad, where):
    """The first document holds a bad number; the second must not notice."""
    query, key, value, cotangent = CASES["full"].arrays()
    cotangent = jnp.concatenate([cotangent, cotangent[..., :1]], axis=-1)

    def poisoned(name, x):
        return x.at[:, :, 2, 1].set(bad) if where in (name, "all") else x

    clean_out, clean = two_documents(backend)(query, key, value, cotangent)
    spoiled = poisoned("query", query), poisoned("key", key), poisoned("value", value)
    out, grads = two_documents(backend)(*spoiled, cotangent)
    np.testing.assert_array_equal(out[:, :, 6:], clean_out[:, :, 6:])
    attended = out[:, :, 2] if where == "query" else out[:, :, :6]
    assert jnp.isnan(attended).all()
    for have, want in zip(grads, clean, strict=True):
        np.testing.assert_array_equal(have[:, :, 6:], want[:, :, 6:])


@backends
def test_poison_in_padding_changes_nothing(backend):
    query, key, value, cotangent = CASES["full"].arrays()
    run = partial(BACKENDS[backend], mask=masks.padding(jnp.array([11, 5])))
    out, pull = jax.vjp(run, query, key, value)
    pad = jnp.arange(13)[None, :] >= jnp.array([11, 5])[:, None]
    spoiled = [jnp.where(pad[:, None, :, None], jnp.nan, x) for x in (key, value)]
    out_spoiled, pull_spoiled = jax.vjp(run, query, *spoiled)
    np.testing.assert_array_equal(out_spoiled, out)
    for grad, clean in zip(pull_spoiled(cotangent), pull(cotangent), strict=True):
        np.testing.assert_array_equal(grad, clean)


@backends
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_close_to_correct_rounding(backend, dtype):
    case = dataclasses.replace(CASES["causal"], batch=1, seq_q=131, seq_kv=131)
    query, key, value, _ = case.arrays(dtype)
    out = call(backend, case, query, key, value)
    exact, _ = oracle.attention(query, key, value, keep=case.dense())
    rounded = np.asarray(exact.astype(dtype)).astype(np.float64)
    error, ideal = np.abs(np.asarray(out).astype(np.float64) - exact), np.abs(rounded - exact)
    assert out.dtype == dtype
    assert np.sqrt((error**2).mean()) <= 1.5 * np.sqrt((ideal**2).mean()) and error.max() <= 2 * ideal.max()


@backends
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.thorough
def test_huge_logits_give_no_nan(backend, dtype):
    query, key, value, cotangent = CASES["full"].arrays(dtype)
    out, pull = jax.vjp(lambda *x: BACKENDS[backend](*x, scale=1e4), query, key, value)
    assert jnp.isfinite(out).all() and all(jnp.isfinite(grad).all() for grad in pull(cotangent))


@backends
def test_scale_may_be_learned(backend):
    query, key, value, cotangent = CASES["full"].arrays()
    out = BACKENDS[backend](query, key, value, scale=0.3)
    assert oracle.rms_error(out, oracle.attention(query, key, value, scale=0.3)[0]) <= 1e-6
    slope = jax.grad(lambda s: (BACKENDS[backend](query, key, value, scale=s) * cotangent).sum())(jnp.float32(0.3))
    step = 1e-4
    ends = [
        (oracle.attention(query, key, value, scale=0.3 + d)[0] * np.asarray(cotangent)).sum() for d in (-step, step)
    ]
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4)


@backends
def test_arrays_captured_by_mods_get_their_gradients(backend):
    query, key, value, cotangent = CASES["full"].arrays()
    bias = jax.random.normal(jax.random.key(7), (6, 13))

    def loss(bias, run=BACKENDS[backend]):
        mod = lambda scores, b, h, q, kv: scores + bias[h, kv]
        return (run(query, key, value, score_mod=mod, mask=masks.causal()) * cotangent).sum()

    def exact(bias):
        out, _ = oracle.attention(
            query, key, value, keep=np.tri(13, dtype=bool), score_mod=lambda s, b, h, q, kv: s + np.asarray(bias)[h, kv]
        )
        return (out * np.asarray(cotangent)).sum()

    grad = jax.jit(jax.grad(loss))(bias)
    for index in ((0, 0), (3, 7), (5, 11)):
        step = np.zeros((6, 13))
        step[index] = 1e-5
        slope = (exact(np.asarray(bias) + step) - exact(np.asarray(bias) - step)) / 2e-5
        assert grad[index] == pytest.approx(slope, rel=1e-3, abs=1e-5)


@backends
@pytest.mark.thorough
def test_minus_infinity_and_the_lowest_float_from_a_mod_count_as_masked(backend):
    query, key, value, cotangent = CASES["full"].arrays()
    expected, _ = oracle.attention(query, key, value, keep=np.arange(13) > 3)
    for low in (-jnp.inf, jnp.finfo(jnp.float32).min):
        mod = lambda scores, b, h, q, kv, low=low: jnp.where(kv > 3, scores, low)
        out, pull = jax.vjp(partial(BACKENDS[backend], score_mod=mod), query, key.at[:, :, 2].set(jnp.nan), value)
        assert oracle.rms_error(out, expected) <= 1e-6
        for grad in pull(cotangent)[1:]:
            assert (grad[:, :, :4] == 0).all() and (grad[:, :, 4:] != 0).all()


@backends
def test_nan_in_a_bias_behind_the_mask_stays_there(backend):
    query, key, value, cotangent = CASES["full"].arrays()
    bias = jnp.ones(13).at[12].set(jnp.nan)

    def run(query, key, value):
        mod = lambda scores, b, h, q, kv: scores * bias[kv]
        return BACKENDS[backend](query, key, value, mask=masks.padding(jnp.array([12, 5])), score_mod=mod)

    out, pull = jax.vjp(run, query, key, value)
    assert jnp.isfinite(out).all() and all(jnp.isfinite(grad).all() for grad in pull(cotangent))


@backends
def test_nan_from_a_mod_is_seen(backend):
    query, key, value, _ = CASES["full"].arrays()
    mod = lambda scores, b, h, q, kv: jnp.where(q == 4, jnp.nan, scores)
    out = BACKENDS[backend](query, key, value, score_mod=mod)
    assert jnp.isnan(out[:, :, 4]).all() and jnp.isfinite(jnp.delete(out, 4, axis=2)).all()


@backends
def test_dropout_drops_weights_by_their_indices(backend):
    from attnax.kernels._dropout import dropout_words, keep_weights

    query, key, value, _ = CASES["causal"].arrays()
    rng, rate = jax.random.key(3), 0.3
    out = BACKENDS[backend](
        query, key, value, mask=masks.causal(), dropout_rng=rng, dropout_rate=rate, deterministic=False
    )
    kept = np.asarray(keep_weights(dropout_words(rng), rate, *masks.index_grid(2, 6, 13, 13)))
    expected, _ = oracle.attention(query, key, value, keep=np.tri(13, dtype=bool), keep_weights=kept, dropout_rate=rate)
    assert oracle.rms_error(out, expected) <= 1e-6
    other = BACKENDS[backend](query, key, value, dropout_rng=jax.random.key(4), dropout_rate=rate, deterministic=False)
    assert not jnp.allclose(other, out)
    off = BACKENDS[backend](query, key, value, dropout_rng=rng, dropout_rate=rate, deterministic=True)
    np.testing.assert_array_equal(off, BACKENDS[backend](query, key, value))


def test_dropout_bits_are_fair_and_independent():
    from attnax.kernels._dropout import dropout_words, keep_weights

    rate = 0.3
    for seed in range(5):
        kept = np.asarray(
            keep_weights(dropout_words(jax.random.key(seed)), rate, *masks.index_grid(2, 3, 257, 263)), np.float64
        )
        deviation = np.sqrt(rate * (1 - rate) / kept.size)
        assert abs(kept.mean() - (1 - rate)) < 4.5 * deviation
        noise = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
        pairs = {
            "batch": noise[0] * noise[1],
            "head": noise[:, 0] * noise[:, 1],
            "next query": noise[:, :, 1:] * noise[:, :, :-1],
            "next key": noise[..., 1:] * noise[..., :-1],
            "diagonal": noise[:, :, 1:, 1:] * noise[:, :, :-1, :-1],
        }
        for name, product in pairs.items():
            assert abs(product.mean()) < 4.5 / np.sqrt(product.size), name
        for axis in (2, 3):
            means = noise.mean(axis)
            assert 0.85 < means.std() * np.sqrt(noise.shape[axis]) < 1.15
    first, second = (
        np.asarray(keep_weights(dropout_words(jax.random.key(seed)), 0.5, *masks.index_grid(1, 1, 257, 263)))
        for seed in (0, 1)
    )
    assert abs((first == second).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(first.size)


@backends
@pytest.mark.parametrize("case", ["causal", "cross", "function & padding", "score mod & causal"])
@pytest.mark.thorough
def test_eager_equals_compiled(backend, case):
    case = CASES[case]
    query, key, value, _ = case.arrays()
    eager = BACKENDS[backend](query, key, value, mask=case.mask(), score_mod=case.score_mod)
    np.testing.assert_allclose(eager, call(backend, case, query, key, value), atol=2e-6)


@backends
@pytest.mark.thorough
def test_vmap_equals_a_loop(backend):
    case = CASES["causal & left padding"]
    rows = [case.arrays(seed=seed)[:3] for seed in range(3)]
    run = partial(BACKENDS[backend], mask=case.mask())
    mapped = jax.vmap(run)(*(jnp.stack(arrays) for arrays in zip(*rows, strict=True)))
    for have, row in zip(mapped, rows, strict=True):
        np.testing.assert_allclose(have, run(*row), atol=2e-6)


@backends
def test_runs_inside_scan_and_shard_map(backend):
    query, key, value, _ = CASES["causal"].arrays()
    run = partial(BACKENDS[backend], mask=masks.causal())
    expected = jax.jit(run)(query, key, value)
    _, scanned = jax.lax.scan(lambda _, x: (None, run(*x)), None, (query[None], key[None], value[None]))
    np.testing.assert_allclose(scanned[0], expected, atol=2e-6)
    if backend == "pallas":
        return  # JAX does not interpret kernels inside of shard_map; test_pallas lowers them there
    spec = PartitionSpec("data")
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
        sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec))(*arrays)
        np.testing.assert_allclose(sharded, expected, atol=2e-6)


@backends
def test_results_are_bitwise_repeatable(backend):
    query, key, value, cotangent = CASES["causal"].arrays()
    run = jax.jit(lambda *x: jax.vjp(partial(BACKENDS[backend], mask=masks.causal()), *x)[1](cotangent))
    for first, second in zip(run(query, key, value), run(query, key, value), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.thorough
def test_standard_attention_has_every_derivative():
    query, key, value, _ = (x[:1, :2, :5] for x in CASES["multi-head"].arrays())
    bias = jax.random.normal(jax.random.key(9), (2, 5))

    def run(query, key, value, bias):
        mod = lambda scores, b, h, q, kv: scores + bias[h, kv]
        return jnp.stack(
            [
                x.sum()
                for x in BACKENDS["standard"](query, key, value, score_mod=mod, mask=masks.causal(), return_lse=True)
            ]
        )

    check_grads(run, (query, key, value, bias), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.usefixtures("unchecked_shapes")
class TestErrors:
    """Wrong input is refused in words, before any compute."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"query": (2, 6, 13)}, r"must have 4 axes"),
            ({"key": (3, 2, 13, 5)}, r"same batch size; got query\.shape=\(2, 6, 13, 5\), key\.shape=\(3, 2, 13, 5\)"),
            ({"value": (2, 2, 11, 7)}, "key and value must have the same heads and length"),
            ({"key": (2, 2, 13, 3)}, "query and key must have the same head_dim"),
            (
                {"key": (2, 4, 13, 5), "value": (2, 4, 13, 7)},
                "must be a multiple of the number of key heads; got 6 and 4",
            ),
            ({"mask": np.ones((13, 13))}, r"mask must be boolean.*float64.*score_mod"),
            ({"mask": np.ones((11, 13), bool)}, r"must broadcast to .*\(2, 6, 13, 13\); got mask\.shape=\(11, 13\)"),
            ({"mask": np.ones((1, 2, 6, 13, 13), bool)}, "must broadcast"),
            ({"mask": masks.padding(np.array([1, 2, 3]))}, "one length a batch row"),
            ({"mask": masks.causal() & np.ones((3, 1, 1, 13), bool)}, "must broadcast"),
            (
                {"mask": masks.at_positions(None, np.arange(13), np.arange(11))},
                r"kv_positions must be integers of shape \(13,\)",
            ),
            ({"mask": "causal"}, "a boolean array, a Mask or a function; got 'causal'"),
            ({"mask": lambda b, h, q, kv: jnp.where(kv <= q, 0.0, -jnp.inf)}, "must return booleans.*float32"),
            ({"score_mod": 3}, "must be a function"),
            ({"score_mod": lambda s, b, h, q, kv: kv <= q + 0 * s}, "must return floating scores; got dtype=bool"),
            (
                {"mask": masks.at_positions(masks.padding(np.array([1])), np.arange(13), np.arange(13))},
                "one length a batch row",
            ),
            ({"score_mod": lambda s, b, h, q, kv: s[0, 0]}, r"shape that it is given; got \(\d+, \d+\)"),
            (
                {"score_mod": masks.at_positions(lambda s, *_: s, np.arange(13), np.arange(11))},
                r"kv_positions must be integers of shape \(13,\)",
            ),
            ({"scale": np.ones((5, 5))}, r"scale must be one number; got scale.shape=\(5, 5\)"),
            ({"dropout_rng": 3}, "dropout_rng must be a key"),
            ({"dropout_rate": 1.0}, "below 1; got dropout_rate=1.0"),
            ({"dropout_rate": 0.1, "deterministic": False}, "dropout needs a key"),
            ({"dtype": jnp.int32}, "one floating dtype; got int32"),
        ],
    )
    @backends
    def test_wrong_argument(self, backend, change, words):
        shapes = {"query": (2, 6, 13, 5), "key": (2, 2, 13, 5), "value": (2, 2, 13, 7)}
        dtype = change.get("dtype", jnp.float32)
        arrays = [jnp.ones(change.get(name, shape), dtype) for name, shape in shapes.items()]
        options = {name: value for name, value in change.items() if name not in (*shapes, "dtype")}
        with pytest.raises(ValueError, match=words):
            BACKENDS[backend](*arrays, **options)

    @backends
    def test_mixed_dtypes(self, backend):
        query, key, value, _ = CASES["full"].arrays()
        with pytest.raises(ValueError, match="one floating dtype; got float32, bfloat16, float32"):
            BACKENDS[backend](query, key.astype(jnp.bfloat16), value)
