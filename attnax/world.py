"""Which processes train together, by arguments or the variables of a launcher. No process is started or joined."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from jax._src import cloud_tpu_init

from attnax.errors import InputError

__all__ = ["World", "find_world"]

_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is.

    Attributes:
        source: who says so: "arguments", "JAX_*", "torchrun", "SLURM", "Open MPI", "mpi4py", "Kubernetes", "TPU" or
            "nothing".
        count: number of processes; None until JAX has found it out.
        index: number of this process, from 0; None until JAX has found it out.
        address: HOST:PORT at which process 0 listens; None if JAX finds it out, or one process needs none.
        devices: which devices of the machine are this process's; None for those that JAX takes.
    """

    source: str
    count: int | None = 1
    index: int | None = 0
    address: str | None = None
    devices: tuple[int, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `jax.distributed.initialize`: none for a cluster of which JAX finds out the address."""
        if self.source == "mpi4py":
            return {"cluster_detection_method": "mpi4py"}
        if self.address is None:
            return {}
        return {
            "coordinator_address": self.address,
            "num_processes": self.count,
            "process_id": self.index,
            "local_device_ids": self.devices,
            "cluster_detection_method": "deactivate",  # or each process would get one device of its machine
        }


def find_world(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> World:
    """The processes that arguments name, or else the variables of a launcher; see `attnax.distributed.connect`.

    Args:
        environment: the variables, `os.environ`.
        coordinator: HOST:PORT of process 0.
        processes: number of processes.
        process: number of this one, from 0.

    Raises:
        InputError: what was found is incomplete, out of range or no number, or the variables of JAX and those of
            torchrun name different processes.

    Example:
        >>> find_world({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "3"})
        World(source='torchrun', count=8, index=3, address='10.0.0.1:29500', devices=None)
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if any(value is not None for value in given.values()):
        return _whole("arguments", given, "processes", "process", coordinator)
    said = {name: value for name, value in environment.items() if value}
    worlds = [found for found in (_of_jax(said), _of_torchrun(said)) if found is not None]
    if len({(found.count, found.index) for found in worlds}) > 1:
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "WORLD_SIZE", "RANK")
        raise InputError(
            "connect: the variables of JAX and those of torchrun must name the same processes; got "
            f"{', '.join(f'{name}={said[name]}' for name in names)}. Unset those that do not hold."
        )
    return next(iter(worlds), None) or _of_cluster(said) or World("nothing")


def _of_jax(said: Mapping[str, str]) -> World | None:
    """The processes of JAX's variables. The address alone goes with the numbers of a cluster."""
    found = {name: said.get(name) for name in _JAX}
    others = [value for name, value in found.items() if name != _JAX[0]]
    if not any(found.values()) or (not any(others) and _of_cluster(said) is not None):
        return None
    return _whole("JAX_*", found, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", found[_JAX[0]])


def _of_torchrun(said: Mapping[str, str]) -> World | None:
    """The processes of torchrun's variables, which Kubeflow's trainer sets too.

    An address without numbers is no world: scripts for SLURM often export it. Where torchrun itself listens at
    MASTER_PORT, JAX takes the next port.
    """
    found = {name: said.get(name) for name in ("WORLD_SIZE", "RANK")}
    if not any(found.values()):
        return None
    if found != {"WORLD_SIZE": "1", "RANK": "0"}:
        found |= {name: said.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    address = None
    if None not in found.values() and "MASTER_PORT" in found:
        port = _whole_number("MASTER_PORT", found["MASTER_PORT"])
        is_taken = said.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address = f"{found['MASTER_ADDR']}:{port + is_taken}"
    is_alone = _whole_number("LOCAL_WORLD_SIZE", said.get("LOCAL_WORLD_SIZE", "1")) == 1
    devices = None if is_alone else _device(said, "LOCAL_RANK")
    return _whole("torchrun", found, "WORLD_SIZE", "RANK", address, devices)


def _of_cluster(said: Mapping[str, str]) -> World | None:
    """The processes of a cluster that JAX knows, in its order; an address may come from JAX_COORDINATOR_ADDRESS."""
    address = said.get("JAX_COORDINATOR_ADDRESS")
    if all(name in said for name in _OPEN_MPI):
        found = {name: said[name] for name in _OPEN_MPI}
        devices, source = _device(said, "OMPI_COMM_WORLD_LOCAL_RANK"), "Open MPI"
        world = _whole(source, found, *_OPEN_MPI, address, devices)
        if world.count == 1 or address is not None or "OMPI_MCA_orte_hnp_uri" in said:
            return world
        if find_spec("mpi4py") is None:
            raise InputError(
                "connect: Open MPI 5 tells no address; got JAX_COORDINATOR_ADDRESS=None. Install mpi4py, or set "
                "JAX_COORDINATOR_ADDRESS=HOST:PORT for the host of rank 0."
            )
        return dataclasses.replace(world, source="mpi4py")
    if all(name in said for name in _SLURM):
        found = {name: said[name] for name in ("SLURM_NTASKS", "SLURM_PROCID")}
        return _whole("SLURM", found, "SLURM_NTASKS", "SLURM_PROCID", address, _device(said, "SLURM_LOCALID"))
    if cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in said.get("JAX_PLATFORMS", "tpu"):
        return World("TPU", None, None)
    # A Job with indexes may as well be many trainings of one process each. JAX reads its size with that package.
    if all(name in said for name in _KUBERNETES) and find_spec("kubernetes") is not None:
        return World("Kubernetes", None, None)
    return None


def _device(said: Mapping[str, str], name: str) -> tuple[int, ...] | None:
    """The device of a process with this number on its machine, unless the variable of JAX says which it has."""
    if "JAX_LOCAL_DEVICE_IDS" in said or name not in said:
        return None
    return (_whole_number(name, said[name]),)


def _whole(
    source: str,
    found: Mapping[str, Any],
    count_name: str,
    index_name: str,
    address: str | None,
    devices: tuple[int, ...] | None = None,
) -> World:
    """The world of values that must all be there.

    Raises:
        InputError: one is missing, no whole number or out of range.
    """
    missing = [name for name, value in found.items() if value is None]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise InputError(
            f"connect: {', '.join(found)} must be given together; got {there} without {' and '.join(missing)}."
        )
    count, index = (_whole_number(name, found[name]) for name in (count_name, index_name))
    if count < 1:
        raise InputError(f"connect: {count_name} must be at least 1; got {count_name}={count}.")
    if not 0 <= index < count:
        raise InputError(
            f"connect: {index_name} must be at least 0 and below {count_name}={count}; got {index_name}={index}."
        )
    if address is not None and not re.fullmatch(r"\S+:[0-9]+", address):
        raise InputError(f"connect: the coordinator must be HOST:PORT; got {address!r}.")
    return World(source, count, index, address, devices)


def _whole_number(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"connect: {name} must be a whole number; got {name}={value!r}.") from None
