"""Linear attention keeps the contract of attention, and its state stands for all earlier keys."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnax import masks
from attnax.cache import LinearState
from attnax.kernels.linear import linear_attention

LENGTHS = np.array([11, 5])
SHAPES = {  # batch, heads, kv_heads, seq_q, seq_kv, head_dim, value_dim
    "grouped": (2, 6, 2, 13, 13, 5, 7),
    "multi-head": (2, 3, 3, 17, 17, 5, 7),
    "multi-query": (2, 3, 1, 11, 11, 3, 2),
    "more keys": (2, 6, 2, 7, 17, 5, 7),
    "more queries": (2, 6, 2, 17, 11, 5, 7),
    "one token": (2, 6, 2, 1, 1, 5, 7),
    "no query": (2, 6, 2, 0, 5, 5, 7),
    "no key": (2, 6, 2, 5, 0, 5, 7),
    "nothing": (2, 6, 2, 0, 0, 5, 7),
    "several chunks": (1, 2, 1, 131, 131, 3, 5),
}
QUICK = ("grouped", True, True), ("more keys", False, False)  # shape, causal, padded
IN_THE_CONTRACT = {"grouped", "several chunks", "no key"}
causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def arrays(shape="grouped", seed=0, dtype=jnp.float32):
    """query, key, value, cotangent: unit normal."""
    batch, heads, kv_heads, seq_q, seq_kv, head_dim, value_dim = SHAPES[shape]
    sizes = (
        (batch, heads, seq_q, head_dim),
        (batch, kv_heads, seq_kv, head_dim),
        (batch, kv_heads, seq_kv, value_dim),
        (batch, heads, seq_q, value_dim),
    )
    rng = np.random.default_rng(seed)
    return [jax.device_put(rng.standard_normal(size, np.float32).astype(dtype)) for size in sizes]


def keep_of(query, key, causal, lengths=None):
    """Which pairs may attend, (B, T, S)."""
    q, kv = np.arange(query.shape[2])[:, None], np.arange(key.shape[2])[None, :]
    keep = np.broadcast_to(kv <= q if causal else True, (query.shape[0], q.size, kv.size))
    return keep if lengths is None else keep & (kv < np.asarray(lengths)[:, None, None])


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def exact(query, key, value, keep, cotangent=None):
    """The output in float64, or (dq, dk, dv) of sum(out * cotangent): every pair, one query at a time."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    grads = [np.zeros_like(x) for x in (query, key, value)]
    for b, h, q in np.ndindex(query.shape[:3]):
        g = h * key.shape[1] // query.shape[1]
        seen = np.flatnonzero(keep[b, q])
        if seen.size == 0:
            continue
        features, key_features = phi(query[b, h, q]), phi(key[b, g, seen])
        scores = key_features @ features
        weights = scores / scores.sum()
        out[b, h, q] = weights @ value[b, g, seen]
        if cotangent is not None:
            up = np.asarray(cotangent[b, h, q], np.float64)
            d_scores = (value[b, g, seen] - out[b, h, q]) @ up / scores.sum()
            # phi' = min(phi, 1): 1 above 0 and exp below.
            grads[0][b, h, q] += d_scores @ key_features * np.minimum(features, 1)
            grads[1][b, g, seen] += d_scores[:, None] * features * np.minimum(key_features, 1)
            grads[2][b, g, seen] += weights[:, None] * up
    return out if cotangent is None else grads


@pytest.mark.parametrize(
    ("shape", "causal", "padded"),
    [
        pytest.param(
            *given,
            marks=[]
            if given in QUICK
            else [pytest.mark.contract if given[0] in IN_THE_CONTRACT else pytest.mark.thorough],
        )
        for given in itertools.product(SHAPES, (True, False), (True, False))
    ],
)
def test_output_and_gradients_match_float64(shape, causal, padded):
    query, key, value, cotangent = arrays(shape)
    lengths = LENGTHS[: len(query)] if padded else None
    mask = masks.padding(lengths) if padded else None
    run = lambda *x: linear_attention(*x, mask=mask, causal=causal, chunk_size=7)
    out, grads = jax.jit(lambda *x: (run(*x), jax.vjp(run, *x)[1](cotangent)))(query, key, value)
    keep = keep_of(query, key, causal, lengths)
    expected = exact(query, key, value, keep)
    assert out.shape == expected.shape and out.dtype == query.dtype
    assert out.size == 0 or oracle.rms_error(out, expected) <= 1e-6
    for have, want in zip(grads, exact(query, key, value, keep, cotangent), strict=True):
        assert have.shape == want.shape
        assert have.size == 0 or oracle.rms_error(have, want) <= 2e-6


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_size", [1, 3, 13, 64])
def test_chunk_size_changes_nothing(chunk_size):
    query, key, value, cotangent = arrays()
    expected, expected_pull = jax.vjp(partial(linear_attention, chunk_size=7), query, key, value)
    out, pull = jax.vjp(partial(linear_attention, chunk_size=chunk_size), query, key, value)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for have, want in zip(pull(cotangent), expected_pull(cotangent), strict=True):
        np.testing.assert_allclose(have, want, atol=5e-6)


@pytest.mark.contract
@pytest.mark.parametrize(
    "mask",
    [
        masks.padding(LENGTHS),
        masks.causal() & masks.padding(LENGTHS),
        masks.padding(LENGTHS) & (masks.causal() & (np.arange(13) < 12)),
        np.arange(13) < LENGTHS[:, None, None, None],
        masks.causal() & masks.padding(np.arange(13) < LENGTHS[:, None]),
        masks.causal() & np.ones((1, 1), bool) & masks.padding(LENGTHS),
    ],
)
def test_every_way_to_write_a_key_padding_mask_gives_the_same(mask):
    query, key, value, _ = arrays()
    expected = exact(query, key, value, keep_of(query, key, True, LENGTHS))
    assert oracle.rms_error(jax.jit(partial(linear_attention, mask=mask))(query, key, value), expected) <= 1e-6


@pytest.mark.thorough
def test_a_causal_part_of_the_mask_makes_attention_causal():
    query, key, value, _ = arrays()
    expected = linear_attention(query, key, value)
    np.testing.assert_array_equal(linear_attention(query, key, value, causal=False, mask=masks.causal()), expected)
    full = linear_attention(query, key, value, causal=False)
    assert not np.allclose(full, expected)


@functools.cache
def compiled(causal, chunk_size):
    """(out, gradients) under a padding mask, or without a mask if `real` is None."""

    def run(query, key, value, d_out, real=None):
        mask = None if real is None else masks.padding(real)
        attend = partial(linear_attention, mask=mask, causal=causal, chunk_size=chunk_size)
        out, pull = jax.vjp(attend, query, key, value)
        # The cotangent of a row that is NaN is usually NaN itself.
        return out, pull(jnp.where(jnp.isnan(out), jnp.nan, d_out))

    jitted = jax.jit(run)
    return lambda *given: jax.tree.map(np.asarray, jitted(*given))


@pytest.mark.contract
@causality
def test_rows_with_nothing_to_attend_are_exactly_zero(causal):
    real = np.array([[False] * 13, [False] * 5 + [True] * 8])
    out, grads = compiled(causal, 3)(*arrays(), real)
    assert (out[0] == 0).all() and (out[1, :, 5:] != 0).any()
    assert not causal or (out[1, :, :5] == 0).all()
    for grad in grads:
        assert (grad[0] == 0).all() and np.isfinite(grad).all() and (grad[1] != 0).any()
    d_query, d_key, d_value = grads
    assert (d_key[1, :, :5] == 0).all() and (d_value[1, :, :5] == 0).all()
    assert not causal or (d_query[1, :, :5] == 0).all()


@pytest.mark.contract
@causality
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_padding_changes_nothing(bad, causal):
    query, key, value, cotangent = map(np.asarray, arrays())
    real = np.stack([np.arange(13) < 11, np.arange(13) >= 5])
    out, grads = compiled(causal, 3)(query, key, value, cotangent, real)
    contaminated = [np.where(real[:, None, :, None], x, np.float32(bad)) for x in (key, value)]
    out_contaminated, grads_contaminated = compiled(causal, 3)(query, *contaminated, cotangent, real)
    np.testing.assert_array_equal(out_contaminated, out)
    for grad, clean in zip(grads_contaminated, grads, strict=True):
        np.testing.assert_array_equal(grad, clean)


@pytest.mark.contract
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_a_non_finite_key_contaminates_only_the_rows_that_attend_it(bad, where, chunk_size):
    *inputs, cotangent = map(np.array, arrays())
    run = compiled(True, chunk_size)
    clean_out, _ = run(*inputs, cotangent)
    hit = np.zeros(clean_out.shape, bool)
    hit[:, : 1 if where == 0 else 3, 8 : 9 if where == 0 else None] = True
    _, clean_grads = run(*inputs, np.where(hit, 0, cotangent))  # without the contaminated rows
    inputs[where][:, 0, 8, 1] = bad
    out, grads = run(*inputs, cotangent)
    np.testing.assert_array_equal(np.isnan(out), hit)
    np.testing.assert_array_equal(out[~hit], clean_out[~hit])
    for grad, clean in zip(grads, clean_grads, strict=True):
        assert np.isfinite(grad).all()
        np.testing.assert_allclose(np.delete(grad, 8, axis=2), np.delete(clean, 8, axis=2), atol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
def test_without_causality_a_non_finite_key_contaminates_the_rows_that_share_its_head(where):
    *inputs, _ = arrays()
    inputs[where] = inputs[where].at[0, 0, 8, 1].set(jnp.nan)
    out = linear_attention(*inputs, causal=False)
    hit = np.zeros(out.shape, bool)
    hit[0, : 1 if where == 0 else 3, 8 if where == 0 else slice(None)] = True
    np.testing.assert_array_equal(np.isnan(out), hit)


@pytest.mark.thorough
def test_non_finite_queries_with_nothing_to_attend_are_zero():
    query, key, value, _ = arrays()
    out = linear_attention(query.at[0].set(jnp.nan), key, value, mask=masks.padding(np.array([0, 13])))
    assert (out[0] == 0).all() and jnp.isfinite(out).all()


@pytest.mark.thorough
@causality
def test_outputs_depend_on_the_keys_that_they_attend_and_no_other(causal):
    query, key, value, _ = arrays()
    keep = keep_of(query, key, causal, LENGTHS)
    run = jax.jit(partial(linear_attention, mask=masks.padding(LENGTHS), causal=causal, chunk_size=3))
    out = run(query, key, value)
    for j in range(13):
        moved = (run(query, key.at[:, :, j].add(1.0), value.at[:, :, j].add(1.0)) != out).any((1, 3))
        np.testing.assert_array_equal(moved, keep[:, :, j])


@pytest.mark.thorough
@pytest.mark.parametrize("splits", [[0, 13], [1, 2, 3, 11], [6], [5, 5, 8], list(range(1, 13))])
def test_pieces_by_state_equal_the_whole(splits):
    query, key, value, _ = arrays()
    real = np.stack([np.arange(13) < 11, np.arange(13) >= 5])
    run = partial(linear_attention, chunk_size=3, return_state=True)
    jitted = jax.jit(lambda *x, real, state: run(*x, mask=masks.padding(real), state=state))
    whole, whole_state = jitted(query, key, value, real=real, state=None)
    state, outs = None, []
    for start, stop in zip([0, *splits], [*splits, 13], strict=True):
        piece = [np.asarray(x)[:, :, start:stop] for x in (query, key, value)]
        out, state = jitted(*piece, real=real[:, start:stop], state=state)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=2), whole, atol=2e-6)
    assert state.key_sum.dtype == state.key_value_sum.dtype == jnp.float32
    for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(whole_state), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


@pytest.mark.contract
def test_gradients_flow_through_the_state():
    query, key, value, cotangent = arrays()

    def pieces(query, key, value):
        first, state = linear_attention(*(x[:, :, :5] for x in (query, key, value)), return_state=True)
        second = linear_attention(*(x[:, :, 5:] for x in (query, key, value)), state=state, chunk_size=3)
        return jnp.concatenate([first, second], axis=2)

    for have, want in zip(
        jax.jit(lambda *x: jax.vjp(pieces, *x[:3])[1](x[3]))(query, key, value, cotangent),
        exact(query, key, value, keep_of(query, key, True), cotangent),
        strict=True,
    ):
        assert oracle.rms_error(have, want) <= 2e-6


@pytest.mark.thorough
def test_decoding_is_a_scan_over_the_state():
    query, key, value, _ = arrays()
    _, start = linear_attention(query[:, :, :0], key[:, :, :0], value[:, :, :0], return_state=True)

    def step(state, token):
        out, state = linear_attention(*(x[:, :, None] for x in token), state=state, return_state=True)
        return state, out[:, :, 0]

    _, out = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value)))
    np.testing.assert_allclose(jnp.moveaxis(out, 0, 2), linear_attention(query, key, value), atol=2e-6)


@pytest.mark.thorough
def test_the_state_holds_the_keys_after_the_last_query_too():
    query, key, value, _ = arrays("more keys")
    _, state = linear_attention(query, key, value, return_state=True, chunk_size=3)
    np.testing.assert_allclose(state.key_sum, phi(np.asarray(key)).sum(2), rtol=1e-5)


@pytest.mark.thorough
def test_contamination_stays_in_the_state():
    query, key, value, _ = arrays()
    value = value.at[0, 1, 4, 2].set(jnp.nan)
    _, state = linear_attention(*(x[:, :, :7] for x in (query, key, value)), return_state=True)
    out = linear_attention(*(x[:, :, 7:] for x in (query, key, value)), state=state)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(linear_attention(query, key, value)[:, :, 7:]))
    assert jnp.isnan(out[0, 3:]).all() and jnp.isfinite(out[0, :3]).all() and jnp.isfinite(out[1]).all()


@pytest.mark.contract
@causality
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_close_to_correct_rounding(dtype, causal):
    query, key, value, _ = arrays("several chunks", dtype=dtype)
    out = jax.jit(partial(linear_attention, causal=causal))(query, key, value)
    expected = exact(query, key, value, keep_of(query, key, causal))
    rounded = np.asarray(expected.astype(dtype)).astype(np.float64)
    error, ideal = np.abs(np.asarray(out).astype(np.float64) - expected), np.abs(rounded - expected)
    assert out.dtype == dtype
    assert np.sqrt((error**2).mean()) <= 1.5 * np.sqrt((ideal**2).mean()) and error.max() <= 2 * ideal.max()


@pytest.mark.thorough
@pytest.mark.parametrize(("query_shift", "key_shift"), [(-30, -10), (-300, 0), (0, -50), (1e4, 1e4), (-700, 1e4)])
def test_features_far_from_one_keep_output_and_gradients(query_shift, key_shift):
    """exp underflows in float32 below -87; its square, in the derivative of the quotient, below -43."""
    query, key, value, cotangent = arrays()
    query, key = query + query_shift, key + key_shift
    out, pull = jax.vjp(partial(linear_attention, chunk_size=3), query, key, value)
    keep = keep_of(query, key, True)
    assert oracle.rms_error(out, exact(query, key, value, keep)) <= 2e-6
    d_query, d_key, d_value = pull(cotangent)
    expected = exact(query, key, value, keep, cotangent)
    assert oracle.rms_error(d_value, expected[2]) <= 3e-6
    assert jnp.isfinite(d_query).all() and jnp.isfinite(d_key).all()
    if max(query_shift, key_shift) <= 0:
        assert oracle.rms_error(d_query, expected[0]) <= 5e-6 and oracle.rms_error(d_key, expected[1]) <= 5e-6


@pytest.mark.thorough
def test_the_derivative_of_the_feature_map_at_zero_is_one():
    query, key, value, cotangent = arrays()
    query, key = (jnp.where(x > 0.5, x, 0) for x in (query, key))
    pull = jax.vjp(linear_attention, query, key, value)[1]
    expected = exact(query, key, value, keep_of(query, key, True), cotangent)
    for have, want in zip(pull(cotangent), expected, strict=True):
        assert oracle.rms_error(have, want) <= 2e-6


@pytest.mark.thorough
@causality
def test_eager_equals_compiled(causal):
    query, key, value, _ = arrays()
    run = partial(linear_attention, mask=masks.padding(LENGTHS), causal=causal, chunk_size=3)
    np.testing.assert_allclose(run(query, key, value), jax.jit(run)(query, key, value), atol=2e-6)


@pytest.mark.thorough
@causality
def test_vmap_equals_a_loop(causal):
    rows = [arrays(seed=seed)[:3] for seed in range(3)]
    lengths = jnp.array([[3, 5], [13, 0], [7, 11]])
    run = lambda lengths, *x: linear_attention(*x, mask=masks.padding(lengths), causal=causal, chunk_size=3)
    mapped = jax.vmap(run)(lengths, *(jnp.stack(x) for x in zip(*rows, strict=True)))
    for have, row, length in zip(mapped, rows, lengths, strict=True):
        np.testing.assert_allclose(have, run(length, *row), atol=2e-6)


@pytest.mark.thorough
@causality
def test_runs_inside_shard_map(causal):
    query, key, value, _ = arrays()
    run = partial(linear_attention, causal=causal, chunk_size=3)
    expected = run(query, key, value)
    spec = PartitionSpec("data")
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
        out = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec))(*sharded)
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.thorough
def test_second_derivatives_match_a_dense_computation():
    query, key, value, cotangent = (x[:1, :2, :5] for x in arrays("multi-head"))

    def dense(query, key, value):
        features = [jax.nn.elu(x) + 1 for x in (query, key)]
        scores = jnp.where(jnp.tri(5, dtype=bool)[None, None], jnp.einsum("BNTH,BNSH->BNTS", *features), 0)
        return jnp.einsum("BNTS,BNSV->BNTV", scores / scores.sum(-1, keepdims=True), value)

    def curvature(run):
        slope = lambda *x: sum((g**2).sum() for g in jax.vjp(run, *x)[1](cotangent))
        return jax.grad(slope, (0, 1, 2))(query, key, value)

    for have, want in zip(curvature(partial(linear_attention, chunk_size=2)), curvature(dense), strict=True):
        assert oracle.rms_error(have, want) <= 1e-5


@pytest.mark.contract
def test_memory_of_output_and_gradient_is_linear_in_the_length():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, 1, length, 64), jnp.float32)
        loss = lambda *x: linear_attention(*x).sum()
        return [
            jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
            for run in (linear_attention, jax.grad(loss, (0, 1, 2)))
        ]

    bytes_of_an_array = 4096 * 64 * 4
    for short, long in zip(temporary_bytes(1024), temporary_bytes(4096), strict=True):
        assert long <= 4.5 * short and long <= 8 * bytes_of_an_array


@pytest.mark.usefixtures("unchecked_shapes")
class TestErrors:
    """Wrong input is refused in words, before any compute."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1; got chunk_size=0"),
            ({"chunk_size": 2.5}, "got chunk_size=2.5"),
            ({"mask": np.ones((13, 13))}, "mask must be boolean"),
            ({"mask": np.ones((3, 1, 1, 13), bool)}, "must broadcast"),
            ({"mask": masks.causal() & masks.padding(np.array([1, 2, 3]))}, "one length a batch row"),
            ({"dropout_rate": 1.5}, "below 1; got dropout_rate=1.5"),
            ({"causal": False, "return_state": True}, "only causal attention has a state.*return_state=True"),
            (
                {"causal": False, "state": LinearState(jnp.zeros((2, 2, 5, 7)), jnp.zeros((2, 2, 5)))},
                "only causal attention has a state.*got causal=False with a state",
            ),
            (
                {"state": LinearState(jnp.zeros((2, 2, 5, 5)), jnp.zeros((2, 2, 5)))},
                r"shapes \(2, 2, 5, 7\) and \(2, 2, 5\), float32; got \(2, 2, 5, 5\), float32",
            ),
            (
                {"state": LinearState(jnp.zeros((2, 2, 5, 7)), jnp.zeros((2, 2, 5), jnp.bfloat16))},
                r"and \(2, 2, 5\), bfloat16. Pass the state that the previous call returned",
            ),
        ],
    )
    def test_wrong_argument(self, options, words):
        query, key, value, _ = arrays()
        with pytest.raises(ValueError, match=f"linear_attention: .*{words}"):
            linear_attention(query, key, value, **options)

    def test_wrong_shapes(self):
        query, key, value, _ = arrays()
        with pytest.raises(ValueError, match="linear_attention: key and value must have the same heads and length"):
            linear_attention(query, key, value[:, :, :11])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"score_mod": lambda s, b, h, q, kv: s}, "there are no scores to modify"),
            (
                {"dropout_rate": 0.1, "deterministic": False, "dropout_rng": jax.random.key(0)},
                "no attention weights to drop; got dropout_rate=0.1",
            ),
            ({"mask": lambda b, h, q, kv: kv <= q}, "mask must be .*key padding.*; got Pointwise"),
            ({"mask": np.tri(13, dtype=bool)}, r"got a boolean array of shape \(1, 1, 13, 13\)"),
            ({"mask": masks.causal() & np.ones((6, 1, 13), bool)}, r"got a boolean array of shape \(1, 6, 1, 13\)"),
            ({"mask": masks.at_positions(masks.causal(), np.arange(13), np.arange(13))}, "got AtPositions"),
        ],
    )
    def test_what_linear_attention_lacks(self, options, words):
        query, key, value, _ = arrays()
        with pytest.raises(NotImplementedError, match=f"linear_attention: .*{words}"):
            linear_attention(query, key, value, **options)
