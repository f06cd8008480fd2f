"""A training that is killed again and again ends with the bits of one that was not, and loses no checkpoint."""

import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_training import PHASES

from attnax.training import checkpoint_steps
from attnax.training.manifest import Manifest

SCRIPT = Path(__file__).with_name("small_training.py")
ITEMS = ("params", "opt_state", "counters")
UPDATES = 12


def start(folder, *flags):
    # A warning, as of a damaged checkpoint, is an error.
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(folder), "--updates", str(UPDATES), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def train_to_the_end(folder):
    """The digest of the last state."""
    with start(folder) as process:
        words = process.stdout.read().split()
    assert process.returncode == 0 and words[-2] == "final"
    return words[-1]


def kill_once(folder, number, rng):
    """Starts the training and kills it, each time in another way; returns whether it was killed before its end."""
    newest = max(checkpoint_steps(folder), default=0)
    phase = (None, *PHASES)[number % (len(PHASES) + 1)]
    flags = [] if phase is None else ["--die", phase, "--seed", str(rng.randrange(2**31))]
    with start(folder, *flags) as process:
        assert process.stdout.readline().split() == ["restored", str(newest)]
        if phase is None:
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
        words = process.stdout.read().split()
    if process.returncode == 0:
        return False
    assert process.returncode == -9
    durable = [int(word) for before, word in itertools.pairwise(words) if before == "durable"]
    steps = checkpoint_steps(folder)
    assert max(steps, default=0) >= max([newest, *durable])  # none is lost
    for step in steps:  # and all that are listed are whole
        Manifest.read(folder, step).check_files(folder, ITEMS)
    return True


def check_kills(tmp_path, kills, seed):
    rng, final = random.Random(seed), train_to_the_end(tmp_path / "undisturbed")
    killed = runs = 0
    while killed < kills:
        runs += 1
        folder = tmp_path / f"run{runs}"
        while killed < kills and kill_once(folder, killed, rng):
            killed += 1
        assert train_to_the_end(folder) == final
    assert runs <= 1 + kills


@pytest.mark.contract
def test_3_kills_change_nothing(tmp_path):
    check_kills(tmp_path, 3, seed=0)


@pytest.mark.thorough
def test_many_kills_change_nothing(tmp_path):
    seed = int(os.environ.get("ATTNAX_SEED", "1"))
    check_kills(tmp_path, int(os.environ.get("ATTNAX_KILLS", "30")), seed)
