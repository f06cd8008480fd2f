"""Mixtral: Mistral whose feed-forwards are mixtures of experts."""

import dataclasses

from attnax.pretrained.families.llama import FIELDS, RULES, experts
from attnax.pretrained.families.mistral import MISTRAL
from attnax.pretrained.fields import GATED, biases, choice, flag, rope, whole

__all__ = ["MIXTRAL"]

MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    aliases=("MixtralModel",),
    fields=(
        *FIELDS,
        whole("head_dim", "head_dim", None),
        whole("sliding_window", "attention_window", None),
        whole("num_local_experts", "num_experts", 8, least=1),
        whole("num_experts_per_tok", "top_k", 2),
        choice("hidden_act", "ff_activation", GATED, "silu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        biases(),
        rope(1e6),
    ),
    harmless=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    rules=(*RULES, *experts("block_sparse_moe", "w1", "w3", "w2")),
)
