"""A tile of pairs inside a Pallas kernel: its mask and score mod, its scores and their gradients.

The engines of `_gpu` and `_tpu` derive from `TileKernel`: they say how a kernel reads its arrays, and this file what it
computes from them. The mathematics of a tile comes from `_core/softmax.py`, and masks and score mods come from
`_core/split.py`. A full tile needs no mask test; any other tile is partial.

A non-finite row or key must contaminate only the rows that attend it. If a head holds one, all tiles of the head count
as partial: in a partial tile non-finite keys become zeros, and their scores are NaN.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from attnax.checks import wide_dtype
from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_of
from attnax.kernels._core.finite import is_finite
from attnax.kernels._core.split import Read, Split
from attnax.kernels._core.tile_grid import TileGrid
from attnax.typing import Array

__all__ = ["KernelSpec", "QueryRows", "QueryTile", "TileKernel", "TilePlace", "query_rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class KernelSpec:
    """The static part of a call, known when its kernels are traced."""

    score_shape: tuple[int, int, int, int]  # (B, N, T, S)
    kv_heads: int
    grid: TileGrid
    tile: Any  # as the engine describes it
    mask: Split | None
    score_mod: Split | None
    dropout_rate: float
    learn_scale: bool
    interpret: Any

    @property
    def shared(self) -> int:
        """Query heads that share keys."""
        return self.score_shape[1] // self.kv_heads

    @property
    def is_plain(self) -> bool:
        """Whether the scores of full tiles are used as they are."""
        return self.score_mod is None


class TilePlace(NamedTuple):
    """The current tile of a program: tile i of queries and j of keys of a head; `turned` has keys as rows."""

    b: Any
    h: Any
    i: Any
    j: Any
    turned: bool = False


class QueryTile(NamedTuple):
    """The queries of a tile, as the backward pass reads them."""

    query: Array  # (T, H)
    d_out: Array  # (T, V)
    lse: Array  # of each query
    delta: Array


class TileKernel(abc.ABC):
    """A call, and the references that one of its kernels reads.

    A vector over queries or keys has the shape that the engine gives it, until `lay` puts it along an axis of a tile.
    """

    spec: KernelSpec
    inputs: Any  # with `scale` (1,), and `dropout` (4,) uint32 or None

    @abc.abstractmethod
    def lay(self, place: TilePlace, x: Array, *, of_queries: bool) -> Array:
        """A vector over the tile's queries, or keys, along its axis of the tile."""

    @abc.abstractmethod
    def indices(self, place: TilePlace, *, of_queries: bool) -> Array:
        """The indices of the tile's queries, or keys, in their array, along their axis of the tile."""

    @abc.abstractmethod
    def positions(self, place: TilePlace, *, of_queries: bool) -> Array:
        """The same indices as masks and score mods see them."""

    @abc.abstractmethod
    def mask_operands(self, place: TilePlace) -> list[Array]:
        """The operands of the mask at a tile, in natural shapes."""

    @abc.abstractmethod
    def mod_operands(self, place: TilePlace) -> list[Array]:
        """The operands of the score mod at a tile, in natural shapes."""

    @abc.abstractmethod
    def load(self, function: Split, read: Read, where: list[Array], place: TilePlace) -> Array:
        """The elements of a captured array that the mask or the score mod reads."""

    @abc.abstractmethod
    def bind(self, eqn: JaxprEqn, values: list[Any]) -> Array:
        """The result of an elementwise equation of the mask or the score mod."""

    @abc.abstractmethod
    def learned(self, learn: str | None) -> tuple[int, ...]:
        """The numbers of the floating operands, or reads, of the score mod that `learn` names."""

    def shape(self, place: TilePlace) -> tuple[int, int]:
        """The shape of a tile."""
        grid = self.spec.grid
        return (grid.block_kv, grid.block_q) if place.turned else (grid.block_q, grid.block_kv)

    def index(self, place: TilePlace) -> tuple[Any, Any, Array, Array]:
        """(b, h, q, kv) as masks and score mods see them."""
        q, kv = (self.positions(place, of_queries=of_queries) for of_queries in (True, False))
        return place.b, place.h, q, kv

    def keep(self, place: TilePlace) -> Array | None:
        """Where the mask allows the pairs of a tile."""
        mask = self.spec.mask
        if mask is None:
            return None

        def load(read: Read, where: list[Array]) -> Array:
            return self.load(mask, read, where, place)

        return mask(self.mask_operands(place), load, *self.index(place), bind=self.bind)

    def drop(self, place: TilePlace) -> Callable[[Array], Array] | None:
        """The dropout of a tile's weights."""
        if self.inputs.dropout is None:
            return None
        words = tuple(self.inputs.dropout[n] for n in range(4))
        return dropout_of(words, self.spec.dropout_rate, *self.index(place))

    def bias(self, place: TilePlace, finite: Array | None, *, own_queries: bool, own_keys: bool) -> Array | None:
        """The bias for `softmax.mask_scores`: NaN for non-finite keys, -inf for pairs that belong to another tile."""
        grid = self.spec.grid
        bias = None if finite is None else jnp.where(self.lay(place, finite, of_queries=False), 0.0, jnp.nan)
        axes = []
        if own_keys and not grid.even_kv:
            axes.append((False, place.j, grid.block_kv, grid.seq_kv))
        if own_queries and not grid.even_q:
            axes.append((True, place.i, grid.block_q, grid.seq_q))
        for of_queries, n, block, length in axes:
            index = self.indices(place, of_queries=of_queries)
            outside = (index < n * block) | (index >= length)
            bias = jnp.where(outside, -jnp.inf, 0.0 if bias is None else bias)
        return bias

    def scores(
        self, left: Array, right: Array, place: TilePlace, bias: Array | None, *, full: bool, learn: str | None = None
    ) -> tuple[Array, Any]:
        """The tile's scores as `_core/softmax.py` takes them, and the pullback of the score mod if there is one.

        The pullback takes the gradient of the natural scores. It returns the gradient of the scores before the mod, and
        the gradients of the operands that `learn` names: "rows", "columns", "tables" or "" for none. With None there is
        no pullback.
        """
        score_mod = self.spec.score_mod
        scale = self.inputs.scale[0] * softmax.unit(has_score_mod=score_mod is not None)
        scores = softmax.product(left, right, 1, 1) * scale
        keep = None if full else self.keep(place)
        if score_mod is None:
            return (scores if full else softmax.mask_scores(scores, keep, bias)), None
        pulls = []

        def modify(scores: Array) -> Array:
            run, learned = self.mod(place, learn)
            result, pull = jax.vjp(run, scores, learned)
            pulls.append(pull)
            return result

        change = modify if learn is not None else lambda x: self.mod(place)[0](x, ())
        masked = softmax.mask_scores(scores, keep, bias, change)

        def pull(d_scores: Array) -> tuple[Array, tuple[Array, ...]]:
            d_raw, d_learned = pulls[0](d_scores)
            # A mod's derivative may be NaN at forbidden pairs, and outside of the arrays.
            d_raw, *d_learned = (jnp.where(masked == -jnp.inf, 0, x) for x in (d_raw, *d_learned))
            if learn in ("rows", "columns"):
                axis = int((learn == "rows") != place.turned)
                d_learned = [x.astype(wide_dtype(x.dtype)).sum(axis, keepdims=True) for x in d_learned]
            return d_raw, tuple(d_learned)

        return masked, pull

    def gradients(
        self,
        place: TilePlace,
        queries: QueryTile,
        key: Array,
        value: Array,
        learn: str,
        *,
        full: bool = False,
        own_queries: bool = False,
        own_keys: bool = False,
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """(weights, gradient of the raw scores, gradients of the operands that `learn` names) of a tile.

        A row that attends a non-finite key has NaN as its log-sum-exp, so keys are not tested again.
        """
        query, d_out, lse, delta = queries
        bias = None if full else self.bias(place, None, own_queries=own_queries, own_keys=own_keys)
        left, right, d_left, d_right = (key, query, value, d_out) if place.turned else (query, key, d_out, value)
        scores, pull = self.scores(left, right, place, bias, full=full, learn=learn)
        weights, d_scores = softmax.tile_gradients(
            scores,
            self.lay(place, lse, of_queries=True),
            self.lay(place, delta, of_queries=True),
            softmax.product(d_left, d_right, 1, 1),
            masked=not full or not self.spec.is_plain,
            dropout=self.drop(place),
        )
        return (weights, d_scores, ()) if pull is None else (weights, *pull(d_scores))

    def index_of(self, read: Read, place: TilePlace) -> list[Array]:
        """The indices of a read of the score mod, for each axis of the table; no index depends on scores."""
        found: list[list[Array]] = []
        score_mod = self.spec.score_mod
        assert score_mod is not None

        def load(other: Read, where: list[Array]) -> Array:
            if other is read:
                found.append(where)
            return self.load(score_mod, other, where, place)

        nothing = jnp.zeros(self.shape(place), jnp.float32)
        score_mod(self.mod_operands(place), load, nothing, *self.index(place), bind=self.bind)
        return found[0]

    def mod(self, place: TilePlace, learn: str | None = None) -> tuple[Callable[..., Array], Any]:
        """The score mod of a tile, as a function of the scores and the values that `learn` names; and these values.

        There is a value for each pair, so that the gradients of forbidden pairs can be left out.
        """
        score_mod, index, shape = self.spec.score_mod, self.index(place), self.shape(place)
        assert score_mod is not None
        operands = self.mod_operands(place)
        chosen = self.learned(learn)
        if learn == "tables":
            learned = tuple(jnp.zeros(shape, wide_dtype(score_mod.reads[n].dtype)) for n in chosen)
        else:
            learned = tuple(jnp.broadcast_to(operands[n], shape) for n in chosen)

        def run(scores: Array, learned: tuple[Array, ...]) -> Array:
            changed = dict(zip(chosen, learned, strict=True))

            def load(read: Read, where: list[Array]) -> Array:
                value = self.load(score_mod, read, where, place)
                n = score_mod.reads.index(read)
                if learn != "tables" or n not in changed:
                    return value
                return (value.astype(changed[n].dtype) + changed[n]).astype(value.dtype)

            given: Sequence[Any] = operands
            if learn != "tables":
                given = [changed.get(n, x) for n, x in enumerate(operands)]
            return jnp.broadcast_to(score_mod(given, load, scores, *index, bind=self.bind), shape)

        return run, learned


class QueryRows(NamedTuple):
    """What the backward pass knows of each query."""

    d_out: Array  # (B, N, T, V)
    lse: Array  # (B, N, T) in units of log 2; +inf where nothing is attended, NaN in a contaminated row
    delta: Array  # (B, N, T), see `softmax.tile_gradients`
    any_contaminated: Array  # (B, K): whether a head holds a contaminated row


def query_rows(query: Array, kv_heads: int, out: Array, lse: Array, d_out: Array, d_lse: Array) -> QueryRows:
    """The rows of the backward pass, from the results of the forward pass and their cotangents.

    Args:
        query: (B, N, T, H).
        kv_heads: K.
        out: the result, float32.
        lse: the result, in units of log 2.
        d_out: cotangent of out.
        d_lse: cotangent of the natural log-sum-exp.
    """
    d_out = jax.lax.optimization_barrier(d_out)  # the cotangent of a sum is a constant: XLA would test it
    finite = is_finite(query) & is_finite(d_out) & jnp.isfinite(d_lse)
    finite &= jnp.isfinite(lse) | (lse == -jnp.inf)
    delta = jnp.where(finite, (out * d_out.astype(jnp.float32)).sum(-1) - d_lse, 0)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, jnp.where(finite, lse, jnp.nan))
    return QueryRows(d_out, lse, delta, ~finite.reshape(query.shape[0], kv_heads, -1).all(2))
