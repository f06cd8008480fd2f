"""Under a mesh with Explicit axes attention is local to the shards of batch and heads, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from attnax import (
    Transformer,
    TransformerConfig,
    TransformerEncoder,
    TransformerLM,
    VisionTransformer,
    alibi_mod,
    flash_attention,
    masks,
    pallas_flash_attention,
    ring_attention,
    standard_attention,
)
from attnax.kernels.nnx_adapter import nnx_attention_fn

B, N, K, T = 4, 8, 4, 11
IDS = np.random.default_rng(1).integers(-1, 3, (B, T))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


ARRAYS = normal(0, B, N, T, 6), normal(1, B, K, T, 6), normal(2, B, K, T, 6)
TABLE = normal(3, N, T)


def mesh():
    return jax.make_mesh((2, 4), ("data", "model"))


def options(kind, table):
    match kind:
        case "plain":
            return {"mask": masks.causal()}
        case "own":
            return {"mask": masks.documents(IDS) & masks.padding(np.array([11, 7, 3, 9])), "score_mod": alibi_mod(N)}
        case "given":
            dropout = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False}
            mask = lambda b, h, q, kv: (kv <= q + h) | (b == 1)
            return {"mask": mask, "score_mod": lambda s, b, h, q, kv: s + table[h, jnp.abs(q - kv)], **dropout}


def loss(attention_fn, kind, query, key, value, table):
    out, lse = attention_fn(query, key, value, **options(kind, table), return_lse=True)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


@pytest.mark.parametrize(
    ("name", "kind", "spec", "of_keys"),
    [
        ("flash", "plain", P("data", "model"), P("data", "model")),
        ("flash", "own", P("data"), P("data")),
        ("flash", "given", P("data", "model"), P("data", "model")),
        ("flash", "given", P(None, ("data", "model")), P()),
        ("standard", "given", P("data", "model"), P("data", "model")),
        ("standard", "own", P(None, "model"), P()),
    ],
    ids=str,
)
def test_shards_compute_what_one_device_does_and_gather_nothing(name, kind, spec, of_keys):
    attention_fn = {"flash": flash_attention, "standard": standard_attention}[name]
    run = jax.value_and_grad(functools.partial(loss, attention_fn, kind), (0, 1, 2, 3))
    arrays = ARRAYS if of_keys != P() else (ARRAYS[0], *(x[:, :1] for x in ARRAYS[1:]))
    want = jax.jit(run)(*arrays, TABLE)
    with jax.set_mesh(mesh()):
        specs = spec, of_keys, of_keys, P()
        placed = [jax.device_put(x, s) for x, s in zip((*arrays, TABLE), specs, strict=True)]
        program = jax.jit(run).lower(*placed).compile()
        have = program(*placed)
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    assert "all-gather" not in program.as_text()
    assert "all-to-all" not in program.as_text()


@pytest.mark.parametrize("kernel", [flash_attention, standard_attention])
def test_functions_may_hold_arrays_that_are_cut(kernel):
    def loss(x, ids, slopes):
        same = lambda b, h, q, kv: ids[b, q] == ids[b, kv]
        mask = lambda b, h, q, kv: same(b, h, q, kv) & (kv <= q)
        nearer = lambda slopes, s, b, h, q, kv, scale=slopes: s - slopes[h] * scale[h] * (q - kv)
        return (kernel(x, x, x, mask=mask, score_mod=functools.partial(nearer, slopes)) ** 2).sum()

    arrays, specs = (ARRAYS[1], np.abs(IDS), TABLE[:K, 0]), (P("data"), P("data"), P("model"))
    run = jax.jit(jax.grad(loss, (0, 2)))
    want = run(*arrays)
    with jax.set_mesh(mesh()):
        have = run(*(jax.device_put(x, spec) for x, spec in zip(arrays, specs, strict=True)))
    for one, other in zip(have, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_a_recursive_function_may_be_closed_over():
    def power(x, n):
        return x if n == 0 else x * power(x, n - 1)

    with jax.set_mesh(mesh()):
        x = jax.device_put(ARRAYS[1], P("data"))
        run = functools.partial(flash_attention, score_mod=lambda s, *_: power(s, 2))
        assert jax.eval_shape(run, x, x, x).shape == x.shape


def test_a_whole_array_is_refused_in_words_inside_of_shard_map_too():
    auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, bias = jax.ShapeDtypeStruct((2, 1, 300, 4), jnp.float32), np.ones((1, 1, 300, 300), np.float32)
    run = functools.partial(flash_attention, score_mod=lambda s, *_: s + bias)
    with pytest.raises(NotImplementedError, match="does not work with .* scores"):
        jax.eval_shape(jax.shard_map(run, mesh=auto, in_specs=P("data"), out_specs=P("data")), x, x, x)


def test_the_result_is_cut_as_the_query_outside_of_jit_too():
    x = jax.device_put(ARRAYS[1], jax.NamedSharding(mesh(), P("data", "model")))
    assert jax.typeof(flash_attention(x, x, x)).sharding.spec == P("data", "model", None, None)


@pytest.mark.contract
def test_one_of_two_axes_may_cut_outside_of_jit_too():
    want = jax.jit(standard_attention)(*ARRAYS)
    with jax.set_mesh(jax.make_mesh((2, 1), ("data", "model"))):
        have = standard_attention(*(jax.device_put(x, P("data")) for x in ARRAYS))
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", [flash_attention, standard_attention])
def test_what_cannot_be_local_is_refused_in_words(kernel):
    with jax.set_mesh(mesh()):
        for spec in (P(None, None, "data"), P(None, None, None, "data")):
            with pytest.raises(NotImplementedError, match="ring_attention"):
                jax.eval_shape(kernel, *(jax.device_put(np.zeros((2, 2, 4, 4)), spec) for _ in range(3)))
        with pytest.raises(NotImplementedError, match="the 3 heads of keys cannot be cut 4 times"):
            query, key = (jax.device_put(np.zeros((2, n, 4, 4)), P(None, cut)) for n, cut in ((12, "model"), (3, None)))
            jax.eval_shape(kernel, query, key, key)
        with pytest.raises(NotImplementedError, match="must be cut alike"):
            query, key = (jax.device_put(np.zeros((8, 8, 4, 4)), P(cut)) for cut in ("model", "data"))
            jax.eval_shape(kernel, query, key, key)
        with pytest.raises(NotImplementedError, match="mixes heads by reduce_sum"):
            x = jax.device_put(np.zeros((2, 8, 4, 4)), P(None, "model"))
            jax.eval_shape(functools.partial(kernel, score_mod=lambda s, *_: s - s.mean(1, keepdims=True)), x, x, x)


def test_kernels_for_gpus_are_lowered_for_shards():
    gpus = AbstractMesh(
        (2, 4),
        ("data", "model"),
        axis_types=(AxisType.Explicit,) * 2,
        abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda"),
    )
    spec = jax.NamedSharding(gpus, P("data", "model"))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec) for x in ARRAYS]
    run = jax.jit(functools.partial(pallas_flash_attention, mask=masks.causal(), score_mod=alibi_mod(N)))
    with jax.sharding.use_abstract_mesh(gpus):
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "attnax_forward" in text


def test_layers_of_flax_and_language_models_run_on_cut_batches():
    x, ids = normal(0, 4, 6, 16), np.random.default_rng(0).integers(0, 11, (4, 6))
    layer = nnx.MultiHeadAttention(
        num_heads=2, in_features=16, decode=False, attention_fn=nnx_attention_fn(), rngs=nnx.Rngs(0)
    )
    model = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=8, pos_emb_type="rope")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, x, ids):
        logits = nnx.merge(graph, params, rest)(ids, padding_mask=ids > 0)
        return layer(x, is_causal=True), (jax.nn.log_softmax(logits) ** 2).mean()

    gradient = jax.grad(lambda params, x, ids: run(params, x, ids)[1])
    both = jax.jit(lambda params, x, ids: (run(params, x, ids), gradient(params, x, ids)))
    want = both(params, x, ids)
    with jax.set_mesh(mesh()):
        (out, value), gradients = both(params, jax.device_put(x, P("data")), jax.device_put(ids, P("data")))
    assert jax.typeof(out).sharding.spec[0] == "data"
    for one, other in zip(jax.tree.leaves(((out, value), gradients)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_every_model_takes_a_cut_batch_and_generates_from_one():
    sizes = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 16}
    config = TransformerConfig(**sizes)
    images = {"image_size": 4, "patch_size": 2, "num_classes": 3, **{k: sizes[k] for k in list(sizes)[1:5]}}

    def run(ids, pixels):
        return (
            TransformerEncoder(nnx.Rngs(0), config)(ids, padding_mask=ids > 0),
            Transformer(nnx.Rngs(0), config, config)(ids, ids),
            VisionTransformer(nnx.Rngs(0), **images, num_register_tokens=1)(pixels),
        )

    with jax.set_mesh(mesh()):
        ids = jax.device_put(np.ones((4, 6), np.int32), P("data"))
        results = jax.eval_shape(run, ids, jax.device_put(np.ones((4, 4, 4, 3), np.float32), P("data")))
        assert [x.sharding.spec[0] for x in results] == ["data"] * 3
        model = TransformerLM(nnx.Rngs(0), **sizes)
        want = model.generate(np.ones((4, 6), np.int32), max_new_tokens=2)
        np.testing.assert_array_equal(model.generate(ids, max_new_tokens=2).tokens, want.tokens)
        with pytest.raises(NotImplementedError, match="may not cut a traced prompt"):
            jax.eval_shape(lambda ids: model.generate(ids, max_new_tokens=2).tokens, ids)


def test_a_ring_is_what_a_cut_sequence_takes():
    order = jax.make_mesh((2,), ("seq",))
    spec = P(None, None, "seq")
    x = normal(0, 1, 2, 6, 4)
    attend = functools.partial(ring_attention, axis_name="seq", mask=masks.causal())
    with jax.set_mesh(order):
        cut = jax.device_put(x, spec)
        have = jax.jit(jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec))(cut, cut, cut)
    np.testing.assert_allclose(have, standard_attention(x, x, x, mask=masks.causal()), atol=1e-6)
