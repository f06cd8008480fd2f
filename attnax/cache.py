"""The keys and values of what was read so far, as a pytree of fixed shape, so that decoding compiles once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from attnax.config import TransformerConfig
from attnax.typing import Array, ArrayLike, Bool, Float, Int, is_concrete, pytree_dataclass

__all__ = [
    "KVLayerCache",
    "init_decoder_kv_caches",
    "init_decoder_kv_caches_from_config",
    "init_kv_layer_cache",
    "update_kv_layer_cache",
]


@pytree_dataclass
class KVLayerCache:
    """Keys and values of one attention layer; keys are stored after their rotation.

    Attributes:
        keys: (batch, num_kv_heads, max_len, head_dim).
        values: (batch, num_kv_heads, max_len, value_head_dim).
        length: int32 scalar, the slots written so far (the same for every row; padding takes slots too).
        positions: int32 (batch, max_len), each slot's index within its row's own text; -1 is empty or padding.
        overflowed: whether a write beyond max_len was ever dropped; attention then gives NaN.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S Hv"]
    length: Int[Array, ""]
    positions: Int[Array, "B S"]
    overflowed: Bool[Array, ""]

    @property
    def max_len(self) -> int:
        """Capacity in tokens."""
        return self.keys.shape[2]

    def next_positions(self) -> Int[Array, B]:
        """The position that follows the last token of each row."""
        return self.positions.max(axis=1, initial=-1) + 1


def init_kv_layer_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    max_len: int,
    dtype: Any = jnp.float32,
    *,
    value_head_dim: int | None = None,
) -> KVLayerCache:
    """An empty cache for `max_len` tokens a row; values are as wide as keys by default.

    Raises:
        ValueError: a size below 1.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    sizes = {
        "batch_size": batch_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
        "max_len": max_len,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"init_kv_layer_cache: {name} must be at least 1; got {name}={size}.")
    return KVLayerCache(
        keys=jnp.zeros((batch_size, num_kv_heads, max_len, head_dim), dtype),
        values=jnp.zeros((batch_size, num_kv_heads, max_len, value_head_dim), dtype),
        length=jnp.zeros((), jnp.int32),
        positions=jnp.full((batch_size, max_len), -1, jnp.int32),
        overflowed=jnp.zeros((), bool),
    )


def init_decoder_kv_caches(
    *, num_layers: int, batch_size: int, num_kv_heads: int, head_dim: int, max_len: int, dtype: Any = jnp.float32
) -> tuple[KVLayerCache, ...]:
    """One empty cache a layer."""
    return tuple(init_kv_layer_cache(batch_size, num_kv_heads, head_dim, max_len, dtype) for _ in range(num_layers))


def init_decoder_kv_caches_from_config(
    config: TransformerConfig, *, batch_size: int, max_len: int | None = None, dtype: Any = None
) -> tuple[KVLayerCache, ...]:
    """One empty cache a layer of a model of this config.

    Args:
        config: of the model.
        batch_size: rows.
        max_len: capacity in tokens, by default `config.kv_cache_max_len`, else `config.max_len`.
        dtype: of keys and values, by default `config.dtype`.
    """
    max_len = next(size for size in (max_len, config.kv_cache_max_len, config.max_len) if size is not None)
    return tuple(
        init_kv_layer_cache(
            batch_size,
            layer.kv_heads,
            layer.head_size,
            max_len,
            layer.dtype if dtype is None else dtype,
            value_head_dim=layer.value_head_size,
        )
        for layer in map(config.layer, range(config.num_layers))
    )


def update_kv_layer_cache(
    cache: KVLayerCache,
    keys_new: Float[Array, "B K T H"],
    values_new: Float[Array, "B K T Hv"],
    start: int | Int[ArrayLike, ""] | None = None,
    *,
    positions: Int[ArrayLike, T] | Int[ArrayLike, "#B T"] | None = None,
) -> KVLayerCache:
    """Writes T tokens into slots start ... start + T - 1.

    Args:
        cache: stays as it is; the result is a new one (donate the old one under jit to write in place).
        keys_new: (batch, num_kv_heads, T, head_dim).
        values_new: (batch, num_kv_heads, T, value_head_dim).
        start: first slot, by default `cache.length`.
        positions: (T,) or (batch, T), each token's index within its row's text, -1 for padding; by default the slot
            numbers.

    Raises:
        ValueError: shapes that do not fit the cache, or tokens that do not fit into it. Where `start` is traced
            the latter cannot be raised: nothing is written then and `overflowed` is set for good.
    """
    batch, heads, max_len, _ = cache.keys.shape
    num_new = keys_new.shape[2]
    for name, new, held in (("keys_new", keys_new, cache.keys), ("values_new", values_new, cache.values)):
        head_dim = held.shape[3]
        if new.shape != (batch, heads, num_new, head_dim):
            raise ValueError(
                f"update_kv_layer_cache: {name} must have shape (batch, num_kv_heads, new tokens, head_dim)="
                f"({batch}, {heads}, {num_new}, {head_dim}); got {new.shape}."
            )
    start = cache.length if start is None else jnp.asarray(start, jnp.int32)
    if is_concrete(start) and not 0 <= int(start) <= max_len - num_new:
        raise ValueError(
            f"update_kv_layer_cache: {num_new} tokens from slot {int(start)} do not fit into a cache of "
            f"max_len={max_len}. Make the cache longer."
        )
    if num_new > max_len:  # traced start: no slice of this size exists to write back to
        return dataclasses.replace(cache, overflowed=jnp.ones((), bool))
    fits = (start >= 0) & (start + num_new <= max_len)
    slots = start + jnp.arange(num_new, dtype=jnp.int32)
    positions = jnp.asarray(slots if positions is None else positions, jnp.int32)
    positions = jnp.broadcast_to(jnp.atleast_2d(positions), (batch, num_new))

    def write(buffer: Array, new: Array, axis: int) -> Array:
        # A write that does not fit puts back what was there: cheaper than choosing between two whole caches.
        old = lax.dynamic_slice_in_dim(buffer, start, num_new, axis)
        return lax.dynamic_update_slice_in_dim(buffer, jnp.where(fits, new.astype(buffer.dtype), old), start, axis)

    return KVLayerCache(
        keys=write(cache.keys, keys_new, 2),
        values=write(cache.values, values_new, 2),
        length=jnp.where(fits, jnp.maximum(cache.length, start + num_new), cache.length),
        positions=write(cache.positions, positions, 1),
        overflowed=cache.overflowed | ~fits,
    )
