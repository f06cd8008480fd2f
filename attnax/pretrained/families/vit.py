"""Vision transformers: ViT, and DINOv2 without and with registers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnax.config import VisionTransformerConfig
from attnax.models.vision import VisionTransformer
from attnax.pretrained.errors import quoted
from attnax.pretrained.family import Family
from attnax.pretrained.fields import MOST, PLAIN, Field, biases, choice, flag, read_all, real, sides, whole
from attnax.pretrained.rules import Rule, attention, linear, norm, within

__all__ = ["DINOV2", "DINOV2_REGISTERS", "VIT", "VIT_CLASSES"]

_FIELDS = (
    whole("hidden_size", "d_model"),
    whole("num_hidden_layers", "num_layers"),
    whole("num_attention_heads", "num_heads"),
    sides("image_size", "image_size", 224),
    sides("patch_size", "patch_size", 16),
    whole("num_channels", "num_channels", 3),
    biases(always=("feed_forward", "norm", "out"), qkv_bias=(True, ("query", "key", "value"))),
)
_HARMLESS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "tie_word_embeddings")
_EMBEDDINGS = (
    Rule("{base}embeddings.cls_token", ("class_token",), "1 T D -> T D"),
    Rule("{base}embeddings.position_embeddings", ("positions.embedding",), "1 T D -> T D"),
    *linear("{base}embeddings.patch_embeddings.projection", "patches.projection", weight="D C h w -> (h w C) D"),
    *norm("{base}layernorm", "norm"),
)
_ATTENTION = attention(
    *("attention.attention.query", "attention.attention.key", "attention.attention.value"), "attention.output.dense"
)
_LAYERS = "{base}encoder.layer.{layer}", "stack.blocks.{layer}"

VIT = Family(
    model_type="vit",
    architecture="ViTModel",
    model=VisionTransformer,
    config=VisionTransformerConfig,
    constants={"norm_type": "layer", "dropout_rate": 0.0},
    fields=(
        *_FIELDS,
        whole("intermediate_size", "d_ff"),
        choice("hidden_act", "ff_activation", PLAIN, "gelu"),
        real("layer_norm_eps", "norm_eps", 1e-12),
    ),
    harmless=(*_HARMLESS, "encoder_stride", "pooler_output_size", "pooler_act"),
    bases=("", "vit."),
    body=("vit.",),
    rules=(
        *_EMBEDDINGS,
        *within(
            *_LAYERS,
            _ATTENTION,
            norm("layernorm_before", "around_attention.norm_in"),
            linear("intermediate.dense", "feed_forward.up"),
            linear("output.dense", "feed_forward.down"),
            norm("layernorm_after", "around_feed_forward.norm_in"),
        ),
    ),
    buffers=("pooler.dense.weight", "pooler.dense.bias"),
)


def _classes() -> Field:
    """The number of labels."""

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        labels = given.get("id2label", {"0": "", "1": ""})
        if not isinstance(labels, dict) or not labels:
            raise ValueError(f"id2label must be an object with labels; got {quoted(labels)}.")
        return {"num_classes": len(labels)}

    def write(config: VisionTransformerConfig) -> dict[str, Any]:
        return {"id2label": {str(index): f"LABEL_{index}" for index in range(config.num_classes or 0)}}

    return Field(("id2label",), read, write)


VIT_CLASSES = dataclasses.replace(
    VIT,
    architecture="ViTForImageClassification",
    fields=(*VIT.fields, _classes()),
    bases=("vit.", ""),
    body=(),
    rules=(*VIT.rules, *linear("classifier", "head")),
)


def _feed_forward() -> Field:
    """Activation, gate and width of the feed-forward.

    The width is a ratio times hidden_size; if gated, two thirds of that, rounded up to a multiple of 8.
    """
    width, gated = whole("hidden_size", "width"), flag("use_swiglu_ffn", "gated", False)
    ratio, activation = real("mlp_ratio", "ratio", 4), choice("hidden_act", "ff_activation", PLAIN, "gelu")

    def hidden(width: int, ratio: float, gated: bool) -> int:
        return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8 if gated else int(width * ratio)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        found, plain = read_all((width, ratio, gated), given), activation.read(given)
        d_ff = hidden(**found)
        if not 0 < d_ff <= MOST:
            raise ValueError(f"mlp_ratio must give a width of at most {MOST}; got mlp_ratio={found['ratio']}.")
        return {"d_ff": d_ff, "ff_activation": "swiglu" if found["gated"] else plain["ff_activation"]}

    def write(config: VisionTransformerConfig) -> dict[str, Any]:
        is_gated = config.ff_activation == "swiglu"
        # transformers has whole ratios only.
        whole_ratio = round(config.d_ff * (1.5 if is_gated else 1.0) / config.d_model)
        if hidden(config.d_model, float(whole_ratio), is_gated) != config.d_ff:
            raise ValueError(f"d_ff must be the width of a whole mlp_ratio; got d_ff={config.d_ff}.")
        written = {} if is_gated else activation.write(config)
        return written | {"use_swiglu_ffn": is_gated, "mlp_ratio": whole_ratio}

    return Field((*width.keys, *ratio.keys, *gated.keys, *activation.keys), read, write)


DINOV2_REGISTERS = dataclasses.replace(
    VIT,
    model_type="dinov2_with_registers",
    architecture="Dinov2WithRegistersModel",
    constants={**VIT.constants, "position_antialias": True},
    fields=(
        *_FIELDS,
        _feed_forward(),
        real("layer_norm_eps", "norm_eps", 1e-6),
        real("layerscale_value", "layer_scale", 1.0),
        whole("num_register_tokens", "num_register_tokens", 4),
    ),
    # The keys in the second line are for the class as a backbone in transformers.
    harmless=(
        *(*_HARMLESS, "drop_path_rate", "use_mask_token"),
        *("apply_layernorm", "reshape_hidden_states", "stage_names", "out_features", "out_indices"),
    ),
    bases=("", "dinov2_with_registers."),
    body=("dinov2_with_registers.",),
    rules=(
        *_EMBEDDINGS,
        Rule("{base}embeddings.register_tokens", ("registers",), "1 T D -> T D"),
        *within(
            *_LAYERS,
            _ATTENTION,
            norm("norm1", "around_attention.norm_in"),
            (Rule("layer_scale1.lambda1", ("around_attention.layer_scale",)),),
            linear("mlp.fc1", "feed_forward.up", gated=False),
            linear("mlp.fc2", "feed_forward.down", gated=False),
            linear("mlp.weights_in", "feed_forward.gate", "feed_forward.up", gated=True),
            linear("mlp.weights_out", "feed_forward.down", gated=True),
            norm("norm2", "around_feed_forward.norm_in"),
            (Rule("layer_scale2.lambda1", ("around_feed_forward.layer_scale",)),),
        ),
    ),
    buffers=("embeddings.mask_token",),
)
DINOV2 = dataclasses.replace(
    DINOV2_REGISTERS,
    model_type="dinov2",
    architecture="Dinov2Model",
    constants=VIT.constants,
    fields=DINOV2_REGISTERS.fields[:-1],
    bases=("", "dinov2."),
    body=("dinov2.",),
)
