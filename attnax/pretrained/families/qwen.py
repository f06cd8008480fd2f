"""Qwen 2 and 3, and the mixture of experts of Qwen 3."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnax.config import TransformerConfig
from attnax.pretrained.errors import quoted
from attnax.pretrained.families.llama import FIELDS, LLAMA, QK_NORMS, RULES, experts
from attnax.pretrained.fields import (
    FULL,
    GATED,
    MOST_LAYERS,
    SLIDING,
    Field,
    biases,
    choice,
    flag,
    layer_fields,
    layers,
    only,
    rope,
    whole,
)

__all__ = ["QWEN2", "QWEN3", "QWEN3_MOE"]


def _windows_last(theirs: Mapping[str, Any], count: int) -> list[str]:
    """The first layers see everything."""
    if not theirs.get("use_sliding_window", False) or theirs.get("sliding_window", 4096) is None:
        return [FULL] * count
    first = whole("max_window_layers", "first", 28).read(theirs)["first"]
    return [FULL if layer < first else SLIDING for layer in range(count)]


_FIELDS = (
    *FIELDS,
    layers(_windows_last, 4096, switch="use_sliding_window"),
    choice("hidden_act", "ff_activation", GATED, "silu"),
    flag("tie_word_embeddings", "tie_embeddings", False),
    rope(),
)
QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    aliases=("Qwen2Model",),
    fields=(*_FIELDS, biases(always=("query", "key", "value"))),
    harmless=("use_mrope",),
)

_QWEN3_FIELDS = (whole("head_dim", "head_dim", 128), biases(attention_bias=(False, ("query", "key", "value", "out"))))
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    aliases=("Qwen3Model",),
    constants={**LLAMA.constants, "qk_norm": "head"},
    fields=(*_FIELDS, *_QWEN3_FIELDS),
    harmless=(),
    rules=(*RULES, *QK_NORMS),
)


def _sparse_layers() -> Field:
    """Which layers are mixtures: every decoder_sparse_step-th one, but for those of mlp_only_layers."""
    numbers = (
        whole("num_hidden_layers", "layers", least=1),
        whole("decoder_sparse_step", "step", 1, least=1),
        whole("moe_intermediate_size", "sparse", 768),
        whole("intermediate_size", "dense", 6144),
    )
    # Two names, of which transformers 5 writes the second.
    counts = whole("num_experts", "num_experts", None), whole("num_local_experts", "num_experts", 128, least=1)

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for field in numbers:
            said |= field.read(theirs)
        experts = counts["num_experts" not in theirs].read(theirs)["num_experts"]
        skipped = theirs.get("mlp_only_layers") or []
        if not isinstance(skipped, list) or any(type(layer) is not int for layer in skipped):
            raise ValueError(f"mlp_only_layers must be a list of whole numbers; got {quoted(skipped)}.")
        skipped = set(skipped)
        sparse = {"num_experts": experts, "d_ff": said["sparse"]}
        dense = {"num_experts": None, "d_ff": said["dense"]}
        return layer_fields(
            [
                dense if layer in skipped or (layer + 1) % said["step"] else sparse
                for layer in range(min(said["layers"], MOST_LAYERS))
            ]
        )

    def write(config: TransformerConfig) -> dict[str, Any]:
        blocks = [config.layer(index) for index in range(config.num_layers)]
        sparse = [block for block in blocks if block.num_experts is not None]
        dense = [block for block in blocks if block.num_experts is None]
        if not sparse:
            raise ValueError("num_experts must be a number in some layer; got num_experts=None.")
        return {
            "num_experts": sparse[0].num_experts,
            "moe_intermediate_size": sparse[0].d_ff,
            "intermediate_size": (dense or sparse)[0].d_ff,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index, block in enumerate(blocks) if block.num_experts is None],
        }

    keys = tuple(key for field in (*numbers, *counts) for key in field.keys)
    return Field((*keys, "mlp_only_layers"), read, write)


QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    aliases=("Qwen3MoeModel",),
    fields=(
        *(field for field in FIELDS if field.keys != ("intermediate_size",)),
        _sparse_layers(),
        whole("num_experts_per_tok", "top_k", 8),
        flag("norm_topk_prob", "router_renormalize", False),
        only("use_sliding_window", False),
        choice("hidden_act", "ff_activation", GATED, "silu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        rope(),
        *_QWEN3_FIELDS,
    ),
    harmless=("output_router_logits", "router_aux_loss_coef", "sliding_window", "max_window_layers"),
    rules=(*QWEN3.rules, *experts("mlp", "gate_proj", "up_proj", "down_proj")),
)
