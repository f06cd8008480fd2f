"""Gemma 1, 2 and 3 (text)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnax.config import BlockConfig, TransformerConfig
from attnax.pretrained.errors import quoted
from attnax.pretrained.families.llama import ATTENTION, FIELDS, GATED_FEED_FORWARD, HEAD, LLAMA, QK_NORMS
from attnax.pretrained.family import norm, within
from attnax.pretrained.fields import (
    FULL,
    ROPE_KEYS,
    SLIDING,
    Field,
    alternate_layers,
    biases,
    choice,
    flag,
    layer_fields,
    layers,
    only,
    read_layer_types,
    read_rope,
    real,
    refuse_other_rope,
    rope,
    rope_said,
    whole,
    write_rope_scaling,
)

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]


def _width() -> Field:
    """The width, whose root multiplies the embeddings."""
    width = whole("hidden_size", "d_model")

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        ours = width.read(theirs)
        return ours | {"embedding_scale": ours["d_model"] ** 0.5}

    return Field(width.keys, read, width.write)


def _scale() -> Field:
    """What the scores are divided by the root of."""
    scalar = real("query_pre_attn_scalar", "scalar", 256)

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        value = scalar.read(theirs)["scalar"]
        if value <= 0.0:
            raise ValueError(f"query_pre_attn_scalar must be above 0; got query_pre_attn_scalar={value}.")
        return {"attention_scale": value**-0.5}

    def write(config: BlockConfig) -> dict[str, Any]:
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        value = scale**-2
        # transformers takes a whole number, and the root of it gives the scale again.
        return {"query_pre_attn_scalar": round(value) if abs(value - round(value)) < 1e-6 * value else value}

    return Field(scalar.keys, read, write)


def _activation() -> Field:
    """The tanh form of gelu, which the first files call by the name of the exact one."""
    names = choice("hidden_act", "ff_activation", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"})

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        names.read({"hidden_act": "gelu_pytorch_tanh", **theirs})
        return {}

    return Field(names.keys, read, lambda _: {})


_FIELDS = (
    *(field for field in FIELDS if field.keys != ("hidden_size",)),
    _width(),
    whole("head_dim", "head_dim", 256),
    flag("tie_word_embeddings", "tie_embeddings", True),
    biases(attention_bias=(False, ("query", "key", "value", "out"))),
)
GEMMA = dataclasses.replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    aliases=("GemmaModel",),
    constants={**LLAMA.constants, "norm_offset": 1.0, "ff_activation": "geglu_tanh"},
    fields=(
        *_FIELDS,
        _activation(),
        rope(),
        only("use_bidirectional_attention", None),
    ),
    harmless=("hidden_activation",),  # as in transformers
)


_GEMMA2_FIELDS = (
    *_FIELDS,
    only("hidden_activation", "gelu_pytorch_tanh"),
    _scale(),
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    aliases=("Gemma2Model",),
    constants={**GEMMA.constants, "norm_placement": "sandwich"},
    fields=(
        *_GEMMA2_FIELDS,
        layers(alternate_layers, 4096),
        real("attn_logit_softcapping", "attention_soft_cap", 50.0, null=True),
        real("final_logit_softcapping", "logit_soft_cap", 30.0, null=True),
        rope(),
        only("use_bidirectional_attention", None),
    ),
    harmless=("hidden_act", "cache_implementation"),
    rules=(
        *within(
            "{base}layers.{layer}",
            "decoder.stack.blocks.{layer}",
            ATTENTION,
            GATED_FEED_FORWARD,
            norm("input_layernorm", "around_attention.norm_in"),
            norm("post_attention_layernorm", "around_attention.norm_branch"),
            norm("pre_feedforward_layernorm", "around_feed_forward.norm_in"),
            norm("post_feedforward_layernorm", "around_feed_forward.norm_branch"),
        ),
        *HEAD,
    ),
)


def _local_and_global() -> Field:
    """Windows and rotary positions of the two kinds of layers: every sixth one is global."""
    pattern = whole("sliding_window_pattern", "pattern", 6, least=1)
    window = whole("sliding_window", "attention_window", 4096, least=1)

    def every_sixth(theirs: Mapping[str, Any], count: int) -> list[str]:
        period = pattern.read(theirs)["pattern"]
        return [SLIDING if (layer + 1) % period else FULL for layer in range(count)]

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        types = read_layer_types(theirs, every_sixth)
        said, older = (rope_said(theirs, key) for key in ("rope_parameters", "rope_scaling"))  # of transformers 5 and 4
        if any(not isinstance(value, dict | None) for value in said.values()):
            raise ValueError(f"rope_parameters must be an object of objects; got {quoted(said)}.")
        if said.keys() - {FULL, SLIDING}:
            raise ValueError(f"rope_parameters must be those of {FULL} and {SLIDING}; got {quoted(list(said))}.")
        longest = theirs.get("max_position_embeddings")
        plain, base = said.get(FULL) or {}, theirs.get("rope_theta", 1e6)
        full = read_rope({**plain, **older}, base, longest)
        if said and older:
            refuse_other_rope(full, read_rope(plain, base, longest))
        local = read_rope(said.get(SLIDING) or {}, theirs.get("rope_local_base_freq", 1e4), longest)
        return layer_fields([full if kind == FULL else local | window.read(theirs) for kind in types])

    def write(config: TransformerConfig) -> dict[str, Any]:
        blocks = [config.layer(index) for index in range(config.num_layers)]
        full = next((block for block in blocks if block.attention_window is None), blocks[0])
        local = next((block for block in blocks if block.attention_window is not None), blocks[0])
        return {
            "layer_types": [FULL if block.attention_window is None else SLIDING for block in blocks],
            "sliding_window": local.attention_window or 4096,
            "rope_parameters": {
                kind: {
                    "rope_theta": block.rope_base,
                    **(write_rope_scaling(block.rope_scaling) or {"rope_type": "default"}),
                }
                for kind, block in ((FULL, full), (SLIDING, local))
            },
        }

    keys = ("layer_types", "num_hidden_layers", "sliding_window", "sliding_window_pattern", *ROPE_KEYS)
    return Field((*keys, "rope_theta", "rope_local_base_freq"), read, write)


GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    aliases=("Gemma3TextModel",),
    constants={**GEMMA2.constants, "qk_norm": "head"},
    fields=(
        *_GEMMA2_FIELDS,
        _local_and_global(),
        only("attn_logit_softcapping", None),  # transformers has the field, and does nothing with it
        real("final_logit_softcapping", "logit_soft_cap", None),
        only("use_bidirectional_attention", False),
    ),
    harmless=("cache_implementation", "_sliding_window_pattern"),
    rules=(*GEMMA2.rules, *QK_NORMS),
)
