"""Mixtral: Mistral in which each feed-forward is a mixture of experts."""

from attnax.pretrained.families.llama import FIELDS, GATED_SILU, HEAD_DIM, RULES, UNTIED, decoder, experts
from attnax.pretrained.fields import biases, whole
from attnax.pretrained.rope_fields import rope

__all__ = ["MIXTRAL"]

MIXTRAL = decoder(
    "mixtral",
    "Mixtral",
    *(*FIELDS, HEAD_DIM, GATED_SILU, UNTIED, biases(), rope(1e6)),
    whole("sliding_window", "attention_window", None),
    whole("num_local_experts", "num_experts", 8, least=1),
    whole("num_experts_per_tok", "top_k", 2),
    harmless=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    rules=(*RULES, *experts("block_sparse_moe", "w1", "w3", "w2")),
)
