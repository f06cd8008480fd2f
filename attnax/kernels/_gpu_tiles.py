"""Tile sizes of the GPU kernels; `benchmarks/gpu.py --tiles` measures those of both passes again."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["LARGEST_HEAD", "TILES", "Tile", "choose", "shared_memory"]


class Tile(NamedTuple):
    """What one program of a kernel works on."""

    block_q: int  # queries
    block_kv: int  # keys
    num_warps: int
    num_stages: int  # tiles of keys and values that are on their way at once


# For 16-bit arrays, by the greatest head size that an entry is for.
TILES = {
    ("forward", 64): Tile(128, 64, 4, 3),
    ("forward", 128): Tile(128, 128, 8, 3),
    ("forward", 256): Tile(128, 32, 8, 2),
    ("backward", 64): Tile(64, 64, 4, 2),
    ("backward", 128): Tile(64, 64, 4, 2),
    ("backward", 256): Tile(64, 32, 4, 1),
    ("decode", 64): Tile(16, 64, 4, 3),
    ("decode", 128): Tile(16, 64, 4, 3),
    ("decode", 256): Tile(16, 32, 4, 2),
}
LARGEST_HEAD = max(size for _, size in TILES)

_KNOWN = {r"\bA(100|30)\b": 163, r"\b(H[128]00|H20|GH200|G?B[23]00)\b": 227}  # KiB, by the name of a card
_ANY = 99


def shared_memory(device_kind: str) -> int:
    """Bytes that a program may take of a card's shared memory, at least, by its name ("NVIDIA H100 80GB HBM3")."""
    return 1024 * next((size for name, size in _KNOWN.items() if re.search(name, device_kind)), _ANY)


def choose(kind: str, head_dim: int, bits: int = 16, shared: int = 0) -> Tile:
    """The tile of "forward", "backward" or "decode" for heads of this size; 32-bit numbers have smaller ones."""
    size = min(size for of, size in TILES if of == kind and size >= head_dim)
    tile = TILES[kind, size]
    if bits == 16:
        return tile
    return tile._replace(block_q=max(16, tile.block_q // 2), block_kv=max(16, tile.block_kv // 2))
