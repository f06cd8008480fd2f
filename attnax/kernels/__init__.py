"""Attention functions that obey `attnax.typing.AttentionFn`; they need only jax and numpy.

The files without an underscore hold the functions that people call; `standard.py` is the definition, `score_mods.py`
the biases. `_call.py` prepares one call and hands it to an engine, `_decode_call.py` a call of few queries against a
cache. `_xla/`, `_gpu/` and `_tpu/` are the engines; none imports another. `_core/` is below them: the softmax of a
tile, dropout, the arrays inside a user's function, meshes and platforms. `tests/test_layers.py` checks the directions.
"""

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
