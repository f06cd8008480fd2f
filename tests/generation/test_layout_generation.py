"""A model whose parameters lie on a layout writes the tokens of one device, in every way."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import Layout, Sampler, Transformer, TransformerConfig, TransformerLM
from attnax.nn import parameter_shardings

CONFIG = TransformerConfig(
    vocab_size=38, d_model=16, num_heads=4, num_kv_heads=2, num_layers=1, d_ff=20, max_len=24, pos_emb_type="rope"
)
IDS = np.random.default_rng(0).integers(1, 38, (4, 7)).astype(np.int32)
ROOM = {"max_new_tokens": 5}
DRAWN = {"sampler": Sampler(1.0), "key": jax.random.key(3)}
WAYS = {
    "drawn": lambda model: model.generate(IDS, **ROOM, **DRAWN).tokens,
    "one row": lambda model: model.generate(IDS[:1], **ROOM).tokens,
    "paged": lambda model: model.generate(IDS, cache="paged", **ROOM).tokens,
    "padded": lambda model: model.generate(IDS, padding_mask=IDS > 5, **ROOM).tokens,
    "stream": lambda model: np.stack(list(model.stream(IDS[:2], **ROOM))),
    "beams": lambda model: model.beam_search(IDS, num_beams=2, **ROOM).tokens,
    "a draft": lambda model: model.generate(IDS, draft=model, num_draft_tokens=2, **ROOM).tokens,
}


def spread(model, mesh):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(jax.device_put, params, parameter_shardings(params, mesh)), rest)


@pytest.mark.parametrize("layout", ["fsdp=4,tensor=2", "fsdp=2,tensor=2,context=2"])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.contract if way == "drawn" else pytest.mark.thorough) for way in WAYS]
)
def test_tokens_are_those_of_one_device(way, layout):
    model, mesh = build(lambda rngs: TransformerLM(rngs, CONFIG)), Layout.parse(layout).mesh(jax.devices()[:8])
    want = np.asarray(WAYS[way](model))
    model = spread(model, mesh)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(WAYS[way](model), want)
    if way == "drawn":  # XLA places the program by the parameters alone
        np.testing.assert_array_equal(WAYS[way](model), want)


@pytest.mark.thorough
def test_an_encoder_and_a_decoder_write_the_tokens_of_one_device():
    model = build(lambda rngs: Transformer(rngs, encoder=CONFIG, decoder=CONFIG))
    mesh = Layout.parse("fsdp=4,tensor=2").mesh(jax.devices()[:8])
    want = model.generate(IDS, 5, 1).tokens
    model = spread(model, mesh)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(model.generate(IDS, 5, 1).tokens, want)
