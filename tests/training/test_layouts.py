"""The steps of a layout are those of one device: initial parameters, losses, dropout, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import EncoderBlock, Layout, TransformerConfig, TransformerLM, standard_attention
from attnax.training import OptimizerConfig, TokenStream, Trainer, causal_lm

MODEL = TransformerConfig(
    vocab_size=19,  # divided by nothing: the table of tokens is whole where the vocabulary would be cut
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    d_ff=24,
    max_len=8,
    pos_emb_type="rope",
    norm_type="rms",
    ff_activation="swiglu",
    use_bias=False,
    dropout_rate=0.0,
)
VARIANTS = {
    "plain": {},
    "one layer": {"num_layers": 1, "dropout_rate": 0.2, "attention_dropout_rate": 0.3},
    "dropout": {"dropout_rate": 0.2, "attention_dropout_rate": 0.3},
    "scan": {"scan_layers": True, "remat": "full"},
    "remat": {"remat": "attention_out"},
    "packed": {"vocab_size": 20},
    "window": {"attention_window": 3},
    "ALiBi": {"pos_emb_type": "alibi", "norm_type": "layer", "use_bias": True, "ff_activation": "gelu"},
    "learned positions": {"pos_emb_type": "learned", "tie_embeddings": False},
    "T5": {"pos_emb_type": "relative"},
    "mixture": {"num_experts": 4, "top_k": 2, "use_bias": True},
    "mixture with dropout": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1, "dropout_rate": 0.2},
    "standard": {"attention_type": "standard"},
    "bfloat16": {"dtype": "bfloat16"},
    "sinks, wide values": {"attention_sinks": True, "value_head_dim": 6, "dropout_rate": 0.2},
    "muon": {},
    "accumulated": {"dropout_rate": 0.2},
}
OPTIMIZERS = {"muon": {"algorithm": "muon"}, "accumulated": {"accumulate": 2}}
LAYOUTS = (
    "data=8",
    "fsdp=8",
    "fsdp=2,tensor=4",  # more devices than key heads
    "data=2,context=4",
    "data=2,expert=4",
    "fsdp=2,tensor=2,context=2",
    "fsdp=2,expert=2,tensor=2",
    "data=2,fsdp=2,context=2",
)
QUICK = {("one layer", "fsdp=2,tensor=2,context=2")}
IN_CI = {
    ("dropout", "fsdp=2,tensor=4"),
    ("mixture with dropout", "fsdp=2,expert=2,tensor=2"),
    ("scan", "fsdp=2,tensor=4"),
    ("packed", "data=2,context=4"),
    ("ALiBi", "fsdp=2,tensor=2,context=2"),
    ("dropout", "data=2,context=4"),
}
CASES = [
    pytest.param(
        variant,
        layout,
        marks=()
        if (variant, layout) in QUICK
        else pytest.mark.contract
        if (variant, layout) in IN_CI
        else pytest.mark.thorough,
    )
    for variant in VARIANTS
    for layout in LAYOUTS
    if ("expert" not in layout or "mixture" in variant) and ("context" not in layout or variant != "standard")
]
OPTIMIZER = OptimizerConfig(steps=10, batch_size=8, learning_rate=0.01)
TOKENS = np.random.default_rng(0).integers(0, 19, (3, 8, 9)).astype(np.int32)


def make(variant, layout=None, optimizer=OPTIMIZER, ema=None, devices=None, **parts):
    config = dataclasses.replace(MODEL, **VARIANTS[variant])
    model = (lambda rngs: TransformerLM(rngs, config, **parts)) if parts else config
    objective = causal_lm(document_token=0 if variant == "packed" else None)
    optimizer = dataclasses.replace(optimizer, **OPTIMIZERS.get(variant, {}))
    return Trainer(model, objective, optimizer, seed=3, layout=layout, devices=devices, ema=ema)


def run(trainer, updates=3):
    """(parameters before, moments after the first update, losses, norms of the gradients, the state after)."""
    state = trainer.init()
    before, places = jax.tree.map(np.asarray, state.params), jax.tree.map(lambda x: x.sharding, state)
    moments, losses, norms = None, [], []
    for tokens in TOKENS[:updates]:
        microbatches = [tokens, tokens[::-1]][: trainer.optimizer.accumulate]
        state, metrics = trainer.step(state, {"tokens": np.stack(microbatches)})
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
        moments = moments or first_moments(state)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places))
    return before, moments, losses, norms, state


def first_moments(state):
    """A tenth of the gradient of each parameter."""
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [np.asarray(x) for path, x in moments if x.ndim and ".nu" not in jax.tree_util.keystr(path)]


@functools.cache
def on_one_device(variant):
    return run(make(variant))


def same(left, right):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), left, right)))


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_updates_are_those_of_one_device(variant, layout):
    before, moments, losses, norms, _ = on_one_device(variant)
    have = run(make(variant, Layout.parse(layout)))
    assert same(have[0], before)
    tolerance = 2e-2 if variant == "bfloat16" else 5e-6
    np.testing.assert_allclose(have[2], losses, rtol=0, atol=tolerance)
    np.testing.assert_allclose(have[3], norms, rtol=tolerance)
    for one, several in zip(moments, have[1], strict=True):
        # 1e-8: the gradient of a key's bias is 0, but for rounding.
        np.testing.assert_allclose(several, one, rtol=0, atol=2 * tolerance * np.abs(one).max() + 1e-8)
    assert losses[2] != losses[0]


@pytest.mark.contract
def test_accumulation_and_the_average_are_those_of_one_device():
    """The average and the sums lie like the parameters."""
    one, several = (run(make("accumulated", layout, ema=0.9)) for layout in (None, Layout(fsdp=4, tensor=2)))
    np.testing.assert_allclose(several[2], one[2], rtol=2e-6)
    for left, right in zip(jax.tree.leaves(several[4].ema), jax.tree.leaves(one[4].ema), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    places = jax.tree.map(lambda x, y: x.sharding == y.sharding, several[4].params, several[4].ema)
    assert jax.tree.all(places)


@pytest.mark.contract
def test_tensor_alone_computes_what_one_device_does():
    """No other axis cuts anything, and all devices have all tokens."""
    several = make("one layer", Layout(fsdp=1, tensor=2), devices=jax.devices()[:2])
    before, moments, losses, norms, _ = on_one_device("one layer")
    have = run(several)
    assert same(have[0], before)
    np.testing.assert_allclose(have[2], losses, rtol=0, atol=5e-6)
    np.testing.assert_allclose(have[3], norms, rtol=5e-6)
    for one, two in zip(moments, have[1], strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * np.abs(one).max() + 1e-8)


def test_the_state_lies_where_the_rules_say():
    state = make("mixture", Layout(fsdp=2, tensor=2, expert=2)).init()
    feed_forward = state.params["decoder"]["stack"]["blocks"][1]["feed_forward"]
    assert feed_forward["up"].sharding.spec == jax.P("expert", "fsdp", "tensor")
    assert feed_forward["down"].sharding.spec == jax.P("expert", "tensor", "fsdp")
    shapes = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.opt_state) if x.shape == (4, 16, 24)}
    assert shapes == {(2, 8, 12)}  # moments too


@pytest.mark.contract
def test_bits_are_those_of_one_device():
    stream = TokenStream(TOKENS.reshape(-1), window=8)
    trainers = make("plain"), make("plain", Layout(fsdp=4, tensor=2))
    one, several = (trainer.bits(trainer.init().params, stream, batch_size=6) for trainer in trainers)
    assert several == pytest.approx(one, rel=1e-6)


class TestRefusals:
    def test_a_batch_that_is_not_divided(self):
        with pytest.raises(ValueError, match=r"must divide the batch; got 8 of fsdp=8 and batch_size=12"):
            make("plain", Layout(), OptimizerConfig(steps=3, batch_size=12))

    def test_windows_that_are_not_divided(self):
        trainer = make("plain", Layout(fsdp=2, context=4))
        with pytest.raises(ValueError, match="context must divide the length of the windows; got context=4 for 7"):
            trainer.lower_step({"tokens": np.zeros((1, 8, 8), np.int32)})

    def test_a_model_that_is_not_divided(self):
        with pytest.raises(ValueError, match="tensor must divide num_heads; got tensor=8, num_heads=4"):
            make("plain", Layout(tensor=8))

    def test_a_text_in_place_of_a_layout(self, unchecked_shapes):
        with pytest.raises(ValueError, match="layout must be a Layout; got layout='fsdp=8'. Use Layout.parse"):
            make("plain", "fsdp=8")

    def test_a_step_of_another_batch(self):
        with pytest.raises(ValueError, match=r"must divide the batch; got 8 for batch\['tokens'\].shape=\(1, 6, 9\)"):
            make("plain", Layout()).trace_step({"tokens": TOKENS[:1, :6]})

    def test_an_attention_function_of_ones_own_where_sequences_are_cut(self):
        with pytest.raises(ValueError, match="an attention_fn gets whole sequences, and context cuts them"):
            make("plain", Layout(context=2), attention_fn=standard_attention)

    def test_a_part_whose_parameters_state_no_axes(self):
        class Mixer(EncoderBlock):
            def __init__(self, rngs, config):
                super().__init__(rngs, config)
                self.mixer = nnx.Linear(16, 16, rngs=rngs)

        with pytest.raises(ValueError, match=r"every matrix must state its axes; got decoder.stack.blocks.0.mixer"):
            make("plain", Layout(), make_block=Mixer)


class Mixing(EncoderBlock):
    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        axes = {"axes": ("embed", None)}
        self.mixer = nnx.Linear(16, 16, kernel_metadata=axes, rngs=rngs)

    def run(self, x, **options):
        out = super().run(x, **options)
        return out._replace(hidden=out.hidden + 0.1 * jnp.tanh(self.mixer(out.hidden)))


@pytest.mark.contract
def test_a_block_of_a_user_trains_on_a_layout():
    one, several = (run(make("plain", layout, make_block=Mixing), 2) for layout in (None, Layout(fsdp=2, tensor=4)))
    assert same(one[0], several[0])
    np.testing.assert_allclose(several[2], one[2], rtol=2e-6)
