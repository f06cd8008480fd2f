"""Optimizers: schedules, which parameters they treat how, and equal updates for a stack in a loop and in a scan."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import TransformerConfig, TransformerLM, VisionTransformer
from attnax.training import OptimizerConfig
from attnax.training.optimizer import _decays as decays
from attnax.training.optimizer import _is_hidden as is_hidden

MODEL = TransformerConfig(vocab_size=17, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=7, dropout_rate=0.0)


def check_close(left, right, atol=1e-6):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


def test_weight_decay_spares_vectors_and_the_schedule_warms_up_and_decays():
    config = OptimizerConfig(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.2, weight_decay=0.5)
    rates = jax.jit(jax.vmap(config.build_schedule()))(np.array([0, 5, 10, 55, 100])).tolist()
    assert rates == pytest.approx([0, 0.5, 1.0, 0.6, 0.2], abs=1e-6)
    optimizer = config.build()
    params = {
        "matrix": np.ones((2, 2), "f"),
        "vector": np.ones(2, "f"),
        "up_bias": np.ones((3, 2), "f"),
        "scale": np.ones((3, 2), "f"),
        "sinks": np.ones((3, 2), "f"),
        "class_token": np.ones((1, 2), "f"),
        "periods": {"shares": np.ones((3, 2), "f")},
    }

    @jax.jit
    def two_steps(params):  # the first update has learning rate 0
        zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
        _, state = optimizer.update(zeros, state, params)
        return optimizer.update(zeros, state, params)[0]

    updates = jax.tree.map(np.asarray, two_steps(params))
    assert (updates.pop("matrix") < 0).all()
    assert (updates.pop("periods")["shares"] == 0).all()  # one vector for each layer
    assert all((update == 0).all() for update in updates.values())  # also where layers or experts are stacked


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("linear", 0.1, [0, 0.5, 1.0, 0.6, 0.289, 0.2, 0.2]),
        ("constant", 0.1, [0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", 0.1, [0, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2]),
        ("wsd", 0.0, [1.0, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2]),
        ("cosine", 0.1, [0, 0.5, 1.0, 0.6, 0.224, 0.2, 0.2]),
    ],
)
def test_schedules(schedule, warmup, rates):
    config = OptimizerConfig(
        steps=100, learning_rate=1.0, warmup=warmup, final_learning_rate=0.2, schedule=schedule, decay=0.2
    )
    steps = np.array([0, 5, 10, 55, 90, 100, 150])
    with jax.disable_jit():
        found = [float(config.build_schedule()(step)) for step in steps]
    assert found == pytest.approx(rates, abs=1e-3)


def test_muon_gives_hidden_matrices_orthogonal_updates_of_the_size_of_adams_and_the_rest_adams():
    """Also matrices that are stacked by layer and expert; every singular value of an update is nearly the same."""
    shapes = {"embed": {"embedding": (7, 4)}, "head": {"kernel": (4, 7)}, "up_bias": (3, 4)}
    hidden = {"kernel": (6, 4), "stack": {"down": (2, 3, 4, 8)}}
    rng, rate = np.random.default_rng(0), 0.01
    leaves, structure = jax.tree.flatten(shapes | hidden, is_leaf=lambda x: isinstance(x, tuple))
    params, gradients = (structure.unflatten(rng.standard_normal(x, np.float32) for x in leaves) for _ in range(2))

    def update(algorithm, **change):
        fields = {"weight_decay": 0.0, "warmup": 0.0, "learning_rate": rate} | change
        optimizer = OptimizerConfig(algorithm=algorithm, **fields).build()
        return jax.jit(lambda x, p: optimizer.update(x, optimizer.init(p), p)[0])(gradients, params)

    muon, adamw, decayed = update("muon"), update("adamw", weight_decay=0.5), update("muon", weight_decay=0.5)
    change = -rate * 0.5 * params["kernel"]
    np.testing.assert_allclose(decayed["kernel"], muon["kernel"] + change, atol=1e-6)
    for x in jax.tree.leaves({name: muon[name] for name in hidden}):
        singular = np.linalg.svd(np.asarray(x), compute_uv=False)
        assert singular.max() < 1.8 * singular.min()
        assert np.sqrt(np.mean(np.square(x))) == pytest.approx(0.2 * rate, rel=0.3)
    check_close(*({name: x[name] for name in shapes} for x in (decayed, adamw)), atol=1e-8)


def test_muon_takes_the_matrices_of_the_layers_of_every_model():
    layers = {"num_layers": 1, "num_experts": 2, "top_k": 1, "scan_layers": True, "pos_emb_type": "relative"}
    model = dataclasses.replace(MODEL, tie_embeddings=False, **layers)
    size = {"image_size": 8, "patch_size": 4, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 12}
    makers = (
        lambda: TransformerLM(nnx.Rngs(0), model),
        lambda: VisionTransformer(nnx.Rngs(0), **size, num_classes=3, num_register_tokens=2),
    )
    for make in makers:
        params = nnx.to_pure_dict(nnx.eval_shape(lambda make=make: nnx.state(make(), nnx.Param)))
        paths = jax.tree_util.tree_leaves_with_path(params)
        taken = {path[-1].key if path[-1].key != "kernel" else path[-2].key for path, x in paths if is_hidden(path, x)}
        assert taken == {"query", "key", "value", "out", "up", "down"}
        assert not {"class_token", "registers"} & {path[-1].key for path, x in paths if decays(path, x)}


@pytest.mark.parametrize("algorithm", ["lion", "adafactor", "adamw", "muon"])
def test_a_stack_in_a_scan_gets_the_updates_of_one_in_a_loop(algorithm):
    """Two layers; rows and columns large enough for Adafactor to factor."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (130, 129), "scale": (130,), "up_bias": (2, 3)}
    grads, params = ([{n: rng.normal(size=s).astype("f") for n, s in shapes.items()} for _ in range(2)] for _ in "ab")
    grads[1] = jax.tree.map(lambda x: 30 * x, grads[1])
    config = OptimizerConfig(algorithm=algorithm, warmup=0.0, learning_rate=1.0, weight_decay=0.5)

    @jax.jit
    def second_update(grads, params):
        optimizer = config.build()
        _, state = optimizer.update(jax.tree.map(jnp.square, grads), optimizer.init(params), params)
        return optimizer.update(grads, state, params)[0]

    def stack(layers):
        return {"periods": jax.tree.map(lambda *x: np.stack(x), *layers)}

    loop = second_update({"blocks": dict(enumerate(grads))}, {"blocks": dict(enumerate(params))})["blocks"]
    scan = second_update(stack(grads), stack(params))["periods"]
    for layer in range(2):
        check_close(loop[layer], jax.tree.map(lambda x, layer=layer: x[layer], scan), atol=2e-6)


@pytest.mark.parametrize("algorithm", ["adamw", "lion", "muon"])
def test_first_moments_may_be_in_bfloat16(algorithm):
    params = {"kernel": jnp.zeros((4, 4)), "embed": {"embedding": jnp.zeros((4, 4))}}
    config = OptimizerConfig(algorithm=algorithm, moment_dtype="bfloat16")
    state = jax.eval_shape(config.build().init, params)
    dtypes = sorted(str(x.dtype) for x in jax.tree.leaves(state) if x.shape == (4, 4))
    second = {"adamw": 2, "lion": 0, "muon": 1}[algorithm]
    assert dtypes == ["bfloat16", "bfloat16", *["float32"] * second]


def test_adafactor_keeps_a_number_for_each_row_and_column():
    params = {"kernel": jnp.zeros((256, 128)), "small": jnp.zeros((100, 100))}
    state = jax.eval_shape(OptimizerConfig(algorithm="adafactor").build().init, params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 100 * 100 + 256 + 128 + 16


def test_a_configuration_is_a_value():
    assert {OptimizerConfig(): "default"}[OptimizerConfig(steps=1000)] == "default"
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizerConfig().steps = 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps must be at least 1; got steps=0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"decay": 0.0}, "decay must be above 0 and at most 1"),
        ({"schedule": "wsd", "decay": 0.9, "warmup": 0.2}, "together at most 1; got warmup=0.2, decay=0.9"),
        ({"final_learning_rate": 1.5}, "final_learning_rate must be between 0 and 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"beta2": 1.0}, "beta2 must be between 0 and 1"),
        ({"algorithm": "adafactor", "moment_dtype": "bfloat16"}, "adafactor keeps none; got moment_dtype='bfloat16'"),
    ],
)
def test_wrong_options_are_refused_in_words(fields, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**fields)


def test_an_unknown_algorithm_is_refused_in_words():
    words = "algorithm must be 'adamw', 'lion', 'adafactor' or 'muon'; got algorithm='sgd'"
    with pytest.raises(ValueError, match=words):
        OptimizerConfig.__post_init__(types.SimpleNamespace(algorithm="sgd"))  # tests check annotations first
