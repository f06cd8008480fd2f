"""Layouts: how a model, its batch and its state lie on several devices.

A `Layout` has five axes of devices. `RULES` is the one table that says which of these cut a named axis of an array.
Parameters name their axes where they are made, by the metadata `axes`; activations name theirs in calls of `constrain`.
Both read the mesh that is around a program (`jax.set_mesh(layout.mesh())`), so that a model is the same program on one
device and on many. Without such a mesh nothing here changes an array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from attnax.checks import is_concrete
from attnax.config import AttentionType, StackConfig
from attnax.typing import Array

__all__ = [
    "AXES",
    "BATCH",
    "Axis",
    "Layout",
    "check_batch_size",
    "check_layout",
    "constrain",
    "current_mesh",
    "cut_of",
    "gather",
    "partition",
    "per_token",
    "stream_axes",
    "sum_tokens",
]

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The axes of a layout's mesh. Devices that differ in the last one alone are neighbours: it moves the most bytes."""
BATCH = ("data", "fsdp", "expert")
"""The axes that cut a batch."""

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": BATCH,
    "length": ("context",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "experts": ("expert",),
}
"""The axes of a layout that cut a named axis of a parameter or an activation."""

Axis = str | tuple[str, int] | None
"""The name of an axis in `RULES`, or the name and the number of parts that stay whole, such as heads; None is uncut."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The number of devices along each of five axes; -1 is the rest of the devices, for at most one axis.

    Attributes:
        data: each device has a part of the batch and all parameters.
        fsdp: each device has a part of the batch and a part of every parameter; a parameter is gathered where it is
            used. With `scan_layers` and `remat` a device holds the whole parameters of about one layer at a time.
        tensor: each device has some heads, and some hidden features of every feed-forward.
        context: each device has a part of every sequence; keys and values go round (`ring_attention`).
        expert: each device has a part of the batch and some experts of every mixture.

    Example:
        >>> from attnax import Layout
        >>> Layout.parse("fsdp=4,tensor=2").sized(8)
        Layout(data=1, fsdp=4, tensor=2, context=1, expert=1)

    References:
        S. Rajbhandari et al., "ZeRO", 2020, https://arxiv.org/abs/1910.02054 (fsdp).
        M. Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053 (tensor).
        H. Liu et al., "Ring Attention with Blockwise Transformers", 2023, https://arxiv.org/abs/2310.01889 (context).
        D. Lepikhin et al., "GShard", 2020, https://arxiv.org/abs/2006.16668 (expert).
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
                raise ValueError(f"Layout: {name} must be a number of devices, or -1 for the rest; got {size!r}.")
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"Layout: at most one axis takes the rest of the devices; got -1 for {' and '.join(rest)}. fsdp takes "
                "it by default."
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout of a text: "fsdp=4,tensor=2", or the name of the axis that takes all devices, such as "data".

        Raises:
            ValueError: a name that is no axis, or a size that is no number.
        """
        if text in AXES:
            return cls(**{"fsdp": 1, text: -1})
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, size = (word.strip() for word in part.partition("="))
            if name not in AXES or not equals or not size.removeprefix("-").isdecimal() or name in sizes:
                raise ValueError(
                    f"Layout: a layout is written like fsdp=4,tensor=2, with axes of {', '.join(AXES)}, or as one of "
                    f"them; got {part.strip()!r} in {text!r}."
                )
            sizes[name] = int(size)
        if -1 in sizes.values():
            sizes = {"fsdp": 1, **sizes}
        return cls(**sizes)

    def __str__(self) -> str:
        """The text that `parse` reads: the rest of the devices for fsdp goes without saying."""
        sizes = {name: size for name in AXES if (size := getattr(self, name)) != 1}
        if len(sizes) == 1 and -1 in sizes.values():
            return next(iter(sizes))
        known = {name: size for name, size in sizes.items() if (name, size) != ("fsdp", -1)}
        return ",".join(f"{name}={size}" for name, size in known.items()) or "fsdp=1"

    def sized(self, num_devices: int) -> Layout:
        """The layout without -1, for so many devices.

        Raises:
            ValueError: the sizes do not multiply to the number of devices.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        rest = [name for name, size in sizes.items() if size == -1]
        if num_devices % known or (not rest and known != num_devices):
            what = f"a multiple of {known}" if rest else f"{known} devices"
            raise ValueError(
                f"Layout: {self} needs {what}; got {num_devices} device{'s' * (num_devices != 1)}. Choose sizes whose "
                "product is the number of devices."
            )
        return dataclasses.replace(self, **dict.fromkeys(rest, num_devices // known))

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh of all five axes (`AXES`), of type Auto, over the devices: by default `jax.devices()`.

        Raises:
            ValueError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        layout = self.sized(len(devices))
        sizes = tuple(getattr(layout, name) for name in AXES)
        types = (AxisType.Auto,) * len(AXES)
        if all(getattr(device, "platform", "cpu") == "cpu" for device in devices):
            return Mesh(np.asarray(devices, object).reshape(sizes), AXES, axis_types=types)
        # Knows which devices are neighbours. jax.make_mesh does not split an axis of most TPUs, such as 16 into 2 * 8.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def current_mesh() -> AbstractMesh | None:
    """The mesh of a layout that is around the program, and cuts something; inside of a `shard_map` there is none.

    Raises:
        ValueError: the mesh has the axes of a layout in another order or of another type.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_names) != set(AXES) or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"Layout: a mesh with these axes must have them in the order {', '.join(AXES)} and of the type Auto; "
            f"got {mesh}. Make it by Layout(...).mesh()."
        )
    return mesh


def cut_of(mesh: Any, size: int, axis: Axis, *, without: Sequence[str] = ()) -> tuple[str, ...]:
    """The axes of a mesh that cut an axis of `size` elements: each that its name allows and that still divides it.

    Args:
        mesh: with axes `AXES`.
        size: of the axis.
        axis: its name.
        without: axes of the mesh that cut nothing here.
    """
    name, parts = axis if isinstance(axis, tuple) else (axis, size)
    found: tuple[str, ...] = ()
    count = 1
    for each in () if name is None else RULES[name]:
        more = count * mesh.shape[each]
        if mesh.shape[each] > 1 and each not in without and size % more == 0 and parts % more == 0:
            found, count = (*found, each), more
    return found


def partition(mesh: Any, shape: Sequence[int], axes: Sequence[Axis], *, without: Sequence[str] = ()) -> P:
    """The `PartitionSpec` of an array by `RULES`.

    Args:
        mesh: with axes `AXES`.
        shape: of the array. Leading axes without a name, such as the layers of a scanned stack, are uncut.
        axes: the names of the last axes.
        without: axes of the mesh that cut nothing here.
    """
    named = (None,) * (len(shape) - len(axes)) + tuple(axes)
    cuts = (cut_of(mesh, size, axis, without=without) for size, axis in zip(shape, named, strict=True))
    return P(*(cut or None for cut in cuts))


def constrain(x: Array, *axes: Axis) -> Array:
    """`x`, cut by `RULES` over the layout's mesh that is around the program; without one, `x` itself.

    Args:
        x: an activation.
        axes: the name of each axis.
    """
    mesh = current_mesh()
    return x if mesh is None else _at(x, partition(mesh, x.shape, axes))


def stream_axes(ndim: int, last: Axis = None) -> tuple[Axis, ...]:
    """The names of the axes (batch, length, ..., last) of an activation."""
    return (*("batch", "length")[: ndim - 1], *(None,) * (ndim - 3), last)


def per_token(function: Callable[[Array], Any], x: Array) -> Any:
    """`function(x)` of an activation (batch, length, ..., D), on each device for its tokens.

    XLA gathers the operand of some operations, such as `lax.top_k`, although their rows are independent.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(x)
    spec = partition(mesh, x.shape, stream_axes(x.ndim))
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


def sum_tokens(function: Callable[..., Any], *arrays: Array) -> Any:
    """`function(*arrays)` of arrays (batch, length, ..., D), a pytree of sums over tokens: each device adds its own.

    XLA gathers an array whose batch and length are cut, if they become one axis.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(*arrays)
    specs = tuple(partition(mesh, x.shape, stream_axes(x.ndim)) for x in arrays)
    named = zip(arrays[0].shape, stream_axes(arrays[0].ndim), strict=True)
    cuts = tuple(name for size, axis in named for name in cut_of(mesh, size, axis))

    def local(*arrays: Array) -> Any:
        return jax.lax.psum(function(*arrays), cuts)

    return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(*arrays)


def gather(x: Array, *axes: Axis) -> Array:
    """A parameter without its cut by fsdp, as a layer uses it; its gradient is cut again.

    A layer casts first, so that the narrow dtype travels.

    Args:
        x: the parameter.
        axes: the names of its axes.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    kept, whole = (partition(mesh, x.shape, axes, without=without) for without in ((), ("fsdp",)))
    return x if kept == whole else _gathered(kept, whole, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(kept: P, whole: P, x: Array) -> Array:
    return _at(x, whole)


_gathered.defvjp(lambda kept, whole, x: (_gathered(kept, whole, x), None), lambda kept, _, __, grad: (_at(grad, kept),))


def _at(x: Array, spec: P) -> Array:
    if is_concrete(x):  # outside of jit a constraint takes only arrays that lie on the mesh already
        return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))
    return jax.lax.with_sharding_constraint(x, spec)


_IN_A_RING = AttentionType.FLASH, AttentionType.MEMORY_EFFICIENT, AttentionType.PALLAS_FLASH


def check_layout(config: StackConfig, layout: Layout) -> None:
    """Raises ValueError where a layout does not divide a model, and names the axis and the numbers.

    Args:
        config: of the model.
        layout: without -1 (`Layout.sized`).
    """
    has_experts = False
    for index in range(config.num_layers):
        block = config.layer(index)
        sizes = {"tensor": {"num_heads": block.num_heads, "d_ff": block.d_ff}, "fsdp": {"d_model": block.d_model}}
        for axis, fields in sizes.items():
            size = getattr(layout, axis)
            for name, value in fields.items():
                if value % size:
                    raise ValueError(
                        f"Layout: {axis} must divide {name}; got {axis}={size}, {name}={value}. Take a divisor of "
                        f"{value}."
                    )
        kv_heads, tensor = block.kv_heads, layout.tensor
        if kv_heads % tensor and tensor % kv_heads:
            raise ValueError(
                f"Layout: tensor must divide num_kv_heads, or be a multiple of it; got tensor={tensor}, "
                f"num_kv_heads={kv_heads}. Take a divisor of {kv_heads}."
            )
        if layout.context > 1 and block.attention_type not in _IN_A_RING:
            raise ValueError(
                "Layout: context cuts sequences, over which the tiles of softmax attention go round a ring; got "
                f"context={layout.context}, attention_type={block.attention_type.value!r}. Take context=1, or "
                "attention_type='flash'."
            )
        if block.num_experts is not None:
            has_experts = True
            if block.num_experts % layout.expert:
                raise ValueError(
                    f"Layout: expert must divide the number of experts; got expert={layout.expert}, "
                    f"num_experts={block.num_experts}. Take a divisor of {block.num_experts}."
                )
    if layout.expert > 1 and not has_experts:
        raise ValueError(
            f"Layout: expert cuts the experts of a mixture; got expert={layout.expert} for a model without any. Take "
            "fsdp in its place."
        )


def check_batch_size(batch_size: int, layout: Layout) -> None:
    """Raises ValueError where a layout does not divide a batch.

    Args:
        batch_size: number of rows of a microbatch.
        layout: without -1 (`Layout.sized`).
    """
    parts = math.prod(getattr(layout, name) for name in BATCH)
    if batch_size % parts:
        raise ValueError(
            f"Layout: data * fsdp * expert must divide the batch; got {parts} of {layout} and batch_size={batch_size}. "
            "Take a multiple."
        )
