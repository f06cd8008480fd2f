"""Tile sizes of the TPU kernels."""

from __future__ import annotations

from typing import NamedTuple

from attnax.kernels._core.tile_grid import TileGrid

__all__ = ["LANES", "LARGEST_HEAD", "ROWS", "Tile", "choose", "grid_of"]

LARGEST_HEAD = 256
LANES = 128  # numbers in a row of a register
ROWS = 8  # of a register, of 32-bit numbers


class Tile(NamedTuple):
    """The work of one program of a kernel."""

    block_q: int  # queries
    block_kv: int  # keys
    is_decoding: bool = False  # a few queries: their tile holds no more, and keys are not tested beforehand
    vmem: int = 16 * 2**20  # bytes of vector memory that a kernel may take: what a v4 has


def choose(kind: str, size: int, bits: int, *, busy: bool = False) -> Tile:
    """The tile of a kernel: "forward", "backward" or "decode".

    Args:
        kind: of the kernel.
        size: the larger head size, of keys and values.
        bits: of a number of the arrays.
        busy: whether the kernel reads a small table for each pair, an element at a time.
    """
    if kind == "decode":
        return Tile(LANES, 512, is_decoding=True)
    # `benchmarks/aot.py tpu --tiles` shows the vector memory and the compile time. A product of float32 is six of
    # bfloat16: with backward tiles of 512 libtpu takes 14 s for the passes of causal attention, with 256 it takes 9 s.
    block = 512 if not busy and (bits == 16 or (size <= 128 and kind == "forward")) else 256
    return Tile(block, block)


def grid_of(tile: Tile, seq_q: int, seq_kv: int) -> TileGrid:
    """The grid of such tiles, or of smaller ones for shorter arrays."""
    if tile.is_decoding:  # short arrays are blocks as they are: no cache is padded
        block_q, block_kv = min(tile.block_q, -(-seq_q // ROWS) * ROWS), min(tile.block_kv, seq_kv)
    else:
        block_q, block_kv = (
            min(most, -(-length // LANES) * LANES) for most, length in ((tile.block_q, seq_q), (tile.block_kv, seq_kv))
        )
    return TileGrid(seq_q, seq_kv, block_q, block_kv, overlaps=False)
