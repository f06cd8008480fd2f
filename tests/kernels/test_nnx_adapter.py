"""The layer of Flax with our kernel equals the layer of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import masks, standard_attention
from attnax.kernels.nnx_adapter import nnx_attention_fn

BATCH, LENGTH, KEYS, HEADS, WIDTH = 2, 13, 17, 6, 30
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def graph_mode(request):
    with nnx.set_graph_mode(request.param):
        yield request.param


def make_layer(dtype=jnp.float32, seed=0, rngs=None, **options):
    options = {"num_heads": HEADS, "in_features": WIDTH, "decode": False, "dtype": dtype, **options}
    return nnx.MultiHeadAttention(**options, rngs=rngs or nnx.Rngs(seed))


def built_layer(dtype=jnp.float32, **options):
    """The layer with weights made by NumPy."""
    layer = build(lambda rngs: make_layer(dtype, rngs=rngs, **options))
    for part in (layer.query, layer.key, layer.value, layer.out):  # `build` takes kernels for matrices
        kernel = np.asarray(part.kernel[...])
        fan_in = kernel.shape[0] * (kernel.shape[1] if part is layer.out else 1)
        part.kernel[...] = jnp.asarray(kernel * np.float32((kernel.shape[1] / fan_in) ** 0.5))
    return layer


def make_pair(dtype=jnp.float32, adapter=None, **options):
    """Flax's layer, and the same parameters over our kernel."""
    return built_layer(dtype, **options), built_layer(dtype, attention_fn=adapter or nnx_attention_fn(), **options)


def inputs(*shape, dtype=jnp.float32, seed=1):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def padding_array(dtype):
    real = np.arange(LENGTH) < np.array([[11], [5]])
    return jax.device_put(np.broadcast_to(real[:, None, None], (BATCH, 1, LENGTH, LENGTH)).astype(dtype))


CALLS = {
    "full": {},
    "is_causal": {"is_causal": True},
    "causal mask of floats": {
        "mask": jax.device_put(np.broadcast_to(np.tri(LENGTH, dtype=np.float32), (BATCH, 1, LENGTH, LENGTH)))
    },
    "causal mask of booleans": {
        "mask": jax.device_put(np.broadcast_to(np.tri(LENGTH, dtype=bool), (BATCH, 1, LENGTH, LENGTH)))
    },
    "mask of integers": {"mask": padding_array(jnp.int32)},
    "is_causal and a mask": {"mask": padding_array(jnp.float32), "is_causal": True},
    "mask of every head": {"mask": jax.device_put(np.indices((BATCH, HEADS, LENGTH, LENGTH)).sum(0) % 3)},
}
calls = pytest.mark.parametrize("call", CALLS)


def difference(actual, expected):
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    return abs(actual - expected).max() / max(1.0, abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "call"),
    [
        pytest.param(
            dtype,
            call,
            marks=[pytest.mark.thorough]
            if dtype == jnp.bfloat16
            else []
            if call == "is_causal and a mask"
            else [pytest.mark.contract],
        )
        for dtype in TOLERANCE
        for call in CALLS
    ],
)
def test_self_attention_matches_flax(dtype, call):
    theirs, ours = make_pair(dtype)
    x = inputs(BATCH, LENGTH, WIDTH, dtype=dtype)
    out, expected = nnx.jit(lambda *layers: [layer(x, **CALLS[call]) for layer in layers])(ours, theirs)
    assert out.dtype == expected.dtype == dtype
    assert difference(out, expected) <= TOLERANCE[dtype]


def test_the_adapter_is_a_value_without_arrays_but_those_of_its_mask():
    assert jax.tree.leaves(nnx_attention_fn()) == [] and nnx_attention_fn() == nnx_attention_fn()
    assert len(jax.tree.leaves(nnx_attention_fn(mask=masks.padding(np.array([3]))))) == 1


def test_masks_of_construction_and_of_the_call_are_joined():
    query, key = inputs(BATCH, LENGTH, HEADS, 5), inputs(BATCH, LENGTH, HEADS, 5, seed=2)
    given = padding_array(jnp.float32)
    out, want = jax.jit(
        lambda query, key: [
            nnx_attention_fn(mask=mask)(query, key, key, mask=call, is_causal=is_causal)
            for mask, call, is_causal in ((masks.causal(), given, False), (None, given, True))
        ]
    )(query, key)
    np.testing.assert_array_equal(out, want)


@pytest.mark.contract
@dtypes
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"normalize_qk": True}], ids=["", "grouped", "norms"])
def test_cross_attention_matches_flax(dtype, options):
    theirs, ours = make_pair(dtype, in_kv_features=7, **options)
    x, y = inputs(BATCH, LENGTH, WIDTH, dtype=dtype), inputs(BATCH, KEYS, 7, dtype=dtype, seed=2)
    keys = jax.device_put(np.arange(KEYS) < np.array([11, 5]).reshape(BATCH, 1, 1, 1))
    variants = {}, {"mask": keys}, {"is_causal": True}
    run = nnx.jit(lambda *layers: [[layer(x, y, **call) for call in variants] for layer in layers])
    for out, expected in zip(*run(ours, theirs), strict=True):
        assert difference(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.float32, marks=pytest.mark.contract, id="float32"),
        pytest.param(jnp.bfloat16, marks=pytest.mark.thorough, id="bfloat16"),
    ],
)
@calls
def test_parameter_gradients_match_flax(dtype, call):
    x, cotangent = inputs(BATCH, LENGTH, WIDTH, dtype=dtype), inputs(BATCH, LENGTH, WIDTH, seed=3)
    theirs, ours = make_pair(dtype)
    gradient = nnx.grad(lambda layer: (layer(x, **CALLS[call]) * cotangent).sum())
    both = nnx.jit(lambda *layers: [gradient(layer) for layer in layers])(theirs, ours)
    expected, actual = map(jax.tree.leaves, both)
    assert len(actual) == len(expected) == 8
    for have, want in zip(actual, expected, strict=True):
        assert difference(have, want) <= 4 * TOLERANCE[dtype]


@pytest.mark.thorough
@dtypes
def test_decoding_with_flax_cache_matches_flax(dtype):
    theirs, ours = make_pair(dtype, decode=True)
    x = inputs(BATCH, LENGTH, WIDTH, dtype=dtype)
    for layer in (theirs, ours):
        layer.init_cache(x.shape, dtype)
    whole = built_layer(dtype, attention_fn=nnx_attention_fn(mask=masks.causal()))(x)
    for index in range(LENGTH):
        token = x[:, index : index + 1]
        out = ours(token)
        assert difference(out, theirs(token)) <= TOLERANCE[dtype]
        assert difference(out, whole[:, index : index + 1]) <= TOLERANCE[dtype]


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["none", "two"])
def test_other_numbers_of_batch_axes(batch):
    layer = make_layer(attention_fn=nnx_attention_fn())
    x = inputs(*batch, LENGTH, WIDTH)
    mask = jax.device_put(np.arange(LENGTH) < 1 + np.arange(np.prod(batch, dtype=int)).reshape(*batch, 1, 1, 1))
    out = layer(x, mask=mask)
    rows = zip(x.reshape(-1, LENGTH, WIDTH), mask.reshape(-1, 1, 1, LENGTH), strict=True)
    expected = jnp.stack([layer(row[None], mask=keep[None])[0] for row, keep in rows])
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=1e-6)


@pytest.mark.thorough
def test_a_query_with_nothing_to_attend_gives_zero():
    layer = make_layer(attention_fn=nnx_attention_fn(), use_bias=False)
    np.testing.assert_array_equal(layer(inputs(BATCH, LENGTH, WIDTH), mask=jnp.zeros((LENGTH, LENGTH))), 0)


@pytest.mark.thorough
def test_dropout_is_off_when_deterministic():
    theirs, ours = make_pair(dropout_rate=0.3, deterministic=True)
    x = inputs(BATCH, LENGTH, WIDTH)
    assert difference(ours(x), theirs(x)) <= 2e-6
    with_dropout = make_layer(attention_fn=nnx_attention_fn(), dropout_rate=0.3, deterministic=True)
    assert difference(with_dropout(x), make_layer(attention_fn=nnx_attention_fn())(x)) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("broadcast_dropout", [True, False])
def test_dropout_follows_its_key_and_keeps_the_mean(broadcast_dropout):
    layer = make_layer(
        attention_fn=nnx_attention_fn(),
        dropout_rate=0.3,
        deterministic=False,
        broadcast_dropout=broadcast_dropout,
    )
    x = inputs(BATCH, LENGTH, WIDTH)
    first, again, other = (layer(x, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert difference(first, other) > 0.01
    clean, noise = layer(x, deterministic=True), []
    for seed in range(64):
        noise.append(layer(x, rngs=nnx.Rngs(dropout=seed)) - clean)
    noise = np.asarray(noise)
    assert abs(noise.mean(0)).mean() < 2 * noise.std() / np.sqrt(64)


@pytest.mark.thorough
def test_construction_mask_and_mod_join_those_of_the_call():
    mod = lambda scores, b, h, q, kv: scores - 0.3 * (h + 1) * abs(q - kv)
    layer = make_layer(attention_fn=nnx_attention_fn(mask=lambda b, h, q, kv: kv <= q, score_mod=mod))
    x, keep = inputs(BATCH, LENGTH, WIDTH), padding_array(jnp.float32)

    def direct(query, key, value, mask, **_):
        heads = [y.swapaxes(1, 2) for y in (query, key, value)]
        both = mask.astype(bool) & jnp.tri(LENGTH, dtype=bool)[None, None]
        return standard_attention(*heads, mask=both, score_mod=mod).swapaxes(1, 2)

    np.testing.assert_allclose(layer(x, mask=keep), make_layer(attention_fn=direct)(x, mask=keep), atol=2e-6)


@pytest.mark.thorough
def test_the_layer_passes_mask_objects_on():
    layer, x = make_layer(attention_fn=nnx_attention_fn()), inputs(BATCH, LENGTH, WIDTH)
    np.testing.assert_array_equal(layer(x, mask=masks.causal()), layer(x, is_causal=True))


@pytest.mark.thorough
def test_an_attention_function_without_mask_objects_gets_booleans():
    def strict(query, key, value, *, mask, **options):
        assert mask.dtype == jnp.bool and mask.shape == (1, 1, LENGTH, LENGTH)
        return standard_attention(query, key, value, mask=mask, **options)

    theirs, ours = make_pair(adapter=nnx_attention_fn(strict))
    x = inputs(BATCH, LENGTH, WIDTH)
    assert difference(ours(x, is_causal=True), theirs(x, is_causal=True)) <= 2e-6


@pytest.mark.thorough
@pytest.mark.usefixtures("graph_mode")
def test_equal_layers_share_one_program():
    traced = []

    @nnx.jit
    def run(layer, x):
        traced.append(layer)
        return layer(x)

    for seed in range(3):
        layer = make_layer(seed=seed, attention_fn=nnx_attention_fn(mask=masks.causal()))
        run(layer, inputs(BATCH, LENGTH, WIDTH))
    assert len(traced) == 1


class Slopes(nnx.Module):
    def __init__(self):
        self.slope = nnx.Param(jnp.arange(1.0, 1 + HEADS))

    def __call__(self, scores, b, h, q, kv):
        return scores - 0.1 * self.slope[...][h] * abs(q - kv)


@pytest.mark.thorough
@pytest.mark.usefixtures("graph_mode")
def test_arrays_are_data_and_the_parameters_of_a_mod_learn():
    with pytest.raises(ValueError, match=r"nnx\.data"):
        make_layer(attention_fn=nnx_attention_fn(score_mod=Slopes()))
    mask = masks.padding(jnp.array([11, 5]))
    layer = make_layer(attention_fn=nnx.data(nnx_attention_fn(mask=mask, score_mod=Slopes())))
    x = inputs(BATCH, LENGTH, WIDTH)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        return (nnx.merge(graph, params, rest)(x) ** 2).sum()

    shift = 1e-2
    grads = jax.jit(jax.grad(loss))(params)
    ends = []
    for sign in (-1, 1):
        moved = jax.tree.map(lambda x: x, params)
        slope = moved["attention_fn"]["score_mod"]["slope"]
        slope[...] = slope[...].at[3].add(sign * shift)
        ends.append(float(loss(moved)))
    slope = float(grads["attention_fn"]["score_mod"]["slope"][...][3])
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * shift), rel=2e-2) and slope != 0


@pytest.mark.usefixtures("unchecked_shapes")
class TestErrors:
    def test_sowing_weights(self):
        _, layer = make_pair()
        with pytest.raises(NotImplementedError, match=r"none to sow; got sow_weights=True.*attention_weights"):
            layer(inputs(BATCH, LENGTH, WIDTH), sow_weights=True)

    def test_input_positions(self):
        query = np.ones((BATCH, 5, 3, 7), np.float32)
        with pytest.raises(NotImplementedError, match="does not rotate queries and keys.*use_rope=True"):
            nnx_attention_fn()(query, query, query, input_positions=np.arange(5))

    def test_is_causal_while_decoding(self):
        # As layers did before Flax 0.12.12.
        query, key = np.ones((BATCH, 1, 3, 7), np.float32), np.ones((BATCH, 13, 3, 7), np.float32)
        with pytest.raises(ValueError, match="would attend the first key only; got 13 keys. Leave it out"):
            nnx_attention_fn()(query, key, key, is_causal=True)

    @pytest.mark.parametrize(
        ("shapes", "mask", "words"),
        [
            (((2, 3), (2, 3), (2, 3)), None, "must be .batch..., length, heads, head_dim.* got query.shape=.2, 3."),
            (((2, 5, 3, 7), (3, 5, 3, 7), (2, 5, 3, 7)), None, r"with one batch; .*key.shape=\(3, 5, 3, 7\)"),
            (((2, 5, 3, 7),) * 3, (3, 1, 5, 5), r"must broadcast to .*got mask.shape=\(3, 1, 5, 5\)"),
            (((2, 3, 5, 3, 7),) * 3, (5, 3, 1, 5, 5), r"with batch=\(2, 3\); got mask.shape=\(5, 3, 1, 5, 5\)"),
            (((2, 3, 5, 3, 7),) * 3, (1, 2, 3, 1, 5, 5), r"with batch=\(2, 3\)"),
        ],
    )
    def test_shapes(self, shapes, mask, words):
        arrays = [jnp.ones(shape) for shape in shapes]
        with pytest.raises(ValueError, match=words):
            nnx_attention_fn()(*arrays, mask=None if mask is None else jnp.ones(mask))

    def test_mask_of_construction(self):
        with pytest.raises(ValueError, match="a mask is a boolean array, a Mask or a function"):
            nnx_attention_fn(mask="causal")
