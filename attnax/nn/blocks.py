"""Transformer blocks: sublayers around a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from attnax.cache import KVLayerCache
from attnax.config import BlockConfig, resolve_config
from attnax.masks import Mask
from attnax.nn.attention import MultiHeadAttention
from attnax.nn.dropout import Dropout
from attnax.nn.feedforward import FeedForward
from attnax.nn.norms import create_norm
from attnax.typing import Array, ArrayLike, Float, Int, MaskMod, ScoreMod

__all__ = ["EncoderBlock", "Output", "Residual"]

Extra = TypeVar("Extra")


class Output(NamedTuple):
    """What a block or a stack computes.

    Attributes:
        hidden: (batch, T, d_model); logits (batch, T, vocab_size) from a language model.
        caches: the new cache of a block, the tuple of them of a stack, or None.
        aux: losses and statistics by name, summed over the layers.
    """

    hidden: Array
    caches: Any
    aux: dict[str, Array]


class Residual(nnx.Module):
    """x + f(norm(x)) and its kin: where the norms of a sublayer stand, said once.

    Args:
        rngs: for the norms and the stored dropout stream.
        config: `norm_placement` chooses "pre" x + f(norm(x)), "post" norm(x + f(x)) or "sandwich"
            x + norm(f(norm(x))); f's result goes through dropout.
    """

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig):
        def norm() -> nnx.Module:
            return create_norm(
                config.norm_type,
                config.d_model,
                rngs,
                epsilon=config.norm_eps,
                use_bias=config.use_bias,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
            )

        placement = config.norm_placement
        self.norm_in = nnx.data(norm() if placement in ("pre", "sandwich") else None)
        self.norm_branch = nnx.data(norm() if placement == "sandwich" else None)
        self.norm_sum = nnx.data(norm() if placement == "post" else None)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sublayer: Callable[[Array], tuple[Array, Extra]],
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], Extra]:
        """The new stream, and whatever else `sublayer` returns."""
        branch, extra = sublayer(x if self.norm_in is None else self.norm_in(x))
        if self.norm_branch is not None:
            branch = self.norm_branch(branch)
        x = x + self.dropout(branch, deterministic=deterministic, rngs=rngs)
        return (x if self.norm_sum is None else self.norm_sum(x)), extra


class EncoderBlock(nnx.Module):
    """Self-attention, then a feed-forward; under a causal mask, the block of a decoder-only model.

    Called as `EncoderBlock(rngs, config)` or `EncoderBlock(rngs, d_model=512, num_heads=8, d_ff=2048, ...)`.

    Raises:
        ValueError: a field that BlockConfig lacks, or a value that it refuses.
    """

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig | None = None, /, **fields: Any):
        config = resolve_config(BlockConfig, config, fields)
        self.attention = MultiHeadAttention(rngs, config)
        self.around_attention = Residual(rngs, config)
        self.feed_forward = FeedForward(rngs, config)
        self.around_feed_forward = Residual(rngs, config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        self_attn_kv_cache: KVLayerCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVLayerCache]:
        """The stream after both sublayers, or with a cache the pair of it and the new cache.

        The arguments are those of `MultiHeadAttention`.
        """
        out = self.run(
            x,
            mask=mask,
            deterministic=deterministic,
            position_ids=position_ids,
            score_mod=score_mod,
            cache=self_attn_kv_cache,
            rngs=rngs,
        )
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | MaskMod | ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        cache: KVLayerCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Output:
        """The call with its result in one form."""

        def attend(x: Array) -> tuple[Array, KVLayerCache | None]:
            return self.attention.run(
                x,
                mask=mask,
                deterministic=deterministic,
                position_ids_q=position_ids,
                score_mod=score_mod,
                kv_cache=cache,
                rngs=rngs,
            )

        def feed_forward(x: Array) -> tuple[Array, dict[str, Array]]:
            return self.feed_forward(x, deterministic=deterministic, rngs=rngs), {}

        x, cache = self.around_attention(x, attend, deterministic=deterministic, rngs=rngs)
        x, aux = self.around_feed_forward(x, feed_forward, deterministic=deterministic, rngs=rngs)
        return Output(x, cache, aux)
