"""`attnax launch -- train` with two real processes: what happens to one of them changes no bit of the run."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import two_trainers
from children import ROOT

from attnax.cli.stopwatch import TIMED
from attnax.training import RunFolder, checkpoint_arrays, checkpoint_steps, restore_items

LIMIT = 1200  # seconds for a launcher
FLAGS = [
    *("--tokenizer", "bytes", "--d-model", "16", "--num-heads", "2", "--d-ff", "24", "--num-layers", "1"),
    *("--max-len", "32", "--batch-size", "2", "--accumulate", "2", "--dropout-rate", "0.1", "--ema", "0.9"),
    *("--steps", "150", "--checkpoint-every", "10"),
]
ITEMS = ("params", "opt_state", "ema", "update", "skipped")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(40):
        (folder / f"file{index}.py").write_text(f"def number_{index}(x):\n    return x + {index}\n\n\n" * 4)
    return folder


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """Starts `attnax launch`; all processes share the compiled programs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    @contextlib.contextmanager
    def start(processes, devices, *words, **flags):
        """The launcher; it and its processes are ended after a limit."""
        options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        line = [sys.executable, "-m", "attnax", "launch", "--processes", str(processes), "--devices", str(devices)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen([*line, *options, "--", *words], env=environment, text=True, **pipes) as process:
            limit = threading.Timer(LIMIT, process.kill)  # with the launcher its processes end
            limit.start()
            try:
                yield process
            finally:
                limit.cancel()
                process.kill()

    return start


def rows(folder):
    """The rows of the run, without times."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def wait_for(launcher, folder, step):
    """Waits until the row of an update is written."""
    while max((row["step"] for row in rows(folder)), default=0) < step:
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.01)


def process_of(launcher, number, *ended):
    """The process of this number, a child of the launcher that is none of those which have ended."""
    while launcher.poll() is None:
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if int(child) not in ended and f"JAX_PROCESS_ID={number}".encode() in variables:
                    return int(child)
        time.sleep(0.01)
    return pytest.fail(launcher.stdout.read())


def last_state(folder):
    """All arrays of the last checkpoint, whole."""
    step = max(checkpoint_steps(folder / "checkpoints"))
    likes = {}
    for item in ITEMS:
        likes[item] = {
            name: np.zeros(shape, dtype)
            for name, (shape, dtype) in checkpoint_arrays(folder / "checkpoints", step, item).items()
        }
    return step, restore_items(folder / "checkpoints", likes, step=step, owner=RunFolder(folder).owner)[1]


def check_same(folder, whole):
    assert rows(folder) == rows(whole)
    assert (folder / "result.json").read_text() == (whole / "result.json").read_text()
    (step, mine), (other_step, others) = last_state(folder), last_state(whole)
    assert step == other_step == 150
    for item in ITEMS:
        for name, x in mine[item].items():
            assert np.array_equal(np.asarray(x), np.asarray(others[item][name])), (item, name)


@pytest.fixture(scope="module")
def undisturbed(text, launcher, tmp_path_factory):
    """The run of one process with two devices, to its end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with launcher(1, 2, "train", "--data", str(text), "--out", str(folder), *FLAGS, "--layout", "fsdp=2") as process:
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return folder


@pytest.mark.contract
def test_a_run_of_two_processes_that_are_killed_stopped_and_asked_to_stop_has_the_bits_of_one(
    text, launcher, undisturbed, tmp_path
):
    out = tmp_path / "run"
    words = ["train", "--data", str(text), "--out", str(out), *FLAGS]  # the default layout: fsdp over all devices
    with launcher(2, 1, *words, restarts=6, stall=20) as process:  # JAX would end the others after 30 s
        wait_for(process, out, 25)
        one = process_of(process, 1)
        os.kill(one, signal.SIGKILL)
        killed = time.monotonic()
        process_of(process, 1, one)
        again = time.monotonic() - killed
        wait_for(process, out, 60)
        os.kill(process_of(process, 0), signal.SIGSTOP)
        wait_for(process, out, 95)
        os.kill(process_of(process, 1), signal.SIGTERM)
        printed = process.communicate()[0]
    assert process.returncode == 143, printed
    assert "attempt 3" in printed and "stuck: process" in printed, printed
    assert again < 25, "the processes do not wait until JAX takes one for dead, after 30 s"
    stopped = max(row["step"] for row in rows(out) if "loss" in row)
    assert checkpoint_steps(out / "checkpoints")[-1] == stopped < 150  # both have saved the same update
    *_, command = re.findall(r"^\[0\] interrupted; go on with: \S+ (launch --processes 2 .*)\n", printed, re.MULTILINE)
    assert "[1] interrupted" not in printed  # process 0 speaks for both
    assert command.endswith(f"-- train --resume {out} --layout fsdp")
    with launcher(1, 2, "train", "--resume", str(out), "--layout", "fsdp=2") as process:  # one process goes on
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    check_same(out, undisturbed)


@pytest.mark.contract
def test_wrong_use_ends_both_processes_and_is_not_tried_again(launcher, tmp_path):
    words = ["train", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]
    with launcher(2, 1, *words, restarts=3) as process:
        printed = process.communicate()[0]
    assert process.returncode == 2 and "no such file or folder" in printed and "attempt 2" not in printed, printed


@pytest.mark.thorough
def test_two_processes_of_two_devices_repeat_their_bits_and_have_the_losses_of_one_device(launcher):
    alone, _ = two_trainers.train(None)
    with launcher(2, 2, sys.executable, two_trainers.__file__) as process:
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    for number in range(2):
        lines = re.findall(rf"^\[{number}\] (\S+=\S+) (True|False) (.*)$", printed, re.MULTILINE)
        assert tuple(layout for layout, *_ in lines) == two_trainers.LAYOUTS
        for layout, repeats, losses in lines:
            assert repeats == "True", layout
            assert [float(loss) for loss in losses.split()] == pytest.approx(alone, rel=1e-5), layout


@pytest.mark.thorough
def test_twenty_kills_of_two_processes_change_no_bit(text, launcher, undisturbed, tmp_path):
    rng, out = random.Random(7), tmp_path / "run"
    words = ["train", "--data", str(text), "--out", str(out), *FLAGS, "--layout", "fsdp=2"]
    ended, kills = [], 20
    with launcher(2, 1, *words, restarts=kills) as process:
        for kill in range(kills):
            both = [process_of(process, number, *ended) for number in range(2)]
            if kill % 2:
                time.sleep(rng.uniform(0, 5))  # somewhere between its start and its updates
            else:
                wait_for(process, out, 1 + max((row["step"] for row in rows(out)), default=0))
                time.sleep(rng.uniform(0, 0.05))
            os.kill(rng.choice(both), signal.SIGKILL)
            ended += both
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    assert printed.count("was ended by SIGKILL") == kills, printed
    check_same(out, undisturbed)
