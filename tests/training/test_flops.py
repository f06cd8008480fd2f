"""The operations of an update: the formulas are XLA's count of a program without loops, but for elementwise work."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from attnax import TransformerConfig, TransformerLM, VisionTransformer, VisionTransformerConfig
from attnax.models import MaskedLM
from attnax.training.flops import PEAK_FLOPS, attention_pairs, update_flops

ROWS, LENGTH = 3, 48
SIZES = {"d_model": 96, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "d_ff": 224, "dropout_rate": 0.0}
KIND = {"attention_type": "standard", "use_bias": False, "norm_type": "rms", "ff_activation": "relu"}  # no loops
BOUND = 0.04  # of the count: elementwise work, and gradients of inputs that nothing learns from


def shapes_of(make):
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)


def counted(make, inputs):
    """XLA's count of a forward and a backward pass, and the shapes of the model's parameters."""
    graphdef, params, rest = shapes_of(make)

    def loss(params, rest, inputs):
        return nnx.merge(graphdef, params, rest)(inputs, deterministic=True).sum()

    return jax.jit(jax.grad(loss)).lower(params, rest, inputs).cost_analysis()["flops"], params


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (TransformerLM, {"tie_embeddings": True, "scan_layers": False}),
        (TransformerLM, {"ff_activation": "reglu", "attention_window": 7, "head_dim": 40, "value_head_dim": 16}),
        (MaskedLM, {"pos_emb_type": "learned"}),
    ],
)
def test_the_formulas_are_the_count_of_the_program(kind, fields):
    """Standard attention computes all pairs, also those that a mask forbids."""
    config = TransformerConfig(vocab_size=320, max_len=LENGTH, **{**SIZES, **KIND, "pos_emb_type": "rope", **fields})
    is_causal = kind is TransformerLM
    found, params = counted(lambda rngs: kind(rngs, config), jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32))
    said = update_flops(config, params, sequences=ROWS, length=LENGTH, is_causal=is_causal)
    allowed = attention_pairs(LENGTH, window=config.attention_window, is_causal=is_causal)
    every_pair = said.attention * LENGTH**2 / allowed
    assert said.matrices + every_pair == pytest.approx(found, rel=BOUND) and every_pair > BOUND * found


def test_an_image_meets_the_head_once():
    config = VisionTransformerConfig(image_size=24, patch_size=4, num_channels=1, num_classes=900, **SIZES, **KIND)
    images = jax.ShapeDtypeStruct((ROWS, 24, 24, 1), np.float32)
    found, params = counted(lambda rngs: VisionTransformer(rngs, config), images)
    said = update_flops(config, params, sequences=ROWS, length=37, is_causal=False)
    assert said.total == pytest.approx(found, rel=BOUND)


def test_a_token_meets_its_experts_alone_and_a_stack_of_layers_each_layer():
    base = TransformerConfig(vocab_size=32, num_experts=8, top_k=2, **SIZES)

    def matrices(**fields):
        config = dataclasses.replace(base, **fields)
        params = shapes_of(lambda rngs: TransformerLM(rngs, config))[1]
        return update_flops(config, params, sequences=1, length=5).matrices

    for fields in ({}, {"scan_layers": True}):
        more = matrices(top_k=3, **fields) - matrices(**fields)
        assert more == 2 * 6 * 5 * (2 * 96 * 224)  # two layers, each with two matrices of an expert
        routers = matrices(num_experts=9, **fields) - matrices(**fields)
        assert routers == pytest.approx(2 * 6 * 5 * 96)


def test_the_work_of_linear_attention_grows_with_the_length_and_not_its_square():
    config = TransformerConfig(vocab_size=32, attention_type="linear", **SIZES)
    params = shapes_of(lambda rngs: TransformerLM(rngs, config))[1]
    one, ten = (update_flops(config, params, sequences=1, length=n).attention for n in (640, 6400))
    assert ten == 10 * one


def test_the_peaks_of_tpus_are_those_of_a_device():
    """JAX has its own table by core, some of whose figures differ by a few percent from those of the makers."""
    known = pytest.importorskip("jax._src.tpu_info", reason="an older JAX")
    kinds = [kind for kind in PEAK_FLOPS if kind.startswith("TPU")]
    assert {"TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"} <= set(kinds)
    for kind in kinds:
        chip = known.chip_version_from_device_kind(kind)
        cores = chip.num_physical_tensor_cores_per_chip if chip.supports_megacore else 1  # of a device
        core = known.get_tpu_info_for_chip(chip, cores).bf16_ops_per_second
        assert PEAK_FLOPS[kind] == pytest.approx(core * cores, rel=0.15), kind
