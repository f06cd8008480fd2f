"""Whole models."""

from attnax.models.lm import TransformerLM
from attnax.models.transformer import TransformerDecoder

__all__ = ["TransformerDecoder", "TransformerLM"]
