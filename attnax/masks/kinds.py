"""The common masks, with their bounds over tiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.checks import check_shape, is_concrete
from attnax.masks.mask import Dense, Mask, Range, present_bounds, value_at
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Index, Int, ScoreShape

__all__ = [
    "Causal",
    "Documents",
    "First",
    "Lengths",
    "SlidingWindow",
    "causal",
    "document_ids",
    "documents",
    "first",
    "padding",
    "prefix",
    "sliding_window",
]


@pytree_dataclass
class Causal(Mask):
    """A query attends the keys at its own position and before."""

    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.less_equal(kv, q)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        return jnp.less_equal(kv_range[0], q_range[1]), jnp.less_equal(kv_range[1], q_range[0])

    def keys_per_query(self, seq_kv: int) -> int:
        return seq_kv // 2


@pytree_dataclass
class SlidingWindow(Mask):
    """A query attends `before - 1` keys before its position, its own key, and `after - 1` keys after its position."""

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

    def keys_per_query(self, seq_kv: int) -> int | None:
        is_known = is_concrete(self.before) and is_concrete(self.after)
        return min(int(self.before) + int(self.after) - 1, seq_kv) if is_known else None


@pytree_dataclass
class First(Mask):
    """All queries attend the keys at positions below `end`."""

    end: int | ArrayLike
    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        return jnp.less(kv, self.end)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        return jnp.less(kv_range[0], self.end), jnp.less(kv_range[1], self.end)

    def keys_per_query(self, seq_kv: int) -> int | None:
        return min(int(self.end), seq_kv) if is_concrete(self.end) else None


@pytree_dataclass
class Documents(Mask):
    """Tokens attend the tokens of the same id; a negative id is padding, which neither attends nor is attended."""

    q_ids: Array  # (B|1, T)
    kv_ids: Array  # (B|1, S)
    is_opaque = False

    def __call__(self, b: Index, h: Index, q: Index, kv: Index) -> Array:
        q_id = value_at(self.q_ids, b, q)
        return jnp.equal(q_id, value_at(self.kv_ids, b, kv)) & jnp.greater_equal(q_id, 0)

    def tile(self, b: Index, h: Index, q_range: Range, kv_range: Range) -> tuple[Any, Any]:
        # Padding must not widen the bounds: a row's last tile, half padding, would meet all documents.
        q_least, q_most, q_lowest = present_bounds(self.q_ids, b, q_range)
        kv_least, kv_most, kv_lowest = present_bounds(self.kv_ids, b, kv_range)
        every = (q_lowest == kv_most) & (kv_lowest == q_most) & (q_lowest >= 0)
        return (q_least <= kv_most) & (kv_least <= q_most), every

    @property
    def num_positions(self) -> int | None:
        return min(self.q_ids.shape[1], self.kv_ids.shape[1])

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        batch, _, seq_q, seq_kv = score_shape
        for name, ids, length in (("document_ids", self.q_ids, seq_q), ("kv_ids", self.kv_ids, seq_kv)):
            if ids.shape[0] not in (1, batch) or (length is not None and ids.shape[1] != length):
                size = "length" if length is None else length
                raise ValueError(
                    f"{caller}: documents need one id a token, ({size},) or ({batch}, {size}) for {name}; "
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

    def keys_per_query(self, seq_kv: int) -> int:
        return seq_kv

    def check(self, caller: str, score_shape: ScoreShape) -> None:
        if self.lengths.shape != score_shape[:1]:
            raise ValueError(
                f"{caller}: a mask by lengths needs one length a batch row; "
                f"got lengths.shape={self.lengths.shape} for batch={score_shape[0]}."
            )


def causal() -> Mask:
    """Each query attends the keys at its own position and before: `kv <= q`.

    On bare arrays q and kv are indices, also when T != S; use `at_positions` for a chunk that starts later.

    Example:
        >>> from attnax.masks import causal
        >>> bool(causal()(0, 0, q=2, kv=1)), bool(causal()(0, 0, q=1, kv=2))
        (True, False)
    """
    return Causal()


def padding(real: Int[ArrayLike, "B"] | Bool[ArrayLike, "B S"] | Bool[ArrayLike, "B 1 1 S"]) -> Mask:
    """No query attends padding keys.

    Args:
        real: the number of real keys of each row, with padding on the right; or booleans, True for a real key.

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
        window_size: in tokens, the query included; at least 1. One that is longer than any text hides nothing.
        causal: no key after the query is attended.

    Raises:
        ValueError: a window that is below 1 or not a whole number.

    Example:
        >>> from attnax.masks import sliding_window
        >>> mask = sliding_window(2)
        >>> [bool(mask(0, 0, 2, kv)) for kv in range(4)]
        [False, True, True, False]
    """
    window_size = _whole_number("sliding_window", "window_size", window_size, 1)
    return SlidingWindow(window_size, 1 if causal else window_size)


def first(num_tokens: int | Int[ArrayLike, ""]) -> Mask:
    """All queries attend the first `num_tokens` keys of their row: `kv < num_tokens`.

    With a window these keys are the attention sinks of StreamingLLM. `RingKVCache` keeps exactly the keys of this mask.

    Args:
        num_tokens: the same for all rows; `padding` takes one number for each row.

    Raises:
        ValueError: a number that is below 0 or not whole.

    Example:
        >>> from attnax import masks
        >>> mask = masks.causal() & (masks.sliding_window(2) | masks.first(1))
        >>> [bool(mask(0, 0, 3, kv)) for kv in range(5)]
        [True, False, True, True, False]

    References:
        G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
        https://arxiv.org/abs/2309.17453.
    """
    return First(_whole_number("first", "num_tokens", num_tokens, 0))


def prefix(lengths: Int[ArrayLike, "B"]) -> Mask:
    """Prefix language model: `causal() | padding(lengths)`; all queries attend the first `lengths[b]` tokens of a row.

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
        document_ids: (length,) or (batch, length), in any order; most tiles are skipped if ids are sorted. A negative
            id marks padding, which attends no token and is not attended.
        kv_ids: ids of the keys, if the keys are not the queries.

    Raises:
        ValueError: ids that are not integers of these shapes.

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


def document_ids(
    cu_seqlens: Int[ArrayLike, "M"] | Int[ArrayLike, "B M"], length: int
) -> Int[Array, "T"] | Int[Array, "B T"]:
    """The document of each token of a packed row, for `documents`, from the cumulative lengths of the documents.

    Document i holds the tokens cu_seqlens[i] ... cu_seqlens[i + 1] - 1, as in the functions of FlashAttention for
    sequences of different lengths. Equal neighbours are documents without tokens, so that rows with fewer documents
    repeat their last number.

    Args:
        cu_seqlens: (number of documents + 1,) or (batch, number of documents + 1), from 0 on, never decreasing; may be
            traced.
        length: of a row. Tokens after the last document are padding, with the id -1.

    Raises:
        ValueError: an array of another shape or dtype; known numbers that do not begin with 0, that decrease or that
            exceed the length.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import masks
        >>> ids = masks.document_ids(jnp.array([0, 3, 5]), 7)
        >>> ids.tolist()
        [0, 0, 0, 1, 1, -1, -1]
        >>> mask = masks.causal() & masks.documents(ids)
    """
    check_shape("document_ids", "cu_seqlens", cu_seqlens, ("number + 1",), ("batch", "number + 1"), integers=True)
    if is_concrete(cu_seqlens):
        known = np.asarray(cu_seqlens)
        is_valid = known.shape[-1] > 0 and (known[..., 0] == 0).all() and (np.diff(known) >= 0).all()
        if not is_valid or known.max(initial=0) > length:
            raise ValueError(
                "document_ids: cu_seqlens must begin with 0, never decrease and end at most at the length; "
                f"got cu_seqlens={known.tolist()}, length={length}."
            )
    ends = jnp.asarray(cu_seqlens, jnp.int32)[..., 1:]
    index = jnp.arange(length, dtype=jnp.int32)

    def of_row(ends: Array) -> Array:
        ids = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
        return jnp.where(ids < len(ends), ids, -1)

    return of_row(ends) if ends.ndim == 1 else jax.vmap(of_row)(ends)


def _whole_number(caller: str, name: str, number: Any, least: int) -> Any:
    """The number, at most the greatest int32; ValueError unless it is whole and, if known, at least `least`."""
    is_number = isinstance(number, int | jax.Array | np.ndarray | np.generic)
    is_whole = is_number and jnp.ndim(number) == 0 and jnp.issubdtype(jnp.result_type(number), jnp.integer)
    if not is_whole or (is_concrete(number) and number < least):
        raise ValueError(f"{caller}: {name} must be a whole number, at least {least}; got {name}={number!r}.")
    # No text is longer.
    return min(int(number), np.iinfo(np.int32).max) if isinstance(number, int | np.integer) else number
