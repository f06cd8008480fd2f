"""Gives the tiles of the GPU kernels for a call, or the reason why the kernels do not serve it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from attnax.kernels._core.natural import GPU_ELEMENTWISE
from attnax.kernels._core.operands import Arrays, Operands
from attnax.kernels._core.platform import why_no_triton
from attnax.kernels._core.split import split, why_not_split
from attnax.kernels._gpu import tile_sizes
from attnax.kernels._gpu.tile_sizes import Tile

__all__ = ["KernelTiles", "choose_kernel_tiles", "gpu_tile", "why_no_kernel"]


class KernelTiles(NamedTuple):
    """Tiles of the kernels, forward and backward."""

    plain: tuple[Tile, Tile]
    busy: tuple[Tile, Tile]  # for kernels that draw dropout or load elements for each pair


def choose_kernel_tiles(query: Any, value: Any, block_size: Any) -> KernelTiles | None:
    """Tiles for arrays of these shapes; None if the kernels do not serve these arrays."""
    size = max(query.shape[-1], value.shape[-1])
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or size > tile_sizes.LARGEST_HEAD:
        return None
    if not isinstance(query.shape[0], int):  # Pallas makes no blocks of a symbolic batch
        return None
    block_q, block_kv = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    bits, card = query.dtype.itemsize * 8, tile_sizes.running_card()

    def choose(kind: str, busy: bool) -> Tile:
        tile = tile_sizes.choose(kind, size, bits, card, busy=busy)
        return tile._replace(block_q=block_q or tile.block_q, block_kv=block_kv or tile.block_kv)

    return KernelTiles(*((choose("forward", busy), choose("backward", busy)) for busy in (False, True)))


def why_no_kernel(
    tiles: KernelTiles | None, arrays: Arrays, operands: Operands, dropout_rate: float, *, interpret: bool
) -> str | None:
    """The reason why the kernels do not serve a call, or None."""
    if tiles is None:
        most = tile_sizes.LARGEST_HEAD
        return f"kernels take float32, bfloat16 and float16, heads of at most {most} and no symbolic batch"
    for tile in tiles.plain:
        for size in (tile.block_q, tile.block_kv):
            if size < 16 or size & (size - 1):
                return f"tiles of kernels are powers of 2, at least 16; got {size}"
    pair_bytes = 0
    for name, function in (("mask", operands.mask), ("score mod", operands.score_mod)):
        if function is not None:
            refused = why_not_split(function, GPU_ELEMENTWISE)
            if refused is not None:
                return f"no kernel can hold this {name}: {refused}"
            pair_bytes += split(function).pair_bytes
    if interpret:
        return None
    return why_no_triton() or _why_no_room(_tiles_for(tiles, operands, dropout_rate), arrays, pair_bytes)


def gpu_tile(tiles: KernelTiles, operands: Operands, dropout_rate: float, *, backward: bool) -> Tile:
    """The tile of a pass."""
    return _tiles_for(tiles, operands, dropout_rate)[backward]


def _tiles_for(tiles: KernelTiles, operands: Operands, dropout_rate: float) -> tuple[Tile, Tile]:
    functions = [split(function) for function in (operands.mask, operands.score_mod) if function is not None]
    return tiles.busy if dropout_rate > 0.0 or any(function.reads for function in functions) else tiles.plain


def _why_no_room(tiles: tuple[Tile, Tile], arrays: Arrays, pair_bytes: int) -> str | None:
    """The reason why the card (some card, if unknown) has too little shared memory, or None."""
    query, _, value, _ = arrays
    card = tile_sizes.running_card()
    reason = tile_sizes.why_too_old(card)
    if reason is not None:
        return reason
    sizes = query.shape[-1], value.shape[-1], query.dtype.itemsize * 8
    for kind, whole in zip(("forward", "backward"), tiles, strict=True):
        footprint = tile_sizes.Footprint(kind, whole, *sizes, pair_bytes).fitted(card)
        tile, (need, have) = footprint.tile, footprint.need_and_have(card)
        if need > have:
            owner = "this card has" if card else "some cards have"
            return (
                f"tiles of {tile.block_q} x {tile.block_kv} need {-(-need // 1024)} KiB of shared memory in the "
                f"{kind} kernel, and {owner} {have // 1024}"
            )
    return None
