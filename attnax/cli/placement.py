"""What a layout does to a model: where each parameter lives, and the bytes that a device holds and moves in a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from attnax.cli.options import Inspect, read_layout, refused_layout
from attnax.cli.tables import collapse, fold, in_bytes, in_shape, print_fields, print_rows
from attnax.cli.terminal import printable
from attnax.config import TransformerConfig
from attnax.pretrained.family import stacks
from attnax.sharding import BATCH, Axis, Layout, check_batch_size, check_layout
from attnax.training.optimizer import OptimizerConfig
from attnax.training.traffic import Placed, abstract_mesh, held_bytes, place_parameters, step_traffic

__all__ = ["print_placement"]

_KINDS = {
    "gathers": "gathers of parameters, over fsdp",
    "gradients": "reductions of gradients",
    "tensor": "sums of activations, over tensor",
    "ring": "keys and values that go round, over context",
    "to_experts": "gathers of tokens, over expert",
    "from_experts": "sums of the experts' outputs, over expert",
}


def print_placement(options: Inspect, config: Any, params: Any, optimizer: OptimizerConfig | None = None) -> None:
    """Prints the parameters of a model on the layout of the flags, and the bytes of a device.

    Args:
        options: with a layout.
        config: of the model.
        params: an `nnx.State` of the shapes of its parameters.
        optimizer: of the model's run; without a run AdamW, and one sequence for each part of the batch.

    Raises:
        InputError: the layout does not divide the model or the batch.
    """
    mesh = _mesh(options, config)
    try:
        placed = place_parameters(params, mesh)
    except ValueError as error:
        raise refused_layout(error) from error
    print_rows(list(_rows(placed, mesh)), right=("on a device",))
    whole = list(_undivided(placed, mesh))
    if whole:
        print("\nwhole on every device, because the axis does not divide")
        for line in whole:
            print(f"  {printable(line)}")
    print()
    print_fields("layout", [f"{_sizes(mesh)}: {mesh.size} devices"])
    known = optimizer or OptimizerConfig()
    here, total = (held_bytes(placed, known, where) for where in (mesh, None))
    names = "parameters", f"moments of {known.algorithm}"
    lines = [f"{in_bytes(x)} of {in_bytes(y)}, {name}" for name, x, y in zip(names, here, total, strict=True)]
    print_fields("on a device", [*lines, f"{in_bytes(sum(here))} of {in_bytes(sum(total))}, together"])
    if isinstance(config, TransformerConfig) and any("decoder" in each.path for each in placed):
        print_fields("in a step", _moved(options, config, placed, mesh, optimizer))


def _mesh(options: Inspect, config: Any) -> AbstractMesh:
    layout = read_layout(options.layout)
    assert layout is not None
    sizes = dataclasses.astuple(layout)
    try:
        layout = layout.sized(jax.device_count() if -1 in sizes else math.prod(sizes))
    except ValueError as error:
        raise refused_layout(error, " Or name every size, such as fsdp=4,tensor=2.") from error
    try:
        for stack in stacks(config):
            check_layout(stack, layout)
    except ValueError as error:
        raise refused_layout(error) from error
    return abstract_mesh(layout)


def _rows(placed: Sequence[Placed], mesh: AbstractMesh) -> Iterable[tuple[str, ...]]:
    """The rows of the table, one for equal parameters of several layers."""
    yield "parameter", "shape", "axes", "cut", "on a device"
    for same in fold(placed, lambda each: ((each.name,), each._replace(path=()))):
        first = same[0]
        cuts = [
            f"{_name(axis)}/{','.join(f'{x}={mesh.shape[x]}' for x in cut)}"
            for axis, cut in zip(first.axes, first.cuts, strict=True)
            if cut
        ]
        axes = ", ".join(_name(axis) or "-" for axis in first.axes)
        held = len(same) * first.size(mesh) * first.dtype.itemsize
        name = printable(collapse(each.name for each in same))
        yield name, in_shape(first.shape), axes, ", ".join(cuts) or "replicated", in_bytes(held)


def _undivided(placed: Sequence[Placed], mesh: AbstractMesh) -> Iterable[str]:
    for same in fold(placed, lambda each: ((each.name,), each._replace(path=()))):
        for name, number, axes in same[0].undivided(mesh):
            yield f"{collapse(each.name for each in same)}: {name} {number:,} is no multiple of {axes}"


def _moved(
    options: Inspect,
    config: TransformerConfig,
    placed: Sequence[Placed],
    mesh: AbstractMesh,
    optimizer: OptimizerConfig | None,
) -> Iterable[str]:
    """The lines about a step."""
    rows = math.prod(mesh.shape[name] for name in BATCH)
    batch_size = options.batch_size or (rows if optimizer is None else optimizer.batch_size)
    length = options.length or config.max_len
    try:
        check_batch_size(batch_size, Layout(**mesh.shape))
    except ValueError as error:
        raise refused_layout(error) from error
    yield f"{batch_size:,} sequences of {length:,} tokens, {config.dtype}; bytes that a device moves:"
    moved = step_traffic(config, placed, mesh, batch_size, length)
    for name, num_bytes in moved._asdict().items():
        if num_bytes:
            yield f"{in_bytes(num_bytes)}, {_KINDS[name]}"
    yield f"{in_bytes(sum(moved))}, together"
    if length % mesh.shape["context"]:
        yield f"length {length:,} is no multiple of context={mesh.shape['context']}: sequences are whole"
    if optimizer is not None and optimizer.algorithm == "muon":
        yield "the products of Muon move more, which is not counted"


def _name(axis: Axis) -> str:
    return (axis[0] if isinstance(axis, tuple) else axis) or ""


def _sizes(mesh: AbstractMesh) -> str:
    return str(Layout(**dict(mesh.shape)))
