"""The sizes of tiles on a CPU, chosen by the shapes and by the mask."""

from __future__ import annotations

import dataclasses

from attnax.masks import Mask

__all__ = ["Shape", "Tiles", "check_block_size", "choose_tiles", "tile_shape"]

_SCORES = 2**20  # of a tile, at most: more do not fit the caches of a CPU
_LARGEST = 512  # queries or keys of a tile
_ONE_TILE = 256  # a shorter text is not cut: loops take longer to compile, and save little


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The sizes of a tile.

    Query heads that share keys are a group. Groups are numbered over all rows of the batch. A tile holds consecutive
    groups: some groups of one row, or all groups of several rows.
    """

    groups: int
    queries: int
    keys: int


Shape = tuple[int, int, int, int, int]
"""(B, N, T, K, S)."""


def tile_shape(tiles: Tiles, shape: Shape) -> tuple[int, int, int, int]:
    """(rows of the batch, heads, queries, keys) of a tile, as masks and score mods see the tile."""
    _, heads, _, kv_heads, _ = shape
    rows = max(1, tiles.groups // kv_heads)
    return rows, tiles.groups // rows * (heads // kv_heads), tiles.queries, tiles.keys


def check_block_size(caller: str, block_size: int | tuple[int | None, int | None] | None) -> None:
    """Raises ValueError for a tile size that is not an int above 0; a pair is named `block_q` and `block_kv`."""
    named = {"block_size": block_size}
    if isinstance(block_size, tuple) and len(block_size) == 2:
        named = {"block_q": block_size[0], "block_kv": block_size[1]}
    for name, size in named.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{caller}: {name} must be a whole number, at least 1; got {name}={size!r}.")


def choose_tiles(
    score_shape: tuple[int, int, int, int],
    kv_heads: int,
    block_size: int | tuple[int | None, int | None] | None,
    mask: Mask | None,
) -> Tiles:
    """Tiles for (B, N, T, S) = `score_shape` and K = `kv_heads`; `block_size` names the sizes that the user chose."""
    batch, heads, seq_q, seq_kv = score_shape
    block_q, block_kv = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    largest = _largest(mask, seq_kv)
    queries = _even(seq_q, largest) if block_q is None else min(block_q, seq_q)
    keys = _even(seq_kv, largest) if block_kv is None else min(block_kv, seq_kv)
    is_cut = block_q is None and block_kv is None and (queries, keys) != (seq_q, seq_kv)
    scores = _SCORES * largest // _LARGEST if is_cut else _SCORES  # small tiles are fast in fewer heads
    whole = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    # A tile of several rows is computed if one row needs it, so large tiles under a mask hold one row.
    is_large = is_cut and mask is not None and heads * queries * keys >= _SCORES // 8
    if isinstance(batch, int) and not is_large:
        whole += [n * kv_heads for n in range(2, batch + 1) if batch % n == 0]
    groups = max(n for n in whole if n == 1 or n * heads // kv_heads * queries * keys <= scores)
    return Tiles(groups, queries, keys)


def _largest(mask: Mask | None, seq_kv: int) -> int:
    """The most queries or keys of a tile.

    A query computes the keys that the mask allows and, at each edge of the mask, about half a tile of forbidden ones.
    Smaller tiles compute fewer forbidden pairs, but a pair takes longer: about 1, 1.1 and 1.3 times as long in tiles of
    512, 256 and 128 (`benchmarks/tiles.py`). With two edges, as a window has, (keys + tile) * time is equal at the
    limits below. A mask that allows half of the keys, as the causal mask does, has one edge.
    """
    keys = seq_kv if mask is None else mask.keys_per_query(seq_kv)
    if keys is None:
        return 128
    if mask is None or keys > 2304:
        return _LARGEST
    return 128 if keys <= 576 and keys < seq_kv // 2 else 256


def _even(length: int, largest: int) -> int:
    """The tile of at most `largest` that cuts `length` most evenly; a multiple of 16 if there are several tiles."""
    count = 1 if length <= _ONE_TILE else -(-length // largest)
    return length if count == 1 else -(-length // (16 * count)) * 16
