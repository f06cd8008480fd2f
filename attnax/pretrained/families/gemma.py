"""Gemma 1, 2 and 3 (text)."""

from collections.abc import Mapping
from typing import Any

from attnax.config import BlockConfig, TransformerConfig
from attnax.pretrained.errors import quoted
from attnax.pretrained.families import llama
from attnax.pretrained.fields import Field, choice, flag, only, real, whole, without
from attnax.pretrained.layer_fields import FULL, SLIDING, alternate_layers, by_layer, layer_types, windows
from attnax.pretrained.rope_fields import (
    ROPE_KEYS,
    read_rope,
    refuse_other_rope,
    rope,
    rope_object,
    write_rope_scaling,
)
from attnax.pretrained.rules import norm

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]


def _width() -> Field:
    """The width; its square root multiplies the embeddings."""
    width = whole("hidden_size", "d_model")

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        fields = width.read(given)
        return fields | {"embedding_scale": fields["d_model"] ** 0.5}

    return Field(width.keys, read, width.write)


def _scale() -> Field:
    """The number whose square root divides the scores."""
    scalar = real("query_pre_attn_scalar", "scalar", 256)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        value = scalar.read(given)["scalar"]
        if value <= 0.0:
            raise ValueError(f"query_pre_attn_scalar must be above 0; got query_pre_attn_scalar={value}.")
        return {"attention_scale": value**-0.5}

    def write(config: BlockConfig) -> dict[str, Any]:
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        value = scale**-2
        # transformers takes a whole number here; rounding restores it from the scale.
        return {"query_pre_attn_scalar": round(value) if abs(value - round(value)) < 1e-6 * value else value}

    return Field(scalar.keys, read, write)


def _activation() -> Field:
    """The tanh form of GELU; the first files name the exact form but mean the tanh form."""
    names = choice("hidden_act", "ff_activation", {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"})

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        names.read({"hidden_act": "gelu_pytorch_tanh", **given})
        return {}

    return Field(names.keys, read, lambda _: {})


_FIELDS = (
    *without(llama.FIELDS, "hidden_size"),
    _width(),
    whole("head_dim", "head_dim", 256),
    flag("tie_word_embeddings", "tie_embeddings", True),
    llama.ATTENTION_BIAS,
)
GEMMA = llama.decoder(
    "gemma",
    "Gemma",
    *_FIELDS,
    _activation(),
    rope(),
    only("use_bidirectional_attention", None),
    constants={"norm_offset": 1.0, "ff_activation": "geglu_tanh"},
    harmless=("hidden_activation",),  # transformers ignores it too
)

_GEMMA2_FIELDS = (*_FIELDS, only("hidden_activation", "gelu_pytorch_tanh"), _scale())
GEMMA2 = llama.decoder(
    "gemma2",
    "Gemma2",
    *_GEMMA2_FIELDS,
    windows(alternate_layers, 4096),
    real("attn_logit_softcapping", "attention_soft_cap", 50.0, null=True),
    real("final_logit_softcapping", "logit_soft_cap", 30.0, null=True),
    rope(),
    only("use_bidirectional_attention", None),
    like=GEMMA,
    constants={"norm_placement": "sandwich"},
    harmless=("hidden_act", "cache_implementation"),
    rules=(
        *llama.in_layers(
            llama.ATTENTION,
            llama.GATED_FEED_FORWARD,
            norm("input_layernorm", "around_attention.norm_in"),
            norm("post_attention_layernorm", "around_attention.norm_branch"),
            norm("pre_feedforward_layernorm", "around_feed_forward.norm_in"),
            norm("post_feedforward_layernorm", "around_feed_forward.norm_branch"),
        ),
        *llama.HEAD,
    ),
)


def _local_and_global() -> Field:
    """Windows and rotary positions of the two kinds of layers; one layer in six is global."""
    pattern = whole("sliding_window_pattern", "pattern", 6, least=1)
    window = whole("sliding_window", "attention_window", 4096, least=1)

    def every_sixth(given: Mapping[str, Any], count: int) -> list[str]:
        period = pattern.read(given)["pattern"]
        return [SLIDING if (layer + 1) % period else FULL for layer in range(count)]

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        types = layer_types(given, every_sixth)
        # The keys of transformers 5 and 4.
        parameters, older = (rope_object(given, key) for key in ("rope_parameters", "rope_scaling"))
        if any(not isinstance(value, dict | None) for value in parameters.values()):
            raise ValueError(f"rope_parameters must be an object of objects; got {quoted(parameters)}.")
        if parameters.keys() - {FULL, SLIDING}:
            raise ValueError(f"rope_parameters must be of {FULL} and {SLIDING}; got {quoted(list(parameters))}.")
        longest = given.get("max_position_embeddings")
        plain, base = parameters.get(FULL) or {}, given.get("rope_theta", 1e6)
        full = read_rope({**plain, **older}, base, longest)
        if parameters and older:
            refuse_other_rope(full, read_rope(plain, base, longest))
        local = read_rope(parameters.get(SLIDING) or {}, given.get("rope_local_base_freq", 1e4), longest)
        return by_layer([full if kind == FULL else local | window.read(given) for kind in types])

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


GEMMA3 = llama.decoder(
    "gemma3_text",
    "Gemma3",
    *_GEMMA2_FIELDS,
    _local_and_global(),
    only("attn_logit_softcapping", None),  # transformers has the field and does not use it
    real("final_logit_softcapping", "logit_soft_cap", None),
    only("use_bidirectional_attention", False),
    like=GEMMA2,
    constants={"qk_norm": "head"},
    harmless=("cache_implementation", "_sliding_window_pattern"),
    rules=(*GEMMA2.rules, *llama.QK_NORMS),
    aliases=("Gemma3TextModel",),
)
