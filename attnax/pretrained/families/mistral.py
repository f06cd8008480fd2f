"""Mistral: Llama in which a token attends a window."""

from attnax.pretrained.families.llama import FIELDS, GATED_SILU, HEAD_DIM, UNTIED, decoder
from attnax.pretrained.fields import biases, whole
from attnax.pretrained.rope_fields import rope

__all__ = ["MISTRAL"]

MISTRAL = decoder(
    "mistral",
    "Mistral",
    *(*FIELDS, HEAD_DIM, GATED_SILU, UNTIED, biases(), rope()),
    whole("sliding_window", "attention_window", 4096, null=True),
)
