"""Stacks of blocks over token embeddings."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnax.cache import KVLayerCache
from attnax.config import TransformerConfig, resolve_config
from attnax.masks import Mask, as_mask, at_positions, causal
from attnax.nn.blocks import EncoderBlock, Output
from attnax.nn.dropout import Dropout
from attnax.nn.embeddings import LearnedPositionalEmbedding, PositionalEncoding, TokenEmbedding
from attnax.nn.norms import create_norm
from attnax.typing import Array, ArrayLike, Bool, Float, Int, MaskMod, ScoreMod, check_positions

__all__ = ["TransformerDecoder"]


class TransformerDecoder(nnx.Module):
    """A decoder-only stack: embeddings, blocks under a causal mask, and a last norm; returns hidden states.

    Called as `TransformerDecoder(rngs, config)` or with the fields of TransformerConfig as keywords.

    Args:
        rngs: for the initial weights and the stored dropout streams.
        config: a TransformerConfig.
        self_mask: who attends whom, by default `causal()`. Nothing attends padding in any case.
        **fields: the fields of TransformerConfig.

    Raises:
        ValueError: a field that TransformerConfig lacks, or a value that it refuses.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: TransformerConfig | None = None,
        /,
        *,
        self_mask: Mask | MaskMod | None = None,
        **fields: Any,
    ):
        self.config = config = resolve_config(TransformerConfig, config, fields)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.embed = TokenEmbedding(rngs, config.vocab_size, config.d_model, **dtypes)
        self.positions: Any = nnx.data(None)
        if config.pos_emb_type == "sinusoidal":
            self.positions = nnx.data(PositionalEncoding(config.max_len, config.d_model))
        elif config.pos_emb_type == "learned":
            self.positions = nnx.data(
                LearnedPositionalEmbedding(
                    rngs, num_positions=config.max_len, d_model=config.d_model, param_dtype=config.param_dtype
                )
            )
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.blocks = nnx.List([EncoderBlock(rngs, config) for _ in range(config.num_layers)])
        # After "post" blocks the stream is normalised already.
        self.norm = nnx.data(
            None
            if config.norm_placement == "post"
            else create_norm(
                config.norm_type,
                config.d_model,
                rngs,
                epsilon=config.norm_eps,
                use_bias=config.use_bias,
                **dtypes,
            )
        )
        self.self_mask = nnx.data(causal() if self_mask is None else as_mask(self_mask))

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        padding_mask: Bool[ArrayLike, "B T"] | Bool[ArrayLike, "B 1 1 T"] | None = None,
        deterministic: bool | None = None,
        position_ids: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
        score_mod: ScoreMod | None = None,
        layer_kv_caches: tuple[KVLayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], tuple[KVLayerCache, ...]]:
        """Hidden states of `input_ids`.

        Args:
            input_ids: (batch, T).
            padding_mask: True for real tokens, (batch, T) or (batch, 1, 1, T); padding may stand left or right.
            deterministic: no dropout; None means the attribute that `train()` and `eval()` set, initially True.
            position_ids: each token's index within its row's text, -1 for padding; by default counted from the
                padding mask and the caches. Masks and score mods are read at positions too.
            score_mod: applied to the attention scores of every layer.
            layer_kv_caches: one a layer; the tokens are appended to them and attend all of them.
            rngs: randomness of the dropout, instead of the stored streams.

        Returns:
            (batch, T, d_model), or with caches the pair of it and the new caches. Rows of padding hold no meaning.

        Raises:
            ValueError: ids outside the vocabulary, a sequence longer than max_len, or arguments that do not fit.
        """
        out = self.run(
            input_ids,
            padding_mask=padding_mask,
            deterministic=deterministic,
            position_ids=position_ids,
            score_mod=score_mod,
            caches=layer_kv_caches,
            rngs=rngs,
        )
        return out.hidden if out.caches is None else (out.hidden, out.caches)

    def run(
        self,
        input_ids: Int[ArrayLike, "B T"],
        *,
        padding_mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        position_ids: ArrayLike | None = None,
        score_mod: ScoreMod | None = None,
        caches: tuple[KVLayerCache, ...] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Output:
        """The call with its result in one form."""
        input_ids = self._check_ids(input_ids, caches)
        real = None if padding_mask is None else self._real_tokens(padding_mask, input_ids.shape)
        mask = self.self_mask
        if position_ids is not None:
            position_ids = check_positions(type(self).__name__, "position_ids", position_ids, *input_ids.shape)
            position_ids = position_ids if real is None else jnp.where(real, position_ids, -1)
        elif real is not None or caches is not None:
            position_ids = _count_positions(input_ids.shape, real, caches)
        if position_ids is not None and caches is None:  # with a cache, attention does this
            batch, length = input_ids.shape
            mask.check(type(self).__name__, (batch, self.config.num_heads, length, length))
            mask = at_positions(mask, position_ids, position_ids)
            score_mod = None if score_mod is None else at_positions(score_mod, position_ids, position_ids)

        x = self.embed(input_ids)
        if self.positions is not None:
            x = self.positions(x, position_ids=position_ids)
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        new_caches, aux = [], dict[str, Array]()
        for block, cache in zip(self.blocks, caches or (None,) * len(self.blocks), strict=True):
            x, new_cache, block_aux = block.run(
                x,
                mask=mask,
                deterministic=deterministic,
                position_ids=position_ids,
                score_mod=score_mod,
                cache=cache,
                rngs=rngs,
            )
            new_caches.append(new_cache)
            aux |= {name: aux.get(name, 0.0) + value for name, value in block_aux.items()}
        if self.norm is not None:
            x = self.norm(x)
        return Output(x, None if caches is None else tuple(new_caches), aux)

    def _check_ids(self, input_ids: ArrayLike, caches: tuple[KVLayerCache, ...] | None) -> Array:
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"{type(self).__name__}: input_ids must be (batch, length); got shape {input_ids.shape}.")
        if caches is None and input_ids.shape[1] > self.config.max_len:
            raise ValueError(
                f"{type(self).__name__}: a sequence must not be longer than max_len={self.config.max_len}; "
                f"got {input_ids.shape[1]} tokens."
            )
        if caches is not None and len(caches) != self.config.num_layers:
            raise ValueError(
                f"{type(self).__name__}: layer_kv_caches must hold one cache a layer; "
                f"got {len(caches)} for num_layers={self.config.num_layers}."
            )
        return input_ids

    def _real_tokens(self, padding_mask: ArrayLike, shape: tuple[int, ...]) -> Array:
        padding_mask = jnp.asarray(padding_mask)
        if padding_mask.dtype != jnp.bool_ or padding_mask.shape not in (shape, (shape[0], 1, 1, shape[1])):
            raise ValueError(
                f"{type(self).__name__}: padding_mask must be boolean, True for real tokens, of shape {shape} or "
                f"({shape[0]}, 1, 1, {shape[1]}); got shape={padding_mask.shape}, dtype={padding_mask.dtype}."
            )
        return padding_mask.reshape(shape)


def _count_positions(
    shape: tuple[int, ...], real: Array | None, caches: tuple[KVLayerCache, ...] | None
) -> Int[Array, "B T"]:
    """Real tokens count on from what the caches hold; padding is at -1."""
    real = jnp.ones(shape, bool) if real is None else real
    start = 0 if caches is None else caches[0].next_positions()[:, None]
    return jnp.where(real, start + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)
