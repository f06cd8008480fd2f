"""Which processes train together, by the variables of each launcher. No process is started."""

import re

import jax
import pytest

from attnax import world
from attnax.distributed import connect, find_world
from attnax.errors import InputError
from attnax.world import World

TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {"SLURM_JOB_ID": "65001", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
SLURM |= {"SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
ORTE = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
ONE = {"WORLD_SIZE": "1", "RANK": "0"}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


FOUND = {
    "nothing": ({}, World("nothing")),
    "JAX": (JAX, World("JAX_*", 2, 1, "10.0.0.2:1234")),
    "torchrun": (TORCH, World("torchrun", 4, 3, "10.0.0.1:29500")),
    "torchrun, which listens at its port": (
        TORCH | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        World("torchrun", 4, 3, "10.0.0.1:29501"),
    ),
    "torchrun with a process for each device": (
        TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        World("torchrun", 4, 3, "10.0.0.1:29500", (1,)),
    ),
    "torchrun with one process for each machine": (
        TORCH | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        World("torchrun", 4, 3, "10.0.0.1:29500"),
    ),
    "torchrun, one process": (ONE, World("torchrun")),
    "an address of torchrun without numbers": (without(TORCH, "WORLD_SIZE", "RANK"), World("nothing")),
    "JAX and torchrun, which agree": (
        TORCH | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
        World("JAX_*", 4, 3, "a:1"),
    ),
    "empty variables": (dict.fromkeys((*JAX, *TORCH), ""), World("nothing")),
    "SLURM": (SLURM, World("SLURM", 4, 2, None, (0,))),
    "SLURM, with an address": (
        SLURM | {"JAX_COORDINATOR_ADDRESS": "node07:1"},
        World("SLURM", 4, 2, "node07:1", (0,)),
    ),
    "SLURM, devices by JAX's variable": (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, World("SLURM", 4, 2)),
    "a script of SLURM without srun": (without(SLURM, "SLURM_STEP_NODELIST", "SLURM_PROCID"), World("nothing")),
    "a launcher inside of SLURM": (SLURM | JAX, World("JAX_*", 2, 1, "10.0.0.2:1234")),
    "torchrun inside of SLURM": (SLURM | TORCH, World("torchrun", 4, 3, "10.0.0.1:29500")),
    "Open MPI 4": (ORTE, World("Open MPI", 2, 1, None, (1,))),
    "Open MPI inside of SLURM": (SLURM | ORTE, World("Open MPI", 2, 1, None, (1,))),
    "Open MPI 5, with an address": (
        OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a:1"},
        World("Open MPI", 2, 1, "a:1", (1,)),
    ),
    "Kubernetes without JAX's package for it": (KUBERNETES, World("nothing")),
}


@pytest.mark.parametrize("case", FOUND)
def test_variables_name_the_world(case):
    variables, expected = FOUND[case]
    assert find_world(variables) == expected


def test_arguments_come_before_variables():
    assert find_world(JAX | TORCH, coordinator="h:9", processes=7, process=6) == World("arguments", 7, 6, "h:9")


def test_packages_that_jax_needs_for_a_cluster(monkeypatch):
    monkeypatch.setattr(world, "find_spec", lambda name: name)
    assert find_world(KUBERNETES) == World("Kubernetes", None, None)
    assert find_world(without(KUBERNETES, "JOB_COMPLETION_INDEX")) == World("nothing")
    assert find_world(OPEN_MPI) == World("mpi4py", 2, 1, None, (1,))


def test_tpus_of_a_cloud(monkeypatch):
    monkeypatch.setattr(world.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert find_world({}) == World("TPU", None, None)
    assert find_world({"JAX_PLATFORMS": "cpu"}) == World("nothing")


WRONG = {
    "RANK without WORLD_SIZE": (
        {"RANK": "1"},
        "connect: WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT must be given together; got RANK=1 without WORLD_SIZE and "
        "MASTER_ADDR and MASTER_PORT.",
    ),
    "no address": (without(TORCH, "MASTER_ADDR"), "without MASTER_ADDR."),
    "half of JAX's": (without(JAX, "JAX_PROCESS_ID"), "JAX_NUM_PROCESSES=2 without JAX_PROCESS_ID."),
    "an address alone": ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "without JAX_NUM_PROCESSES and JAX_PROCESS_ID."),
    "half of JAX's in SLURM": (SLURM | without(JAX, "JAX_PROCESS_ID"), "without JAX_PROCESS_ID."),
    "outside": (TORCH | {"RANK": "4"}, "connect: RANK must be at least 0 and below WORLD_SIZE=4; got RANK=4."),
    "negative": (JAX | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID must be at least 0 and below JAX_NUM_PROCESSES=2"),
    "no process": (JAX | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES must be at least 1; got JAX_NUM_PROCESSES=0."),
    "no number": (TORCH | {"WORLD_SIZE": "two"}, "connect: WORLD_SIZE must be a whole number; got WORLD_SIZE='two'."),
    "no port": (JAX | {"JAX_COORDINATOR_ADDRESS": "host"}, "the coordinator must be HOST:PORT; got 'host'."),
    "a port that is no number": (TORCH | {"MASTER_PORT": "x"}, "connect: MASTER_PORT must be a whole number"),
    "SLURM, outside": (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID must be at least 0 and below SLURM_NTASKS=4"),
    "two that disagree": (
        JAX | TORCH,
        "connect: the variables of JAX and those of torchrun must name the same processes; got JAX_NUM_PROCESSES=2, "
        "JAX_PROCESS_ID=1, WORLD_SIZE=4, RANK=3. Unset those that do not hold.",
    ),
    "Open MPI 5": (OPEN_MPI, "connect: Open MPI 5 tells no address; got JAX_COORDINATOR_ADDRESS=None."),
}


@pytest.mark.parametrize("case", WRONG)
def test_variables_that_contradict_or_miss_others_are_refused(case):
    variables, words = WRONG[case]
    with pytest.raises(InputError, match=re.escape(words)):
        find_world(variables)


def test_arguments_are_given_together():
    with pytest.raises(InputError, match="got coordinator=a:1, processes=2 without process."):
        find_world({}, coordinator="a:1", processes=2)


INITIALIZED = {
    "all": (JAX, {"coordinator_address": "10.0.0.2:1234", "num_processes": 2, "process_id": 1}),
    "SLURM": (SLURM, {}),
}


@pytest.mark.parametrize("case", INITIALIZED)
def test_jax_is_given_what_it_does_not_find_itself(case):
    variables, expected = INITIALIZED[case]
    given = find_world(variables).arguments()
    if expected:
        expected = expected | {"local_device_ids": None, "cluster_detection_method": "deactivate"}
    assert given == expected


@pytest.mark.parametrize("variables", [ONE, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}])
def test_one_process_connects_to_nobody(monkeypatch, variables):
    for name in (*JAX, *TORCH, *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delattr(jax.distributed, "initialize")
    assert connect().count == 1
