"""Whole models."""

from attnax.models.lm import TransformerLM
from attnax.models.masked import MaskedLM
from attnax.models.sentence import SentenceEncoder
from attnax.models.seq2seq import Transformer
from attnax.models.transformer import TransformerDecoder, TransformerEncoder
from attnax.models.vision import VisionTransformer, with_image_size

__all__ = [
    "MaskedLM",
    "SentenceEncoder",
    "Transformer",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerLM",
    "VisionTransformer",
    "with_image_size",
]
