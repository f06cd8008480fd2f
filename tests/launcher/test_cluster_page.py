"""The files of docs/guides/clusters.md: their scripts run with stand-ins for the programs of a cluster."""

import os
import re
import subprocess

import pytest
import yaml
from children import ROOT

from attnax.world import World, find_world

PAGE = (ROOT / "docs" / "guides" / "clusters.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


SLURM, SLURM_LAUNCHER = blocks("bash")
JOB_SET, SKYPILOT = map(yaml.safe_load, blocks("yaml"))


@pytest.fixture
def perform(tmp_path):
    """Runs a script in which some programs print their words, one a line; returns the lines and the exit code."""

    def call(script, begun=False, codes=(), **variables):
        run = tmp_path / "shared" / "runs" / "a"
        run.mkdir(parents=True, exist_ok=True)
        if begun:
            (run / "config.json").touch()
        for name in ("attnax", "srun", "scontrol"):
            program = tmp_path / name
            program.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {dict(codes).get(name, 0)}\n')
            program.chmod(0o755)
        script = script.replace("/shared/", f"{tmp_path}/shared/")
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], env=path | variables, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout.replace(str(tmp_path), "").splitlines(), done.returncode

    return call


@pytest.mark.parametrize(("begun", "flags"), [(False, "--data /shared/notes --out"), (True, "--resume")])
def test_slurm_goes_on_with_the_run_and_requeues_after_a_stop(perform, begun, flags):
    train = f"srun --kill-on-bad-exit=1 attnax train {flags} /shared/runs/a --layout fsdp=16"
    for code in (0, 1, 143):
        lines, exit_code = perform(SLURM, begun, {"srun": code}, SLURM_JOB_ID="17")
        assert lines == [train, "scontrol requeue 17"][: 2 if code == 143 else 1]
        assert exit_code == code


def test_slurm_starts_a_launcher_on_each_machine(perform):
    script = SLURM_LAUNCHER.replace("srun --kill-on-bad-exit=1 ", "flags='--out x'; ")
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    (line,), _ = perform(f"scontrol() {{ echo first; echo second; }}; {script}", **variables)
    words = "--processes 8 --devices 1 --restarts 10 -- train"
    assert line.startswith(f"attnax launch --nodes 2 --node 1 --coordinator first:6000 {words} ")


def test_the_pods_of_kubernetes_find_each_other():
    (job,) = JOB_SET["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    first = f"{JOB_SET['metadata']['name']}-{job['name']}-0-0.{JOB_SET['metadata']['name']}:1234"
    for index in range(pods["completions"]):
        field = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index)}
        variables = {
            each["name"]: each["value"] if "value" in each else field[each["valueFrom"]["fieldRef"]["fieldPath"]]
            for each in container["env"]
        }
        assert find_world(variables) == World("JAX_*", pods["parallelism"], index, first)


@pytest.mark.parametrize(("begun", "flags"), [(False, "--data /shared/notes --out"), (True, "--resume")])
def test_a_pod_goes_on_with_the_run(perform, begun, flags):
    (container,) = JOB_SET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    assert perform(script, begun)[0] == [f"attnax train {flags} /shared/runs/a --layout fsdp"]


def test_skypilot_starts_a_launcher_on_each_machine(perform):
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    (line,), _ = perform(SKYPILOT["run"], begun=True, **variables)
    words = "--nodes 2 --node 1 --coordinator 10.0.0.1:6000 --processes 1 --restarts 10"
    assert line == f"attnax launch {words} -- train --resume /shared/runs/a --layout fsdp"


def test_the_script_for_ray_is_python():
    (script,) = blocks("py")
    compile(script, "train_on_ray.py", "exec")
