"""The kernel of an attention layer: its attention function with the layer's options, with a cache or without."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.cache import FEW_QUERIES, LayerCache, LinearState, StoresTokens
from attnax.config import AttentionType, BlockConfig
from attnax.kernels.cached import cached_attention
from attnax.kernels.flash import flash_attention, memory_efficient_attention, pallas_flash_attention
from attnax.kernels.linear import linear_attention
from attnax.kernels.lite import lite_attention
from attnax.kernels.standard import standard_attention
from attnax.masks import Causal, Mask, at_positions, causal, kernel_of, mask_argument, mask_of_cache, padding
from attnax.nn.linear import Linear
from attnax.typing import Array, AttentionFn, Float, ScoreMod

__all__ = ["Heads", "Kernel", "attend_cache", "attention_function", "bound_options", "check_cache"]


class Heads(NamedTuple):
    """The projected heads of one call, with its mask and score mod.

    Attributes:
        query: (B, N, T, H), rotated.
        key: (B, K, S, H), rotated.
        value: (B, K, S, Hv).
        mask: read at indices; with a cache that holds tokens, at positions.
        score_mod: read like the mask.
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
        sinks: (N,), the learned score of each head's sink; None for no sinks.
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
        """Calls `attend`, which holds the arrays and the mask, with the other options of the call and the layer."""
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
        share = jax.nn.sigmoid(lse - self.sinks.astype(lse.dtype)[None, :, None])  # the weight without the sink
        return (out.astype(share.dtype) * share[..., None]).astype(out.dtype)


class LiteAttention(nnx.Module):
    """`lite_attention` with its gate, as an AttentionFn.

    Args:
        rngs: for the gate's weights.
        config: for its initialiser, dtypes, bias and the width of a head.
    """

    takes_mask_objects = True

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig):
        self.gate = Linear(rngs, config, config.head_size, 1, bias="query", axes=(None, None))

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
        case AttentionType.LINEAR:  # causal under a causal mask
            return _Configured(linear_attention, causal=False, chunk_size=config.linear_attention_chunk_size)
        case AttentionType.LITE:
            return LiteAttention(rngs, config)


def check_cache(caller: str, function: AttentionFn, cache: Any, window: int | None) -> None:
    """Raises unless the attention function can read the cache and the cache's window holds the layer's window."""
    if not isinstance(cache, LayerCache):
        raise ValueError(
            f"{caller}: kv_cache must be a cache of one layer, with the members of attnax.cache.LayerCache; got "
            f"{type(cache).__name__}. Make one by init_kv_layer_cache, or derive a kind from StoresTokens."
        )
    cache.check(caller)
    kernel = kernel_of(function)
    is_lite = isinstance(kernel, LiteAttention) or kernel is lite_attention
    if is_lite or (kernel is linear_attention) != (cache.keeps == "sums"):
        inner = getattr(cache, "cache", cache)  # of an EmptyCache
        name = "lite" if is_lite else "linear" if kernel is linear_attention else "softmax"
        raise NotImplementedError(
            f"{caller}: {name} attention does not read a {type(inner).__name__}. Linear attention "
            "reads a LinearLayerCache, softmax kernels read the other caches, lite attention reads none."
        )
    held = getattr(cache, "window", None)
    # A ring with sinks is asked for, and hides what it does not keep: a layer has no option that says the same.
    needs_window = held is not None and not getattr(cache, "num_sinks", 0)
    if (window is None and needs_window) or (window is not None and held is not None and window > held):
        raise ValueError(
            f"{caller}: the layer's attention_window must be set and at most the window of its cache; "
            f"got window={held}, attention_window={window}. Make the cache with that window, or with none."
        )


class CachedCall(NamedTuple):
    """A call with a cache, as the cache sees it: a `CacheCall`."""

    kernel: Kernel
    heads: Heads
    num_positions: int | None  # of the cache

    @property
    def new(self) -> dict[str, Array]:
        return {"keys": self.heads.key, "values": self.heads.value}

    @property
    def positions(self) -> Array:
        assert self.heads.positions is not None
        return self.heads.positions

    def attend_new(self, kept: Mask | None = None) -> Array:
        heads = self.heads
        positions = jnp.broadcast_to(self.positions, (heads.query.shape[0], heads.query.shape[2]))
        real = padding(positions >= 0) if kept is None else at_positions(kept, positions, positions)
        return self.kernel.attend(heads._replace(mask=real if heads.mask is None else heads.mask & real))

    def attend_stored(self, stored: StoresTokens) -> Array:
        kernel, heads, positions = self.kernel, self.heads, self.positions
        mask, score_mod = heads.mask, heads.score_mod
        if mask is not None:
            mask = mask_of_cache(mask, positions, self.num_positions)
            batch, num_heads, _, _ = heads.query.shape
            shape = batch, num_heads, self.num_positions, self.num_positions
            mask.check("MultiHeadAttention, with a cache", shape)
        if _reads_chunks(kernel.function, heads.query.shape[2]):
            options = {name: x for name, x in bound_options(kernel.function).items() if name in _CACHED_OPTIONS}
            read = functools.partial(cached_attention, heads.query, stored, positions, **options)
            out: Array = kernel.call(functools.partial(read, mask=mask), heads)
            return out
        tokens = stored.tokens(heads.query.dtype)
        if stored.num_sinks and stored.kept is not None:  # a window alone is the layer's, which is in its mask
            mask = stored.kept if mask is None else mask & stored.kept
        mask = at_positions(mask, positions, tokens.positions)
        if score_mod is not None:
            score_mod = at_positions(score_mod, positions, tokens.positions)
        key: Any = tokens.keys
        value: Any = tokens.values
        return kernel.attend(heads._replace(key=key, value=value, mask=mask, score_mod=score_mod))

    def attend_sums(self, state: LinearState) -> tuple[Array, LinearState]:
        heads = self.heads
        if not isinstance(heads.mask, Causal):
            raise NotImplementedError(
                "MultiHeadAttention: the sums of linear attention hold all tokens before, so with a cache mask must be "
                f"masks.causal(); got mask={heads.mask!r}. Use a softmax kernel for another mask."
            )
        mask = causal() & padding(jnp.broadcast_to(self.positions >= 0, (heads.query.shape[0], heads.query.shape[2])))
        function: Any = self.kernel.function
        attend = functools.partial(
            function, heads.query, heads.key, heads.value, mask=mask, state=state, return_state=True
        )
        out: tuple[Array, LinearState] = self.kernel.call(attend, heads)
        return out


def attend_cache(kernel: Kernel, heads: Heads, cache: LayerCache) -> tuple[Array, Any]:
    """The attention to the cache and the new tokens, and the cache with the new tokens appended."""
    return cache.attend(CachedCall(kernel, heads, getattr(cache, "num_positions", None)))


_CACHED_OPTIONS = inspect.signature(cached_attention).parameters


def _reads_chunks(function: AttentionFn, num_queries: int) -> bool:
    """Whether `cached_attention` takes the place of a function that declares `reads_cache_in_chunks`.

    A function with options of its own, such as a tile size, computes many queries itself: they fill its tiles.
    """
    has_options = isinstance(function, functools.partial)
    return getattr(kernel_of(function), "reads_cache_in_chunks", False) and (
        num_queries <= FEW_QUERIES or not has_options
    )


def bound_options(function: Any) -> dict[str, Any]:
    """The keywords that partials bind."""
    if not isinstance(function, functools.partial):
        return {}
    return bound_options(function.func) | function.keywords
