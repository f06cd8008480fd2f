"""Mistral: Llama in which a token attends a window."""

from attnax.pretrained.families import llama
from attnax.pretrained.fields import biases, whole
from attnax.pretrained.rope_fields import rope

__all__ = ["MISTRAL"]

MISTRAL = llama.decoder(
    "mistral",
    "Mistral",
    *(*llama.FIELDS, llama.HEAD_DIM, llama.GATED_SILU, llama.UNTIED, biases(), rope()),
    whole("sliding_window", "attention_window", 4096, null=True),
)
