"""Attention functions that obey `attnax.typing.AttentionFn`; they need only jax and numpy."""

from attnax.kernels.flash import flash_attention, memory_efficient_attention, why_not_cudnn
from attnax.kernels.standard import standard_attention

__all__ = ["flash_attention", "memory_efficient_attention", "standard_attention", "why_not_cudnn"]
