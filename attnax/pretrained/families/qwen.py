"""Qwen 2 and 3, and the mixture of experts of Qwen 3."""

from collections.abc import Mapping
from typing import Any

from attnax.config import TransformerConfig
from attnax.pretrained.errors import quoted
from attnax.pretrained.families import llama
from attnax.pretrained.fields import Field, biases, flag, only, read_all, whole, without
from attnax.pretrained.layer_fields import FULL, MOST_LAYERS, SLIDING, by_layer, windows
from attnax.pretrained.rope_fields import rope

__all__ = ["QWEN2", "QWEN3", "QWEN3_MOE"]


def _windows_last(given: Mapping[str, Any], count: int) -> list[str]:
    """The first layers attend all tokens, the last layers a window."""
    if not given.get("use_sliding_window", False) or given.get("sliding_window", 4096) is None:
        return [FULL] * count
    first = whole("max_window_layers", "first", 28).read(given)["first"]
    return [FULL if layer < first else SLIDING for layer in range(count)]


_WINDOWS = windows(_windows_last, 4096, switch="use_sliding_window")
QWEN2 = llama.decoder(
    "qwen2",
    "Qwen2",
    *(*llama.FIELDS, _WINDOWS, llama.GATED_SILU, llama.UNTIED, rope()),
    biases(always=("query", "key", "value")),
    harmless=("use_mrope",),
)

_HEAD_DIM = whole("head_dim", "head_dim", 128)
QWEN3 = llama.decoder(
    "qwen3",
    "Qwen3",
    *(*llama.FIELDS, _WINDOWS, llama.GATED_SILU, llama.UNTIED, rope(), _HEAD_DIM, llama.ATTENTION_BIAS),
    constants={"qk_norm": "head"},
    rules=(*llama.RULES, *llama.QK_NORMS),
)


def _sparse_layers() -> Field:
    """The layers that are mixtures: one in decoder_sparse_step, except for the layers of mlp_only_layers."""
    numbers = (
        whole("num_hidden_layers", "layers", least=1),
        whole("decoder_sparse_step", "step", 1, least=1),
        whole("moe_intermediate_size", "sparse", 768),
        whole("intermediate_size", "dense", 6144),
    )
    # Two names of one number; transformers 5 writes the second.
    counts = whole("num_experts", "num_experts", None), whole("num_local_experts", "num_experts", 128, least=1)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        found = read_all(numbers, given)
        num_experts = counts["num_experts" not in given].read(given)["num_experts"]
        skipped = given.get("mlp_only_layers") or []
        if not isinstance(skipped, list) or any(type(layer) is not int for layer in skipped):
            raise ValueError(f"mlp_only_layers must be a list of whole numbers; got {quoted(skipped)}.")
        dense_layers = set(skipped)
        sparse = {"num_experts": num_experts, "d_ff": found["sparse"]}
        dense = {"num_experts": None, "d_ff": found["dense"]}
        return by_layer(
            [
                dense if layer in dense_layers or (layer + 1) % found["step"] else sparse
                for layer in range(min(found["layers"], MOST_LAYERS))
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


QWEN3_MOE = llama.decoder(
    "qwen3_moe",
    "Qwen3Moe",
    *without(llama.FIELDS, "intermediate_size"),
    *(llama.GATED_SILU, llama.UNTIED, rope(), _HEAD_DIM, llama.ATTENTION_BIAS),
    _sparse_layers(),
    whole("num_experts_per_tok", "top_k", 8),
    flag("norm_topk_prob", "router_renormalize", False),
    only("use_sliding_window", False),
    like=QWEN3,
    harmless=("output_router_logits", "router_aux_loss_coef", "sliding_window", "max_window_layers"),
    rules=(*QWEN3.rules, *llama.experts("mlp", "gate_proj", "up_proj", "down_proj")),
)
