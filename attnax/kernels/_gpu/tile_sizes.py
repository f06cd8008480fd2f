"""Tile sizes of the GPU kernels, and the shared memory that they take.

`benchmarks/aot_triton.py --search` finds which tiles fit, and `make aot-triton` checks the sizes here with Triton's
compiler. On a GPU `benchmarks/gpu.py --tiles` measures which are fast.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

from attnax.kernels._core.platform import abstract_device, has_nvidia_gpu
from attnax.kernels._core.tile_grid import TileGrid

__all__ = [
    "BUSY",
    "LARGER",
    "LARGEST_HEAD",
    "TILES",
    "Footprint",
    "Tile",
    "choose",
    "grid_of",
    "running_card",
    "shared_memory",
    "why_too_old",
]


class Tile(NamedTuple):
    """The work of one program of a kernel."""

    block_q: int  # queries
    block_kv: int  # keys
    num_warps: int
    num_stages: int  # tiles of keys and values that are loaded ahead, the one in use included


def grid_of(tile: Tile, seq_q: int, seq_kv: int) -> TileGrid:
    """The grid of such tiles, or of smaller ones for shorter arrays: powers of 2, at least 16."""
    block_q, block_kv = (
        min(most, max(16, 1 << (length - 1).bit_length()))
        for most, length in ((tile.block_q, seq_q), (tile.block_kv, seq_kv))
    )
    return TileGrid(seq_q, seq_kv, block_q, block_kv, overlaps=True)


# For any card. A key is a kind, the bits of a number, and the largest head size that the entry serves.
TILES = {
    ("forward", 16, 64): Tile(128, 64, 8, 3),
    ("forward", 16, 128): Tile(128, 64, 8, 2),
    ("forward", 16, 256): Tile(64, 32, 8, 2),
    ("backward", 16, 64): Tile(64, 64, 4, 2),
    ("backward", 16, 128): Tile(64, 64, 8, 2),
    ("backward", 16, 256): Tile(32, 32, 8, 2),
    ("decode", 16, 64): Tile(16, 64, 4, 3),
    ("decode", 16, 128): Tile(16, 64, 4, 3),
    ("decode", 16, 256): Tile(16, 32, 4, 2),
    ("forward", 32, 64): Tile(64, 32, 8, 2),
    ("forward", 32, 128): Tile(32, 32, 8, 2),
    ("forward", 32, 256): Tile(32, 16, 8, 2),
    ("backward", 32, 64): Tile(32, 32, 8, 1),
    ("backward", 32, 128): Tile(32, 32, 8, 1),
    ("backward", 32, 256): Tile(16, 16, 4, 1),
    ("decode", 32, 64): Tile(16, 32, 4, 3),
    ("decode", 32, 128): Tile(16, 32, 4, 3),
    ("decode", 32, 256): Tile(16, 16, 4, 2),
}

# In place of an entry of TILES on a card that is known to have at least `_LARGE` bytes of shared memory.
LARGER = {
    ("forward", 16, 128): Tile(128, 64, 8, 3),
    ("backward", 16, 256): Tile(64, 32, 8, 2),
}

# In place of both tables for kernels that draw dropout or load elements for each pair: larger tiles would spill
# registers.
BUSY = {
    ("forward", 16, 128): Tile(64, 64, 8, 2),
    ("backward", 16, 64): Tile(64, 32, 4, 2),
}

LARGEST_HEAD = max(size for *_, size in TILES)
_KIB = 1024
_LARGE = 163 * _KIB
_OLDEST = 80  # the first with Triton's tensor cores for 16-bit floats and at least `_LEAST` of shared memory
_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB, of the cards with more than `_LEAST`
_LEAST = 99
_SLACK = 2 * _KIB  # for sums over rows, and barriers
_NAMES = {
    **dict.fromkeys(("V100", "TITAN V"), 70),
    **dict.fromkeys(("T4", "RTX 2080", "Quadro RTX"), 75),
    **dict.fromkeys(("A100", "A800", "A30"), 80),
    **dict.fromkeys(("H100", "H200", "H800", "H20", "GH200"), 90),
    **dict.fromkeys(("B200", "GB200"), 100),
    **dict.fromkeys(("B300", "GB300"), 103),
}


def running_card() -> int:
    """Ten times the compute capability of the GPU of a program that is traced now; 0 if unknown.

    The mesh that the program is traced under may name the GPU (`jax.sharding.AbstractDevice`); the default is the GPU
    of this process.
    """
    device = abstract_device()
    if device is not None:
        named = (card for name, card in _NAMES.items() if re.search(rf"\b{name}\b", device.device_kind))
        return next(named, 0)
    return round(10 * float(jax.devices()[0].compute_capability)) if has_nvidia_gpu() else 0


def why_too_old(card: int) -> str | None:
    """The reason why a card is too old for the kernels; None if the card is new enough, or unknown."""
    if 0 < card < _OLDEST:
        return f"the Pallas kernels are for GPUs of compute capability 8.0 and later; this one has {card / 10}"
    return None


def shared_memory(card: int) -> int:
    """The least shared memory, in bytes, that a program may take on a card of compute capability 8.0 or later."""
    return _SHARED.get(card, _LEAST) * _KIB


def choose(kind: str, head_dim: int, bits: int = 16, card: int = 0, *, busy: bool = False) -> Tile:
    """The tile of "forward", "backward" or "decode" for heads of this size that fits the card; 0 for any card.

    `busy` kernels draw dropout, or load an element for each pair of a query and a key.
    """
    key = min(key for key in TILES if key[:2] == (kind, bits) and key[2] >= head_dim)
    if busy and key in BUSY:
        return BUSY[key]
    return LARGER[key] if key in LARGER and shared_memory(card) >= _LARGE else TILES[key]


class Footprint(NamedTuple):
    """The facts that decide the shared memory of a kind of kernel.

    Its methods take a card as ten times its compute capability; 0 stands for every card.
    """

    kind: str  # "forward", "backward" or "decode"
    tile: Tile
    head_dim: int  # of queries and keys
    value_dim: int
    bits: int = 16  # of a number
    pair_bytes: int = 0  # that masks and score mods read for each pair of a query and a key

    def fits(self, card: int = 0) -> bool:
        """Whether the card has enough shared memory."""
        need, have = self.need_and_have(card)
        return need <= have

    def need_and_have(self, card: int = 0) -> tuple[int, int]:
        """(bytes needed, bytes of the card); card 0 means the card that lacks most."""
        both = ((self.bytes_on(of), shared_memory(of)) for of in ([card] if card else [86, *_SHARED]))
        return max(both, key=lambda need_have: need_have[0] - need_have[1])

    def fitted(self, card: int = 0) -> Footprint:
        """The footprint with as many stages of the tile as the card has memory for, at least one."""
        stages = range(self.tile.num_stages, 0, -1)
        fewer = [self._replace(tile=self.tile._replace(num_stages=count)) for count in stages]
        return next((footprint for footprint in fewer if footprint.fits(card)), fewer[-1])

    def bytes_on(self, card: int) -> int:
        """An upper bound of the bytes of shared memory on a card that is known."""
        tile = self.tile
        head_dim, value_dim = (max(16, 1 << (dim - 1).bit_length()) for dim in (self.head_dim, self.value_dim))

        def need(held: int, moving: int, width: int, turned: int) -> int:
            """Bytes, if `held` rows of `width` stay, and tiles of `moving` rows of both head sizes come and go."""
            # From Hopper on, tall products read shared memory: their operands stay there while the next tile comes.
            reads_shared = 90 <= card < 120 and held >= 64
            buffers = max(1, tile.num_stages - 1)
            operands = tile.num_stages if reads_shared else buffers
            if self.kind == "decode":  # a kernel that tests keys itself writes them back
                operands = min(2, tile.num_stages)
            elif (card >= 100 and reads_shared) or (tile.num_stages == 1 and self.bits == 16):
                operands += turned
            numbers = held * width + operands * moving * (head_dim + value_dim) + (1 + turned) * held * moving
            for_pairs = (tile.num_stages - 1) * held * moving * self.pair_bytes
            return numbers * self.bits // 8 + for_pairs + _SLACK

        if self.kind != "backward":
            return need(tile.block_q, tile.block_kv, head_dim, 0)
        both = (tile.block_q, tile.block_kv), (tile.block_kv, tile.block_q)
        return max(need(*blocks, head_dim + value_dim, 1) for blocks in both)
