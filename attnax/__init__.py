"""Attnax: attention as a function, and the transformers built on it, for JAX and Flax NNX.

Names are loaded when first used, so `import attnax` loads neither Flax nor any kernel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

if TYPE_CHECKING:
    from attnax import masks as masks
    from attnax import reference as reference
    from attnax.cache import KVLayerCache as KVLayerCache
    from attnax.cache import init_decoder_kv_caches as init_decoder_kv_caches
    from attnax.cache import init_decoder_kv_caches_from_config as init_decoder_kv_caches_from_config
    from attnax.cache import init_kv_layer_cache as init_kv_layer_cache
    from attnax.cache import update_kv_layer_cache as update_kv_layer_cache
    from attnax.config import BlockConfig as BlockConfig
    from attnax.config import FfActivation as FfActivation
    from attnax.config import NormKind as NormKind
    from attnax.config import PosEmbType as PosEmbType
    from attnax.config import TransformerConfig as TransformerConfig
    from attnax.generation.loop import Generation as Generation
    from attnax.generation.samplers import Sampler as Sampler
    from attnax.kernels.flash import flash_attention as flash_attention
    from attnax.kernels.flash import memory_efficient_attention as memory_efficient_attention
    from attnax.kernels.score_mods import compose_score_mods as compose_score_mods
    from attnax.kernels.standard import standard_attention as standard_attention
    from attnax.models.lm import TransformerLM as TransformerLM
    from attnax.models.transformer import TransformerDecoder as TransformerDecoder
    from attnax.nn.attention import MultiHeadAttention as MultiHeadAttention
    from attnax.nn.blocks import EncoderBlock as EncoderBlock
    from attnax.nn.embeddings import LearnedPositionalEmbedding as LearnedPositionalEmbedding
    from attnax.nn.embeddings import PositionalEncoding as PositionalEncoding
    from attnax.nn.embeddings import TokenEmbedding as TokenEmbedding
    from attnax.nn.feedforward import FeedForward as FeedForward
    from attnax.nn.norms import RMSNorm as RMSNorm
    from attnax.nn.norms import create_norm as create_norm
    from attnax.nn.rope import RotaryEmbedding as RotaryEmbedding
    from attnax.nn.rope import apply_rope as apply_rope
    from attnax.nn.rope import rope_cos_sin_from_positions as rope_cos_sin_from_positions
    from attnax.nn.rope import rope_cos_sin_table as rope_cos_sin_table
    from attnax.nn.rope import rope_inv_freq as rope_inv_freq
    from attnax.typing import AttentionFn as AttentionFn
    from attnax.typing import MaskMod as MaskMod
    from attnax.typing import ScoreMod as ScoreMod

_HOMES = {
    "cache": (
        "KVLayerCache",
        "init_decoder_kv_caches",
        "init_decoder_kv_caches_from_config",
        "init_kv_layer_cache",
        "update_kv_layer_cache",
    ),
    "config": ("BlockConfig", "FfActivation", "NormKind", "PosEmbType", "TransformerConfig"),
    "generation": ("Generation", "Sampler"),
    "kernels.score_mods": ("compose_score_mods",),
    "kernels.flash": ("flash_attention", "memory_efficient_attention"),
    "kernels.standard": ("standard_attention",),
    "models": ("TransformerDecoder", "TransformerLM"),
    "nn": (
        "EncoderBlock",
        "FeedForward",
        "LearnedPositionalEmbedding",
        "MultiHeadAttention",
        "PositionalEncoding",
        "RMSNorm",
        "RotaryEmbedding",
        "TokenEmbedding",
        "apply_rope",
        "create_norm",
        "rope_cos_sin_from_positions",
        "rope_cos_sin_table",
        "rope_inv_freq",
    ),
    "typing": ("AttentionFn", "MaskMod", "ScoreMod"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("generation", "kernels", "masks", "models", "nn", "reference", "training", "typing")

# Not `training`, which needs the extra of that name: `from attnax import *` must work without it.
__all__ = sorted([*_HOME_OF, *(name for name in _SUBMODULES if name != "training")])  # noqa: PLE0605  # the TYPE_CHECKING imports above name them


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"attnax.{_HOME_OF[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"attnax.{name}")
    raise AttributeError(f"module 'attnax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
