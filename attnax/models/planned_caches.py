"""The sizes and the caches of a call that writes; its first program makes them, or gives those of another call room."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cache import (
    CacheFunction,
    CacheKind,
    EmptyCache,
    LayerCache,
    ScalarCache,
    StoresTokens,
    cache_kinds,
    grow,
    init_decoder_kv_caches_from_config,
    init_scalar_cache,
    select_rows,
    slots_in_use,
    stack_caches,
)
from attnax.checks import is_concrete, wide_dtype
from attnax.config import BlockConfig, TransformerConfig
from attnax.generation.prompt import TextCaches
from attnax.generation.request import Request, padded_length
from attnax.nn.attention import MultiHeadAttention
from attnax.nn.blocks import DecoderBlock, EncoderBlock
from attnax.nn.stack import Stack
from attnax.paged_cache import init_paged_kv_caches_from_config
from attnax.pytrees import pytree_dataclass

__all__ = ["CachePlan", "CallSizes", "Continued", "check_caches", "scalar_heads"]

_PAGE = 16  # tokens of a page, at most


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The empty caches of a model, which a program makes; plans of equal sizes and of one function are equal.

    Attributes:
        config: of the model.
        kind: of the caches; or a function that makes the cache of a layer.
        batch_size: prompts.
        max_len: slots of a row.
        dtype: of keys and values; None for the config's.
        pool_rows: rows that share a pool of pages.
        at_once: the model reads the whole prompt in one call, so that the caches are known to be empty.
        scalar_heads: of the token scalars of each layer, 0 for none.
    """

    config: TransformerConfig
    kind: CacheKind | CacheFunction
    batch_size: int
    max_len: int
    dtype: str | None
    pool_rows: int
    at_once: bool
    scalar_heads: tuple[int, ...]

    def make(self, state: Any, /) -> Sequence[Any]:
        """One cache a layer."""
        layers = self._layers()
        caches = tuple(map(self._with_scalars, range(len(layers)), layers))
        return tuple(map(EmptyCache, caches)) if self.at_once else _as_returned(caches, self.config)

    def _layers(self) -> tuple[Any, ...]:
        sizes: dict[str, Any] = {"batch_size": self.batch_size, "max_len": self.max_len, "dtype": self.dtype}
        if self.kind == "paged":
            page = math.gcd(_PAGE, self.max_len)
            num_blocks = self.pool_rows * self.max_len // page
            return init_paged_kv_caches_from_config(self.config, **sizes, block_size=page, num_blocks=num_blocks)
        caches = init_decoder_kv_caches_from_config(self.config, **sizes, ring=self.kind == "ring")
        if not callable(self.kind):
            return caches
        return tuple(
            self.kind(**self._sizes(layer))
            if cache.keeps == "tokens"  # the sums of linear attention are one kind
            else cache
            for layer, cache in zip(map(self.config.layer, range(self.config.num_layers)), caches, strict=True)
        )

    def _sizes(self, layer: BlockConfig) -> dict[str, Any]:
        """The arguments of a CacheFunction for a layer."""
        return {
            "batch_size": self.batch_size,
            "num_kv_heads": layer.kv_heads,
            "head_dim": layer.head_size,
            "value_head_dim": layer.value_head_size,
            "max_len": self.max_len,
            "dtype": layer.dtype if self.dtype is None else self.dtype,
        }

    def check(self, caller: str, num_tokens: int) -> None:
        """Raises ValueError if a function makes no caches, or caches of other rows or heads or of fewer tokens."""
        if not callable(self.kind):
            return
        try:
            inspect.signature(self.kind).bind(**self._sizes(self.config))
        except TypeError as error:
            raise ValueError(
                f"{caller}: a function given as cache must take {', '.join(self._sizes(self.config))} by name; "
                f"got {self.kind!r}: {error}. Take those that it does not need as **sizes."
            ) from None
        jax.eval_shape(lambda: self._check(caller, num_tokens, self._layers()))

    def _check(self, caller: str, num_tokens: int, caches: Sequence[Any]) -> None:
        for cache in caches:
            if not isinstance(cache, LayerCache) or isinstance(cache, EmptyCache):
                raise ValueError(
                    f"{caller}: a function given as cache must return the cache of a layer; "
                    f"got {type(cache).__name__} from {self.kind!r}. Return init_ring_kv_cache(...), for example."
                )
            rows = cache.next_positions().shape[0]
            if rows != self.batch_size:
                raise ValueError(
                    f"{caller}: a function given as cache must make a row for each prompt, here {self.batch_size}; "
                    f"got {rows} rows from {self.kind!r}. Hand on its batch_size."
                )
            room = getattr(cache, "num_positions", None)
            if room is not None and room < num_tokens:
                raise ValueError(
                    f"{caller}: a function given as cache must make room for the whole text, here {num_tokens} tokens; "
                    f"got room for {room} from {self.kind!r}. Hand on its max_len, or make a ring with a window."
                )
        _check_heads(caller, caches, self.config)

    def _with_scalars(self, layer: int, cache: Any) -> Any:
        if not self.scalar_heads[layer]:
            return cache
        dtype = wide_dtype(self.config.layer(layer).dtype)
        return init_scalar_cache(cache, self.scalar_heads[layer], num_positions=self.max_len, dtype=dtype)


@pytree_dataclass
class Continued:
    """The caches of an earlier call, which a program gives room for more tokens.

    Attributes:
        layers: of one row, or of a row for each prompt.
        config: of the model that goes on.
        batch_size: prompts.
        max_len: slots of a row.
        pool_rows: rows that share a pool of pages.
    """

    layers: Any
    config: TransformerConfig = dataclasses.field(metadata={"static": True})
    batch_size: int = dataclasses.field(metadata={"static": True})
    max_len: int = dataclasses.field(metadata={"static": True})
    pool_rows: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def with_room(
        cls,
        caches: TextCaches,
        config: TransformerConfig,
        batch_size: int,
        num_slots: Callable[[int], int],
        pool_rows: int,
    ) -> Continued:
        """The caches for a longer text: `num_slots` is the number of slots in use -> the number of slots needed."""
        capacity = max(getattr(cache, "max_len", 0) for cache in cache_kinds(caches.layers))
        taken = slots_in_use(caches.layers)
        in_use = max(int(np.asarray(x).max()) for x in taken) if all(map(is_concrete, taken)) else capacity
        return cls(caches.layers, config, batch_size, max(capacity, num_slots(in_use)), pool_rows)

    def make(self, state: Any, /) -> Any:
        """The caches of the prompts."""
        layers = grow(self.layers, self.max_len, self.pool_rows)
        if layers[0].next_positions().shape[0] != self.batch_size:
            layers = select_rows(layers, jnp.zeros(self.batch_size, jnp.int32))
        return _as_returned(layers, self.config)


class CallSizes(NamedTuple):
    """The lengths of a call, rounded up so that few programs serve all.

    Attributes:
        caller: for errors.
        config: of the model that reads and writes.
        earlier: tokens of the longest text in the caches; its room where lengths are traced.
        is_known: lengths are not traced.
        prompt: tokens of a row of the prompt, padding included.
        new: tokens to write at most.
        spare: slots for tokens that are taken back.
        pool_rows: rows that share a pool of pages.
        scalar_heads: of the token scalars of each layer, 0 for none.
    """

    caller: str
    config: TransformerConfig
    earlier: int
    is_known: bool
    prompt: int
    new: int
    spare: int
    pool_rows: int
    scalar_heads: tuple[int, ...]

    @property
    def room(self) -> int:
        """Of the result, in tokens."""
        return padded_length(max(64, self.new))

    @property
    def padded_prompt(self) -> int:
        """Behind an earlier text the model reads one token more than the prompt."""
        return padded_length(self.prompt + 1) - 1 if self.earlier else padded_length(self.prompt)

    def check(self) -> None:
        """Raises ValueError if the text is known not to fit into the positions of the model, which later are NaN."""
        total, has_table = self.earlier + self.prompt, self.config.pos_emb_type in ("learned", "sinusoidal")
        if has_table and self.is_known and total + self.new > self.config.max_len + 1:
            raise ValueError(
                f"{self.caller}: prompt and new tokens must fit into the {self.config.max_len} positions of the model; "
                f"got {total} + {self.new}."
            )

    def slots(self, earlier: int) -> int:
        """The slots of a row whose cache holds `earlier` tokens or none."""
        slots = earlier + self.padded_prompt + self.room + self.spare
        # Padding after a prompt takes no slot, so a long total is padded only once.
        return padded_length(slots if slots <= 1024 else earlier + self.prompt + max(64, self.new) + self.spare)

    def empty_caches(self, request: Request, kind: CacheKind | CacheFunction, dtype: Any) -> CachePlan:
        """Caches for the whole text of the request."""
        self.check()
        name = None if dtype is None else jnp.dtype(dtype).name
        batch_size, slots = request.ids.shape[0], self.slots(self.earlier)
        at_once, heads = request.reads_at_once, self.scalar_heads
        plan = CachePlan(self.config, kind, batch_size, slots, name, self.pool_rows, at_once, heads)
        plan.check(self.caller, self._least_tokens(request))
        return plan

    def _least_tokens(self, request: Request) -> int:
        """The tokens that the longest row will have in a cache, if no end token ends it; at least."""
        ids, read = request.position_ids, self.earlier if self.is_known else 0
        if isinstance(ids, np.ndarray | jax.Array) and is_concrete(ids):
            read = max(read, int(np.asarray(ids).max(initial=-1)) + 1)
        return read + self.new - 1 + self.spare

    def held_caches(self, request: Request, caches: TextCaches) -> Continued:
        """The caches of an earlier call with room for the rest of the text."""
        self.check()
        return Continued.with_room(caches, self.config, request.ids.shape[0], self.slots, self.pool_rows)


def _as_returned(caches: Sequence[Any], config: TransformerConfig) -> Sequence[Any]:
    """The caches in the form in which the model returns them, stacked or not: a loop carries one form."""
    places = max(1, len(config.layer_pattern))
    if not config.scan_layers or config.num_layers < places:
        return tuple(caches)
    return stack_caches("generate", caches, places, config.num_layers // places)


def scalar_heads(stack: Stack) -> tuple[int, ...]:
    """The heads of the token scalars of each layer, 0 for none: those of the MultiHeadAttention in its block."""
    return tuple(map(_scalar_heads, stack.holders()))


def _scalar_heads(block: Any) -> int:
    if type(block) in (EncoderBlock, DecoderBlock) and type(block.attention) is MultiHeadAttention:
        return block.attention.scalar_heads
    parts = [part for _, part in nnx.iter_modules(block) if isinstance(part, MultiHeadAttention)]
    return max((part.scalar_heads for part in parts), default=0)


def check_caches(caller: str, caches: Any, config: TransformerConfig, batch_size: int | None) -> None:
    """Raises ValueError unless `caches` can belong to a model of this config, and their rows to this many prompts."""
    if not isinstance(caches, TextCaches):
        raise ValueError(
            f"{caller}: caches must be TextCaches, which prefill and generate(return_caches=True) return; "
            f"got {type(caches).__name__}."
        )
    rows = caches.text.lengths.shape[0]
    if batch_size is not None and rows not in (1, batch_size):
        raise ValueError(
            f"{caller}: caches must have one row, or a row for each prompt; got {rows} rows for {batch_size} prompts. "
            "Choose rows by caches.select_rows."
        )
    if len(caches.layers) != config.num_layers:
        raise ValueError(
            f"{caller}: caches must have a layer for each of the model, here {config.num_layers}; "
            f"got {len(caches.layers)}. Give the caches of this model."
        )
    _check_heads(caller, jax.eval_shape(tuple, caches.layers), config)
    if not (is_concrete(caches.text.ids) and is_concrete(caches.text.lengths)):
        return
    ids, lengths = np.asarray(caches.text.ids), np.asarray(caches.text.lengths)
    highest = int(np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, 0).max())
    if highest >= config.vocab_size:
        raise ValueError(
            f"{caller}: the text of the caches must have tokens below vocab_size={config.vocab_size}; "
            f"got {highest}. Give the caches of this model."
        )


def _check_heads(caller: str, caches: Sequence[Any], config: TransformerConfig) -> None:
    """Raises ValueError unless keys and values of the caches have the heads of the model."""
    for index, held in enumerate(caches):
        layer, cache = config.layer(index), held.cache if isinstance(held, ScalarCache) else held
        want = (layer.kv_heads, layer.head_size), (layer.kv_heads, layer.value_head_size)
        if isinstance(cache, StoresTokens) and (got := tuple(x.shape for x in cache.key_value)) != want:
            raise ValueError(
                f"{caller}: layer {index} has keys and values of {want[0]} and {want[1]} (heads, size); "
                f"got caches with {got[0]} and {got[1]}. Give the caches of this model."
            )
