"""What `attnax train` does beside its updates: order of reading, evaluations, traces, files for TensorBoard."""

import errno
import json
import os
import signal
import struct
from pathlib import Path

import jax
import pytest
from quick_trainer import QuickTrainer, quick_training
from tiny_run import TINY, refuse

from attnax.cli import finish as finish_module
from attnax.cli import main
from attnax.cli import train as train_module
from attnax.cli.stopwatch import TIMED
from attnax.training import Checkpoints, RunFolder, checkpoint_steps


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_training(monkeypatch)


@pytest.fixture
def start(corpus, tmp_path):
    """Trains with these flags; returns the run folder."""

    def call(*flags):
        assert main(["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TINY, *flags]) == 0
        return tmp_path / "run"

    call.corpus = corpus
    return call


LAST = ("--eval-every", "12", "--checkpoint-every", "12")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_update_is_read_after_the_next_one_began_and_nothing_is_unread_before_a_look(start, monkeypatch):
    events = []

    def noted(name, function):
        return lambda *arguments, **options: events.append(name) or function(*arguments, **options)

    monkeypatch.setattr(QuickTrainer, "step", noted("begin", QuickTrainer.step))
    monkeypatch.setattr(QuickTrainer, "bits", noted("look", QuickTrainer.bits))
    monkeypatch.setattr(Checkpoints, "save", noted("save", Checkpoints.save))
    monkeypatch.setattr(RunFolder, "append_metrics", noted("row", RunFolder.append_metrics))
    start("--steps", "5", "--checkpoint-every", "3")
    looked = ["look", "row", "save"]
    ended = ["begin", "row", "row", *looked, "look"]  # and the look at all of the held-out text
    assert events == ["begin", "begin", "row", "begin", "row", "row", *looked, "begin", *ended]


def test_rows_have_the_fields_that_the_docs_promise(start):
    rows = [row for row in rows_of(start("--peak-flops", "1e9")) if "loss" in row]
    kept = {"step", "tokens", "loss", "weight", "grad_norm", "learning_rate"}
    known = set(TIMED) - {"memory"}  # a CPU does not say it
    assert all(set(row) == kept | known for row in rows[1:])
    assert set(rows[0]) == kept | {"seconds", "goodput"}  # the first update compiles
    assert all(row["mfu"] > 0 and 0 <= row["goodput"] <= 1 for row in rows[1:])


def test_evaluations_and_checkpoints_have_numbers_of_their_own(start):
    folder = start("--eval-every", "4")
    assert [row["step"] for row in rows_of(folder) if "held_out_bits_per_byte" in row] == [4, 8, 12]
    assert checkpoint_steps(folder / "checkpoints") == [10, 12]


def test_the_best_checkpoint_and_those_of_keep_every_are_kept_beside_the_two_newest(start, monkeypatch):
    """The held-out text is least at the fourth update."""
    monkeypatch.setattr(QuickTrainer, "bits", lambda self, params, stream: next(bits))
    bits = iter([9.0, 8.0, 7.0, 1.0, *[2.0] * 9])
    folder = start("--checkpoint-every", "1", "--keep-every", "5")
    assert checkpoint_steps(folder / "checkpoints") == [4, 5, 10, 11, 12]


class TestTrace:
    @pytest.fixture
    def traced(self, monkeypatch):
        """The updates that began, and when the trace started and stopped."""
        events, step = [], QuickTrainer.step
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))

        def noted(self, state, batch):
            events.append(int(state.update) + 1)
            return step(self, state, batch)

        monkeypatch.setattr(QuickTrainer, "step", noted)
        return events

    def test_it_holds_the_updates_of_the_flag_alone(self, start, traced, capsys):
        folder = start("--profile", "2:3", "--steps", "5")
        assert traced == [1, "start", 2, 3, "stop", 4, 5]
        assert f"trace      {folder / 'profile'}" in capsys.readouterr().out

    def test_it_stops_with_the_run(self, start, traced):
        start("--profile", "4:9", "--steps", "5")
        assert traced == [1, 2, 3, "start", 4, 5, "stop"]

    def test_one_that_would_not_be_made_is_refused(self, start, traced, capsys, corpus, tmp_path):
        line = refuse(capsys, "train", "--data", corpus, "--out", tmp_path / "late", *TINY, "--profile", "13:14")
        assert "--profile must begin within the 12 updates of the run; got '13:14'." in line
        assert not (tmp_path / "late").exists()
        folder = start()
        (folder / "result.json").unlink()
        assert main(["train", "--resume", str(folder), "--step", "10", "--profile", "2:3"]) == 0
        assert "--profile 2:3: these updates were made before; there will be no trace." in capsys.readouterr().err
        assert "start" not in traced

    @pytest.mark.parametrize("text", ["", "3", "3:2", "0:2", "2:x", "-1:2", "1:2:3"])
    def test_another_text_is_refused(self, capsys, text):
        line = refuse(capsys, "train", "--profile", text)
        assert f"--profile must be FROM:TO, such as 10:12, the first and last update; got {text!r}." in line

    @pytest.mark.contract
    def test_the_files_are_those_of_the_profiler(self, start):
        folder = start("--profile", "2:2", "--steps", "3")
        assert list((folder / "profile").rglob("*.xplane.pb"))


def scalars_of(folder):
    """(step, name, value) of the files for TensorBoard, whose records are a length, its check, the event, its check."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_files_for_tensorboard_have_the_numbers_of_the_metrics(start):
    folder = start("--tensorboard")
    rows = rows_of(folder)
    wanted = {
        (row["step"], name): value for row in rows for name, value in row.items() if name not in ("step", "layout")
    }
    found = {(step, name): value for step, name, value in scalars_of(folder / "tensorboard")}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_run_that_goes_on_may_have_other_flags_of_the_process_but_none_of_the_run(start, capsys):
    folder = start()
    (folder / "result.json").unlink()
    flags = ("--step", "10", "--peak-flops", "1e9", "--tensorboard")
    assert main(["train", "--resume", str(folder), *flags]) == 0
    assert "mfu" in rows_of(folder)[-2] and {step for step, _, _ in scalars_of(folder / "tensorboard")} == {11, 12}
    assert "--resume goes on with the run's own options" in refuse(
        capsys, "train", "--resume", folder, "--eval-every", 3
    )
    for value in ("0", "-1", "nan", "inf"):
        assert "--peak-flops must be above 0 and finite" in refuse(capsys, "train", "--peak-flops", value)


class TestGoingBack:
    @pytest.fixture
    def stopped(self, start):
        folder = start()
        (folder / "result.json").unlink()
        return folder

    def test_no_second_state_is_made(self, stopped, monkeypatch):
        monkeypatch.setattr(QuickTrainer, "shapes", jax.eval_shape(QuickTrainer.init, None))
        monkeypatch.setattr(QuickTrainer, "init", None)
        assert main(["train", "--resume", str(stopped), "--step", "10"]) == 0

    def test_nothing_is_deleted_by_a_command_that_cannot_go_on(self, stopped, monkeypatch, capsys):
        def step(self, state, batch):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

        monkeypatch.setattr(QuickTrainer, "step", step)
        line = refuse(capsys, "train", "--resume", stopped, "--step", "10")
        assert "too little memory for an update with --batch-size 4. Take a smaller one" in line
        assert "RESOURCE_EXHAUSTED: Out of memory" in line
        assert checkpoint_steps(stopped / "checkpoints") == [10, 12]
        assert [row["step"] for row in rows_of(stopped)][-1] == 12


def test_a_signal_during_the_last_evaluation_stops_before_the_end(start, monkeypatch, tmp_path, capsys):
    def bits(self, params, stream):
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(QuickTrainer, "bits", bits)
        assert main(["train", "--data", str(start.corpus), "--out", str(tmp_path / "run"), *TINY, *LAST]) == 143
    assert "interrupted; go on with:" in capsys.readouterr().out
    assert not (tmp_path / "run" / "result.json").exists()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("name", ["loss.png", "sample.txt", "result.json"])
def test_a_full_disk_at_the_end_is_named_with_the_command_that_goes_on(start, monkeypatch, tmp_path, capsys, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if name == "loss.png":
            patch.setattr(finish_module, "plot_training", full)
        else:
            write = Path.write_text
            patch.setattr(
                Path, "write_text", lambda path, *a: full() if path.name == f"{name}.tmp" else write(path, *a)
            )
        assert main(["train", "--data", str(start.corpus), "--out", str(tmp_path / "run"), *TINY]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / 'run' / name}: No space left on device. Mend it, then go on with:" in line
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_divergence_is_said_though_the_last_checkpoint_could_not_be_saved(start, monkeypatch, tmp_path, capsys):
    def wait(self):
        raise OSError(errno.ENOSPC, "No space left on device", "a file")

    monkeypatch.setattr(QuickTrainer, "bad", (7,))
    monkeypatch.setattr(train_module, "latest_checkpoint", lambda folder: None)
    monkeypatch.setattr(Checkpoints, "wait", wait)
    for name in ("close", "save", "discard_after"):
        monkeypatch.setattr(Checkpoints, name, lambda *_, **__: None)
    assert main(["train", "--data", str(start.corpus), "--out", str(tmp_path / "run"), *TINY]) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 7: the loss is nan" in line
    assert line.endswith("The last checkpoint could not be saved: a file: No space left on device.")


def test_a_model_that_no_device_holds_alone_is_finished_without_a_sample(start, monkeypatch, tmp_path, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(finish_module, "open_run", full)
    assert main(["train", "--data", str(start.corpus), "--out", str(tmp_path / "run"), *TINY]) == 0
    assert "one device has too little memory for the whole model" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").exists()
