"""The meaning of a config: the fields that decide which numbers a model computes, with defaults applied.

Configs with the same meaning describe the same model; `Family.write_config` compares meanings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attnax.config import BIASES, EncoderDecoderConfig, StackConfig

__all__ = ["meaning"]

_WITHOUT_EFFECT = {
    # how the numbers are computed and stored
    *("attention_block_size", "linear_attention_chunk_size", "rope_max_positions", "kv_cache_max_len", "scan_layers"),
    *("remat", "dtype", "param_dtype"),
    # of training only
    *("attention_dropout_rate", "dropout_rate", "router_jitter", "kernel_init", "embedding_init", "init_std"),
    "residual_init",
    "layer_pattern",  # its fields are compared layer by layer
}


def meaning(config: StackConfig | EncoderDecoderConfig) -> dict[str, Any]:
    """The fields that decide what a model computes; a field in which layers differ is a list, one entry a layer."""
    if isinstance(config, EncoderDecoderConfig):
        halves = {"encoder": meaning(config.encoder), "decoder": meaning(config.decoder)}
        fields = {f"{half}.{name}": value for half, found in halves.items() for name, value in found.items()}
        return fields | {"share_embeddings": config.share_embeddings}
    layers = [config.layer(index) for index in range(config.num_layers)]
    fields = {}
    for field in dataclasses.fields(config):
        if field.name not in _WITHOUT_EFFECT:
            values = [_effective(layer, field.name) for layer in layers]
            fields[field.name] = values[0] if all(value == values[0] for value in values) else values
    return fields


def _effective(config: Any, name: str) -> Any:
    """The value of a field as the model uses it; None where the model does not use it."""
    value = getattr(config, name)
    match name:
        case "num_kv_heads":
            return config.kv_heads
        case "head_dim":
            return config.head_size
        case "value_head_dim":
            return config.value_head_size
        case "attention_scale":
            return config.head_size**-0.5 if value is None else value
        case "ff_activation":
            return "silu" if value == "swish" else value
        case "attention_type":
            return value if value in ("linear", "lite") else "softmax"
        case "use_bias":
            return tuple(layer for layer in BIASES if config.has_bias(layer) and _has_layer(config, layer))
        case "rope_base" | "rope_fraction" | "rope_scaling":
            return value if config.pos_emb_type == "rope" else None
        case "layer_scale":  # the number is the initial value of a learned scale
            return None if value is None else "learned"
        case "position_offset":
            return value if config.pos_emb_type == "learned" else None
        case "relative_buckets" | "relative_max_distance":
            return value if config.pos_emb_type == "relative" else None
        case "top_k" | "num_shared_experts" | "router_type" | "router_renormalize":
            return None if config.num_experts is None else value
    return value


def _has_layer(config: Any, layer: str) -> bool:
    if layer == "router":
        return config.num_experts is not None
    if layer == "gate":
        return bool(config.attention_gate != "none")
    return layer != "norm" or config.norm_type == "layer"
