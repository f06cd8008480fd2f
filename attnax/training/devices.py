"""The devices of a training: batches go to them, and programs run on them, in one process or in several."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import P
from jax.sharding import Mesh, NamedSharding

from attnax.distributed import barrier
from attnax.sharding import BATCH
from attnax.training.mesh import num_parts

__all__ = ["Devices", "part_of"]

_COMPILATION = 3600.0  # seconds in which all processes must have compiled a program


class Devices:
    """The devices of a mesh, or the default device.

    Args:
        mesh: of a layout, or None.

    Attributes:
        mesh: of a layout, or None.
        part: which part of the rows of a batch this process gives, and of how many; (0, 1) if it gives all.

    Raises:
        ValueError: a process has none of the devices, or those of a process hold rows that are no such part.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        self._is_shared = mesh is not None and jax.process_count() > 1
        self.part = (0, 1)
        if mesh is not None and self._is_shared:
            owners = {device.process_index for device in mesh.devices.flat}
            if len(owners) < jax.process_count():
                raise ValueError(
                    f"Trainer: devices must be some of each of the {jax.process_count()} processes; got those of "
                    f"{sorted(owners)}. Leave them out, and all are taken."
                )
            self.part = part_of(jax.process_index(), _rows_of_processes(mesh))
        self._compiled: set[Any] = set()  # programs that all processes have

    def check(self, caller: str, batch: Any, *, accumulates: bool) -> None:
        """Raises ValueError unless all arrays have the same rows, which the layout divides.

        Args:
            caller: for messages.
            batch: a pytree of arrays, (accumulate, B, ...) or (B, ...), with the rows of this process.
            accumulates: whether there is an axis of microbatches.
        """
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        shapes = [tuple(np.shape(x)) for _, x in leaves]
        wanted, count = ("(accumulate, B, ...)", 2) if accumulates else ("(B, ...)", 1)
        for (path, x), shape in zip(leaves, shapes, strict=True):
            name = _name_of(path, x)
            if len(shape) < count or shape[:count] != shapes[0][:count] or 0 in shape[:count]:
                raise ValueError(
                    f"{caller}: the arrays of a batch must be {wanted}, with the same first sizes, none of them 0; got "
                    f"{name}" + (f" beside {_name_of(*leaves[0])}." if path != leaves[0][0] else ".")
                )
            if shape[count - 1] * self.part[1] % num_parts(self.mesh):
                rows = "" if self.part[1] == 1 else f", the rows of one of {self.part[1]} processes"
                raise ValueError(
                    f"{caller}: data * fsdp * expert must divide the batch; got {num_parts(self.mesh)} for {name}"
                    f"{rows}. Take a multiple."
                )
        if not leaves:
            raise ValueError(f"{caller}: a batch must hold arrays of shape {wanted}; got {batch!r}.")

    def shapes(self, batch: Any, *, accumulates: bool) -> Any:
        """The shapes, dtypes and shardings of the whole batch; of a part there may be arrays or shapes."""
        shapes = jax.eval_shape(lambda batch: batch, batch)
        if self.mesh is None:
            return shapes
        axis, cut = int(accumulates), self._cut(accumulates)

        def whole(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*x.shape[:axis], x.shape[axis] * self.part[1], *x.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=cut)

        return jax.tree.map(whole, shapes)

    def run(self, program: Any, held: Any, batch: Any, *, accumulates: bool) -> Any:
        """Runs a compiled function of a state or parameters, which lie on the devices, and of a batch.

        Raises:
            ProcessError: another process does not compile the program within an hour, or has ended.
        """
        if self._is_shared:
            shapes, cut = self.shapes(batch, accumulates=accumulates), self._cut(accumulates)
            batch = jax.tree.map(
                lambda x, whole: jax.make_array_from_process_local_data(cut, np.asarray(x), whole.shape), batch, shapes
            )
        elif self.mesh is not None:
            batch = jax.device_put(batch, self._cut(accumulates))
        with self.around():
            if self._is_shared:
                self._meet(program, held, batch)
            return program(held, batch)

    def _meet(self, program: Any, held: Any, batch: Any) -> None:
        """Waits until all processes have compiled the program: between CPUs, a process that comes 30 s late fails."""
        called = program, *((x.shape, x.dtype) for x in jax.tree.leaves((held, batch)))
        if called not in self._compiled:
            program.lower(held, batch).compile()
            barrier("compiled", _COMPILATION)
            self._compiled.add(called)

    def put(self, state: Any, shardings: Any) -> Any:
        """Puts arrays that every process has whole on the devices, as the shardings say."""
        if not self._is_shared:
            return jax.device_put(state, shardings)
        whole = jax.device_get(state)  # `device_put` would compare the arrays of all processes
        return jax.tree.map(
            lambda x, cut: jax.make_array_from_callback(x.shape, cut, lambda at: x[at]), whole, shardings
        )

    def around(self) -> Any:
        """The context in which a program of the mesh is traced and run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _cut(self, accumulates: bool) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, P(None, BATCH) if accumulates else P(BATCH))


def part_of(process: int, rows: Mapping[int, set[int]]) -> tuple[int, int]:
    """Which part of the rows of a batch a process holds, and of how many.

    Args:
        process: its number.
        rows: of each process; several may hold the same ones.

    Raises:
        ValueError: the rows of a process are no such part.
    """
    size, num_rows = len(rows[process]), len(set().union(*rows.values()))
    for number, held in rows.items():
        first = min(held) // size * size
        if held != set(range(first, first + size)) or num_rows % size:
            raise ValueError(
                f"Layout: each process must hold one part of every batch, all of the same size; got rows "
                f"{sorted(held)} of {num_rows} in process {number}. Take a layout in which data * fsdp * expert is a "
                "divisor or a multiple of the number of processes."
            )
    return min(rows[process]) // size, num_rows // size


def _rows_of_processes(mesh: Mesh) -> dict[int, set[int]]:
    """The rows of each process, of a batch with one row for each part."""
    num_rows, held = num_parts(mesh), dict[int, set[int]]()
    places: Any = NamedSharding(mesh, P(BATCH)).devices_indices_map((num_rows,))
    for device, rows in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows[0].indices(num_rows)))
    return held


def _name_of(path: Any, x: Any) -> str:
    """An array of a batch for a message: its path and its shape, or its value if it has none."""
    return f"batch{jax.tree_util.keystr(path)}" + (f".shape={np.shape(x)}" if hasattr(x, "shape") else f"={x!r}")
