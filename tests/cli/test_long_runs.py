"""`attnax train` over many updates: cut at twenty places it ends with the same bits, and a thousand leak nothing."""

import json
import os
import random
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import TINY

from attnax.cli import main
from attnax.cli.stopwatch import TIMED
from attnax.training import RunFolder, Trainer, causal_lm, restore_items


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def state_of(folder):
    """The arrays of the last checkpoint."""
    run = RunFolder(folder)
    options, _, _ = run.load()
    shapes = Trainer(options.model, causal_lm(), options.optimizer, ema=options.ema).shapes
    names = ("params", "opt_state", "update", "skipped", "ema")
    return restore_items(run.checkpoints, {name: getattr(shapes, name) for name in names}, owner=run.owner)


@pytest.mark.thorough
def test_a_run_that_is_cut_at_twenty_places_ends_with_the_same_bits(corpus, tmp_path, monkeypatch):
    """Dropout, an average, accumulation, and three passes over the text."""
    flags = ["--steps", "60", "--accumulate", "2", "--ema", "0.9", "--dropout-rate", "0.1", "--checkpoint-every", "7"]
    append, cuts = RunFolder.append_metrics, sorted(random.Random(0).sample(range(1, 58, 2), 20))

    def start(name):
        return main(["train", "--data", str(corpus), "--out", str(tmp_path / name), *TINY, *flags])

    assert start("whole") == 0

    def interrupt(self, **row):
        append(self, **row)
        if cuts and row["step"] >= cuts[0]:
            del cuts[0]
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunFolder, "append_metrics", interrupt)
    code, stops = start("run"), 0
    while code == 130:
        stops += 1
        code = main(["train", "--resume", str(tmp_path / "run")])
    assert code == 0 and stops == 20
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert rows_of(run) == rows_of(whole)
    assert (run / "result.json").read_text() == (whole / "result.json").read_text()
    (step, have), (_, want) = state_of(run), state_of(whole)
    assert step == 60
    jax.tree.map(np.testing.assert_array_equal, have, want)


@pytest.mark.thorough
def test_a_thousand_updates_compile_nothing_anew_and_hold_no_more_memory(corpus, tmp_path, monkeypatch, caplog):
    """The rows note what was compiled and what is resident."""
    append, notes = RunFolder.append_metrics, {}

    def note(self, **row):
        append(self, **row)
        if row["step"] not in (1, 900, 1900):
            return
        status = Path("/proc/self/status").read_text()
        compiled = sum(record.getMessage().startswith("Compiling") for record in caplog.records)
        notes[row["step"]] = compiled, 1024 * int(status.partition("VmRSS:")[2].split()[0])

    monkeypatch.setattr(RunFolder, "append_metrics", note)
    flags = ["--steps", "2000", "--checkpoint-every", "2000"]
    with jax.log_compiles(True):
        assert main(["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TINY, *flags]) == 0
    assert notes[1][0] > 0  # it counts
    assert notes[900][0] == notes[1900][0]
    assert notes[1900][1] - notes[900][1] < 1e6
