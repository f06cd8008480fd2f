"""Lite attention weighs each position by a softmax of its gate logit, and keeps the contract of attention."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnax import masks
from attnax.kernels._core.dropout import dropout_words, keep_weights
from attnax.kernels.lite import lite_attention

LENGTHS = np.array([11, 5])
SHAPES = {  # batch, heads, kv_heads, length, head_dim, value_dim
    "grouped": (2, 6, 2, 13, 5, 7),
    "multi-head": (2, 3, 3, 17, 5, 7),
    "multi-query": (2, 3, 1, 11, 3, 2),
    "one token": (2, 6, 2, 1, 5, 7),
    "nothing": (2, 6, 2, 0, 5, 7),
    "long": (1, 2, 1, 131, 3, 5),
}


def mark_of(shape, causal):
    if (shape, causal) == ("grouped", True):
        return []
    return [pytest.mark.contract if shape in ("grouped", "long", "nothing") else pytest.mark.thorough]


causality = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
REAL = np.stack([np.arange(13) < 11, np.arange(13) >= 5])


def arrays(shape="grouped", seed=0, dtype=jnp.float32):
    """query, key, value, gate, cotangent: unit normal."""
    batch, heads, kv_heads, length, head_dim, value_dim = SHAPES[shape]
    sizes = (
        (batch, heads, length, head_dim),
        (batch, kv_heads, length, head_dim),
        (batch, kv_heads, length, value_dim),
        (head_dim, 1),
        (batch, heads, length, value_dim),
    )
    rng = np.random.default_rng(seed)
    return [jax.device_put(rng.standard_normal(size, np.float32).astype(dtype)) for size in sizes]


def attend(query, key, value, gate, **options):
    """Lite attention with a linear gate of weights `gate`."""
    return lite_attention(query, key, value, lambda product: product @ gate, **options)


def mask_of(causal, real=None):
    parts = ([masks.causal()] if causal else []) + ([] if real is None else [masks.padding(jnp.asarray(real))])
    return masks.combine_masks(*parts)


def exact(query, key, value, gate, causal, real=None, cotangent=None):
    """The output in float64, or the gradients of sum(out * cotangent): one position at a time."""
    query, key, value, gate = (np.asarray(x).astype(np.float64) for x in (query, key, value, gate))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    grads = [np.zeros_like(x) for x in (query, key, value, gate)]
    real = np.ones((query.shape[0], query.shape[2]), bool) if real is None else real
    for b, h, j in np.ndindex(query.shape[:3]):
        g = h * key.shape[1] // query.shape[1]
        seen = np.flatnonzero(real[b] & (np.arange(real.shape[1]) <= j if causal else True))
        if not real[b, j]:
            continue
        product = query[b, h, seen] * key[b, g, seen]
        logits = (product @ gate)[:, 0]
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        own = seen == j
        out[b, h, j] = weights[own] * value[b, g, j]
        if cotangent is not None:
            up = np.asarray(cotangent[b, h, j], np.float64)
            d_logits = (up @ value[b, g, j]) * weights[own] * (own - weights)
            d_product = d_logits[:, None] * gate[:, 0]
            grads[0][b, h, seen] += d_product * key[b, g, seen]
            grads[1][b, g, seen] += d_product * query[b, h, seen]
            grads[2][b, g, j] += weights[own] * up
            grads[3][:, 0] += d_logits @ product
    return out if cotangent is None else grads


@pytest.mark.parametrize(
    ("shape", "causal"),
    [pytest.param(shape, causal, marks=mark_of(shape, causal)) for shape in SHAPES for causal in (True, False)],
)
def test_output_and_gradients_match_float64(shape, causal):
    *inputs, cotangent = arrays(shape)
    run = partial(attend, mask=mask_of(causal))
    out, grads = jax.jit(lambda *x: (run(*x), jax.vjp(run, *x)[1](cotangent)))(*inputs)
    expected = exact(*inputs, causal)
    assert out.shape == expected.shape and out.dtype == inputs[0].dtype
    assert out.size == 0 or oracle.rms_error(out, expected) <= 2e-6
    for have, want in zip(grads, exact(*inputs, causal, cotangent=cotangent), strict=True):
        assert have.shape == want.shape
        assert have.size == 0 or oracle.rms_error(have, want) <= 4e-6


@functools.cache
def compiled(causal):
    """(out, gradients) with padding."""

    def run(query, key, value, gate, d_out, real):
        out, pull = jax.vjp(partial(attend, mask=mask_of(causal, real)), query, key, value, gate)
        # The cotangent of a row that is NaN is usually NaN itself.
        return out, pull(jnp.where(jnp.isnan(out), jnp.nan, d_out))

    jitted = jax.jit(run)
    return lambda *given: jax.tree.map(np.asarray, jitted(*given))


@pytest.mark.contract
@causality
def test_padding_is_zero_and_counts_for_nothing(causal):
    *inputs, cotangent = arrays()
    out, grads = compiled(causal)(*inputs, cotangent, REAL)
    assert oracle.rms_error(out, exact(*inputs, causal, REAL)) <= 2e-6
    pad = np.broadcast_to(~REAL[:, None], out.shape[:3])
    assert (out[pad] == 0).all()
    for have, want in zip(grads, exact(*inputs, causal, REAL, cotangent), strict=True):
        assert oracle.rms_error(have, want) <= 4e-6
    for grad in grads[:3]:
        assert (grad[pad[:, : grad.shape[1]]] == 0).all()


@pytest.mark.contract
@causality
def test_rows_of_padding_only_are_exactly_zero(causal):
    out, grads = compiled(causal)(*arrays(), np.arange(13) < np.array([[0], [5]]))
    assert (out[0] == 0).all() and (out[1] != 0).any()
    for grad in grads[:3]:
        assert (grad[0] == 0).all() and np.isfinite(grad).all()


@pytest.mark.contract
@causality
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_padding_changes_nothing(bad, causal):
    *inputs, gate, cotangent = map(np.asarray, arrays())
    out, grads = compiled(causal)(*inputs, gate, cotangent, REAL)
    contaminated = [np.where(REAL[:, None, :, None], x, np.float32(bad)) for x in inputs]
    out_contaminated, grads_contaminated = compiled(causal)(*contaminated, gate, cotangent, REAL)
    np.testing.assert_array_equal(out_contaminated, out)
    for grad, clean in zip(grads_contaminated, grads, strict=True):
        np.testing.assert_array_equal(grad, clean)


@pytest.mark.contract
@causality
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
def test_a_non_finite_position_contaminates_only_the_positions_that_include_it(bad, where, causal):
    *inputs, cotangent = map(np.array, arrays())
    run = compiled(causal)
    clean_out, _ = run(*inputs, cotangent, REAL)
    hit = np.zeros(clean_out.shape, bool)
    hit[:, : 1 if where == 0 else 3, 8 if causal else 0 :] = True
    hit &= REAL[:, None, :, None]
    _, clean_grads = run(*inputs, np.where(hit, 0, cotangent), REAL)  # without the contaminated rows
    inputs[where][:, 0, 8, 1] = bad
    out, grads = run(*inputs, cotangent, REAL)
    np.testing.assert_array_equal(np.isnan(out), hit)
    np.testing.assert_array_equal(out[~hit], clean_out[~hit])
    for grad, clean in zip(grads, clean_grads, strict=True):
        np.testing.assert_allclose(grad, clean, atol=2e-6)


@pytest.mark.thorough
def test_infinity_from_the_gate_is_seen():
    query, key, value, _, _ = arrays()
    query = query.at[:, :, 4].set(0)
    gate = lambda product: jnp.where((product == 0).all(-1, keepdims=True), jnp.inf, product[..., :1])
    out = lite_attention(query, key, value, gate, mask=masks.causal())
    assert jnp.isnan(out[:, :, 4:]).all() and jnp.isfinite(out[:, :, :4]).all()


@pytest.mark.thorough
@causality
def test_outputs_depend_on_the_positions_that_they_include_and_no_other(causal):
    query, key, value, gate, _ = arrays()
    run = jax.jit(partial(attend, mask=mask_of(causal, REAL)))
    out = run(query, key, value, gate)
    for j in range(13):
        moved = (run(query.at[:, :, j].add(1.0), key, value, gate) != out).any((1, 3))
        expected = REAL & REAL[:, j : j + 1] & (np.arange(13) >= j if causal else True)
        expected &= (not causal) | (REAL.cumsum(1) > 1)  # the weight of the first position is always 1
        np.testing.assert_array_equal(moved, expected)
        moved = (run(query, key, value.at[:, :, j].add(1.0), gate) != out).any((1, 3))
        np.testing.assert_array_equal(moved, REAL & (np.arange(13) == j))


@pytest.mark.thorough
@causality
@pytest.mark.parametrize("gate_type", ["module", "partial"])
def test_a_gate_of_any_kind_learns(gate_type, causal):
    query, key, value, gate, cotangent = arrays()
    if gate_type == "module":
        linear = nnx.Linear(5, 1, rngs=nnx.Rngs(0))
        linear.kernel[...] = gate
        graph, state = nnx.split(linear)
        build = lambda weights: nnx.merge(graph, nnx.State({**state, "kernel": state["kernel"].replace(weights)}))
    else:
        build = lambda weights: jax.tree_util.Partial(lambda weights, product: product @ weights, weights)

    @jax.jit
    def loss(weights):
        return (lite_attention(query, key, value, build(weights), mask=mask_of(causal)) * cotangent).sum()

    expected = exact(query, key, value, gate, causal, cotangent=cotangent)[3]
    assert oracle.rms_error(jax.grad(loss)(gate), expected) <= 4e-6


@pytest.mark.contract
@causality
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_close_to_correct_rounding(dtype, causal):
    *inputs, _ = arrays("long", dtype=dtype)
    out = jax.jit(partial(attend, mask=mask_of(causal)))(*inputs)
    expected = exact(*inputs, causal)
    rounded = np.asarray(expected.astype(dtype)).astype(np.float64)
    error, ideal = np.abs(np.asarray(out).astype(np.float64) - expected), np.abs(rounded - expected)
    assert out.dtype == dtype
    assert np.sqrt((error**2).mean()) <= 1.5 * np.sqrt((ideal**2).mean()) and error.max() <= 2 * ideal.max()


@pytest.mark.thorough
@causality
def test_huge_logits_give_no_nan(causal):
    query, key, value, gate, cotangent = arrays()
    out, pull = jax.vjp(partial(attend, mask=mask_of(causal, REAL)), query, key, value, gate * 1e4)
    assert jnp.isfinite(out).all() and all(jnp.isfinite(grad).all() for grad in pull(cotangent))


@pytest.mark.thorough
def test_a_later_maximum_does_not_swallow_the_sums_before_it():
    """A softmax by one maximum for all positions would divide 0 by 0: exp(-1e4) is 0 in float32."""
    query, key, value, _, _ = arrays()
    rising = lambda product: jnp.broadcast_to(1e4 * jnp.arange(13.0)[:, None], (2, 6, 13, 1))
    out = lite_attention(query, key, value, rising, mask=masks.causal())
    np.testing.assert_allclose(out, jnp.repeat(value, 3, axis=1), rtol=1e-6)


@pytest.mark.thorough
@causality
def test_dropout_drops_weights_by_their_indices(causal):
    *inputs, _ = arrays()
    rng, rate = jax.random.key(3), 0.3
    run = partial(attend, *inputs, mask=mask_of(causal), dropout_rate=rate)
    b, h, q, kv = masks.index_grid(2, 6, 13, 13)
    kept = np.asarray(keep_weights(dropout_words(rng), rate, b, h, q, kv))[:, :, np.arange(13), np.arange(13)]
    expected = np.where(kept[..., None], exact(*inputs, causal) / (1 - rate), 0)
    assert 0 < kept.mean() < 1
    assert oracle.rms_error(run(dropout_rng=rng, deterministic=False), expected) <= 2e-6
    assert not jnp.allclose(run(dropout_rng=jax.random.key(4), deterministic=False), expected)
    np.testing.assert_array_equal(run(dropout_rng=rng), attend(*inputs, mask=mask_of(causal)))


@pytest.mark.thorough
@causality
def test_eager_equals_compiled(causal):
    *inputs, _ = arrays()
    run = partial(attend, mask=mask_of(causal, REAL))
    np.testing.assert_allclose(run(*inputs), jax.jit(run)(*inputs), atol=2e-6)


@pytest.mark.thorough
@causality
def test_vmap_equals_a_loop(causal):
    rows = [arrays(seed=seed)[:4] for seed in range(3)]
    lengths = jnp.array([[3, 5], [13, 0], [7, 11]])
    run = lambda lengths, *x: attend(*x, mask=mask_of(causal, lengths))
    mapped = jax.vmap(run)(lengths, *(jnp.stack(x) for x in zip(*rows, strict=True)))
    for have, row, length in zip(mapped, rows, lengths, strict=True):
        np.testing.assert_allclose(have, run(length, *row), atol=2e-6)


@pytest.mark.thorough
@causality
def test_runs_inside_shard_map(causal):
    *inputs, gate, _ = arrays()
    run = partial(attend, gate=gate, mask=mask_of(causal))
    expected = run(*inputs)
    spec = PartitionSpec("data")
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs]
        out = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec))(*sharded)
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.usefixtures("unchecked_shapes")
class TestErrors:
    """Wrong input is refused in words, before any compute."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"mask": np.ones((13, 13))}, "mask must be boolean"),
            ({"mask": masks.causal() & masks.padding(np.array([1, 2, 3]))}, "one length a batch row"),
            ({"dropout_rate": 0.1, "deterministic": False}, "dropout needs a key"),
            ({"gate_proj": 3}, r"gate_proj must be a function \(..., head_dim\) -> \(..., 1\); got gate_proj=3"),
            ({"gate_proj": lambda x: x}, r"must map .*; got \(2, 6, 13, 5\) for \(2, 6, 13, 5\)"),
            ({"gate_proj": lambda x: x.sum(-1)}, r"must map .*; got \(2, 6, 13\) for \(2, 6, 13, 5\)"),
        ],
    )
    def test_wrong_argument(self, options, words):
        query, key, value, gate, _ = arrays()
        options = {"gate_proj": lambda product: product @ gate, **options}
        with pytest.raises(ValueError, match=f"lite_attention: .*{words}"):
            jax.eval_shape(lambda *x: lite_attention(*x, **options), query, key, value)

    def test_cross_attention(self):
        query, key, value, gate, _ = arrays()
        with pytest.raises(ValueError, match=r"key of its own position.*got query\.shape=\(2, 6, 11, 5\)"):
            attend(query[:, :, :11], key, value, gate)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"score_mod": lambda s, b, h, q, kv: s}, "there are no scores of pairs to modify"),
            ({"mask": lambda b, h, q, kv: kv <= q}, "mask must be .*key padding.*; got Pointwise"),
            ({"mask": masks.sliding_window(3)}, "got SlidingWindow"),
            ({"mask": masks.causal() & masks.documents(np.arange(13) // 5)}, "got Documents"),
            ({"mask": np.tri(13, dtype=bool)}, r"got a boolean array of shape \(1, 1, 13, 13\)"),
            ({"mask": masks.at_positions(masks.causal(), np.arange(13), np.arange(13))}, "got AtPositions"),
        ],
    )
    def test_what_lite_attention_lacks(self, options, words):
        *inputs, _ = arrays()
        with pytest.raises(NotImplementedError, match=f"lite_attention: .*{words}"):
            attend(*inputs, **options)
