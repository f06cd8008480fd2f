"""Layers on Flax NNX."""

from attnax.nn._token_scalars import TokenScalars
from attnax.nn.attention import KeysValues, MultiHeadAttention
from attnax.nn.axes import parameter_axes, parameter_shardings
from attnax.nn.blocks import DecoderBlock, EncoderBlock, Output
from attnax.nn.depth import first_layers, with_scan_layers
from attnax.nn.dropout import Dropout
from attnax.nn.embeddings import LearnedPositionalEmbedding, PositionalEncoding, TokenEmbedding, TransformerEmbedding
from attnax.nn.feedforward import FeedForward
from attnax.nn.heads import attend
from attnax.nn.moe import MixtureOfExperts
from attnax.nn.norms import RMSNorm, create_norm
from attnax.nn.patches import PatchEmbedding
from attnax.nn.probe import Probe, Probed
from attnax.nn.rope import RotaryEmbedding, apply_rope, rope_cos_sin_from_positions, rope_cos_sin_table, rope_inv_freq
from attnax.nn.stack import Stack

__all__ = [
    "DecoderBlock",
    "Dropout",
    "EncoderBlock",
    "FeedForward",
    "KeysValues",
    "LearnedPositionalEmbedding",
    "MixtureOfExperts",
    "MultiHeadAttention",
    "Output",
    "PatchEmbedding",
    "PositionalEncoding",
    "Probe",
    "Probed",
    "RMSNorm",
    "RotaryEmbedding",
    "Stack",
    "TokenEmbedding",
    "TokenScalars",
    "TransformerEmbedding",
    "apply_rope",
    "attend",
    "create_norm",
    "first_layers",
    "parameter_axes",
    "parameter_shardings",
    "rope_cos_sin_from_positions",
    "rope_cos_sin_table",
    "rope_inv_freq",
    "with_scan_layers",
]
