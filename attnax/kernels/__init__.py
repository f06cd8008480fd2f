"""Attention functions that obey `attnax.typing.AttentionFn`; they need only jax and numpy."""

from attnax.kernels.standard import standard_attention

__all__ = ["standard_attention"]
