"""The sums of linear attention, of one size for any length."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnax.cache.layer_cache import CacheCall, Keeps, StoredTokens, check_rows, check_sizes
from attnax.checks import wide_dtype
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Int

__all__ = ["LinearLayerCache", "LinearState", "init_linear_layer_cache"]


@pytree_dataclass
class LinearState:
    """Sums over all keys and values that linear attention read so far, in float32 (float64 for float64)."""

    key_value_sum: Array  # (B, K, H, Hv), sum of phi(key) value^T
    key_sum: Array  # (B, K, H), sum of phi(key); NaN once a key or value was non-finite


@pytree_dataclass
class LinearLayerCache:
    """The state of one layer of causal linear attention.

    Attributes:
        state: sums over the keys and values read so far.
        lengths: int32 (batch,), the tokens of each row.
    """

    state: LinearState
    lengths: Int[Array, "B"]
    keeps: ClassVar[Keeps] = "sums"
    is_empty: ClassVar[bool] = False

    def check(self, caller: str) -> None:
        """Every call may read the sums."""

    def attend(self, call: CacheCall) -> tuple[Array, LinearLayerCache]:
        out, state = call.attend_sums(self.state)
        return out, LinearLayerCache(state, jnp.maximum(self.lengths, call.positions.max(1, initial=-1) + 1))

    attend_first = attend

    def tokens(self, dtype: Any) -> StoredTokens:
        """Raises NotImplementedError: a sum does not know its terms."""
        raise NotImplementedError(
            "LinearLayerCache: the sums of linear attention store no tokens. Use a softmax kernel to read them."
        )

    def next_positions(self) -> Int[Array, "B"]:
        return self.lengths

    def slots_in_use(self) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def grow(self, max_len: int, num_rows: int) -> LinearLayerCache:
        return self  # sums have room for every text

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> LinearLayerCache:
        rows = check_rows("LinearLayerCache.select_rows", rows, self.lengths.shape[0])
        return jax.tree.map(lambda x: x[rows], self)

    def forget(self, first: Int[ArrayLike, "B"]) -> LinearLayerCache:
        """Raises NotImplementedError: a sum does not know its terms."""
        raise NotImplementedError(
            "LinearLayerCache: the sums of linear attention cannot take tokens back. Use a softmax kernel, or decode "
            "without a draft."
        )


def init_linear_layer_cache(
    batch_size: int, num_kv_heads: int, head_dim: int, dtype: Any = jnp.float32, *, value_head_dim: int | None = None
) -> LinearLayerCache:
    """The state of a layer of linear attention before its first token; sums are at least float32.

    Raises:
        ValueError: a size below 1.
    """
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check_sizes("init_linear_layer_cache", **sizes, value_head_dim=value_head_dim)
    dtype = wide_dtype(dtype)
    state = LinearState(
        key_value_sum=jnp.zeros((batch_size, num_kv_heads, head_dim, value_head_dim), dtype),
        key_sum=jnp.zeros((batch_size, num_kv_heads, head_dim), dtype),
    )
    return LinearLayerCache(state, jnp.zeros((batch_size,), jnp.int32))
