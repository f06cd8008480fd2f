"""Processes that another launcher than ours starts, or its variables."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from children import ROOT

from attnax.launcher.nodes import free_port

PROGRAM = [sys.executable, str(Path(__file__).with_name("joins.py"))]
CACHE = ROOT / ".cache" / "openmpi"


@pytest.fixture
def environment():
    """The variables of the processes: one device, and nothing else that JAX would read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}


def start(environments):
    """The lines of a process for each environment."""
    processes = [
        subprocess.Popen(PROGRAM, env=environment, stdout=subprocess.PIPE, text=True) for environment in environments
    ]
    try:
        return [process.communicate(timeout=100)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def lines(source):
    return [f"{source}: {index} of 2, ('0', '1'), 2 devices" for index in range(2)]


def free_port_of_slurm():
    """A free port among those that JAX computes from the number of a job, and such a number."""
    for job in range(4096):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", 61440 + job)):
                return job, 61440 + job
    raise AssertionError("no port is free")


@pytest.mark.contract
def test_variables_of_slurm(environment):
    job, port = free_port_of_slurm()
    of_job = {"SLURM_JOB_ID": str(4096 * 17 + job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    of_job |= {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    tasks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    assert start([environment | of_job | task for task in tasks]) == lines("SLURM")


@pytest.mark.thorough
def test_variables_of_torchrun(environment):
    port = str(free_port("127.0.0.1"))
    of_job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    of_job |= {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    assert start([environment | of_job | rank for rank in ranks]) == lines("torchrun")


@pytest.mark.thorough
def test_processes_that_do_not_come_are_awaited_for_a_limited_time(environment):
    code = "from attnax.distributed import connect; connect(seconds=2.0)"
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    alone = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "3"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | alone | {"JAX_PROCESS_ID": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert run.returncode != 0
    assert f"attnax: connect: all 3 processes must join at {address} within 2 s; one or more have not." in run.stderr


@pytest.fixture(scope="module")
def mpirun():
    """A command line of Open MPI for this machine's loopback, and its variables.

    Where it is not installed, Debian's packages are unpacked into a folder.
    """
    options = ["--allow-run-as-root", "--oversubscribe", "--mca", "oob_tcp_if_include", "lo", "-np", "2"]
    if found := shutil.which("mpirun"):
        return [found, *options], {}
    if not (CACHE / "usr" / "bin").is_dir():
        _unpack()
    folders = sorted({str(path.parent) for path in CACHE.rglob("*.so*")})
    variables = {"OPAL_PREFIX": str(CACHE / "usr"), "PMIX_INSTALL_PREFIX": str(CACHE / "usr")}
    variables |= {"OPAL_SYSCONFDIR": str(CACHE / "etc" / "openmpi"), "LD_LIBRARY_PATH": ":".join(folders)}
    variables["OPAL_LIBDIR"] = str(next(CACHE.glob("usr/lib/*/openmpi/lib")))
    return [str(CACHE / "usr" / "bin" / "mpirun.openmpi"), *options], variables


def _unpack():
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        pytest.skip("mpirun is not installed, and this machine has no packages of Debian to take it from")
    wanted = subprocess.run(
        ["apt-get", "install", "--simulate", "--no-install-recommends", "openmpi-bin"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = [line.split()[1] for line in wanted.stdout.splitlines() if line.startswith("Inst ")]
    if wanted.returncode or not names:
        pytest.skip(f"mpirun is not installed, and apt-get does not know openmpi-bin: {wanted.stderr.strip()}")
    CACHE.mkdir(parents=True, exist_ok=True)
    got = subprocess.run(
        ["apt-get", "download", *names], cwd=CACHE, capture_output=True, text=True, check=False, timeout=300
    )
    if got.returncode:
        pytest.skip(f"mpirun is not installed, and its packages cannot be downloaded: {got.stderr.strip()}")
    for package in CACHE.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, CACHE], check=True)
        package.unlink()


@pytest.mark.thorough
def test_a_real_mpirun(mpirun, environment):
    command, variables = mpirun
    run = subprocess.run(
        [*command, *PROGRAM], env=environment | variables, capture_output=True, text=True, check=False, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert sorted(line for line in run.stdout.splitlines() if line.startswith("Open MPI: ")) == lines("Open MPI")
