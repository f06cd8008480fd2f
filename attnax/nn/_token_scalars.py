"""Numbers of each token and head that enter the scores, and live in the cache beside keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.cache import EmptyCache, ScalarCache, ScalarSlots
from attnax.checks import wide_dtype
from attnax.config import AttentionType, BlockConfig
from attnax.kernels.ring import ring_attention
from attnax.masks import NoTruth, kernel_of
from attnax.nn._hidden import refuse_hidden_arrays, unchanged
from attnax.nn._kernel import bound_options
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, AttentionFn, Float, Index, ScoreMod

__all__ = ["TokenScalars", "check_scalar_cache", "check_token_scalars", "place_scalars"]


@runtime_checkable
class TokenScalars(Protocol):
    """What `MultiHeadAttention(token_scalars=...)` takes: an nnx.Module with these members.

    Attributes:
        cumulative: whether the score mod reads running sums over the tokens of a row's text, padding left out, in place
            of the numbers.
    """

    cumulative: bool

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B n T"]:
        """The numbers of each token, for each query head, or one for all heads; they are stored as float32 or wider."""

    def mod(
        self, scores: Array, b: Index, h: Index, q: Index, kv: Index, of_query: Array, of_key: Array
    ) -> Float[Array, "..."]:
        """A score mod with two arguments more: the numbers of the query and of the key, which broadcast to `scores`."""


@pytree_dataclass
class TokenScalarMod(NoTruth):
    """The score mod of a layer's token scalars; `scalars` (B, n, P) are read at the slots of q and kv."""

    module: Any
    scalars: Array
    slots: ScalarSlots = dataclasses.field(metadata={"static": True})

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        numbers, heads = self.scalars.astype(scores.dtype), 0 if self.scalars.shape[1] == 1 else h
        of_query, of_key = (numbers.at[b, heads, self.slots(index)].get(mode="clip") for index in (q, kv))
        result: Array = self.module.mod(scores, b, h, q, kv, of_query, of_key)
        return result


def place_scalars(module: Any, x: Array, positions: Array | None, cache: Any) -> tuple[ScoreMod, Any]:
    """The score mod of a call, and the cache with the numbers of x.

    Args:
        module: a TokenScalars.
        x: (B, T, D).
        positions: (B or 1, T); negative is padding. None for no padding.
        cache: None, a ScalarCache or one in an EmptyCache.
    """
    scalars = module(x)
    scalars = scalars.astype(wide_dtype(scalars.dtype))
    has_tokens = cache is not None and not cache.is_empty
    if module.cumulative:
        if positions is not None:
            scalars = jnp.where(positions[:, None] >= 0, scalars, 0)
        scalars = jnp.cumsum(scalars, axis=2)
        if has_tokens:
            scalars = scalars + cache.last().astype(scalars.dtype)[..., None]
    if has_tokens:
        cache = cache.write(scalars, positions)
        return TokenScalarMod(module, cache.scalars, cache.slots), cache
    if cache is not None:
        cache = EmptyCache(cache.cache.write(scalars, positions, is_first=True))
    return TokenScalarMod(module, scalars, ScalarSlots(scalars.shape[2])), cache


def check_token_scalars(caller: str, module: Any, config: BlockConfig, attention_fn: AttentionFn, scores: Any) -> int:
    """The heads of a layer's token scalars; raises ValueError for an object that is none.

    Args:
        caller: for the message.
        module: the argument token_scalars.
        config: of the layer.
        attention_fn: of the layer.
        scores: shapes and dtypes of the arguments of a score mod.
    """
    if not isinstance(module, nnx.Module) or not isinstance(module, TokenScalars):
        raise ValueError(
            f"{caller}: token_scalars must be an nnx.Module with cumulative, __call__ and mod, as "
            f"attnax.nn.TokenScalars says; got {type(module).__name__}."
        )
    if config.attention_type in (AttentionType.LINEAR, AttentionType.LITE):
        raise ValueError(
            f"{caller}: token_scalars change scores; got attention_type={config.attention_type}, which has none. Use a "
            "softmax kernel."
        )
    if kernel_of(attention_fn) is ring_attention and bound_options(attention_fn).get("axis_name") is not None:
        raise NotImplementedError(
            f"{caller}: token_scalars are read by the index in the whole text, and a device of a ring knows those of "
            "its shard only; got attention_fn=ring_attention with an axis_name. Use flash_attention."
        )
    x = jax.ShapeDtypeStruct((1, 1, config.d_model), config.dtype)
    made = jax.eval_shape(lambda: unchanged(module)(jnp.zeros(x.shape, x.dtype)))
    shape = getattr(made, "shape", None)
    if shape not in ((1, 1, 1), (1, config.num_heads, 1)) or not jnp.issubdtype(made.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: token_scalars must return floating numbers of shape (batch, {config.num_heads} or 1, length); "
            f"got {jax.tree.map(lambda x: x.shape, made)} for x of shape (1, 1, {config.d_model})."
        )
    refuse_hidden_arrays(caller, "token_scalars", module, (x,))
    number = jax.ShapeDtypeStruct((1, shape[1], 1, 1), jnp.float32)
    leaves = jax.tree.leaves(nnx.state(module))
    refuse_hidden_arrays(caller, "token_scalars", module.mod, (*scores, number, number), visible=leaves)
    return int(shape[1])


def check_scalar_cache(caller: str, cache: Any, num_heads: int) -> None:
    """Raises ValueError unless a cache has room for `num_heads` numbers a token, or none with 0."""
    inner = cache.cache if isinstance(cache, EmptyCache) else cache
    held = inner.scalars.shape[1] if isinstance(inner, ScalarCache) else 0
    if held != num_heads:
        needs = f"with token_scalars of {num_heads} heads kv_cache must be a ScalarCache with as many"
        raise ValueError(
            f"{caller}: {needs if num_heads else 'without token_scalars kv_cache must be no ScalarCache'}; got "
            f"{type(inner).__name__}{f' with {held}' if held else ''}. "
            f"{f'Make it by attnax.cache.init_scalar_cache(cache, {num_heads}).' if num_heads else 'Give its cache.'}"
        )
