"""Mistral, a Llama with sliding windows, and Mixtral, with mixtures of experts as feed-forwards."""

from attnax.pretrained.families import llama
from attnax.pretrained.fields import biases, whole
from attnax.pretrained.rope_fields import rope

__all__ = ["MISTRAL", "MIXTRAL"]

MISTRAL = llama.decoder(
    "mistral",
    "Mistral",
    *(*llama.FIELDS, llama.HEAD_DIM, llama.GATED_SILU, llama.UNTIED, biases(), rope()),
    whole("sliding_window", "attention_window", 4096, null=True),
)
MIXTRAL = llama.decoder(
    "mixtral",
    "Mixtral",
    *(*llama.FIELDS, llama.HEAD_DIM, llama.GATED_SILU, llama.UNTIED, biases(), rope(1e6)),
    whole("sliding_window", "attention_window", None),
    whole("num_local_experts", "num_experts", 8, least=1),
    whole("num_experts_per_tok", "top_k", 2),
    harmless=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    rules=(*llama.RULES, *llama.experts("block_sparse_moe", "w1", "w3", "w2")),
)
