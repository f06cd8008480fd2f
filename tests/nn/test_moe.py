"""Mixture of experts: equal to computing every expert, at the cost of the chosen ones, and no token dropped."""

import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny import build

from attnax import BlockConfig
from attnax.nn.moe import MixtureOfExperts

D_MODEL, D_FF, EXPERTS, TOKENS = 7, 11, 5, (3, 13)
BASE = {"d_model": D_MODEL, "d_ff": D_FF, "num_experts": EXPERTS, "top_k": 2}
VARIANTS = {
    "gated, softmax": {},
    "plain, sigmoid, no bias": {"ff_activation": "gelu", "router_type": "sigmoid", "top_k": 3, "use_bias": False},
    "one choice, weighed as it is": {
        "ff_activation": "reglu",
        "top_k": 1,
        "router_renormalize": False,
        "use_bias": ("router",),
    },
    "sigmoids as they are, shared": {
        "ff_activation": "relu2",
        "router_type": "sigmoid",
        "router_renormalize": False,
        "num_shared_experts": 2,
    },
}
ACTIVATIONS = {  # of NumPy or JAX, as xp
    "swiglu": lambda x, xp: x / (1 + xp.exp(-x)),
    "gelu": lambda x, xp: x * 0.5 * (1 + (np.vectorize(math.erf) if xp is np else jax.lax.erf)(x / np.sqrt(2))),
    "reglu": lambda x, xp: xp.maximum(x, 0),
    "relu2": lambda x, xp: xp.maximum(x, 0) ** 2,
}


def normal(seed, *shape, dtype="float32", size=1.0):
    return jax.device_put((size * np.random.default_rng(seed).normal(size=shape)).astype(dtype))


@cache
def layer(fields):
    moe = nnx.eval_shape(lambda: MixtureOfExperts(nnx.Rngs(0), **{**BASE, **dict(fields)}))
    graphdef, params, rest = nnx.split(moe, nnx.Param, ...)

    @jax.jit
    def run(params, x, key=None):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(graphdef, params, rest)(x, deterministic=key is None, rngs=rngs)

    return run, params, moe.config


def make(**fields):
    """A layer in functional form, run(params, x, key=None) -> (out, aux), its parameters, biases too, and its config.

    A key switches dropout and jitter on.
    """
    run, params, config = layer(tuple(sorted(fields.items())))
    return run, jax.tree.map(lambda x: normal(x.size, *x.shape, dtype=x.dtype, size=0.4), params), config


def every_expert(params, x, config, xp=jnp):
    """The definition: every expert sees every token, and the weights of experts that are not chosen are 0."""
    values = nnx.to_pure_dict(params)
    if xp is np:
        values, x = jax.tree.map(partial(np.asarray, dtype=np.float64), (values, x))
    act, tokens = partial(ACTIVATIONS[config.ff_activation], xp=xp), x.reshape(-1, x.shape[-1])

    def add(x, bias):
        return x if bias is None else x + bias[None]

    def product(name, equation, x):
        return add(xp.einsum(equation, x, values[name]), values.get(f"{name}_bias"))

    up = product("up", "MD,EDF->MEF", tokens)
    hidden = act(product("gate", "MD,EDF->MEF", tokens)) * up if "gate" in values else act(up)
    outs = product("down", "MEF,EFD->MED", hidden)
    logits = add(tokens @ values["router"], values.get("router_bias"))
    exponentials = xp.exp(logits - logits.max(-1, keepdims=True))
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    scores = softmax if config.router_type == "softmax" else 1 / (1 + xp.exp(-logits))
    rank = (scores[:, None, :] > scores[:, :, None]).sum(-1)  # how many experts score higher
    weights = xp.where(rank < config.top_k, scores, 0)
    if config.router_renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    out = (weights[..., None] * outs).sum(1)
    if config.num_shared_experts:
        shared = values["shared"]
        hidden = act(add(tokens @ shared["up"]["kernel"], shared["up"]["bias"]))
        out = out + add(hidden @ shared["down"]["kernel"], shared["down"]["bias"])
    probability = scores / scores.sum(-1, keepdims=True)
    load = (rank < config.top_k).mean(0) / config.top_k
    aux = {
        "load_balance_loss": config.num_experts * (load * probability.mean(0)).sum(),
        "router_z_loss": (xp.log(xp.exp(logits).sum(-1)) ** 2).mean(),
        "router_entropy": -(probability * xp.log(probability)).sum(-1).mean(),
        "expert_load": load,
    }
    return out.reshape(x.shape), aux


def pick(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def loss(run, params, x):
    out, aux = run(params, x)
    extra = aux["load_balance_loss"] + 0.5 * aux["router_z_loss"] - 0.3 * aux["router_entropy"]
    return (out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + extra, (out, aux)


def definition(config):
    """In JAX, to be differentiated; one function for all dtypes of the layer, which it does not look at."""
    return _definition(dataclasses.replace(config, dtype="float32", param_dtype="float32"))


@cache
def _definition(config):
    return jax.jit(partial(every_expert, config=config))


@cache
def value_and_grad(run):
    return jax.jit(jax.value_and_grad(partial(loss, run), (0, 1), has_aux=True))


def results(run, params, x):
    """((loss, (out, aux)), all gradients)."""
    return value_and_grad(run)(params, x)


def assert_close(have, want, tolerance=2e-6):
    for (path, one), (_, two) in zip(*map(jax.tree.leaves_with_path, (have, want)), strict=True):
        one, two = (np.asarray(x).astype(np.float64) for x in (one, two))
        assert abs(one - two).max(initial=0) <= tolerance * max(1, abs(two).max(initial=0)), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=((), pytest.mark.contract, pytest.mark.thorough, pytest.mark.thorough)[index])
        for index, name in enumerate(VARIANTS)
    ],
)
def test_output_statistics_and_gradients_equal_every_expert_computed(variant):
    run, params, config = make(**VARIANTS[variant])
    x = normal(99, *TOKENS, D_MODEL)
    have = results(run, params, x)
    assert_close(have, results(definition(config), params, x))
    assert all((np.asarray(gradient) != 0).any() for gradient in jax.tree.leaves(have[1]))


def test_bfloat16_computes_in_bfloat16_and_routes_in_float32():
    run, params, config = make(dtype="bfloat16")
    x = normal(99, *TOKENS, D_MODEL, dtype="bfloat16")
    have, want = results(run, params, x), results(definition(config), params, jnp.asarray(np.asarray(x), jnp.float32))
    assert have[0][1][0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((have[0][1][1], have[1][0]))} == {jnp.dtype("float32")}
    assert_close(have[0][1][1], want[0][1][1])
    assert_close(have, want, 4e-2)


@pytest.mark.contract
def test_float64_is_as_exact_as_float64():
    with jax.enable_x64(True):
        run, params, config = make(dtype="float64", param_dtype="float64")
        x = normal(99, *TOKENS, D_MODEL, dtype="float64")
        have, want = results(run, params, x), results(definition(config), params, x)
        assert have[1][1].dtype == jnp.float64
        assert_close((have[0][1][0], have[1]), (want[0][1][0], want[1]), 1e-7)  # statistics are float32
        assert_close(have[0][1][0], want[0][1][0], 1e-13)


@pytest.mark.contract
def test_float16_is_taken():
    run, params, config = make(dtype="float16")
    x = normal(99, *TOKENS, D_MODEL, dtype="float16")
    assert_close(run(params, x)[0], every_expert(params, x, config, np)[0], 5e-3)


def test_nothing_is_dropped_when_all_tokens_choose_one_expert():
    run, params, config = make(top_k=1, use_bias=("router",))
    params["router_bias"][...] = jnp.asarray(40.0 * (np.arange(EXPERTS) == 3), jnp.float32)
    x = normal(99, *TOKENS, D_MODEL)
    have = results(run, params, x)
    assert_close(have, results(definition(config), params, x))
    aux = have[0][1][1]
    np.testing.assert_array_equal(aux["expert_load"], np.arange(EXPERTS) == 3)
    np.testing.assert_allclose(aux["load_balance_loss"], EXPERTS, rtol=1e-6)
    for name in ("up", "gate", "down"):
        gradient = np.asarray(have[1][0][name][...])
        assert (np.delete(gradient, 3, axis=0) == 0).all() and (gradient[3] != 0).any()


@pytest.mark.parametrize("router_type", ["softmax", "sigmoid"])
def test_statistics_of_a_router_that_knows_nothing(router_type):
    run, params, _ = make(router_type=router_type, use_bias=("router",))
    params["router"][...] = jax.device_put(np.zeros((D_MODEL, EXPERTS), np.float32))
    params["router_bias"][...] = jax.device_put(np.zeros(EXPERTS, np.float32))
    _, aux = run(params, normal(99, *TOKENS, D_MODEL))
    assert {value.dtype for value in aux.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(aux["load_balance_loss"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(aux["router_z_loss"], np.log(EXPERTS) ** 2, rtol=1e-6)
    np.testing.assert_allclose(aux["router_entropy"], np.log(EXPERTS), rtol=1e-6)
    np.testing.assert_allclose(np.sum(aux["expert_load"]), 1.0, rtol=1e-6)


def test_sigmoid_weights_that_underflow_still_sum_to_one():
    run, params, _ = make(router_type="sigmoid", use_bias=("router",))
    x = normal(99, *TOKENS, D_MODEL)
    softmax, _, _ = make(use_bias=("router",))
    params["router_bias"][...] = jax.device_put(np.full(EXPERTS, -500, np.float32))
    # So far down a sigmoid is an exponential, and renormalised ones are a softmax.
    assert_close(run(params, x)[0], softmax(params, x)[0], 1e-4)


def intermediates(jaxpr):
    """Sizes of all results in a program and the programs in it."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def test_no_array_holds_every_expert_of_every_token():
    run, params, _ = make(num_experts=67)
    x = normal(99, *TOKENS, D_MODEL)
    sizes = list(intermediates(jax.make_jaxpr(jax.grad(partial(loss, run), has_aux=True))(params, x).jaxpr))
    weights, hidden, scores = 67 * D_MODEL * D_FF, 2 * 39 * D_FF, 39 * 67
    assert len(sizes) > 100 and max(sizes) == weights >= max(hidden, scores)


def test_permuted_tokens_give_permuted_outputs():
    run, params, _ = make()
    x, order = normal(99, *TOKENS, D_MODEL), np.random.default_rng(0).permutation(13)
    (out, aux), (permuted, permuted_aux) = run(params, x), run(params, np.asarray(x)[:, order])
    np.testing.assert_allclose(permuted, np.asarray(out)[:, order], atol=1e-6)
    assert_close(aux, permuted_aux)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_token_contaminates_only_its_own_row(bad):
    run, params, _ = make()
    x = np.array(normal(99, *TOKENS, D_MODEL))
    out = np.asarray(run(params, x)[0])
    x[1, 5, 2] = bad
    contaminated, others = np.asarray(run(params, x)[0]), np.arange(39).reshape(TOKENS) != 18
    assert not np.isfinite(contaminated[1, 5]).any()
    np.testing.assert_allclose(contaminated[others], out[others], atol=1e-6)


@pytest.mark.thorough
def test_a_non_finite_cotangent_reaches_only_its_own_token_and_its_experts():
    run, params, _ = make()
    x = normal(99, *TOKENS, D_MODEL)
    step = jax.jit(jax.grad(lambda params, x, cotangent: (run(params, x)[0] * cotangent).sum(), (0, 1)))
    d_params, d_x = step(params, x, jnp.ones_like(x).at[1, 5].set(jnp.nan))
    others = np.arange(39).reshape(TOKENS) != 18
    assert jnp.isnan(d_x[1, 5]).all() and jnp.isfinite(d_x[others]).all()
    for name in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias"):
        finite = jnp.isfinite(d_params[name][...]).reshape(EXPERTS, -1).all(1)
        assert finite.sum() == EXPERTS - 2


class TestRandomness:
    def test_jitter_changes_the_routing_in_training_only(self):
        run, params, _ = make(router_jitter=0.5)
        still, _, _ = make()
        x = normal(99, *TOKENS, D_MODEL)
        np.testing.assert_array_equal(run(params, x)[0], still(params, x)[0])
        one, two, other = (float(run(params, x, jax.random.key(seed))[1]["router_z_loss"]) for seed in (1, 1, 2))
        assert one == two != other != float(run(params, x)[1]["router_z_loss"])

    def test_jitter_stays_within_its_rate(self):
        run, params, _ = make(router_jitter=0.25, num_experts=1, top_k=1)
        params["router"][...] = jax.device_put(np.eye(D_MODEL, 1, dtype=np.float32))
        x = np.ones((1, D_MODEL), np.float32)
        factors = [float(run(params, x, jax.random.key(seed))[1]["router_z_loss"]) for seed in range(97)]
        assert 0.75**2 <= min(factors) < 0.8**2 and 1.2**2 < max(factors) <= 1.25**2

    def test_jitter_does_not_reach_the_experts(self):
        run, params, _ = make(router_jitter=0.25, num_experts=1, top_k=1)  # chosen whatever the router says
        x = normal(99, 1, D_MODEL)
        for seed in range(5):
            np.testing.assert_array_equal(run(params, x)[0], run(params, x, jax.random.key(seed))[0])

    def test_stored_streams_go_on(self):
        moe = build(lambda rngs: MixtureOfExperts(rngs, **BASE, dropout_rate=0.5, router_jitter=0.1))
        x = normal(99, *TOKENS, D_MODEL)
        call = nnx.jit(lambda moe, x: moe(x)[0])
        still = call(moe, x)
        moe.train()
        one, two = call(moe, x), call(moe, x)
        assert not np.allclose(one, two)
        moe.eval()
        np.testing.assert_array_equal(call(moe, x), still)

    def test_hidden_activations_are_dropped_and_the_rest_scaled(self):
        fields = {"d_model": 1, "d_ff": 997, "num_experts": 1, "top_k": 1, "ff_activation": "relu", "use_bias": False}
        moe = build(lambda rngs: MixtureOfExperts(rngs, **fields, dropout_rate=0.25))
        moe.up[...], moe.down[...] = (
            jax.device_put(np.full(shape, value, np.float32))
            for shape, value in (((1, 1, 997), 1), ((1, 997, 1), 1 / 997))
        )
        train = nnx.jit(lambda moe, x: moe(x, deterministic=False, rngs=nnx.Rngs(1))[0])
        out = np.asarray(train(moe, np.ones((31, 1), np.float32)))
        assert abs(out.mean() - 1) < 0.02 and out.std() > 0.005

    def test_without_any_randomness_it_says_so(self):
        moe, x = build(lambda rngs: MixtureOfExperts(rngs, **BASE, router_jitter=0.125)), normal(99, 2, D_MODEL)
        moe.jitter.rngs = None
        words = "Jitter: jitter needs randomness; got router_jitter=0.125, deterministic=False, rngs=None. Pass rngs="
        with pytest.raises(ValueError, match=words):
            moe(x, deterministic=False)
        with pytest.raises(ValueError, match="Jitter: rngs must have a `dropout` stream"):
            moe(x, deterministic=False, rngs=nnx.Rngs(params=0))

    def test_rate_zero_stores_no_streams(self):
        moe = nnx.eval_shape(lambda: MixtureOfExperts(nnx.Rngs(0), **BASE, num_shared_experts=1))
        assert not jax.tree.leaves(nnx.state(moe, nnx.RngState))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
@pytest.mark.thorough
def test_both_nnx_modes_give_the_same(graph):
    run, params, config = make()
    x = normal(99, *TOKENS, D_MODEL)
    with nnx.set_graph_mode(graph):
        moe = MixtureOfExperts(nnx.Rngs(0), config)
        nnx.update(moe, params)
        step = nnx.jit(nnx.value_and_grad(lambda moe, x: loss(lambda _, x: moe(x), None, x), has_aux=True))
        (value, (out, aux)), gradients = step(moe, x)
    want = results(run, params, x)
    assert_close((value, out, aux, gradients), (want[0][0], *want[0][1], want[1][0]))


@pytest.mark.thorough
class TestTransformations:
    def test_eager_equals_jit_and_compiles_once(self, count_compilations):
        run, params, _ = make()
        x = normal(99, *TOKENS, D_MODEL)
        compiled, eager = run(params, x), run.__wrapped__(params, x)
        assert_close(eager, compiled)
        count_compilations.clear()
        run.__wrapped__(params, x)
        assert not count_compilations

    def test_vmap_equals_a_loop(self):
        run, params, _ = make()
        x = normal(99, 2, 17, D_MODEL)
        step = jax.jit(jax.grad(lambda params, x: loss(run, params, x)[0], (0, 1)))
        have = jax.jit(jax.vmap(step, (None, 0)))(params, x)
        for have_one, x_one in zip(map(partial(pick, have), range(2)), x, strict=True):
            assert_close(have_one, step(params, x_one), 5e-6)

    def test_vmap_over_layers_equals_a_loop(self):
        run, params, _ = make()
        x = normal(99, 17, D_MODEL)
        several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        have = jax.jit(jax.vmap(run, (0, None)))(several, x)
        for i in range(2):
            assert_close(pick(have, i), run(pick(several, i), x), 5e-6)

    def test_layers_may_be_scanned_and_rematerialised(self):
        run, params, _ = make()
        several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        x = normal(99, 17, D_MODEL)

        def scanned(several):
            return jax.lax.scan(jax.checkpoint(lambda x, p: (run(p, x)[0], None)), x, several)[0].sum()

        def unrolled(several):
            return run(pick(several, 1), run(pick(several, 0), x)[0])[0].sum()

        assert_close(jax.jit(jax.grad(scanned))(several), jax.jit(jax.grad(unrolled))(several), 5e-6)

    def test_tokens_may_be_sharded(self):
        run, params, _ = make()
        x = normal(99, 8, 5, D_MODEL)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        step = jax.jit(jax.grad(lambda params, x: (run(params, x)[0] ** 2).sum(), (0, 1)))
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        sharded = jax.shard_map(step, mesh=mesh, in_specs=(everywhere, rows), out_specs=(everywhere, rows))
        assert_close(jax.jit(sharded)(params, x), step(params, x), 5e-6)


@pytest.mark.parametrize("shape", [(2, 0), (), pytest.param((1, 1, 2), marks=pytest.mark.thorough)])
def test_any_number_of_tokens_and_leading_axes(shape):
    run, params, config = make(num_shared_experts=2, ff_activation="relu2")
    x = normal(99, *shape, D_MODEL)
    if x.size:
        have = run(params, x)
        assert have[0].shape == x.shape
        assert_close(have, every_expert(params, x, config, np), 5e-6)
    else:
        (_, (out, aux)), gradients = results(run, params, x)
        assert out.shape == x.shape
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves((out, aux, gradients)))


def test_from_a_config_and_from_keywords_is_the_same():
    config = BlockConfig(**BASE, num_heads=7, dropout_rate=0.0, ff_activation="swiglu")
    x = normal(99, *TOKENS, D_MODEL)
    one, two = (
        build(make)
        for make in (lambda rngs: MixtureOfExperts(rngs, config), lambda rngs: MixtureOfExperts(rngs, **BASE))
    )
    assert_close(*nnx.jit(lambda one, two: (one(x), two(x)))(one, two), 0)


def test_initial_experts_are_of_the_size_of_a_linear_layer():
    make = lambda name: MixtureOfExperts(nnx.Rngs(0), d_model=31, d_ff=97, num_experts=13, kernel_init=name)
    fans = {"lecun_normal": (31, 97), "xavier_uniform": (64, 64)}
    made = jax.jit(lambda: {name: (make(name).up[...], make(name).down[...]) for name in fans})()
    for name, both in made.items():
        for matrices, fan in zip(both, fans[name], strict=True):
            np.testing.assert_allclose(np.std(matrices, (1, 2)), fan**-0.5, rtol=0.1, err_msg=name)
    moe = nnx.eval_shape(lambda: make("lecun_normal"))
    assert moe.router_bias is None and moe.up_bias.shape == (13, 97)


def test_padding_of_any_value_is_in_no_statistic_and_changes_no_output_of_a_token():
    moe, x, real = (
        build(lambda rngs: MixtureOfExperts(rngs, **BASE)),
        np.array(normal(99, 2, 5, D_MODEL)),
        np.ones((2, 5), bool),
    )
    x[0, 2:4], real[0, 2:4] = np.nan, False
    call = nnx.jit(lambda moe, x, real: moe(x, padding_mask=real))
    (have, aux), (want, same) = call(moe, jax.device_put(x), real), nnx.jit(lambda moe, x: moe(x))(moe, x[real])
    assert_close((have[real], aux), (want, same))
    assert all((np.asarray(value) == 0).all() for value in call(moe, jax.device_put(x), ~real & False)[1].values())


def test_the_router_is_a_parameter_that_may_be_read_and_replaced():
    moe, x = build(lambda rngs: MixtureOfExperts(rngs, **BASE)), normal(99, 3, D_MODEL)
    assert isinstance(moe.router, nnx.Param) and moe.router.shape == (D_MODEL, EXPERTS)
    assert jnp.asarray(moe.router).shape == (D_MODEL, EXPERTS)
    moe.router = nnx.Param(jax.device_put(np.zeros((D_MODEL, EXPERTS), np.float32)))
    np.testing.assert_allclose(moe(x)[1]["router_entropy"], np.log(EXPERTS), rtol=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("padding", [np.ones((3, 1), bool), np.ones(4, bool), np.ones(3, np.int32)])
def test_a_padding_mask_that_does_not_fit_is_refused_in_words(padding):
    moe = nnx.eval_shape(lambda: MixtureOfExperts(nnx.Rngs(0), **BASE))
    words = r"MixtureOfExperts: padding_mask must be boolean \(3,\), True for real tokens; got padding_mask.shape="
    with pytest.raises(ValueError, match=words):
        moe(np.ones((3, D_MODEL), np.float32), padding_mask=padding)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("fields", "x", "words"),
    [
        ({"num_experts": None}, None, "MixtureOfExperts: num_experts must be given; got num_experts=None. Use Feed"),
        ({"top_k": 6}, None, "top_k must be at most num_experts; got top_k=6, num_experts=5"),
        ({"experts": 6}, None, "every argument must be a field; got experts=6"),
        ({}, np.ones((3, 6), np.float32), r"MixtureOfExperts: x must be \(\.\.\., 7\); got x.shape=\(3, 6\)"),
        ({}, np.ones((), np.float32), r"MixtureOfExperts: x must be \(\.\.\., 7\); got x.shape=\(\)"),
    ],
)
def test_wrong_input_is_refused_in_words(fields, x, words):
    with pytest.raises(ValueError, match=words):
        build(lambda rngs: MixtureOfExperts(rngs, **{**BASE, **fields}))(x)


def test_config_and_fields_exclude_each_other():
    with pytest.raises(ValueError, match="give a config or fields, not both"):
        MixtureOfExperts(nnx.Rngs(0), BlockConfig(**BASE, num_heads=7), d_ff=3)
