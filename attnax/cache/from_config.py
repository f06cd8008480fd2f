"""The caches of all layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from attnax.cache.kv import KVLayerCache, init_kv_layer_cache
from attnax.cache.linear import init_linear_layer_cache
from attnax.cache.ring import SPARE_SLOTS, init_ring_kv_cache
from attnax.config import AttentionType, BlockConfig, TransformerConfig

__all__ = ["CacheFunction", "CacheKind", "init_decoder_kv_caches", "init_decoder_kv_caches_from_config"]

CacheKind = Literal["contiguous", "ring", "paged"]
"""The kinds of caches that generation makes: KVLayerCache, RingKVCache and PagedKVCache."""

CacheFunction = Callable[..., Any]
"""`(*, batch_size, num_kv_heads, head_dim, value_head_dim, max_len, dtype) -> LayerCache`: the empty cache of a layer,
with room for `max_len` tokens of each row or for those that the layer attends."""


def init_decoder_kv_caches(
    *, num_layers: int, batch_size: int, num_kv_heads: int, head_dim: int, max_len: int, dtype: Any = jnp.float32
) -> tuple[KVLayerCache, ...]:
    """One empty cache a layer."""
    return tuple(init_kv_layer_cache(batch_size, num_kv_heads, head_dim, max_len, dtype) for _ in range(num_layers))


def init_decoder_kv_caches_from_config(
    config: TransformerConfig, *, batch_size: int, max_len: int | None = None, dtype: Any = None, ring: bool = False
) -> tuple[Any, ...]:
    """One empty cache a layer of a model of this config.

    A layer of linear attention gets a LinearLayerCache. A layer with an `attention_window` gets a RingKVCache of
    attention_window + 16 slots, if they are fewer than `max_len`. Any other layer gets a KVLayerCache.
    `attnax.paged_cache` makes paged caches.

    Args:
        config: of the model.
        batch_size: rows.
        max_len: capacity in tokens, by default `config.kv_cache_max_len`, else `config.max_len`.
        dtype: of keys and values, by default `config.dtype`; int8 as in `init_kv_layer_cache`.
        ring: layers without a short window get a RingKVCache too. Rows of different lengths then waste no slots, and
            tokens can be taken back.
    """
    max_len = config.cache_max_len if max_len is None else max_len

    def init(layer: BlockConfig) -> Any:
        sizes = batch_size, layer.kv_heads, layer.head_size
        stored, values = layer.dtype if dtype is None else dtype, layer.value_head_size
        if layer.attention_type == AttentionType.LINEAR:
            return init_linear_layer_cache(*sizes, layer.dtype, value_head_dim=values)
        window = layer.attention_window
        if window is not None and window + SPARE_SLOTS < max_len:
            return init_ring_kv_cache(*sizes, window + SPARE_SLOTS, stored, window=window, value_head_dim=values)
        if ring:
            return init_ring_kv_cache(*sizes, max_len, stored, value_head_dim=values)
        return init_kv_layer_cache(*sizes, max_len, stored, value_head_dim=values)

    return tuple(init(config.layer(index)) for index in range(config.num_layers))
