"""Masks as boolean arrays that broadcast to (B, N, T, S), True to attend."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attnax.masks.kinds import causal, documents, sliding_window
from attnax.masks.mask import And, Dense, Mask, as_mask
from attnax.typing import Array, ArrayLike, Bool, Int, MaskMod

__all__ = [
    "TileCounts",
    "combine_masks",
    "count_tiles",
    "index_grid",
    "make_causal_mask",
    "make_document_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
]


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
    """The pairs that all `masks` allow, skipping None; None if there is nothing to combine.

    Boolean arrays give an array. If one of the masks is a Mask or a function, the result is a Mask.

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


class TileCounts(NamedTuple):
    """Numbers of empty tiles (kernels skip them), partial tiles and full tiles of a mask."""

    empty: int
    partial: int
    full: int

    @property
    def skipped(self) -> float:
        """Fraction of the tiles that is never computed."""
        return self.empty / sum(self)


def count_tiles(keep: np.ndarray, tile: tuple[int, int]) -> tuple[TileCounts, np.ndarray, np.ndarray]:
    """The tiles of a mask array (T, S), cut into tiles of (queries, keys) from the first pair on.

    Returns:
        The counts, and two boolean arrays (tiles of queries, tiles of keys): which tiles are empty and which are full.
    """
    starts = [np.arange(0, length, size) for length, size in zip(keep.shape, tile, strict=True)]
    sizes = [np.diff(first, append=length) for first, length in zip(starts, keep.shape, strict=True)]
    allowed = np.add.reduceat(np.add.reduceat(keep, starts[0], axis=0, dtype=np.int64), starts[1], axis=1)
    empty, full = allowed == 0, allowed == np.multiply.outer(*sizes)
    return TileCounts(int(empty.sum()), int((~empty & ~full).sum()), int(full.sum())), empty, full
