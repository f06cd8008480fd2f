"""Whole models."""

from attnax.models.lm import TransformerLM
from attnax.models.seq2seq import Transformer
from attnax.models.transformer import TransformerDecoder, TransformerEncoder

__all__ = ["Transformer", "TransformerDecoder", "TransformerEncoder", "TransformerLM"]
