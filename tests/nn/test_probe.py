"""A probe sees and changes what a loop by hand would, in every form of the layers and in every model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_blocks import HyperConnections, ValueResidual
from tiny import build

import attnax
from attnax import (
    MultiHeadAttention,
    Transformer,
    TransformerConfig,
    TransformerLM,
    VisionTransformer,
    standard_attention,
)
from attnax.models import MaskedLM
from attnax.nn import EncoderBlock, Output, Probe, with_scan_layers

CONFIG = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=3, d_ff=6, max_len=16, dropout_rate=0.0)
IDS = np.random.default_rng(0).integers(0, 11, (2, 5))
ALL = Probe(hidden_states=True, attention_weights=True)


def lm(**fields):
    return build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **fields)))


def in_forms(model):
    scanned = with_scan_layers(model, True)
    rematted = nnx.clone(scanned)
    rematted.decoder.stack.config = dataclasses.replace(scanned.decoder.stack.config, remat="full")
    return {"loop": model, "scan, remat": rematted}


def by_hand(model, edit=lambda layer, x: x):
    """Hidden states and attention weights of a loop over the layers."""
    mask, x = model.decoder.self_mask, edit(0, model.decoder.embed(jnp.asarray(IDS)))
    states, weights = [x], []
    for layer, block in enumerate(model.decoder.stack.layers(), 1):
        weights.append(block.attention.attention_weights(block.around_attention.norm_in(x), mask=mask))
        x = edit(layer, block(x, mask=mask))
        states.append(x)
    return jnp.stack(states), jnp.stack(weights), model.logits(model.decoder.norm(x))


@pytest.mark.parametrize("form", ["loop", "scan, remat"])
def test_a_probe_sees_what_a_loop_by_hand_computes(form):
    model = lm(layer_pattern=({}, {"attention_window": 2}))
    states, weights, logits = by_hand(model)
    run = nnx.jit(lambda model: model.run(IDS, probe=ALL))
    out = run(in_forms(model)[form])
    assert out.probed.hidden_states.shape == (4, 2, 5, 8) and out.probed.attention_weights.shape == (3, 2, 2, 5, 5)
    np.testing.assert_allclose(out.probed.hidden_states, states, atol=1e-5)
    np.testing.assert_allclose(out.probed.attention_weights, weights, atol=1e-5)
    np.testing.assert_allclose(out.logits, logits, atol=1e-5)
    assert out.probed.cross_attention_weights is None
    last = model.logits(model.decoder.norm(out.probed.hidden_states[-1]))  # the logit lens of the last layer
    np.testing.assert_allclose(last, out.logits, atol=1e-5)


@pytest.mark.parametrize("form", ["loop", "scan, remat"])
def test_an_edit_patches_one_layer_and_has_gradients(form):
    model, patch = lm(), jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)

    def edit(layer, x, patch):
        return jnp.where(layer == 2, x.at[:, 1].set(patch), x)

    def probed(model, patch):
        return model.run(IDS, probe=Probe(hidden_states=True, edit=lambda layer, x: edit(layer, x, patch)))

    def loss(patch, model):
        out = probed(model, patch)
        return out.logits[0, 3, 4] + out.probed.hidden_states[1].sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(patch, in_forms(model)[form])
    want = by_hand(model, lambda layer, x: edit(layer, x, patch))
    np.testing.assert_allclose(out.probed.hidden_states, want[0], atol=1e-5)
    np.testing.assert_allclose(out.logits, want[2], atol=1e-5)
    one = jax.grad(lambda patch: by_hand(model, lambda layer, x: edit(layer, x, patch))[2][0, 3, 4])(patch)
    np.testing.assert_allclose(gradient, one, atol=1e-5)
    assert out.probed.attention_weights is None and float(jnp.abs(gradient).max()) > 1e-4


def test_every_model_has_a_probe():
    def shapes(probed):
        return [None if x is None else jnp.shape(x) for x in probed]

    def run():
        pattern = dataclasses.replace(CONFIG, layer_pattern=({}, {"num_heads": 4}))
        weights = TransformerLM(nnx.Rngs(0), pattern).run(IDS, probe=ALL).probed.attention_weights
        assert [x.shape for x in weights] == [(2, 2, 5, 5), (2, 4, 5, 5), (2, 2, 5, 5)]
        assert shapes(MaskedLM(nnx.Rngs(0), CONFIG).run(IDS, probe=ALL).probed)[1] == (3, 2, 2, 5, 5)
        model = Transformer(nnx.Rngs(0), CONFIG, dataclasses.replace(CONFIG, num_layers=2, scan_layers=True))
        seen = model.run(IDS, IDS[:, :3], probe=ALL).probed
        assert shapes(seen) == [(3, 2, 3, 8), (2, 2, 2, 3, 3), (2, 2, 2, 3, 5)]
        assert shapes(model.encoder.run(IDS, probe=ALL).probed) == [(4, 2, 5, 8), (3, 2, 2, 5, 5), None]
        sizes = {"image_size": 4, "patch_size": 2, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 6}
        vision = VisionTransformer(nnx.Rngs(0), **sizes)
        assert shapes(vision.run(np.ones((1, 4, 4, 3), np.float32), probe=ALL).probed)[:2] == [
            (3, 1, 5, 8),
            (2, 1, 2, 5, 5),
        ]
        assert TransformerLM(nnx.Rngs(0), CONFIG).run(IDS).probed is None

    jax.eval_shape(run)


def test_the_weights_of_a_block_are_those_of_its_own_stream():
    """Also where a block hands another stream to its attention than the one it gets."""

    class Shifted(EncoderBlock):
        def run(self, x, **options):
            return super().run(x[:, ::-1], **options)

    model = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, num_layers=1), make_block=Shifted))
    block = model.decoder.stack.blocks[0]
    x = block.around_attention.norm_in(model.decoder.embed(jnp.asarray(IDS))[:, ::-1])
    wanted = block.attention.attention_weights(x, mask=model.decoder.self_mask)
    seen = model.run(IDS, probe=Probe(attention_weights=True)).probed
    np.testing.assert_allclose(seen.attention_weights[0], wanted, atol=1e-5)


class Normed(nnx.Module):
    """An attention function whose result is no weighted sum of the values."""

    def __init__(self, width):
        self.norm = nnx.RMSNorm(width, rngs=nnx.Rngs(0))

    def __call__(self, query, key, value, **options):
        return self.norm(standard_attention(query, key, value, **options))


def halved(query, key, value, **options):
    return standard_attention(query, key, value, **options) / 2


def test_weights_are_those_of_a_weighted_sum_of_the_values_only():
    """The norm over the heads is that of a differential transformer."""

    def attention(function):
        return build(lambda rngs: MultiHeadAttention(rngs, d_model=8, num_heads=2, attention_fn=function))

    x = jax.device_put(np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32))
    weights = attention(halved).attention_weights(x)
    np.testing.assert_allclose(weights.sum(-1), np.full((1, 2, 5), 0.5), atol=1e-6)
    words = "must be a weighted sum of the values, of any width; got attention_fn=.*Normed, which is none. Define"
    normed = attention(Normed(4))
    for length in (4, 5):  # equal to the width of a value, or not
        with pytest.raises(ValueError, match=words):
            normed.attention_weights(x[:, :length])
    assert np.isnan(nnx.jit(lambda attn: attn.attention_weights(x[:, :4]))(normed)).all()


class OwnAttention(MultiHeadAttention):
    def run(self, x, **options):
        out, cache = super().run(x, **options)
        return 2 * out, cache


class WithOwnAttention(EncoderBlock):
    def __init__(self, rngs, config):
        super().__init__(rngs, config, attention=OwnAttention(rngs, config))


class NoWeights(EncoderBlock):
    def run(self, x, *, attention_weights=False, **options):
        return Output(x, None, {})


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("fields", "probe", "words"),
    [
        ({"make_block": HyperConnections}, ALL, "needs them of every block; got none from HyperConnections.run"),
        ({"make_block": NoWeights}, ALL, "got none from NoWeights.run. Derive the block from EncoderBlock"),
        ({"make_block": WithOwnAttention}, ALL, "got .*OwnAttention with a run of its own. Define attention_weights"),
        ({}, True, r"probe must be an attnax.nn.Probe; got probe=True. Write Probe"),
        ({}, Probe(edit=lambda layer, x: x[:, :2]), r"edit must return.*float32\[2, 5, 8\]; got float32\[2, 2, 8\]"),
        (
            {"scan_layers": True},
            Probe(edit=lambda layer, x: x if layer else 2 * x),
            r"edit gets is traced.*jnp.where\(",
        ),
    ],
)
def test_what_a_probe_cannot_see_is_refused(fields, probe, words):
    def run():
        make_block = fields.get("make_block")
        config = dataclasses.replace(CONFIG, **{k: v for k, v in fields.items() if k != "make_block"})
        with pytest.raises(ValueError, match=words):
            TransformerLM(nnx.Rngs(0), config, make_block=make_block).run(IDS, probe=probe)

    jax.eval_shape(run)


def test_with_caches_a_probe_has_hidden_states_and_no_weights():
    def run():
        model = TransformerLM(nnx.Rngs(0), CONFIG, make_block=ValueResidual)
        caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=2)
        out = model.run(IDS, caches=caches, probe=Probe(hidden_states=True))
        assert out.probed.hidden_states.shape == (4, 2, 5, 8)
        with pytest.raises(ValueError, match="got attention_weights=True with caches. Leave the caches out"):
            model.run(IDS, caches=caches, probe=ALL)

    jax.eval_shape(run)
