"""Attnax: attention as a function, and the transformers built on it, for JAX and Flax NNX.

Names are loaded when first used, so `import attnax` loads neither Flax nor any kernel.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

__version__ = "0.3.0.dev0"

with lazy_imports(globals()):
    from attnax import distributed as distributed
    from attnax import generation as generation
    from attnax import kernels as kernels
    from attnax import masks as masks
    from attnax import models as models
    from attnax import nn as nn
    from attnax import pretrained as pretrained
    from attnax import reference as reference
    from attnax import sharding as sharding
    from attnax import text as text
    from attnax import training as training
    from attnax import typing as typing
    from attnax.cache import KVLayerCache as KVLayerCache
    from attnax.cache import LinearLayerCache as LinearLayerCache
    from attnax.cache import LinearState as LinearState
    from attnax.cache import RingKVCache as RingKVCache
    from attnax.cache import init_decoder_kv_caches as init_decoder_kv_caches
    from attnax.cache import init_decoder_kv_caches_from_config as init_decoder_kv_caches_from_config
    from attnax.cache import init_kv_layer_cache as init_kv_layer_cache
    from attnax.cache import init_linear_layer_cache as init_linear_layer_cache
    from attnax.cache import init_ring_kv_cache as init_ring_kv_cache
    from attnax.cache import update_kv_layer_cache as update_kv_layer_cache
    from attnax.config import AttentionType as AttentionType
    from attnax.config import BlockConfig as BlockConfig
    from attnax.config import EncoderDecoderConfig as EncoderDecoderConfig
    from attnax.config import FfActivation as FfActivation
    from attnax.config import NormKind as NormKind
    from attnax.config import Pool as Pool
    from attnax.config import PosEmbType as PosEmbType
    from attnax.config import RopeScaling as RopeScaling
    from attnax.config import TransformerConfig as TransformerConfig
    from attnax.config import VisionTransformerConfig as VisionTransformerConfig
    from attnax.generation.loop import Generation as Generation
    from attnax.generation.samplers import Sampler as Sampler
    from attnax.kernels.cached import cached_attention as cached_attention
    from attnax.kernels.flash import flash_attention as flash_attention
    from attnax.kernels.flash import memory_efficient_attention as memory_efficient_attention
    from attnax.kernels.flash import pallas_flash_attention as pallas_flash_attention
    from attnax.kernels.flash import why_not_cudnn as why_not_cudnn
    from attnax.kernels.flash import why_not_pallas as why_not_pallas
    from attnax.kernels.flash import why_not_tpu as why_not_tpu
    from attnax.kernels.linear import linear_attention as linear_attention
    from attnax.kernels.lite import lite_attention as lite_attention
    from attnax.kernels.merge import merge_attention as merge_attention
    from attnax.kernels.nnx_adapter import nnx_attention_fn as nnx_attention_fn
    from attnax.kernels.paged import paged_attention as paged_attention
    from attnax.kernels.ring import ring_attention as ring_attention
    from attnax.kernels.ring import ring_attention_reference as ring_attention_reference
    from attnax.kernels.ring import zigzag_order as zigzag_order
    from attnax.kernels.score_mods import additive_bias_mod as additive_bias_mod
    from attnax.kernels.score_mods import alibi_mod as alibi_mod
    from attnax.kernels.score_mods import alibi_slopes as alibi_slopes
    from attnax.kernels.score_mods import causal_mod as causal_mod
    from attnax.kernels.score_mods import compose_score_mods as compose_score_mods
    from attnax.kernels.score_mods import document_mask_mod as document_mask_mod
    from attnax.kernels.score_mods import mask_mod_to_boolean_mask as mask_mod_to_boolean_mask
    from attnax.kernels.score_mods import mask_mod_to_score_mod as mask_mod_to_score_mod
    from attnax.kernels.score_mods import prefix_lm_mod as prefix_lm_mod
    from attnax.kernels.score_mods import relative_bias_mod as relative_bias_mod
    from attnax.kernels.score_mods import relative_table_mod as relative_table_mod
    from attnax.kernels.score_mods import sliding_window_mod as sliding_window_mod
    from attnax.kernels.score_mods import soft_cap_mod as soft_cap_mod
    from attnax.kernels.standard import standard_attention as standard_attention
    from attnax.masks import Mask as Mask
    from attnax.masks import combine_masks as combine_masks
    from attnax.masks import make_causal_mask as make_causal_mask
    from attnax.masks import make_document_mask as make_document_mask
    from attnax.masks import make_padding_mask as make_padding_mask
    from attnax.masks import make_sliding_window_mask as make_sliding_window_mask
    from attnax.models.lm import TransformerLM as TransformerLM
    from attnax.models.seq2seq import Transformer as Transformer
    from attnax.models.transformer import TransformerDecoder as TransformerDecoder
    from attnax.models.transformer import TransformerEncoder as TransformerEncoder
    from attnax.models.vision import VisionTransformer as VisionTransformer
    from attnax.nn.attention import MultiHeadAttention as MultiHeadAttention
    from attnax.nn.blocks import DecoderBlock as DecoderBlock
    from attnax.nn.blocks import EncoderBlock as EncoderBlock
    from attnax.nn.embeddings import LearnedPositionalEmbedding as LearnedPositionalEmbedding
    from attnax.nn.embeddings import PositionalEncoding as PositionalEncoding
    from attnax.nn.embeddings import TokenEmbedding as TokenEmbedding
    from attnax.nn.feedforward import FeedForward as FeedForward
    from attnax.nn.moe import MixtureOfExperts as MixtureOfExperts
    from attnax.nn.norms import RMSNorm as RMSNorm
    from attnax.nn.norms import create_norm as create_norm
    from attnax.nn.patches import PatchEmbedding as PatchEmbedding
    from attnax.nn.rope import RotaryEmbedding as RotaryEmbedding
    from attnax.nn.rope import apply_rope as apply_rope
    from attnax.nn.rope import rope_cos_sin_from_positions as rope_cos_sin_from_positions
    from attnax.nn.rope import rope_cos_sin_table as rope_cos_sin_table
    from attnax.nn.rope import rope_inv_freq as rope_inv_freq
    from attnax.paged_cache import PagedKVCache as PagedKVCache
    from attnax.paged_cache import allocate_blocks as allocate_blocks
    from attnax.paged_cache import allocate_rows as allocate_rows
    from attnax.paged_cache import append_kv as append_kv
    from attnax.paged_cache import append_rows as append_rows
    from attnax.paged_cache import free_rows as free_rows
    from attnax.paged_cache import gather_kv as gather_kv
    from attnax.paged_cache import gather_rows as gather_rows
    from attnax.paged_cache import init_paged_kv_cache as init_paged_kv_cache
    from attnax.paged_cache import init_paged_kv_caches_from_config as init_paged_kv_caches_from_config
    from attnax.pretrained.caches import load_caches as load_caches
    from attnax.pretrained.caches import save_caches as save_caches
    from attnax.sharding import Layout as Layout
    from attnax.typing import AttentionFn as AttentionFn
    from attnax.typing import MaskMod as MaskMod
    from attnax.typing import ScoreMod as ScoreMod
