"""The names of the axes of a model's parameters, and where a layout puts them."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax.sharding import Mesh, NamedSharding

from attnax.sharding import AXES, RULES, Axis, current_mesh, gather, partition

__all__ = ["fsdp_specs", "gather_parameters", "parameter_axes", "parameter_shardings"]


def parameter_axes(params: Any) -> dict[tuple[Any, ...], tuple[Axis, ...]]:
    """The names of the axes of each parameter, by its path.

    A parameter states them by the metadata `axes`: `nnx.Param(x, axes=("embed", None))`, or in a layer of Flax
    `nnx.Linear(..., kernel_metadata={"axes": ("embed", None)})`. The names are those of `attnax.sharding.RULES`. A
    vector that states none is whole on every device, such as a bias.

    Args:
        params: an `nnx.State` of a model, such as `nnx.state(model, nnx.Param)`.

    Raises:
        ValueError: a matrix states no axes, or more or fewer than it has, an unknown name, or two names that the same
            axis of the devices cuts.
    """
    found: dict[tuple[Any, ...], tuple[Axis, ...]] = {}
    for path, variable in nnx.to_flat_state(params):
        ndim = len(variable.shape) - ("periods" in path)  # with scan_layers arrays have a leading axis of layers
        axes = variable.get_metadata().get("axes")
        if axes is None and ndim > 1:
            raise ValueError(
                f"Layout: every matrix must state its axes; got {'.'.join(map(str, path))} of shape {variable.shape} "
                'without them. Make it by nnx.Param(x, axes=("embed", None)), or a layer of Flax with '
                'kernel_metadata={"axes": ("embed", None)}; None keeps an axis whole on every device.'
            )
        axes = (None,) * ndim if axes is None else tuple(axes)
        for axis in axes:
            if (axis[0] if isinstance(axis, tuple) else axis) not in (None, *RULES):
                raise ValueError(
                    f"Layout: an axis is None or one of {', '.join(RULES)}; got {axis!r} of {'.'.join(map(str, path))}."
                )
        if len(axes) != ndim:
            raise ValueError(
                f"Layout: a parameter states each of its axes; got {'.'.join(map(str, path))} of shape "
                f"{variable.shape} with axes={axes}."
            )
        cuts = [mesh_axis for axis in axes for mesh_axis in _rules_of(axis)]
        if len(cuts) != len(set(cuts)):
            raise ValueError(
                "Layout: an axis of the devices cuts one axis of a parameter; got "
                f"{'.'.join(map(str, path))} with axes={axes}. Name one of them None."
            )
        found[path] = axes
    return found


def _rules_of(axis: Axis) -> tuple[str, ...]:
    name = axis[0] if isinstance(axis, tuple) else axis
    return () if name is None else RULES[name]


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """`params` with a `NamedSharding` over the mesh of a layout in place of each array.

    Args:
        params: as in `parameter_axes`.
        mesh: of a layout.

    Raises:
        ValueError: the mesh is none of a layout, or as in `parameter_axes`.
    """
    if mesh.axis_names != AXES:
        raise ValueError(
            f"parameter_shardings: mesh must be that of a layout; got the axes {mesh.axis_names}. Make it by "
            "Layout(...).mesh()."
        )
    axes = parameter_axes(params)
    flat = [
        (path, variable.replace(NamedSharding(mesh, partition(mesh, variable.shape, axes[path]))))
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def gather_parameters(params: Any) -> Any:
    """The parameters, each without its cut by fsdp: see `gather`. For those that a loop uses in every turn."""
    if current_mesh() is None:
        return params
    axes = parameter_axes(params)
    flat = [
        (path, variable.replace(gather(variable[...], *axes[path]))) for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def fsdp_specs(params: Any) -> Any:
    """`params` with a `PartitionSpec` in place of each array: its cut by fsdp on the mesh around the program.

    For a `shard_map` that gathers parameters itself. None without a mesh, and on a mesh with tensor: XLA would gather a
    parameter over tensor too.
    """
    mesh = current_mesh()
    if mesh is None or mesh.shape["tensor"] > 1:
        return None
    axes, others = parameter_axes(params), [name for name in AXES if name != "fsdp"]
    flat = [
        (path, variable.replace(partition(mesh, variable.shape, axes[path], without=others)))
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)
