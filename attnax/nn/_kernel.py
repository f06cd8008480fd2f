"""The kernel of an attention layer: the attention function that its config names, and the options of the layer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from attnax.config import AttentionType, BlockConfig
from attnax.kernels.flash import flash_attention, memory_efficient_attention, pallas_flash_attention
from attnax.kernels.linear import linear_attention
from attnax.kernels.lite import lite_attention
from attnax.kernels.standard import standard_attention
from attnax.masks import Mask, kernel_of, mask_argument
from attnax.nn.linear import Linear
from attnax.typing import Array, AttentionFn, Float, ScoreMod

__all__ = ["Heads", "Kernel", "LiteAttention", "attention_function"]


class Heads(NamedTuple):
    """The projected heads of one call, and the masks and mods by which they attend.

    Attributes:
        query: (B, N, T, H), rotated.
        key: (B, K, S, H), rotated.
        value: (B, K, S, Hv).
        mask: read at indices; with a cache that holds tokens, at positions.
        score_mod: likewise.
        dropout_rng: None for no dropout.
        positions: (B or 1, T), of the queries; never None with a cache.
    """

    query: Float[Array, "B N T H"]
    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S Hv"]
    mask: Mask | None
    score_mod: ScoreMod | None
    dropout_rng: Array | None
    positions: Array | None


class Kernel(NamedTuple):
    """An attention function with the dropout, the scale and the sinks of a layer.

    Attributes:
        function: an AttentionFn.
        dropout_rate: of the attention weights.
        scale: of the scores, None for the function's own.
        sinks: (N,), None for no sinks.
    """

    function: AttentionFn
    dropout_rate: float
    scale: float | None
    sinks: Array | None

    def attend(self, heads: Heads) -> Float[Array, "B N T Hv"]:
        """The attention of the queries to the keys of the call."""
        (batch, num_heads, seq_q, _), seq_kv = heads.query.shape, heads.key.shape[2]
        mask = mask_argument("MultiHeadAttention", self.function, heads.mask, (batch, num_heads, seq_q, seq_kv))
        attend = functools.partial(self.function, heads.query, heads.key, heads.value, mask=mask)
        out: Array = self.call(attend, heads)
        return out

    def call(self, attend: Any, heads: Heads) -> Any:
        """Calls `attend`, which has its arrays and mask, with the other options of the call and the layer."""
        options: dict[str, Any] = {"dropout_rng": heads.dropout_rng, "deterministic": heads.dropout_rng is None}
        options |= {"score_mod": heads.score_mod, "dropout_rate": self.dropout_rate}
        if self.scale is not None:
            options["scale"] = self.scale
        if self.sinks is not None:
            options["return_lse"] = True
        function = kernel_of(attend)
        with jax.named_scope(str(getattr(function, "__name__", type(function).__name__))):
            result = attend(**options)
        if self.sinks is None:
            return result
        out, lse = result
        share = jax.nn.sigmoid(lse - self.sinks.astype(lse.dtype)[None, :, None])  # of the keys beside the sink
        return (out.astype(share.dtype) * share[..., None]).astype(out.dtype)


class LiteAttention(nnx.Module):
    """`lite_attention` with its gate, as an AttentionFn.

    Args:
        rngs: for the gate's weights.
        config: for their kind and the width of a head.
    """

    takes_mask_objects = True

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig):
        self.gate = Linear(rngs, config, config.head_size, 1, bias="query")

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        return lite_attention(query, key, value, self.gate, **options)


class _Configured(functools.partial[Any]):
    """A partial that equals a partial of the same function and keywords: two layers of one config are one program."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Configured) and (self.func, self.keywords) == (other.func, other.keywords)

    def __hash__(self) -> int:
        return hash((self.func, *sorted(self.keywords.items())))


def attention_function(rngs: nnx.Rngs, config: BlockConfig) -> AttentionFn:
    """The attention function that the config's `attention_type` names."""
    size = config.attention_block_size
    match config.attention_type:
        case AttentionType.STANDARD:
            return standard_attention
        case AttentionType.MEMORY_EFFICIENT:
            return _Configured(memory_efficient_attention, block_size=size)
        case AttentionType.FLASH:
            return flash_attention if size is None else _Configured(flash_attention, block_size=size)
        case AttentionType.PALLAS_FLASH:
            return _Configured(pallas_flash_attention, block_q=size, block_kv=size)
        case AttentionType.LINEAR:  # causal where the mask is
            return _Configured(linear_attention, causal=False, chunk_size=config.linear_attention_chunk_size)
        case AttentionType.LITE:
            return LiteAttention(rngs, config)
