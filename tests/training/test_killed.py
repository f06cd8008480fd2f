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


def start(folder, updates, *flags):
    # A warning, as of a damaged checkpoint, is an error.
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(folder), "--updates", str(updates), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def train_to_the_end(folder, updates):
    """The digest of the last state."""
    with start(folder, updates) as process:
        words = process.stdout.read().split()
    assert process.returncode == 0 and words[-2] == "final"
    return words[-1]


def kill_once(folder, updates, number, rng):
    """Starts the training and kills it, each time in another way; returns whether it was killed before its end."""
    newest = max(checkpoint_steps(folder), default=0)
    phase = (None, *PHASES)[number % (len(PHASES) + 1)]
    flags = [] if phase is None else ["--die", phase, "--seed", str(rng.randrange(2**31))]
    with start(folder, updates, *flags) as process:
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


def check_kills(tmp_path, updates, kills, seed):
    rng, final = random.Random(seed), train_to_the_end(tmp_path / "undisturbed", updates)
    killed = runs = 0
    while killed < kills:
        runs += 1
        folder = tmp_path / f"run{runs}"
        while killed < kills and kill_once(folder, updates, killed, rng):
            killed += 1
        assert train_to_the_end(folder, updates) == final
    assert runs <= 1 + kills


@pytest.mark.contract
def test_3_kills_change_nothing(tmp_path):
    check_kills(tmp_path, 7, 3, seed=0)


@pytest.mark.thorough
def test_many_kills_change_nothing(tmp_path):
    seed = int(os.environ.get("ATTNAX_SEED", "1"))
    check_kills(tmp_path, 12, int(os.environ.get("ATTNAX_KILLS", "30")), seed)
