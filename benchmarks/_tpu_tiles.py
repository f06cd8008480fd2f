"""The vector memory that a TPU kernel takes with each size of tile, and the time that libtpu takes to compile it.

libtpu's error names the bytes that a kernel takes above a limit, step by step: first the scratch memory, then the
blocks of the pipeline, then the values that registers cannot hold. The limit follows the error until it compiles.
Seconds are those of all threads on a processor in the last, whole compilation: they depend little on what else the
machine does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax

HEADS, KV_HEADS = 8, 4
LENGTH = 2**14  # libtpu keeps shorter arrays in vector memory whole
LIMIT = 2**17  # bytes, the first try
STEP = 2**17  # above what the error names, which it rounds
SIZES = 64, 128, 256
DTYPES = "bfloat16", "float32"
TILES = tuple((q, kv) for q in (256, 512, 1024) for kv in (256, 512, 1024))
KERNELS = "forward", "d_query", "d_key_value"

__all__ = ["DTYPES", "KERNELS", "SIZES", "TILES", "Use", "search"]


class Use(NamedTuple):
    """What a kernel takes."""

    kernel: str
    dtype: str
    size: int  # of a head
    block_q: int
    block_kv: int
    mib: float  # of vector memory
    seconds: float
    error: str = ""


def search(compile_for: Any, kernels: Any, dtypes: Any, sizes: Any, tiles: Any) -> Iterator[Use]:
    """The use of each kernel, for one device.

    Args:
        compile_for: lowers and compiles a function for arguments.
        kernels: some of `KERNELS`.
        dtypes: some of `DTYPES`.
        sizes: of heads.
        tiles: pairs (block_q, block_kv).
    """
    for size in sizes:
        for dtype in dtypes:
            for kernel in kernels:
                for block_q, block_kv in tiles:
                    mib, limit, message = 0.0, LIMIT, ""
                    while True:
                        start = time.process_time()
                        message = _error(compile_for, kernel, dtype, size, (block_q, block_kv), limit)
                        seconds = time.process_time() - start
                        found = _SIZE.search(message)
                        if found is None:
                            break
                        mib = float(found[1]) / (1024 if found[2] == "K" else 1)
                        if mib * 2**20 <= limit:  # the device's own limit
                            message = f"only {found[3]}{found[4]}iB"
                            break
                        limit = int(mib * 2**20) + STEP
                    yield Use(kernel, dtype, size, block_q, block_kv, mib, seconds, message[:300])


_SIZE = re.compile(r"Scoped allocation with size ([\d.]+)([KM]) and limit ([\d.]+)([KM])")


def _error(compile_for: Any, kernel: str, dtype: str, size: int, tile: tuple[int, int], limit: int) -> str:
    """The compiler's error; empty if the kernel compiles."""
    from attnax import masks, pallas_flash_attention
    from attnax.kernels._tpu import tile_sizes

    def choose(kind: str, size: int, bits: int, **_: Any) -> tile_sizes.Tile:
        is_it = (kind == "forward") == (kernel == "forward")
        return tile_sizes.Tile(*tile, vmem=limit) if is_it else tile_sizes.Tile(256, 256)

    def run(*arrays: Any) -> Any:
        return pallas_flash_attention(*arrays, mask=masks.causal())

    def gradient(*arrays: Any) -> Any:
        out, pull = jax.vjp(run, *arrays)
        return pull(out)[0 if kernel == "d_query" else 1]

    arrays = [jax.ShapeDtypeStruct((1, heads, LENGTH, size), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    jax.clear_caches()
    with mock.patch("attnax.kernels._tpu.prepare.choose", choose):
        try:
            compile_for(run if kernel == "forward" else gradient, arrays)
        except RuntimeError as error:  # libtpu's
            return str(error)
    return ""
