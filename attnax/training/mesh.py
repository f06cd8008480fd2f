"""The devices of a training: the mesh of a layout, and where it puts the state and the batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from attnax.config import EncoderDecoderConfig, StackConfig
from attnax.kernels import flash_attention, memory_efficient_attention, pallas_flash_attention
from attnax.masks import kernel_of
from attnax.nn._parts import name_of
from attnax.nn.attention import MultiHeadAttention
from attnax.sharding import BATCH, Layout, check_batch_size, check_layout

__all__ = ["check_attention_functions", "make_mesh", "num_parts", "state_shardings"]


def make_mesh(
    layout: Layout,
    config: StackConfig | EncoderDecoderConfig | None = None,
    *,
    batch_size: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh of a layout over devices, by default all devices of the process.

    Args:
        layout: of the devices.
        config: of the model, if it is a model of the library.
        batch_size: number of rows of a microbatch, if it is known.
        devices: of the mesh.

    Raises:
        ValueError: the layout does not divide the devices, the model or the batch.
    """
    mesh = layout.mesh(devices)
    sized = layout.sized(mesh.size)
    for stack in (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (config,):
        if stack is not None:
            check_layout(stack, sized)
    if batch_size is not None:
        check_batch_size(batch_size, sized)
    return mesh


def num_parts(mesh: Mesh | None) -> int:
    """The number of parts into which a layout cuts a batch; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH)


def check_attention_functions(model: nnx.Module, mesh: Mesh) -> None:
    """Raises ValueError for a layer whose attention has no ring, on a layout that cuts sequences."""
    if mesh.shape["context"] == 1:
        return
    in_a_ring = flash_attention, memory_efficient_attention, pallas_flash_attention
    for path, module in nnx.iter_modules(model):
        if isinstance(module, MultiHeadAttention) and kernel_of(module.attention_fn) not in in_a_ring:
            raise ValueError(
                "Trainer: an attention_fn gets whole sequences, and context cuts them; got "
                f"{name_of(module.attention_fn)} of {'.'.join(map(str, path))} with context={mesh.shape['context']}. "
                "Take context=1, or attention_type='flash' with a mask or a score mod."
            )


def state_shardings(state: Any, params: Any, cuts: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a state: that of the parameter whose path ends its own and whose shape it has.

    So moments and averages lie like their parameters; all other arrays are whole on every device.

    Args:
        state: a pytree of shapes that holds copies of `params`, or of dictionaries of it.
        params: the parameters or their shapes, a dictionary of dictionaries.
        cuts: the `NamedSharding` of each parameter.
        mesh: of a layout.
    """
    known = {
        _names(path): (leaf.shape, cut)
        for (path, leaf), cut in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(cuts), strict=True)
    }

    def find(path: Any, x: Any) -> NamedSharding:
        names = _names(path)
        ends = (known.get(names[start:]) for start in range(len(names)))
        shape, cut = next((end for end in ends if end is not None), (None, None))
        return cut if cut is not None and shape == x.shape else NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(find, state)


def _names(path: Any) -> tuple[Any, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
