"""Each row times the matrix of its group; the cost follows the rows, not the number of groups.

Rows are sorted by group. A tile is a few rows of one group. A loop visits the tiles that hold rows, so an empty group
costs nothing and no row of a large group is dropped. A tile has a static length and may overlap rows of another tile:
such rows keep their values, and count as zeros in the gradient of the matrix. The backward pass loops over the same
tiles and adds in place to the gradient of the tile's matrix; reverse mode through a `lax.scan` would add an array as
large as all matrices at every tile.

Axes: R rows, G groups, I and O the widths of input and output, T the rows of a tile.

References:
    T. Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022,
    https://arxiv.org/abs/2211.15841.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from attnax.checks import wide_dtype
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.typing import Array

__all__ = ["grouped_product", "make_tiles", "tile_length"]

MAX_TILE = 128  # longer tiles are hardly faster per row, and waste more at the end of a group; benchmarks/moe.py

Carry = TypeVar("Carry")
Function = TypeVar("Function", bound=Callable[..., object])


def grouped_product(x: Array, weights: Array, bias: Array | None, sizes: Array) -> Array:
    """x[r] @ weights[g] + bias[g], with g the group of row r.

    Differentiable once, in reverse mode. `jax.vmap` loops over its batch.

    Args:
        x: (R, I), rows sorted by group.
        weights: (G, I, O), of any floating dtype; cast to the dtype of x a tile at a time. Sums are in float32 or
            more.
        bias: (G, O), or None.
        sizes: (G,) int32, the number of rows of each group, R in all.

    Returns:
        (R, O) in the dtype of x.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, weights.shape[2]), x.dtype)
    arrays = (x, weights, bias, sizes)
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(arrays)))
    return _grouped_product(*jax.tree.map(lambda array: vary(array, axes), arrays))


def tile_length(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: about the mean rows of a group, so that both tiles and unused rows are few."""
    if not isinstance(num_rows, int):  # a symbolic size cannot be rounded to a power of 2
        return jax.core.min_dim(num_rows, MAX_TILE)
    mean = -(-num_rows // num_groups)
    return min(num_rows, MAX_TILE, 1 << (mean - 1).bit_length())


class RowTiles(NamedTuple):
    """The rows of every tile, (number of tiles,) each; only the first `used` are tiles."""

    group: Array
    start: Array
    stop: Array  # the end of the group's rows: a tile's own rows are start to min(start + length, stop)
    used: Array  # ()


def make_tiles(sizes: Array, num_rows: int, length: int) -> RowTiles:
    """The tiles of groups of `sizes` rows: at most num_rows / length, and one more for each group with rows."""
    most = jax.core.min_dim(num_rows, sizes.shape[0])
    tile = jnp.arange((num_rows - most) // length + most)
    counts = -(-sizes // length)
    group_ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(counts)
    group = jnp.minimum((tile[:, None] >= tile_ends[None]).sum(1), sizes.shape[0] - 1)
    start = (group_ends - sizes)[group] + (tile - (tile_ends - counts)[group]) * length
    return RowTiles(group, start, group_ends[group], tile_ends[-1])


class RowTile(NamedTuple):
    """One tile: its group, its first row in the arrays, and which rows from there on are its own, (T, 1)."""

    group: Array
    begin: Array
    own: Array

    def read(self, rows: Array) -> Array:
        """T rows, from the first one on."""
        return lax.dynamic_slice_in_dim(rows, self.begin, self.own.shape[0])

    def write(self, rows: Array, values: Array) -> Array:
        """`rows` with the tile's own rows replaced."""
        return lax.dynamic_update_slice_in_dim(rows, jnp.where(self.own, values, self.read(rows)), self.begin, 0)


def _each_tile(step: Callable[[RowTile, Carry], Carry], carry: Carry, num_rows: int, sizes: Array) -> Carry:
    length = tile_length(num_rows, sizes.shape[0])
    tiles = make_tiles(sizes, num_rows, length)

    def visit(i: Array, carry: Carry) -> Carry:
        begin = jnp.minimum(tiles.start[i], num_rows - length)
        row = begin + jnp.arange(length)
        own = (row >= tiles.start[i]) & (row < tiles.stop[i])
        return step(RowTile(tiles.group[i], begin, own[:, None]), carry)

    return lax.fori_loop(0, tiles.used, visit, carry)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, like: Array) -> Array:
    return vary(jnp.zeros(shape, dtype), varying_axes(like))


def _one_program(function: Function) -> Function:
    # jit: an eager loop would be compiled again at every call. sequential_vmap: a loop with a batched bound would visit
    # all tiles and select from the whole carry at each.
    return sequential_vmap(jax.jit(function))


@_one_program
def _forward(x: Array, weights: Array, bias: Array | None, sizes: Array) -> Array:
    dtype = wide_dtype(x.dtype)

    def step(tile: RowTile, out: Array) -> Array:
        matrix = weights[tile.group].astype(x.dtype)
        product = jnp.einsum("TI,IO->TO", tile.read(x), matrix, preferred_element_type=dtype)
        if bias is not None:
            product = product + bias[tile.group][None].astype(dtype)
        return tile.write(out, product.astype(out.dtype))

    out = _zeros((x.shape[0], weights.shape[2]), x.dtype, x)
    return _each_tile(step, out, x.shape[0], sizes)


@_one_program
def _d_input(d_out: Array, weights: Array, sizes: Array) -> Array:
    dtype = wide_dtype(d_out.dtype)

    def step(tile: RowTile, d_x: Array) -> Array:
        matrix = weights[tile.group].astype(d_out.dtype)
        product = jnp.einsum("TO,IO->TI", tile.read(d_out), matrix, preferred_element_type=dtype)
        return tile.write(d_x, product.astype(d_x.dtype))

    d_x = _zeros((d_out.shape[0], weights.shape[1]), d_out.dtype, d_out)
    return _each_tile(step, d_x, d_out.shape[0], sizes)


@_one_program
def _d_weights(x: Array, d_out: Array, sizes: Array) -> tuple[Array, Array]:
    """Gradients of weights and bias, in float32 at least."""
    dtype = wide_dtype(x.dtype)

    def step(tile: RowTile, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        # Both arrays: a row of another group may hold NaN, and 0 * NaN is NaN.
        tile_x, tile_d_out = (jnp.where(tile.own, tile.read(rows), 0) for rows in (x, d_out))
        product = jnp.einsum("TI,TO->IO", tile_x, tile_d_out, preferred_element_type=dtype)
        d_weights, d_bias = grads
        return d_weights.at[tile.group].add(product), d_bias.at[tile.group].add(tile_d_out.sum(0, dtype=dtype))

    groups = sizes.shape[0]
    shapes = (groups, x.shape[1], d_out.shape[1]), (groups, d_out.shape[1])
    d_weights, d_bias = (_zeros(shape, dtype, x) for shape in shapes)
    return _each_tile(step, (d_weights, d_bias), x.shape[0], sizes)


@jax.custom_vjp
def _grouped_product(x: Array, weights: Array, bias: Array | None, sizes: Array) -> Array:
    return _forward(x, weights, bias, sizes)


_Residuals = tuple[Array, Array, Array | None, Array]


def _save(x: Array, weights: Array, bias: Array | None, sizes: Array) -> tuple[Array, _Residuals]:
    return _forward(x, weights, bias, sizes), (x, weights, bias, sizes)


def _gradients(residuals: _Residuals, d_out: Array) -> tuple[Array, Array, Array | None, None]:
    x, weights, bias, sizes = residuals
    d_weights, d_bias = _d_weights(x, d_out, sizes)
    return (
        _d_input(d_out, weights, sizes),
        d_weights.astype(weights.dtype),
        None if bias is None else d_bias.astype(bias.dtype),
        None,
    )


_grouped_product.defvjp(_save, _gradients)
