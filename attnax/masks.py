"""Masks as values: who may attend whom, written once and read in two ways.

A `Mask` is a callable pytree. Pointwise, `mask(b, h, q, kv)` says whether query `q` may attend key `kv`
(indices are integer arrays of any shapes that broadcast together). Over a tile,
`mask.tile(b, h, q_range, kv_range)` bounds the same answer for whole ranges by interval arithmetic, which is
what lets a kernel skip the tiles that a mask forbids. True means attend. Masks combine with `&`, `|` and `~`,
with each other and with one-line functions and boolean arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.checks import check_mask_shape, check_positions, explain_tracing, is_concrete
from attnax.pytrees import function_pytree, pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Index, Int, MaskMod, ScoreMod, ScoreShape

__all__ = [
    "Mask",
    "MaskedScoreMod",
    "as_mask",
    "at_positions",
    "causal",
    "combine_masks",
    "documents",
    "index_grid",
    "make_causal_mask",
    "make_document_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "mask_argument",
    "names_residuals",
    "padding",
    "prefix",
    "reads_cache_in_chunks",
    "resolve_masks",
    "sliding_window",
    "split_score_mod",
    "takes_mask_objects",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_BLOCK = 16  # tokens whose ids or positions are summed up by their bounds

Range = tuple[Index, Index]
"""First and last index of a tile along one axis, both included."""


class NoTruth:
    """Of masks and score mods, which have a value at every pair: `and`, `or`, `not` and `if` raise TypeError."""

    def __bool__(self) -> bool:
        raise TypeError(
            f"{type(self).__name__}: a mask or score mod has a value for each pair, and no truth value for `and`, "
            "`or`, `not` and `if`. Combine masks by `&`, `|` and `~` and score mods by compose_score_mods; write "
            "`is None` to test whether there is one."
        )


class Mask(NoTruth):
    """A boolean function of (batch, head, query, key) that also knows its value over tiles."""

    @property
    def is_opaque(self) -> bool:
        """Whether `tile` cannot tell enough, so that a kernel should look at the pairs themselves."""
        return True

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        """True where query `q` may attend key `kv`; the shape is what the indices broadcast to, or smaller."""
        raise NotImplementedError

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        """Bounds over a tile: `(may any pair attend, do all pairs attend)`.

        Both are safe: `any` may be True where nothing attends, `all` may be False where everything does.
        `(True, False)`, the default, means "cannot tell".
        """
        return True, False

    @property
    def num_positions(self) -> int | None:
        """How many positions the mask's arrays know; None if it serves any number."""
        return None

    def check(self, caller: str, full: ScoreShape) -> None:
        """Raises ValueError if the mask holds arrays that do not fit (B, N, T, S) = `full`."""

    def __and__(self, other: Mask | MaskMod | ArrayLike) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: MaskMod | ArrayLike) -> Mask:
        return And(as_mask(other), self)

    def __or__(self, other: Mask | MaskMod | ArrayLike) -> Mask:
        return ~(~self & ~as_mask(other))

    def __ror__(self, other: MaskMod | ArrayLike) -> Mask:
        return ~(~as_mask(other) & ~self)

    def __invert__(self) -> Mask:
        return Not(self)

    __array_ufunc__ = None  # so that NumPy leaves `array & mask` to __rand__


@pytree_dataclass
class And(Mask):
    """Both masks allow the pair."""

    left: Mask
    right: Mask

    @property
    def is_opaque(self) -> bool:
        return self.left.is_opaque or self.right.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.logical_and(self.left(b, h, q, kv), self.right(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        left_any, left_all = self.left.tile(b, h, q_range, kv_range)
        right_any, right_all = self.right.tile(b, h, q_range, kv_range)
        return jnp.logical_and(left_any, right_any), jnp.logical_and(left_all, right_all)

    @property
    def num_positions(self) -> int | None:
        known = [n for n in (self.left.num_positions, self.right.num_positions) if n is not None]
        return min(known, default=None)

    def check(self, caller: str, full: ScoreShape) -> None:
        self.left.check(caller, full)
        self.right.check(caller, full)


@pytree_dataclass
class Not(Mask):
    """The pairs that `mask` forbids; `a | b` is `~(~a & ~b)`."""

    mask: Mask

    @property
    def is_opaque(self) -> bool:
        return self.mask.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.logical_not(self.mask(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        some, every = self.mask.tile(b, h, q_range, kv_range)
        return jnp.logical_not(every), jnp.logical_not(some)

    @property
    def num_positions(self) -> int | None:
        return self.mask.num_positions

    def check(self, caller: str, full: ScoreShape) -> None:
        self.mask.check(caller, full)


@pytree_dataclass
class Causal(Mask):
    """A query attends the keys at its own position and before."""

    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.less_equal(kv, q)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        return jnp.less_equal(kv_range[0], q_range[1]), jnp.less_equal(kv_range[1], q_range[0])


@pytree_dataclass
class SlidingWindow(Mask):
    """A query attends the `before - 1` keys before it, itself, and the `after - 1` keys after it."""

    before: int | ArrayLike
    after: int | ArrayLike
    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        distance = jnp.subtract(q, kv)
        return jnp.logical_and(distance < self.before, -distance < self.after)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        least, most = jnp.subtract(q_range[0], kv_range[1]), jnp.subtract(q_range[1], kv_range[0])
        some = jnp.logical_and(least < self.before, -most < self.after)
        return some, jnp.logical_and(most < self.before, -least < self.after)


@pytree_dataclass
class Documents(Mask):
    """Tokens attend the tokens of the same id; a negative id is padding, which attends nothing and is not attended."""

    q_ids: Array  # (B|1, T)
    kv_ids: Array  # (B|1, S)
    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        q_id = _read(self.q_ids, b, q)
        return jnp.equal(q_id, _read(self.kv_ids, b, kv)) & jnp.greater_equal(q_id, 0)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        q_least, q_most = _range_bounds(self.q_ids, b, q_range)
        kv_least, kv_most = _range_bounds(self.kv_ids, b, kv_range)
        some = (jnp.maximum(q_least, 0) <= kv_most) & (jnp.maximum(kv_least, 0) <= q_most)
        return some, (q_least == kv_most) & (kv_least == q_most) & (q_least >= 0)

    @property
    def num_positions(self) -> int | None:
        return min(self.q_ids.shape[1], self.kv_ids.shape[1])

    def check(self, caller: str, full: ScoreShape) -> None:
        for name, ids, length in (("document_ids", self.q_ids, full[2]), ("kv_ids", self.kv_ids, full[3])):
            if ids.shape[0] not in (1, full[0]) or (length is not None and ids.shape[1] != length):
                raise ValueError(
                    f"{caller}: documents need one id a token, ({length},) or ({full[0]}, {length}) for {name}; "
                    f"got {name}.shape={ids.shape}. Where queries and keys differ, use documents(ids, kv_ids)."
                )


@pytree_dataclass
class Lengths(Mask):
    """Row `b` holds `lengths[b]` real keys, then padding."""

    lengths: Array
    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.less(kv, self.lengths[b])

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        lengths = self.lengths[b]
        return jnp.less(kv_range[0], lengths), jnp.less(kv_range[1], lengths)

    def check(self, caller: str, full: ScoreShape) -> None:
        if self.lengths.shape != full[:1]:
            raise ValueError(
                f"{caller}: a mask by lengths needs one length a batch row; "
                f"got lengths.shape={self.lengths.shape} for batch={full[0]}."
            )


@pytree_dataclass
class Dense(Mask):
    """A boolean array that broadcasts to (B, N, T, S), read lazily at the indices asked for."""

    array: Array  # (B|1, N|1, T|1, S|1)

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        indices = zip((b, h, q, kv), self.array.shape, strict=True)
        # Positions may lie past the array (a cache has spare room): nothing attends there.
        return self.array.at[tuple(0 if size == 1 else index for index, size in indices)].get(
            mode="fill", fill_value=False
        )

    @property
    def num_positions(self) -> int | None:
        return min((size for size in self.array.shape[2:] if size > 1), default=None)

    def check(self, caller: str, full: ScoreShape) -> None:
        check_mask_shape(caller, self.array.shape, full)


@pytree_dataclass
class Pointwise(Mask):
    """A user's function `(b, h, q, kv) -> bool`; nothing is known about its tiles."""

    function: MaskMod  # a pytree

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        with explain_tracing("mask", "a mask function"):
            allowed = jnp.asarray(self.function(b, h, q, kv))
        if allowed.dtype != jnp.bool_:
            raise ValueError(
                f"mask: a mask function must return booleans, True to attend; got dtype={allowed.dtype}. "
                "Add a bias by a score_mod."
            )
        return allowed


@pytree_dataclass
class AtPositions(Mask):
    """`mask` read at true positions; a key at a negative position is no token, and nothing attends it."""

    mask: Mask | None
    q_positions: Array  # (B|1, T)
    kv_positions: Array  # (B|1, S)

    @property
    def is_opaque(self) -> bool:
        return self.mask is not None and self.mask.is_opaque

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        q, kv = _read(self.q_positions, b, q), _read(self.kv_positions, b, kv)
        present = jnp.greater_equal(kv, 0)
        return present if self.mask is None else jnp.logical_and(present, self.mask(b, h, q, kv))

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        tile = None if self.mask is None else self.mask.tile
        return tile_at_positions(tile, self.q_positions, self.kv_positions, b, h, q_range, kv_range)

    @property
    def num_positions(self) -> int | None:
        return min(self.q_positions.shape[1], self.kv_positions.shape[1])

    def check(self, caller: str, full: ScoreShape) -> None:
        _check_both_positions(caller, self.q_positions, self.kv_positions, full)
        if self.mask is not None:
            self.mask.check(caller, (*full[:2], None, None))


@pytree_dataclass
class ScoreModAtPositions(NoTruth):
    """A score mod read at true positions."""

    score_mod: ScoreMod  # a pytree
    q_positions: Array  # (B|1, T)
    kv_positions: Array  # (B|1, S)

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return self.score_mod(scores, b, h, _read(self.q_positions, b, q), _read(self.kv_positions, b, kv))

    def check(self, caller: str, full: ScoreShape) -> None:
        """Raises ValueError if the positions, or the mod's arrays, do not fit (B, N, T, S) = `full`.

        The mod is given None for the lengths: which positions there may be is not known.
        """
        batch, num_heads, seq_q, seq_kv = full
        if seq_q is not None and seq_kv is not None:
            _check_both_positions(caller, self.q_positions, self.kv_positions, (batch, num_heads, seq_q, seq_kv))
        if hasattr(self.score_mod, "check"):
            self.score_mod.check(caller, (batch, num_heads, None, None))


@pytree_dataclass
class MaskedScoreMod(NoTruth):
    """A score mod that is, or contains, a mask: `score_mod` first, then -inf where `mask` forbids the pair.

    Kernels take the two apart, so that a mask given as a score mod saves as much as one given as `mask=`.
    """

    score_mod: ScoreMod | None  # a pytree
    mask: Mask

    def __call__(self, scores: Array, b: Index, h: Index, q: Index, kv: Index) -> Array:
        if self.score_mod is not None:
            scores = self.score_mod(scores, b, h, q, kv)
        return jnp.where(self.mask(b, h, q, kv), scores, -jnp.inf)


def split_score_mod(score_mod: ScoreMod | None) -> tuple[ScoreMod | None, Mask | None]:
    """The part of a score mod that changes scores, and the mask that it carries."""
    if isinstance(score_mod, MaskedScoreMod):
        return score_mod.score_mod, score_mod.mask
    return score_mod, None


def causal() -> Mask:
    """Each query attends itself and what came before: `kv <= q`.

    On bare arrays q and kv are indices, also when T != S; use `at_positions` for a chunk that starts later.

    Example:
        >>> from attnax.masks import causal
        >>> bool(causal()(0, 0, q=2, kv=1)), bool(causal()(0, 0, q=1, kv=2))
        (True, False)
    """
    return Causal()


def padding(real: Int[ArrayLike, "B"] | Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"]) -> Mask:
    """Nothing attends padding keys.

    Args:
        real: how many keys of each row are real, the padding being on the right; or which keys are, as
            booleans.

    Raises:
        ValueError: an array of another shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import causal, padding
        >>> mask = causal() & padding(jnp.array([3, 5]))
        >>> bool(mask(0, 0, q=4, kv=3)), bool(mask(1, 0, q=4, kv=3))
        (False, True)
    """
    real = jnp.asarray(real)
    if jnp.issubdtype(real.dtype, jnp.integer) and real.ndim == 1:
        return Lengths(real)
    if real.dtype == jnp.bool_ and real.ndim == 2:
        return Dense(real[:, None, None, :])
    if real.dtype == jnp.bool_ and real.ndim == 4 and real.shape[1:3] == (1, 1):
        return Dense(real)
    raise ValueError(
        "padding: give integer lengths (batch,) or booleans (batch, length), True for a real token; "
        f"got shape={real.shape}, dtype={real.dtype}."
    )


def sliding_window(window_size: int | Int[ArrayLike, ""], *, causal: bool = True) -> Mask:
    """Each query attends the nearest `window_size` keys: `0 <= q - kv < window_size`, or `|q - kv| < window_size`.

    Args:
        window_size: in tokens, itself included; at least 1.
        causal: nothing after the query.

    Raises:
        ValueError: a window that is below 1 or no whole number.

    Example:
        >>> from attnax.masks import sliding_window
        >>> mask = sliding_window(2)
        >>> [bool(mask(0, 0, 2, kv)) for kv in range(4)]
        [False, True, True, False]
    """
    whole = jnp.ndim(window_size) == 0 and jnp.issubdtype(jnp.result_type(window_size), jnp.integer)
    if not whole or (is_concrete(window_size) and window_size < 1):
        raise ValueError(
            f"sliding_window: window_size must be a whole number, at least 1; got window_size={window_size!r}."
        )
    return SlidingWindow(window_size, 1 if causal else window_size)


def prefix(lengths: Int[ArrayLike, "B"]) -> Mask:
    """Prefix language model: `causal() | padding(lengths)`, the first `lengths[b]` tokens of a row are seen by all.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import prefix
        >>> mask = prefix(jnp.array([2]))
        >>> [bool(mask(0, 0, 0, kv)) for kv in range(4)]
        [True, True, False, False]
    """
    lengths = jnp.asarray(lengths)
    if lengths.ndim != 1 or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"prefix: give one whole length a batch row; got shape={lengths.shape}, dtype={lengths.dtype}."
        )
    return Causal() | Lengths(lengths)


def documents(
    document_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"],
    kv_ids: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"] | None = None,
) -> Mask:
    """Packed rows: a token attends only tokens of its own document. Combine with `causal()` as needed.

    Args:
        document_ids: (length,) or (batch, length), in any order; tiles are skipped best where ids are sorted. A
            negative id marks padding: it attends nothing, and nothing attends it.
        kv_ids: the same for the keys, where they are not the queries.

    Raises:
        ValueError: ids that are no integers of these shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import causal, documents
        >>> mask = causal() & documents(jnp.array([0, 0, 1, 1]))
        >>> [bool(mask(0, 0, 2, kv)) for kv in range(4)]
        [False, False, True, False]
    """
    q_ids = jnp.asarray(document_ids)
    kv_ids = q_ids if kv_ids is None else jnp.asarray(kv_ids)
    for ids in (q_ids, kv_ids):
        if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                "documents: ids must be integers (length,) or (batch, length); "
                f"got shape={ids.shape}, dtype={ids.dtype}."
            )
    return Documents(jnp.atleast_2d(q_ids), jnp.atleast_2d(kv_ids))


def as_mask(mask: Mask | MaskMod | ArrayLike) -> Mask:
    """The Mask of a boolean array (which broadcasts to (B, N, T, S)) or of a function `(b, h, q, kv) -> bool`.

    Raises:
        ValueError: an array that is not boolean or has more than 4 axes, or anything that cannot be called.
    """
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, jax.Array | np.ndarray):
        if mask.dtype != jnp.bool_ or mask.ndim > 4:
            raise ValueError(
                "as_mask: a mask array must be boolean, True to attend, and broadcast to "
                f"(batch, num_heads, seq_q, seq_kv); got shape={mask.shape}, dtype={mask.dtype}."
            )
        return Dense(jnp.asarray(mask).reshape((1,) * (4 - mask.ndim) + mask.shape))
    if callable(mask):
        return Pointwise(function_pytree(mask))
    raise ValueError(f"as_mask: a mask is a boolean array, a Mask or a function (b, h, q, kv) -> bool; got {mask!r}.")


@overload
def at_positions(
    mask_or_mod: Mask | None,
    q_positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"],
) -> Mask: ...
@overload
def at_positions(
    mask_or_mod: ScoreMod,
    q_positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"],
) -> ScoreMod: ...
def at_positions(
    mask_or_mod: Mask | ScoreMod | None,
    q_positions: Int[ArrayLike, "T"] | Int[ArrayLike, "#B T"],
    kv_positions: Int[ArrayLike, "S"] | Int[ArrayLike, "#B S"],
) -> Mask | ScoreMod:
    """Reads a mask or a score mod at true positions instead of array indices.

    Kernels only know array indices. Where index and position differ (the second chunk of a text, left
    padding, a shard of a ring) this is the one translation between them.

    Args:
        mask_or_mod: a Mask, or None for "everything attends"; anything else is taken as a score mod (wrap a
            plain mask function in `as_mask` first).
        q_positions: the position of each query: an index within its row's own text.
        kv_positions: the position of each key; a negative one marks an empty slot or padding, which nothing
            attends.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.masks import at_positions, causal
        >>> mask = at_positions(causal(), jnp.array([7]), jnp.array([6, 7, 8, -1]))
        >>> [bool(mask(0, 0, 0, kv)) for kv in range(4)]
        [True, True, False, False]
    """
    for name, positions in (("q_positions", q_positions), ("kv_positions", kv_positions)):
        if not jnp.issubdtype(jnp.result_type(positions), jnp.integer):
            raise ValueError(f"at_positions: {name} must be integers; got dtype={jnp.result_type(positions)}.")
    # int32: the difference of two unsigned positions is never negative.
    q_positions, kv_positions = (jnp.atleast_2d(jnp.asarray(x, jnp.int32)) for x in (q_positions, kv_positions))
    if mask_or_mod is None or isinstance(mask_or_mod, Mask):
        return AtPositions(mask_or_mod, q_positions, kv_positions)
    score_mod, mask = split_score_mod(mask_or_mod)
    if score_mod is not None:
        score_mod = ScoreModAtPositions(function_pytree(score_mod), q_positions, kv_positions)
    if mask is None:
        assert score_mod is not None
        return score_mod
    return MaskedScoreMod(score_mod, AtPositions(mask, q_positions, kv_positions))


def index_grid(batch: int, num_heads: int, seq_q: int, seq_kv: int) -> tuple[Array, Array, Array, Array]:
    """Indices b, h, q, kv of shapes (B,1,1,1), (1,N,1,1), (1,1,T,1), (1,1,1,S): every pair, by broadcasting."""
    return (
        jnp.arange(batch)[:, None, None, None],
        jnp.arange(num_heads)[None, :, None, None],
        jnp.arange(seq_q)[None, None, :, None],
        jnp.arange(seq_kv)[None, None, None, :],
    )


def make_padding_mask(input_ids: Int[ArrayLike, "B S"], pad_token_id: int = 0) -> Bool[Array, "B 1 1 S"]:
    """True where `input_ids` holds a real token.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import make_padding_mask
        >>> make_padding_mask(jnp.array([[5, 7, 0]]))[0, 0, 0].tolist()
        [True, True, False]
    """
    return (jnp.asarray(input_ids) != pad_token_id)[:, None, None, :]


def make_causal_mask(seq_len: int) -> Bool[Array, "1 1 T T"]:
    """`causal()` as an array."""
    return causal()(*index_grid(1, 1, seq_len, seq_len))


def make_sliding_window_mask(
    seq_q: int, seq_kv: int | None = None, *, window_size: int, causal: bool = True
) -> Bool[Array, "1 1 T S"]:
    """`sliding_window(window_size, causal=causal)` as an array."""
    mask = sliding_window(window_size, causal=causal)
    return mask(*index_grid(1, 1, seq_q, seq_q if seq_kv is None else seq_kv))


def make_document_mask(document_ids: Int[ArrayLike, "T"] | Int[ArrayLike, "B T"]) -> Bool[Array, "B 1 T T"]:
    """`documents(document_ids)` as an array."""
    ids = jnp.atleast_2d(jnp.asarray(document_ids))
    return documents(ids)(*index_grid(ids.shape[0], 1, ids.shape[1], ids.shape[1]))


def combine_masks(*masks: Mask | MaskMod | ArrayLike | None) -> Mask | Array | None:
    """What all `masks` allow, skipping None; None if there is nothing to combine.

    Boolean arrays give an array; if a Mask or a function is among them, the result is a Mask.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import combine_masks, make_causal_mask, make_padding_mask
        >>> combine_masks(make_causal_mask(3), None, make_padding_mask(jnp.array([[5, 7, 0]]))).shape
        (1, 1, 3, 3)
    """
    present = [as_mask(mask) for mask in masks if mask is not None]
    if not present:
        return None
    if all(isinstance(mask, Dense) for mask in present):
        return functools.reduce(jnp.logical_and, [mask.array for mask in present if isinstance(mask, Dense)])
    return functools.reduce(And, present)


def resolve_masks(
    caller: str, mask: Any, score_mod: ScoreMod | None, full: ScoreShape
) -> tuple[Mask | None, ScoreMod | None]:
    """The arguments `mask=` and `score_mod=` of a kernel as one Mask and one score mod that is no mask.

    Raises:
        ValueError: something in them holds arrays that do not fit (B, N, T, S) = `full`.
    """
    score_mod, carried = split_score_mod(score_mod)
    mask = None if mask is None else as_mask(mask)
    if carried is not None:
        mask = carried if mask is None else mask & carried
    if mask is not None:
        mask.check(caller, full)
    check = getattr(score_mod, "check", None)
    if check is not None:
        check(caller, full)
    return mask, score_mod


def takes_mask_objects(attention_fn: Function) -> Function:
    """Marks an attention function whose `mask=` may be a Mask; any other gets a dense boolean array."""
    attention_fn.takes_mask_objects = True  # type: ignore[attr-defined]
    return attention_fn


def reads_cache_in_chunks(attention_fn: Function) -> Function:
    """Marks an attention function whose place `cached_attention` may take for a few queries against a cache."""
    attention_fn.reads_cache_in_chunks = True  # type: ignore[attr-defined]
    return attention_fn


def names_residuals(attention_fn: Function) -> Function:
    """Marks an attention function that names what its backward pass reads, "attention_out", for `jax.checkpoint`."""
    attention_fn.names_residuals = True  # type: ignore[attr-defined]
    return attention_fn


def mask_argument(
    caller: str, attention_fn: Callable[..., Any], mask: Mask | None, full: tuple[int, int, int, int]
) -> Mask | Array | None:
    """`mask` in the form that `attention_fn` takes: itself, or an array that broadcasts to (B, N, T, S) = `full`."""
    if mask is None:
        return None
    kernel = attention_fn
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    if getattr(kernel, "takes_mask_objects", False):
        return mask  # and checks it, against lengths that only it may know: a ring's are global
    mask.check(caller, full)
    array = mask(*index_grid(*full))
    return array.reshape((1,) * (4 - array.ndim) + array.shape)  # not `full`: a window is the same for all heads


def tile_at_positions(
    tile: Callable[..., tuple[Any, Any]] | None,
    q_positions: Array,
    kv_positions: Array,
    b: Index,
    h: Index,
    q_range: Range,
    kv_range: Range,
) -> tuple[Any, Any]:
    """What `Mask.tile` says of a mask at positions (B|1, T) and (B|1, S); `tile` is its own, None where all attend."""
    absent_last = jnp.where(kv_positions < 0, jnp.iinfo(jnp.int32).max, kv_positions)
    kv_least, _ = _range_bounds(absent_last, b, kv_range)
    lowest, kv_most = _range_bounds(kv_positions, b, kv_range)
    some, every = True, True
    if tile is not None:
        some, every = tile(b, h, _range_bounds(q_positions, b, q_range), (kv_least, kv_most))
    return jnp.logical_and(some, kv_most >= 0), jnp.logical_and(every, lowest >= 0)


def _read(values: Array, b: Index, index: Index) -> Array:
    # The first value before the array, the last one past it: those that `_range_bounds` sees there.
    return values[0 if values.shape[0] == 1 else b, jnp.maximum(index, 0)]


def _range_bounds(values: Array, b: Index, index_range: Range) -> tuple[Array, Array]:
    """Bounds on `values[b, first:last + 1]`, (least, greatest): exact where a range begins and ends a block of 16.

    Level j of a table holds the bounds of 2**j blocks from each block on; any range is covered by two of those.
    """
    blocks = -(-values.shape[1] // _BLOCK)
    blocked = jnp.pad(values, ((0, 0), (0, blocks * _BLOCK - values.shape[1])), mode="edge")
    blocked = blocked.reshape(-1, blocks, _BLOCK)
    first, last = (jnp.clip(jnp.asarray(index), 0, values.shape[1] - 1) // _BLOCK for index in index_range)
    level = jnp.maximum(31 - lax.clz((last - first + 1).astype(jnp.int32)), 0)
    bounds = []
    for reduce, join in ((jnp.min, jnp.minimum), (jnp.max, jnp.maximum)):
        table = [reduce(blocked, axis=2)]
        while 2 ** len(table) <= blocks:
            half = 2 ** (len(table) - 1)
            table.append(join(table[-1], jnp.pad(table[-1][:, half:], ((0, 0), (0, half)), mode="edge")))
        levels, row = jnp.stack(table), 0 if values.shape[0] == 1 else b
        bounds.append(join(levels[level, row, first], levels[level, row, last + 1 - (1 << level)]))
    return bounds[0], bounds[1]


def _check_both_positions(caller: str, q_positions: Array, kv_positions: Array, full: ScoreShape) -> None:
    for name, positions, length in (("q_positions", q_positions, full[2]), ("kv_positions", kv_positions, full[3])):
        check_positions(caller, name, positions, full[0], positions.shape[1] if length is None else length)
