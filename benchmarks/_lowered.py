"""The GPU kernels in a program that is lowered for NVIDIA GPUs, on any machine: Triton modules, checked by MLIR.

Lowering does not check a module. A GPU parses it at the first call, and an invalid module fails there; `parse` finds
the error without a GPU. Needs jax and numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxlib.mlir import ir
from jaxlib.triton import dialect

__all__ = ["Kernel", "gpu_mesh", "kernels_of", "parse"]

_CALL = "__gpu$xla.gpu.triton"  # the custom call that holds a module


class Kernel(NamedTuple):
    """A Triton module and its launch."""

    name: str
    bytecode: bytes
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    operands: tuple[tuple[tuple[int, ...], str], ...]  # shape, and MLIR's name of the dtype, for each input
    results: tuple[tuple[tuple[int, ...], str], ...]


def gpu_mesh(count: int = 1, axis_type: Any = AxisType.Auto, name: str = "NVIDIA H100 80GB HBM3") -> AbstractMesh:
    """A mesh to trace and lower under without a GPU: from JAX 0.11.1 on, Pallas reads the GPU's name from it."""
    gpu = AbstractDevice(name, 132, "cuda")
    return AbstractMesh((count,), ("gpus",), (axis_type,), abstract_device=gpu)


def kernels_of(function: Callable[..., Any], *arguments: Any, mesh: AbstractMesh | None = None) -> list[Kernel]:
    """The kernels of `function(*arguments)`, in their order in the program; arguments may be shapes."""
    with jax.sharding.use_abstract_mesh(mesh or gpu_mesh()):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found: list[Kernel] = []

    def look(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and operation.attributes["call_target_name"].value == _CALL:
            found.append(_kernel(operation))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return found


def _kernel(call: Any) -> Kernel:
    config = {entry.name: entry.attr for entry in call.attributes["mhlo.backend_config"]}

    def kinds(values: Any) -> tuple[tuple[tuple[int, ...], str], ...]:
        types = [value.type for value in values]
        return tuple((tuple(x.shape), str(x.element_type)) for x in types)

    return Kernel(
        config["name"].value,
        config["ir"].value_bytes,
        tuple(config[f"grid_{axis}"].value for axis in "xyz"),
        config["num_warps"].value,
        config["num_stages"].value,
        kinds(call.operands),
        kinds(call.results),
    )


def parse(kernel: Kernel) -> Any:
    """The module, verified.

    Raises:
        ValueError: the module is invalid; the message is the verifier's.
    """
    with ir.Context() as context:
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        try:
            return ir.Module.parse(kernel.bytecode)
        except ir.MLIRError as error:
            raise ValueError(f"{kernel.name}: invalid module: {error}") from None
