"""A few queries over stored tokens in a GPU kernel: its choice and its launch."""

from __future__ import annotations

import jax.numpy as jnp

from attnax.kernels._core import softmax
from attnax.kernels._core.decode import DecodeInputs
from attnax.kernels._core.lift import Lifted
from attnax.kernels._core.natural import GPU_ELEMENTWISE
from attnax.kernels._core.platform import why_no_card, why_no_triton
from attnax.kernels._gpu import tile_sizes
from attnax.typing import Array

__all__ = ["attend", "decode_tile"]


def attend(
    inputs: DecodeInputs, mask: Lifted | None, score_mod: Lifted | None, *, interpret: bool = False
) -> tuple[Array, Array] | None:
    """(out, natural log-sum-exp) in float32, from the kernel; None if the kernel does not serve the call.

    Mask and score mod see true positions. `interpret` runs the kernel as ordinary JAX.
    """
    tile = decode_tile(inputs)
    if tile is None:
        return None
    if not interpret and (why_no_triton() or why_no_card() or tile_sizes.why_too_old(tile_sizes.running_card())):
        return None
    setup = inputs.setup(tile, mask, score_mod, GPU_ELEMENTWISE, interpret=interpret)
    if setup is None:
        return None
    from attnax.kernels._gpu import launch  # imports Pallas, which takes long and is seldom needed

    out, lse = launch.decode(inputs.arrays, setup, inputs.tokens.block_table)
    return out, softmax.in_nats(lse)


def decode_tile(inputs: DecodeInputs) -> tile_sizes.Tile | None:
    """The tile, with as many keys as a page; None if the kernel cannot read the arrays without a copy."""
    tokens, card = inputs.tokens, tile_sizes.running_card()
    sizes = tokens.keys.shape[-1], tokens.values.shape[-1]
    lengths = sizes if tokens.block_table is None else (*sizes, tokens.keys.shape[2])
    dtypes = {inputs.query.dtype, tokens.keys.dtype, tokens.values.dtype}
    if len(dtypes) > 1 or inputs.query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return None
    # Any other size would have to be copied into another shape at each step.
    if any(length < 16 or length & (length - 1) for length in lengths) or max(sizes) > tile_sizes.LARGEST_HEAD:
        return None
    bits = inputs.query.dtype.itemsize * 8
    tile = tile_sizes.choose("decode", max(sizes), bits)
    if tokens.block_table is not None:
        tile = tile._replace(block_kv=tokens.keys.shape[2])
    # Where the card is not known, every card must hold the tile.
    fits = tile_sizes.Footprint("decode", tile._replace(num_stages=1), *sizes, bits).fits(card)
    return tile if fits else None
