"""Stacks: a loop and a scan are the same model, whatever the layers are, and so is one that computes again."""

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import TransformerConfig, TransformerLM
from attnax.nn import EncoderBlock, Stack, with_scan_layers

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    num_heads=3,
    num_kv_heads=1,
    num_layers=5,
    d_ff=10,
    max_len=19,
    dropout_rate=0.3,
    pos_emb_type="rope",
    # Two whole periods and a layer left over; local and global, dense and mixed, rotated and not.
    layer_pattern=({"attention_window": 3, "num_experts": 3, "ff_activation": "swiglu"}, {"pos_emb_type": "none"}),
)
FORMS = {
    "loop": CONFIG,
    "scan": dataclasses.replace(CONFIG, scan_layers=True),
    "scan, remat": dataclasses.replace(CONFIG, scan_layers=True, remat="dots_saveable"),
    "loop, remat": dataclasses.replace(CONFIG, remat="full"),
}
IDS = np.random.default_rng(0).integers(0, 23, (2, 8))


@pytest.fixture(scope="module")
def runs():
    """Of every form: logits, aux and gradients in training, under explicit rngs."""

    def run(config):
        graphdef, params, rest = nnx.split(TransformerLM(nnx.Rngs(1), config), nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            out = model.run(IDS, deterministic=False, rngs=nnx.Rngs(dropout=5))
            return jax.nn.log_softmax(out.logits)[..., 3].sum() + out.aux["load_balance_loss"], out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return out, nnx.merge(graphdef, grads, rest)

    return {name: run(config) for name, config in FORMS.items()}


@pytest.mark.parametrize("form", [name for name in FORMS if name != "loop"])
@pytest.mark.thorough
def test_every_form_is_the_same_model_with_the_same_dropout(runs, form):
    (expected, loop_grads), (out, grads) = runs["loop"], runs[form]
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)
    assert out.aux.keys() == expected.aux.keys()
    for name, value in expected.aux.items():
        np.testing.assert_allclose(out.aux[name], value, rtol=1e-5, atol=1e-6)
    assert [load.shape for load in out.aux["expert_load"]] == [(3,)] * 3
    unrolled = nnx.state(with_scan_layers(grads, False), nnx.Param)
    for one, two in zip(jax.tree.leaves(unrolled), jax.tree.leaves(nnx.state(loop_grads, nnx.Param)), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-4, rtol=2e-4)


def assert_same_models(made, wanted):
    """Of equal structure, configs and parameters; random streams may hold other keys."""
    (graphdef, state), (wanted_graphdef, wanted_state) = nnx.split(made), nnx.split(wanted)
    assert graphdef == wanted_graphdef and made.config == wanted.config
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(wanted_state), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
    params, wanted_params = nnx.state(made, nnx.Param), nnx.state(wanted, nnx.Param)
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(wanted_params), strict=True):
        np.testing.assert_array_equal(one, two)


def test_parameters_convert_both_ways():
    loop = build(lambda rngs: TransformerLM(rngs, CONFIG))
    scan, again = nnx.jit(lambda loop: (scan := with_scan_layers(loop, True), with_scan_layers(scan, False)))(loop)
    made = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(1), FORMS["scan"]))
    assert nnx.graphdef(scan) == nnx.graphdef(made) and scan.config == FORMS["scan"]
    leaves = (jax.tree.leaves(nnx.state(model)) for model in (scan, made))
    assert all(one.shape == two.shape and one.dtype == two.dtype for one, two in zip(*leaves, strict=True))
    assert_same_models(again, loop)


@pytest.mark.contract
def test_loop_and_scan_begin_with_the_same_parameters():
    loop, scan = (TransformerLM(nnx.Rngs(1), FORMS[name]) for name in ("loop", "scan"))
    assert_same_models(with_scan_layers(loop, True), scan)
    assert_same_models(with_scan_layers(scan, False), loop)


def test_caches_of_a_scan_are_those_of_the_loop():
    config = dataclasses.replace(
        CONFIG, layer_pattern=({"attention_window": 3}, {"pos_emb_type": "none", "num_experts": 3})
    )
    loop = build(lambda rngs: TransformerLM(rngs, config))
    models = {"loop": loop, "scan": with_scan_layers(loop, True)}
    run = nnx.jit(lambda model, ids, caches: model(ids, layer_kv_caches=caches))
    caches = dict.fromkeys(models, attnax.init_decoder_kv_caches_from_config(config, batch_size=2))
    for chunk in (IDS[:, :4], IDS[:, 4:]):
        logits = {}
        for name, model in models.items():
            logits[name], caches[name] = run(model, chunk, caches[name])
        np.testing.assert_allclose(logits["scan"], logits["loop"], atol=1e-5)
    assert len(caches["scan"]) == 5
    for one, two in zip(jax.tree.leaves(tuple(caches["scan"])), jax.tree.leaves(caches["loop"]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.thorough
def test_stored_streams_go_on_from_call_to_call():
    """Without explicit rngs, each layer draws from its own stream, and the next call draws something else."""
    config = dataclasses.replace(CONFIG, layer_pattern=(), num_layers=3)
    results = []
    for form in ({}, {"scan_layers": True}, {"remat": "full"}):
        model = TransformerLM(nnx.Rngs(1), dataclasses.replace(config, **form))
        run = nnx.jit(lambda model: model(IDS, deterministic=False))
        results.append([run(model), run(model)])
    assert float(jnp.abs(results[0][0] - results[0][1]).max()) > 1e-2
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_remat_is_a_checkpoint_around_each_layer_with_the_policy_that_is_named(form):
    config = FORMS[form]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config)))
    program = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(IDS, deterministic=True))(state)
    policies = [eqn.params["policy"] for eqn in equations(program.jaxpr) if eqn.primitive.name == "remat2"]
    dots = jax.checkpoint_policies.dots_saveable  # of the two layers of a period, and of the one that is left over
    assert policies == {"loop": [], "scan": [], "scan, remat": 3 * [dots], "loop, remat": 5 * [None]}[form]


def equations(jaxpr):
    """All equations of a program, with the equations inside of other equations."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(tuple(eqn.params.values())):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def test_a_scanned_stack_holds_whole_periods_and_runs_the_layers_that_are_left_over_apart():
    for layers, turns, left in ((1, 0, 1), (2, 1, 0), (5, 2, 1), (7, 3, 1), (8, 4, 0)):
        config = dataclasses.replace(CONFIG, num_layers=layers, scan_layers=True)
        stack = nnx.eval_shape(lambda config=config: TransformerLM(nnx.Rngs(0), config)).decoder.stack
        assert len(stack.blocks) == left
        assert [period.attention.query.kernel.shape[0] for period in stack.periods] == ([turns, turns] if turns else [])


def test_a_layer_has_its_own_config():
    model = build(lambda rngs: TransformerLM(rngs, CONFIG))
    windows = [layer.attention.config.attention_window for layer in model.decoder.stack.layers()]
    assert windows == [3, None, 3, None, 3]
    assert [layer.attention.rope is None for layer in model.decoder.stack.layers()] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"layer_pattern": ({"d_f": 3},)},
            "layer_pattern may change the fields of BlockConfig, except d_model; got 'd_f'",
        ),
        ({"layer_pattern": ({"d_model": 3},)}, "except d_model; got 'd_model'"),
        ({"layer_pattern": ({"num_heads": 5},)}, "d_model must be a multiple of num_heads"),
        ({"layer_pattern": ({"pos_emb_type": "learned"},)}, "a layer's own pos_emb_type must be rope, alibi or none"),
        ({"num_layers": 1, "layer_pattern": ({}, {"num_heads": 5})}, "d_model must be a multiple of num_heads"),
        ({"layer_pattern": (3,)}, "layer_pattern must be a sequence of mappings; got layer_pattern="),
        ({"remat": "some"}, "remat must be one of none, full"),
        ({"num_layers": 0}, "num_layers must be a whole number, at least 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_stacks_are_refused_in_words(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **fields)


def test_a_config_with_a_pattern_is_a_value():
    """It hashes, copies, pickles, and goes through JSON."""
    pattern = [
        {"use_bias": ["query"], "rope_scaling": {"kind": "linear", "factor": 2.0}, "attention_type": "linear"},
        {},
    ]
    config = dataclasses.replace(CONFIG, layer_pattern=pattern)
    for same in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))),
    ):
        assert same == config and hash(same) == hash(config)
    with pytest.raises(TypeError, match="layer_pattern cannot be changed"):
        config.layer_pattern[0]["use_bias"] = True


@pytest.mark.thorough
def test_layers_of_another_dtype_leave_the_stream_its_own():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", dropout_rate=0.0, layer_pattern=({"dtype": "float32"}, {}))
    for scan in (False, True):
        model = TransformerLM(nnx.Rngs(1), dataclasses.replace(config, num_layers=2, scan_layers=scan))
        assert model.decoder(IDS).dtype == jnp.bfloat16


def test_explicit_randomness_is_not_used_up_where_nothing_is_drawn():
    rngs, config = nnx.Rngs(dropout=1), dataclasses.replace(CONFIG, num_layers=1, layer_pattern=())
    model = build(lambda rngs: TransformerLM(rngs, config))
    jax.eval_shape(lambda ids: model(ids, rngs=rngs), IDS)  # a draw would change a stream outside of it, and raise
    assert int(rngs.dropout.count[...]) == 0


def test_equal_layers_are_traced_once(monkeypatch):
    traced, run = [], EncoderBlock.run
    monkeypatch.setattr(EncoderBlock, "run", lambda *args, **options: traced.append(1) or run(*args, **options))
    config = dataclasses.replace(CONFIG, num_layers=4, layer_pattern=({}, {"attention_window": 3}))
    model = build(lambda rngs: TransformerLM(rngs, config))
    step = jax.grad(lambda model, ids: model(ids, deterministic=True).sum(), allow_int=True)
    jax.jit(step).lower(model, np.zeros((1, 5), np.int32))
    assert len(traced) == 2


class Remembering(EncoderBlock):
    """Keeps statistics, its last input, and an attribute that is no Variable."""

    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.last = nnx.data(None)

    def run(self, x, *, flag=True, **options):
        out = super().run(x, **options)
        self.sow(nnx.Intermediate, "seen", out.hidden.sum())
        self.calls[...] += 1
        self.last = nnx.data(out.hidden.sum() if flag else None)
        return out


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_a_block_by_a_user_keeps_its_writes():
    config = dataclasses.replace(CONFIG, num_layers=2, layer_pattern=())
    stack = build(lambda rngs: Stack(rngs, config, Remembering))

    @nnx.jit
    def run(stack, x):
        hidden = stack.run(x, deterministic=True, each={"flag": [True, False]}).hidden
        return hidden, stack.blocks[0].last

    hidden, last = run(stack, np.ones((1, 3, config.d_model), np.float32))
    assert [int(block.calls[...]) for block in stack.blocks] == [1] * 2
    np.testing.assert_allclose(stack.blocks[-1].seen[0], np.asarray(hidden).sum(), rtol=1e-5)
    np.testing.assert_array_equal(last, stack.blocks[0].seen[0])


class Noisy(EncoderBlock):
    """Draws though it holds no dropout."""

    def run(self, x, *, rngs=None, **options):
        out = super().run(x, **options)
        return out._replace(hidden=out.hidden + jax.random.normal(rngs.dropout(), (1, 1, 1)))


def test_a_block_by_a_user_gets_randomness_of_its_own_in_every_layer():
    config = dataclasses.replace(CONFIG, num_layers=2, layer_pattern=())
    graphdef, state = nnx.split(build(lambda rngs: Stack(rngs, config, Noisy)))

    @jax.jit
    def run(state, x, key):
        stack, rngs = nnx.merge(graphdef, state), nnx.Rngs(dropout=key)
        return stack.run(x, rngs=rngs, deterministic=True).hidden

    x = np.ones((1, 3, config.d_model), np.float32)
    one, again, other = (np.asarray(run(state, x, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).min() > 1e-3
