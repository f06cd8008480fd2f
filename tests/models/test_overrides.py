"""A user's method or layer in place of the library's is used, or refused in words."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import MultiHeadAttention, TransformerConfig, TransformerLM, standard_attention
from attnax.models import MaskedLM, SentenceEncoder
from attnax.nn import EncoderBlock, with_scan_layers

CONFIG = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=2, d_ff=6, max_len=64, dropout_rate=0.0)
IDS = np.random.default_rng(0).integers(0, 11, (2, 5))


def make(model=TransformerLM, **options):
    return build(lambda rngs: model(rngs, CONFIG, **options))


def only_seven(logits):
    return logits.at[..., 7].add(1e4)


class OwnCall(TransformerLM):
    def __call__(self, input_ids, **options):
        result = super().__call__(input_ids, **options)
        return (only_seven(result[0]), result[1]) if isinstance(result, tuple) else only_seven(result)


class OwnRun(TransformerLM):
    def run(self, input_ids, **options):
        out = super().run(input_ids, **options)
        return out._replace(logits=only_seven(out.logits))


class CallAboveOwnRun(OwnRun):
    def __call__(self, input_ids):
        return self.run(input_ids).logits.argmax(-1)

    def run(self, input_ids, **options):
        return super().run(input_ids, **options)


@pytest.mark.parametrize("model", [OwnCall, OwnRun, CallAboveOwnRun])
def test_generate_uses_the_method_that_a_subclass_overrides(model):
    assert (np.asarray(make(model).generate(IDS, max_new_tokens=3).tokens) == 7).all()


def test_generate_refuses_a_run_that_is_bound_to_the_object():
    model = make()
    model.run = OwnRun.run.__get__(model, OwnRun)
    with pytest.raises(NotImplementedError, match="a method assigned to model.run is bound"):
        model.generate(IDS, max_new_tokens=3)


class RunWithoutLogits(TransformerLM):
    def run(self, input_ids, **options):
        return self.decoder.run(input_ids, **options)


def test_generate_refuses_a_run_without_logits():
    with pytest.raises(NotImplementedError, match="RunWithoutLogits.run must return an Output with logits; got"):
        make(RunWithoutLogits).generate(IDS, max_new_tokens=3)


def test_log_probs_are_those_of_an_overridden_call():
    assert (np.asarray(make(OwnCall).log_probs(IDS)).argmax(-1) == 7).all()


class WithoutCaches(TransformerLM):
    def __call__(self, input_ids):
        return super().__call__(input_ids)


class WithoutPair(TransformerLM):
    def __call__(self, input_ids, **options):
        return super().__call__(input_ids, **options)[0]


@pytest.mark.parametrize(
    ("model", "got"),
    [(WithoutCaches, "got a signature that does not: got an unexpected keyword"), (WithoutPair, "got .*Tracer")],
)
def test_a_call_by_which_nothing_can_be_written_is_refused(model, got):
    with pytest.raises(NotImplementedError, match=f"__call__ must take input_ids.*{got}.*Or override run"):
        make(model).generate(IDS, max_new_tokens=3)


class OwnTransformer(attnax.Transformer):
    def __call__(self, source_ids, target_ids, **options):
        return super().__call__(source_ids, target_ids, **options) * 2


def test_a_transformer_refuses_a_method_that_generate_would_ignore():
    model = nnx.eval_shape(lambda: OwnTransformer(nnx.Rngs(0), encoder=CONFIG, decoder=CONFIG))
    with pytest.raises(NotImplementedError, match="got OwnTransformer with a __call__ or run of its own"):
        model.generate(IDS, max_length=3, start_token=1)


class OwnAttention(MultiHeadAttention):
    def __call__(self, x, **options):
        return 2 * super().__call__(x, **options)


class OwnBlock(EncoderBlock):
    def __call__(self, x, **options):
        return 2 * super().__call__(x, **options)


class OwnEncoder(attnax.TransformerEncoder):
    def __call__(self, input_ids, **options):
        return 2 * super().__call__(input_ids, **options)


class Passing(nnx.Module):
    def __call__(self, x, **options):
        return x


def replace_call(module):
    module.__call__ = types.MethodType(lambda self, ids, **options: ids, module)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (TransformerLM, lambda lm, rngs: setattr(lm.decoder.stack.blocks[0], "attention", OwnAttention(rngs, CONFIG))),
        (TransformerLM, lambda lm, rngs: lm.decoder.stack.blocks.__setitem__(1, OwnBlock(rngs, CONFIG))),
        (TransformerLM, lambda lm, rngs: replace_call(lm.decoder)),
        (MaskedLM, lambda lm, rngs: setattr(lm, "encoder", OwnEncoder(rngs, CONFIG))),
        (lambda rngs: SentenceEncoder(OwnEncoder(rngs, CONFIG)), lambda encoder, rngs: None),
        (TransformerLM, lambda lm, rngs: setattr(lm.decoder.stack.blocks[0], "attention", Passing())),
    ],
    ids=["attention", "block", "object", "encoder", "sentence", "without run"],
)
def test_a_part_whose_call_would_be_ignored_is_refused(model, change):
    def run():
        rngs = nnx.Rngs(0)
        made = model(rngs, CONFIG) if isinstance(model, type) else model(rngs)
        change(made, rngs)
        with pytest.raises(NotImplementedError, match="a __call__ of its own would be ignored.* Override run"):
            made(IDS)

    jax.eval_shape(run)


def test_a_copy_of_a_scanned_layer_refuses_every_change():
    config = dataclasses.replace(CONFIG, scan_layers=True, dropout_rate=0.1)

    def run():
        model = TransformerLM(nnx.Rngs(0), config)
        layer = model.decoder.stack.layers()[1]
        kernel, state = layer.attention.query.kernel, nnx.state(layer)
        changes = [
            *(lambda at=at: setattr(*at, None) for at in ((layer, "attention"), (layer.attention, "score_mod"))),
            lambda: setattr(layer.attention.query, "kernel", None),
            lambda: setattr(layer.attention.dropout, "deterministic", False),
            lambda: delattr(layer, "attention"),
            lambda: kernel.__setitem__(..., 0 * kernel[...]),
            lambda: kernel.__setitem__((0, 0), 1.0),
            lambda: setattr(kernel, "value", 0 * kernel[...]),
            lambda: kernel.set_value(0 * kernel[...]),
            lambda: kernel.copy_from(nnx.clone(kernel)),
            lambda: nnx.update(layer, state),
            layer.train,
            layer.eval,
            lambda: layer(jnp.ones((1, 3, 8)), deterministic=False),  # its stream of dropout would go on
        ]
        for change in changes:
            with pytest.raises(ValueError, match=r"Stack.layers: .*a change would be lost.*with_scan_layers"):
                change()
        assert layer(jnp.ones((1, 3, 8))).shape == (1, 3, 8)
        nnx.view(layer, deterministic=False).eval()
        copy = nnx.clone(layer)
        assert type(copy) is EncoderBlock and type(copy.attention) is MultiHeadAttention
        copy.attention.query.kernel[...] = 0 * kernel[...]
        copy.train()
        with_scan_layers(model, False).decoder.stack.layers()[1].attention.query.kernel[...] = 0 * kernel[...]

    jax.eval_shape(run)


def test_a_replaced_layer_is_used_wherever_equal_layers_share_a_program():
    model = make()
    forward = jax.jit(lambda split: nnx.merge(*split)(IDS))
    before = forward(nnx.split(model))
    model.decoder.stack.layers()[1].attention.attention_fn = lambda query, *others, **options: 0 * query
    after = forward(nnx.split(model))
    assert not np.allclose(before, after, atol=1e-3)
    np.testing.assert_allclose(after, model(IDS), atol=1e-5)
    model.decoder.stack.layers()[1].attention.attention_fn = standard_attention
    np.testing.assert_allclose(forward(nnx.split(model)), before, atol=1e-5)
