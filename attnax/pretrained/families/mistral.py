"""Mistral: Llama in whose layers a token sees a window."""

import dataclasses

from attnax.pretrained.families.llama import FIELDS, LLAMA
from attnax.pretrained.fields import GATED, biases, choice, flag, rope, whole

__all__ = ["MISTRAL"]

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    aliases=("MistralModel",),
    fields=(
        *FIELDS,
        whole("head_dim", "head_dim", None),
        whole("sliding_window", "attention_window", 4096, null=True),
        choice("hidden_act", "ff_activation", GATED, "silu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        biases(),
        rope(),
    ),
    harmless=(),
)
