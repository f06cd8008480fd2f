"""Attention functions that obey `attnax.typing.AttentionFn`; they need only jax and numpy."""

from attnax.kernels.cached import cached_attention
from attnax.kernels.flash import (
    flash_attention,
    memory_efficient_attention,
    pallas_flash_attention,
    why_not_cudnn,
    why_not_pallas,
)
from attnax.kernels.linear import linear_attention
from attnax.kernels.lite import lite_attention
from attnax.kernels.nnx_adapter import nnx_attention_fn
from attnax.kernels.paged import paged_attention
from attnax.kernels.ring import ring_attention, ring_attention_reference, zigzag_order
from attnax.kernels.standard import standard_attention

__all__ = [
    "cached_attention",
    "flash_attention",
    "linear_attention",
    "lite_attention",
    "memory_efficient_attention",
    "nnx_attention_fn",
    "paged_attention",
    "pallas_flash_attention",
    "ring_attention",
    "ring_attention_reference",
    "standard_attention",
    "why_not_cudnn",
    "why_not_pallas",
    "zigzag_order",
]
