"""Every attention function keeps the contract, on every case.

Two programs of each function, one under a mask and one under a mask, a score mod and dropout, serve most of the tests:
all that these change is an argument of the program.
"""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BACKENDS, CASES, INTERPRETED, contract_unless
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from attnax import flash_attention, masks, standard_attention
from attnax.kernels._core.dropout import dropout_words, keep_weights

# What `make test` runs; the rest of the table is for `make contract`.
QUICK = {
    "tiles of 4": ("cross", "no key", "array of a head axis"),
    "flash": ("score mod & causal", "no query"),
    "standard": ("function & padding",),
    "pallas": ("no key",),
    "tpu": ("causal & left padding", "score mod & causal"),
}
RATE, KEY = 0.3, jax.random.key(3)
CAUSAL = np.tri(13, dtype=bool)


backends = pytest.mark.parametrize("backend", [contract_unless(name == "tiles of 4", name) for name in BACKENDS])
backends_but_kernels = pytest.mark.parametrize("backend", [contract_unless(x not in INTERPRETED, x) for x in BACKENDS])


def call(backend, case, query, key, value, **options):
    """The backend on a case, compiled."""
    run = partial(BACKENDS[backend], mask=case.mask(), score_mod=case.score_mod, **options)
    return jax.jit(run)(query, key, value)


def numpy_mod(case):
    if case.score_mod is None:
        return None
    return lambda scores, b, h, q, kv: np.asarray(case.score_mod(scores, b, h, q, kv))


@pytest.mark.parametrize(
    ("backend", "case"), [contract_unless(name in QUICK[x], x, name) for x in BACKENDS for name in CASES]
)
def test_values_and_gradients_match_float64(backend, case):
    """With the default scale, and options of a dropout that is off."""
    case = CASES[case]
    query, key, value, cotangent = case.arrays()

    def run(query, key, value, d_out, d_lse):
        attend = partial(BACKENDS[backend], mask=case.mask(), score_mod=case.score_mod, return_lse=True)
        (out, lse), pull = jax.vjp(partial(attend, dropout_rng=KEY, dropout_rate=RATE), query, key, value)
        return out, lse, *pull((d_out, d_lse))

    d_lse = np.zeros((case.batch, case.num_heads, case.seq_q), np.float32)
    out, lse, *grads = jax.jit(run)(query, key, value, cotangent, d_lse)
    expected, expected_lse = oracle.attention(query, key, value, keep=case.dense(), score_mod=numpy_mod(case))
    assert out.shape == expected.shape and out.dtype == query.dtype and lse.dtype == jnp.float32
    assert out.size == 0 or oracle.rms_error(out, expected) <= 1e-6
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)
    exact = oracle.gradients(query, key, value, cotangent, keep=case.dense(), score_mod=numpy_mod(case))
    for have, want in zip(grads, exact, strict=True):
        assert have.shape == want.shape
        assert have.size == 0 or oracle.rms_error(have, want) <= 2e-6


@pytest.mark.parametrize(
    ("backend", "seq"), [contract_unless((x, n) == ("tiles of 4", 4096), x, n) for x in BACKENDS for n in (257, 4096)]
)
def test_float32_error_stays_small_for_many_keys(backend, seq):
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 1, n, 64), np.float32) for n in (5, seq, seq))
    expected, _ = oracle.attention(query, key, value)
    assert oracle.rms_error(BACKENDS[backend](query, key, value), expected) <= 1e-6


NO_ROWS_EMPTY = np.array([13, 13])
ONE_DOCUMENT = np.zeros(13, np.int32)
TWO_DOCUMENTS = (np.arange(13) >= 6).astype(np.int32)
D_LSE = np.random.default_rng(5).standard_normal((2, 6, 13), np.float32)


@functools.cache
def masked(backend):
    """A call under a mask by a function and by lengths, with its gradients, compiled once."""

    def run(query, key, value, d_out, d_lse, scale, documents, lengths):
        mask = (lambda b, h, q, kv: documents[q] == documents[kv]) & masks.padding(lengths)

        def attend(query, key, value, scale):
            return BACKENDS[backend](query, key, value, mask=mask, scale=scale, return_lse=True)

        (out, lse), pull = jax.vjp(attend, query, key, value, scale)
        # The cotangent of a row that is NaN is usually NaN itself.
        d_out, d_lse = jnp.where(jnp.isnan(out), jnp.nan, d_out), jnp.where(jnp.isnan(lse), jnp.nan, d_lse)
        return out, lse, pull((d_out, d_lse))

    compiled = jax.jit(run)

    def call(query, key, value, d_out, d_lse=D_LSE, scale=0.3, documents=ONE_DOCUMENT, lengths=NO_ROWS_EMPTY):
        given = query, key, value, d_out, d_lse, np.float32(scale), documents, lengths
        return jax.tree.map(np.asarray, compiled(*given))

    return call


def full_arrays(dtype=jnp.float32):
    return [np.array(x) for x in CASES["full"].arrays(dtype)]


def d_scale_of(query, key, d_scores):
    return np.einsum("BNTS,BNTH,BNSH->", d_scores, query, np.repeat(key, 3, axis=1), dtype=np.float64)


@backends_but_kernels
def test_lse_and_scale_have_their_gradients(backend):
    query, key, value, cotangent = full_arrays()
    keep = np.equal.outer(TWO_DOCUMENTS, TWO_DOCUMENTS) & (np.arange(13) < np.array([[[[11]]], [[[5]]]]))
    options = {"documents": TWO_DOCUMENTS, "lengths": np.array([11, 5])}
    for d_out in (cotangent, 0 * cotangent):
        out, lse, grads = masked(backend)(query, key, value, d_out, **options)
        expected, expected_lse = oracle.attention(query, key, value, keep=keep, scale=0.3)
        assert oracle.rms_error(out, expected) <= 1e-6
        np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)
        exact = partial(oracle.gradients, query, key, value, d_out)(keep=keep, scale=0.3, d_lse=D_LSE)
        for have, want in zip(grads[:3], exact, strict=True):
            assert oracle.rms_error(have, want) <= 2e-6
        _, d_scores = oracle.weights_and_score_gradients(query, key, value, d_out, keep=keep, scale=0.3, d_lse=D_LSE)
        assert grads[3] == pytest.approx(d_scale_of(query, key, d_scores), rel=1e-4)


@backends_but_kernels
def test_rows_with_nothing_to_attend_are_exactly_zero(backend):
    ones = np.ones_like(D_LSE)
    out, lse, grads = masked(backend)(*full_arrays(), d_lse=ones, lengths=np.array([0, 5]))
    assert (out[0] == 0).all() and np.isneginf(lse[0]).all() and np.isfinite(lse[1]).all()
    for grad in grads[:3]:
        assert (grad[0] == 0).all() and np.isfinite(grad).all() and (grad[1] != 0).any()


@backends
@pytest.mark.parametrize("where", ["query", "key", "value", "all"])
def test_poison_reaches_only_the_rows_that_may_attend_it(backend, where):
    """The first document holds a bad number; the second must not notice."""
    *arrays, cotangent = full_arrays()
    run = partial(masked(backend), d_out=cotangent, documents=TWO_DOCUMENTS)
    clean_out, clean_lse, clean = run(*arrays)
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = [x.copy() for x in arrays]
        for name, x in zip(("query", "key", "value"), spoiled, strict=True):
            if where in (name, "all"):
                x[:, :, 2, 1] = bad
        out, lse, grads = run(*spoiled)
        np.testing.assert_array_equal(out[:, :, 6:], clean_out[:, :, 6:])
        np.testing.assert_array_equal(lse[:, :, 6:], clean_lse[:, :, 6:])
        for attended in (out, lse):
            assert np.isnan(attended[:, :, 2] if where == "query" else attended[:, :, :6]).all()
        for have, want in zip(grads[:3], clean[:3], strict=True):
            np.testing.assert_array_equal(have[:, :, 6:], want[:, :, 6:])


@backends
def test_poison_in_padding_changes_nothing(backend):
    query, key, value, cotangent = full_arrays()
    lengths = np.array([11, 5])
    run = partial(masked(backend), d_out=cotangent, lengths=lengths)
    pad = np.arange(13) >= lengths[:, None]
    spoiled = [np.where(pad[:, None, :, None], np.float32(np.nan), x) for x in (key, value)]
    for have, want in zip(jax.tree.leaves(run(query, *spoiled)), jax.tree.leaves(run(query, key, value)), strict=True):
        np.testing.assert_array_equal(have, want)


@backends
def test_results_are_bitwise_repeatable(backend):
    first, second = (jax.tree.leaves(masked(backend)(*full_arrays())) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            x,
            dtype,
            marks=[pytest.mark.thorough]
            if dtype == jnp.float16
            else []
            if (x, dtype) == ("tiles of 4", jnp.float32)
            else [pytest.mark.contract],
        )
        for x in BACKENDS
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        if (x, dtype) != ("tpu", jnp.float16)
    ],
)
def test_huge_logits_give_no_nan(backend, dtype):
    out, _, grads = masked(backend)(*full_arrays(dtype), d_lse=0 * D_LSE, scale=1e4)
    assert out.dtype == dtype
    for x in (out, *grads[:3]):
        assert np.isfinite(x.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        contract_unless(x == "tiles of 4" and dtype == jnp.bfloat16, x, dtype)
        for x in BACKENDS
        for dtype in (jnp.bfloat16, jnp.float16)
        if (x, dtype) != ("tpu", jnp.float16)
    ],
)
def test_low_precision_is_close_to_correct_rounding(backend, dtype):
    case = dataclasses.replace(CASES["causal"], batch=1, seq_q=131, seq_kv=131)
    query, key, value, _ = case.arrays(dtype)
    out = call(backend, case, query, key, value)
    exact, _ = oracle.attention(query, key, value, keep=np.tri(131, dtype=bool))
    rounded = exact.astype(dtype).astype(np.float64)
    error, ideal = np.abs(np.asarray(out).astype(np.float64) - exact), np.abs(rounded - exact)
    assert out.dtype == dtype
    assert np.sqrt((error**2).mean()) <= 1.5 * np.sqrt((ideal**2).mean()) and error.max() <= 2 * ideal.max()


def test_a_query_that_attends_a_bad_number_is_all_nan_and_the_others_are_as_without_it():
    query, key, value = (np.random.default_rng(n).standard_normal((2, 2, 5, 3), np.float32) for n in range(3))
    bad = value.copy()
    bad[1, 0, 3, 1] = np.nan
    run = jax.jit(lambda value: standard_attention(query, key, value, mask=masks.causal()))
    out, want = np.asarray(run(bad)), np.array(run(value))
    want[1, 0, 3:] = np.nan
    np.testing.assert_array_equal(out, want)


def test_the_log_sum_of_a_query_without_keys_has_no_gradient():
    query, key = (np.random.default_rng(n).standard_normal((1, 1, 3, 2), np.float32) for n in range(2))
    strictly = masks.as_mask(lambda b, h, q, kv: kv < q)  # the first query attends nothing

    def total(query, key):
        _, lse = standard_attention(query, key, key, mask=strictly, return_lse=True)
        return jnp.where(jnp.isfinite(lse), lse, 0).sum()

    d_query, d_key = map(np.asarray, jax.jit(jax.grad(total, (0, 1)))(query, key))
    assert (d_query[0, 0, 0] == 0).all() and (d_key[0, 0, 2] == 0).all()
    assert (d_query[0, 0, 1:] != 0).all() and (d_key[0, 0, :2] != 0).all()


def test_dropout_drops_what_it_dropped_in_earlier_versions():
    """An experiment is repeated with its key, so the bits may not change."""
    kept = keep_weights(jax.device_put(np.array([3, 5, 0, 0], np.uint32)), 0.5, *np.indices((2, 2, 4, 8)))
    assert np.packbits(kept).tobytes().hex() == "3122c45a98d4ccf6cf3a94496313c980"


@functools.cache
def kept_weights():
    draw = jax.jit(lambda key: keep_weights(dropout_words(key), RATE, *masks.index_grid(2, 6, 13, 13)))
    return np.asarray(draw(KEY))


@functools.cache
def modified(backend):
    """A causal call under a score mod of captured arrays and dropout, with its gradients, compiled once."""

    def run(query, key, value, gain, bias, scale, d_out, dropout_key, lengths):
        mask = masks.causal() & masks.padding(lengths)

        def attend(query, key, value, gain, bias, scale):
            mod = lambda scores, b, h, q, kv: scores * gain[kv] + bias[h, kv]
            dropout = {"dropout_rng": dropout_key, "dropout_rate": RATE, "deterministic": False}
            return BACKENDS[backend](query, key, value, mask=mask, score_mod=mod, scale=scale, **dropout)

        out, pull = jax.vjp(attend, query, key, value, gain, bias, scale)
        return out, pull(d_out)

    compiled = jax.jit(run)

    def call(key=None, gain=None, bias=None, dropout_key=KEY, lengths=NO_ROWS_EMPTY):
        query, full_key, value, d_out = full_arrays()
        gain = np.ones(13, np.float32) if gain is None else gain
        bias = np.zeros((6, 13), np.float32) if bias is None else bias
        given = query, full_key if key is None else key, value, gain, bias, np.float32(0.3), d_out, dropout_key, lengths
        return jax.tree.map(np.asarray, compiled(*given))

    return call


every_backend = pytest.mark.parametrize("backend", [contract_unless(x != "tpu", x) for x in BACKENDS])


@every_backend
def test_dropout_drops_weights_by_their_indices_and_captured_arrays_get_their_gradients(backend):
    query, key, value, cotangent = full_arrays()
    bias = np.random.default_rng(7).standard_normal((6, 13), np.float32)
    out, grads = modified(backend)(bias=bias)
    options = {
        "keep": CAUSAL,
        "score_mod": lambda s, b, h, q, kv: s + bias[h, kv],
        "scale": 0.3,
        "keep_weights": kept_weights(),
        "dropout_rate": RATE,
    }
    assert oracle.rms_error(out, oracle.attention(query, key, value, **options)[0]) <= 1e-6
    for have, want in zip(grads[:3], oracle.gradients(query, key, value, cotangent, **options), strict=True):
        assert oracle.rms_error(have, want) <= 2e-6
    _, d_scores = oracle.weights_and_score_gradients(query, key, value, cotangent, **options)
    raw = 0.3 * np.einsum("BNTH,BNSH->BNTS", query, np.repeat(key, 3, axis=1), dtype=np.float64)
    d_gain, d_bias, d_scale = grads[3:]
    assert oracle.rms_error(d_gain, (d_scores * raw).sum((0, 1, 2))) <= 5e-6
    assert oracle.rms_error(d_bias, d_scores.sum((0, 2))) <= 5e-6
    assert d_scale == pytest.approx(d_scale_of(query, key, d_scores), rel=1e-4)
    assert not np.allclose(modified(backend)(bias=bias, dropout_key=jax.random.key(4))[0], out)


@every_backend
def test_minus_infinity_and_the_lowest_float_from_a_mod_count_as_masked(backend):
    query, key, value, _ = full_arrays()
    keep = CAUSAL & (np.arange(13) > 3)
    expected, _ = oracle.attention(
        query, key, value, keep=keep, scale=0.3, keep_weights=kept_weights(), dropout_rate=RATE
    )
    key[:, :, 2] = np.nan
    for low in (-np.inf, np.finfo(np.float32).min):
        bias = np.zeros((6, 13), np.float32)
        bias[:, :4] = low
        out, grads = modified(backend)(key=key, bias=bias)
        assert oracle.rms_error(out, expected) <= 1e-6
        for grad in grads[1:3]:
            assert (grad[:, :, :4] == 0).all() and (grad[:, :, 4:] != 0).any((1, 3)).all()


@every_backend
def test_nan_in_an_array_behind_the_mask_stays_there(backend):
    gain = np.ones(13, np.float32)
    gain[12] = np.nan
    out, grads = modified(backend)(gain=gain, lengths=np.array([12, 5]))
    for x in (out, *grads[:3]):
        assert np.isfinite(x).all()


@every_backend
def test_nan_from_a_mod_is_seen(backend):
    bias = np.zeros((6, 13), np.float32)
    bias[4, 5] = np.nan
    out, _ = modified(backend)(bias=bias)
    assert np.isnan(out[:, 4, 5:]).all() and np.isfinite(out[:, 4, :5]).all()
    assert np.isfinite(np.delete(out, 4, axis=1)).all()


def test_dropout_bits_are_fair_and_independent():
    rate = 0.3
    draw = jax.jit(lambda key: keep_weights(dropout_words(key), rate, *masks.index_grid(2, 3, 257, 263)))
    for seed in range(5):
        kept = np.asarray(draw(jax.random.key(seed)), np.float64)
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
    halves = jax.jit(lambda key: keep_weights(dropout_words(key), 0.5, *masks.index_grid(1, 1, 257, 263)))
    first, second = (np.asarray(halves(jax.random.key(seed))) for seed in (0, 1))
    assert abs((first == second).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(first.size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("causal", marks=pytest.mark.thorough),
        pytest.param("cross", marks=pytest.mark.thorough),
        pytest.param("function & padding", marks=pytest.mark.contract),
        pytest.param("score mod & causal", marks=pytest.mark.thorough),
    ],
)
def test_eager_equals_compiled(backend, case):
    case = CASES[case]
    query, key, value, _ = case.arrays()
    eager = BACKENDS[backend](query, key, value, mask=case.mask(), score_mod=case.score_mod)
    np.testing.assert_allclose(eager, call(backend, case, query, key, value), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.contract
def test_vmap_equals_a_loop(backend):
    case = CASES["causal & left padding"]
    rows = [case.arrays(seed=seed)[:3] for seed in range(3)]
    run = partial(BACKENDS[backend], mask=case.mask())
    mapped, looped = jax.jit(jax.vmap(run)), jax.jit(run)
    for have, row in zip(mapped(*map(np.stack, zip(*rows, strict=True))), rows, strict=True):
        np.testing.assert_allclose(have, looped(*row), atol=2e-6)


@pytest.mark.parametrize(
    ("backend", "axis_type"),
    [
        contract_unless((x, axis_type) == ("tiles of 4", AxisType.Auto), x, axis_type)
        for x in BACKENDS
        for axis_type in (AxisType.Auto, AxisType.Explicit)
    ],
)
def test_runs_inside_scan_and_shard_map(backend, axis_type):
    query, key, value, _ = full_arrays()
    expected, _ = oracle.attention(query, key, value, keep=CAUSAL)

    def run(*arrays):
        step = lambda _, x: (None, BACKENDS[backend](*x, mask=masks.causal()))
        return jax.lax.scan(step, None, [x[None] for x in arrays])[1][0]

    if backend not in INTERPRETED:  # test_gpu_choice and test_splash lower kernels there
        spec = PartitionSpec("data")
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
        query, key, value = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value))
        run = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    np.testing.assert_allclose(jax.jit(run)(query, key, value), expected, atol=2e-6)


NARROW = {
    "read by distance": lambda x: lambda s, b, h, q, kv: s + x[h, abs(q - kv) % 5],
    "read by head": lambda x: lambda s, b, h, q, kv: s * x[h, 0],
    "everywhere": lambda x: lambda s, b, h, q, kv: s + jnp.where(kv < q, x[0, 1], x[0, 2] * 0),
    "in a product": lambda x: lambda s, b, h, q, kv: s + x[h, 0] * (abs(q - kv) % 2),
    "as a leaf": lambda x: jax.tree_util.Partial(lambda x, s, b, h, q, kv: s + x.T[(q + kv) % 5, h], x),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, contract_unless(False, jnp.float16)])
@pytest.mark.parametrize("name", NARROW)
def test_gradients_of_narrow_arrays_are_summed_in_float32(name, dtype):
    x = jax.device_put(np.random.default_rng(0).standard_normal((1, 2, 150, 4), np.float32))
    table = jax.device_put(np.random.default_rng(1).standard_normal((2, 5), np.float32).astype(dtype))

    def loss(table, attention_fn):
        return (attention_fn(x, x, x, score_mod=NARROW[name](table), mask=masks.causal()) ** 2).sum()

    gradients = jax.jit(lambda *tables: [jax.grad(loss)(*both) for both in zip(tables, KERNELS, strict=True)])
    want, *have = gradients(table.astype(jnp.float32), table, table)
    for gradient in have:
        assert gradient.dtype == dtype
        assert oracle.rms_error(gradient, want) <= 4e-3


KERNELS = standard_attention, standard_attention, flash_attention


def test_a_second_derivative_in_reverse_mode_names_what_has_it():
    x = jax.ShapeDtypeStruct((1, 2, 13, 4), jnp.float32)
    loss = lambda x: (BACKENDS["tiles of 4"](x, x, x, mask=masks.causal()) ** 2).sum()
    with pytest.raises(NotImplementedError, match="Use standard_attention, which has every one"):
        jax.eval_shape(jax.grad(lambda x: jax.grad(loss)(x).sum()), x)
    jax.eval_shape(lambda x: jax.jvp(jax.grad(loss), (x,), (x,)), x)
    jax.eval_shape(jax.grad(lambda x: jax.grad(lambda x: standard_attention(x, x, x).sum())(x).sum()), x)


def test_a_policy_of_remat_saves_what_the_backward_pass_reads():
    x = jax.ShapeDtypeStruct((1, 2, 13, 4), jnp.float32)

    def products(**options):
        attend = jax.checkpoint(lambda x: BACKENDS["tiles of 4"](jnp.sin(x), x, x), **options)
        program = jax.jit(jax.grad(lambda x: jnp.sin(attend(x)).sum())).lower(x)
        return program.as_text().count("dot_general")

    saved = jax.checkpoint_policies.save_only_these_names("attention_out")
    assert (
        products(policy=saved) < products() == products(policy=jax.checkpoint_policies.save_only_these_names("other"))
    )


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
        arrays = [np.ones(change.get(name, shape), dtype) for name, shape in shapes.items()]
        options = {name: value for name, value in change.items() if name not in (*shapes, "dtype")}
        with pytest.raises(ValueError, match=words):
            BACKENDS[backend](*arrays, **options)

    @backends
    def test_mixed_dtypes(self, backend):
        query, key, value, _ = full_arrays()
        with pytest.raises(ValueError, match="one floating dtype; got float32, bfloat16, float32"):
            BACKENDS[backend](query, key.astype(jnp.bfloat16), value)
