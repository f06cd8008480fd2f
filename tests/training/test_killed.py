"""A training that is killed again and again ends with the bits of one that was not, and loses no checkpoint."""

import contextlib
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_training import PHASES

from attnax.training import checkpoint_steps
from attnax.training.manifest import Manifest, hash_files

SCRIPT = Path(__file__).with_name("small_training.py")
ITEMS = ("params", "opt_state", "counters")
LIMIT = 240  # seconds for a process, which takes about 10


@contextlib.contextmanager
def start(folder, updates, *flags):
    """The process of a training. One that hangs gets a signal that is neither its end nor a kill."""
    # A warning, as of a damaged checkpoint, is an error.
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(folder), "--updates", str(updates), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(LIMIT, process.terminate)
        limit.start()
        try:
            yield process
            process.wait()
        finally:
            process.kill()
            limit.cancel()


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
        Manifest.read(folder, step).check_files(folder, ITEMS, hash_files)
    return True


def check_kills(tmp_path, updates, kills, seed):
    rng, final = random.Random(seed), train_to_the_end(tmp_path / "undisturbed", updates)
    killed = 0
    for run in range(1 + kills):
        folder = tmp_path / f"run{run}"
        while killed < kills and kill_once(folder, updates, killed, rng):
            killed += 1
        assert train_to_the_end(folder, updates) == final
        if killed == kills:
            return
    pytest.fail(f"{1 + kills} runs came to their end after {killed} kills of {kills}: kill {killed} is never reached")


def test_a_kill_that_is_never_reached_is_an_error_and_not_an_endless_loop(tmp_path, monkeypatch):
    reached = []

    def never_after_two(folder, updates, number, rng):
        reached.append(number)
        assert len(reached) < 100
        return number < 2

    monkeypatch.setattr(sys.modules[__name__], "train_to_the_end", lambda folder, updates: "final")
    monkeypatch.setattr(sys.modules[__name__], "kill_once", never_after_two)
    with pytest.raises(pytest.fail.Exception, match="5 runs came to their end after 2 kills of 4: kill 2 is never"):
        check_kills(tmp_path, 7, 4, seed=0)
    assert reached == [0, 1, 2, 2, 2, 2, 2]


@pytest.mark.contract
def test_3_kills_change_nothing(tmp_path):
    check_kills(tmp_path, 7, 3, seed=0)


@pytest.mark.thorough
def test_many_kills_change_nothing(tmp_path):
    seed = int(os.environ.get("ATTNAX_SEED", "1"))
    check_kills(tmp_path, 12, int(os.environ.get("ATTNAX_KILLS", "30")), seed)
