"""Layers on Flax NNX."""

from attnax.nn.attention import MultiHeadAttention
from attnax.nn.blocks import EncoderBlock, Output
from attnax.nn.dropout import Dropout
from attnax.nn.embeddings import LearnedPositionalEmbedding, PositionalEncoding, TokenEmbedding
from attnax.nn.feedforward import FeedForward
from attnax.nn.norms import RMSNorm, create_norm
from attnax.nn.rope import (
    RotaryEmbedding,
    apply_rope,
    rope_cos_sin_from_positions,
    rope_cos_sin_table,
    rope_inv_freq,
)

__all__ = [
    "Dropout",
    "EncoderBlock",
    "FeedForward",
    "LearnedPositionalEmbedding",
    "MultiHeadAttention",
    "Output",
    "PositionalEncoding",
    "RMSNorm",
    "RotaryEmbedding",
    "TokenEmbedding",
    "apply_rope",
    "create_norm",
    "rope_cos_sin_from_positions",
    "rope_cos_sin_table",
    "rope_inv_freq",
]
