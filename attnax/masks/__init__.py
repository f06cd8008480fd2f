"""Masks as values: which query may attend which key, written once and read in two ways, for a pair and for a tile.

A `Mask` is a callable pytree. Masks combine with `&`, `|` and `~`, with each other and with one-line functions and
boolean arrays. `mask.py` says what a mask is; a new kind goes into `kinds.py`.
"""

from attnax.masks.arguments import (
    MaskedScoreMod,
    check_score_mod,
    kernel_of,
    mask_argument,
    names_residuals,
    reads_cache_in_chunks,
    resolve_masks,
    split_score_mod,
    takes_mask_objects,
)
from attnax.masks.arrays import (
    combine_masks,
    index_grid,
    make_causal_mask,
    make_document_mask,
    make_padding_mask,
    make_sliding_window_mask,
)
from attnax.masks.cached import RowsOfCall, mask_of_cache
from attnax.masks.kinds import (
    Causal,
    Documents,
    Lengths,
    SlidingWindow,
    causal,
    documents,
    padding,
    prefix,
    sliding_window,
)
from attnax.masks.mask import And, Dense, Mask, Not, NoTruth, Pointwise, Range, as_mask
from attnax.masks.positions import AtPositions, ScoreModAtPositions, at_positions, tile_at_positions
from attnax.masks.tiles import TileCounts, count_tiles

__all__ = [
    "And",
    "AtPositions",
    "Causal",
    "Dense",
    "Documents",
    "Lengths",
    "Mask",
    "MaskedScoreMod",
    "NoTruth",
    "Not",
    "Pointwise",
    "Range",
    "RowsOfCall",
    "ScoreModAtPositions",
    "SlidingWindow",
    "TileCounts",
    "as_mask",
    "at_positions",
    "causal",
    "check_score_mod",
    "combine_masks",
    "count_tiles",
    "documents",
    "index_grid",
    "kernel_of",
    "make_causal_mask",
    "make_document_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "mask_argument",
    "mask_of_cache",
    "names_residuals",
    "padding",
    "prefix",
    "reads_cache_in_chunks",
    "resolve_masks",
    "sliding_window",
    "split_score_mod",
    "takes_mask_objects",
    "tile_at_positions",
]
