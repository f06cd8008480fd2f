"""A batch may be empty, or a symbol: an exported model then takes any number of rows."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import contract_unless
from jax import export
from tiny import build

from attnax import (
    AttentionType,
    Transformer,
    TransformerConfig,
    TransformerEncoder,
    TransformerLM,
    VisionTransformer,
    VisionTransformerConfig,
)
from attnax.models import MaskedLM, SentenceEncoder

BLOCKS = {"d_model": 12, "num_heads": 3, "num_layers": 1, "d_ff": 20, "dropout_rate": 0.0}
TEXT = TransformerConfig(vocab_size=23, max_len=13, **BLOCKS)
IMAGE = VisionTransformerConfig(image_size=(6, 10), patch_size=(3, 2), num_channels=2, **BLOCKS)
IDS, TARGET, REAL, PIXELS = ((7,), "int32"), ((5,), "int32"), ((7,), "bool"), ((6, 10, 2), "float32")


def call_padded(model, ids, real):
    return model(ids, padding_mask=real)


def call_both(model, source, target, real):
    return model(source, target, source_padding_mask=real)


# How to make a model, its call and arguments, and the shapes of its results without the batch.
MODELS = {
    "language model": (lambda rngs: TransformerLM(rngs, TEXT), call_padded, (IDS, REAL), (7, 23)),
    "mixture of experts": (
        lambda rngs: TransformerLM(rngs, dataclasses.replace(TEXT, num_experts=5)),
        call_padded,
        (IDS, REAL),
        (7, 23),
    ),
    "kernels alone": (
        lambda rngs: TransformerLM(rngs, dataclasses.replace(TEXT, attention_type=AttentionType.PALLAS_FLASH)),
        call_padded,
        (IDS, REAL),
        (7, 23),
    ),
    "encoder": (lambda rngs: TransformerEncoder(rngs, TEXT), call_padded, (IDS, REAL), (7, 12)),
    "masked language model": (lambda rngs: MaskedLM(rngs, TEXT), call_padded, (IDS, REAL), (7, 23)),
    "sentences": (lambda rngs: SentenceEncoder(TransformerEncoder(rngs, TEXT)), call_padded, (IDS, REAL), (12,)),
    "encoder-decoder": (
        lambda rngs: Transformer(rngs, encoder=TEXT, decoder=TEXT),
        call_both,
        (IDS, TARGET, REAL),
        (5, 23),
    ),
    "images": (
        lambda rngs: VisionTransformer(rngs, dataclasses.replace(IMAGE, num_classes=11)),
        VisionTransformer.__call__,
        (PIXELS,),
        (11,),
    ),
}
models = pytest.mark.parametrize("name", MODELS)
symbolic = pytest.mark.usefixtures("unchecked_shapes")  # a symbol is no int, as shapes are annotated


def specs(kinds, batch):
    return [jax.ShapeDtypeStruct((batch, *shape), kind) for shape, kind in kinds]


def export_model(name, **options):
    make, call, kinds, _ = MODELS[name]
    model, (batch,) = build(make), export.symbolic_shape("batch")
    return model, export.export(jax.jit(lambda *x: call(model, *x)), **options)(*specs(kinds, batch))


@models
def test_an_empty_batch_is_a_batch(name):
    make, call, kinds, shape = MODELS[name]
    model = build(make)
    assert jax.eval_shape(lambda *x: call(model, *x), *specs(kinds, 0)).shape == (0, *shape)


@symbolic
@pytest.mark.parametrize("name", [contract_unless(name in ("images", "encoder-decoder"), name) for name in MODELS])
def test_a_symbolic_batch_is_exported(name):
    _, exported = export_model(name)
    (out,) = exported.out_avals
    assert (str(out.shape[0]), *out.shape[1:]) == ("batch", *MODELS[name][3])


@symbolic
@pytest.mark.contract
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_symbolic_batch_is_exported_for(platform):
    _, exported = export_model("language model", platforms=[platform])
    assert exported.platforms == (platform,)


@symbolic
@pytest.mark.parametrize("name", ["images", contract_unless(False, "mixture of experts")])
def test_an_exported_model_gives_the_results_of_the_model(name):
    model, exported = export_model(name)
    rng, (_, call, kinds, _) = np.random.default_rng(0), MODELS[name]
    arguments = [rng.integers(0, 2, x.shape).astype(x.dtype) for x in specs(kinds, 3)]
    expected = jax.jit(lambda *x: call(model, *x))(*arguments)
    np.testing.assert_allclose(exported.call(*arguments), expected, atol=1e-6)
