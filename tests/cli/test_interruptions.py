"""Runs that are stopped at any place: the checkpoint is kept, and the next command names the next step."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from quick_trainer import QuickTrainer, quick_training
from tiny_run import TINY, refuse

from attnax.cli import finish as finish_module
from attnax.cli import main, terminal
from attnax.cli import progress as progress_module
from attnax.cli.stopwatch import TIMED
from attnax.training import RunFolder, checkpoints, manifest, restore, run_folder
from attnax.training.checkpoints import checkpoint_steps


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_training(monkeypatch)


@pytest.fixture
def start(corpus, tmp_path):
    """Trains with these flags, in a folder of this name."""

    def call(name, *flags):
        return main(["train", "--data", str(corpus), "--out", str(tmp_path / name), *TINY, *flags])

    return call


class Killed(BaseException):
    """Like kill -9: no code of the command runs after it."""


def kill_at(monkeypatch, place, name, count=1):
    """The process dies when a function is called for the `count`-th time."""
    original, calls = getattr(place, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, call)


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def check_same(folder, whole):
    assert rows(folder) == rows(whole)
    assert (folder / "result.json").read_text() == (whole / "result.json").read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        *("10", "10.attnax.json"),
        *("12", "12.attnax.json"),
    ]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


PLACES = {
    "in the first update": (QuickTrainer, "step", 1),
    "in an update": (QuickTrainer, "step", 8),
    "before the look at held-out text": (QuickTrainer, "bits", 2),
    "between that and the checkpoint": (checkpoints.Checkpoints, "save", 2),
    "while old checkpoints are deleted": (checkpoints.shutil, "rmtree", 1),
    "before the picture": (finish_module, "plot_training", 1),
    "before the text": (finish_module, "write_text", 1),
    "before the result": (finish_module, "write_durable", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(start, tmp_path, monkeypatch, capsys, place):
    assert start("whole") == 0
    with monkeypatch.context() as patch:
        kill_at(patch, *PLACES[place])
        with pytest.raises(Killed):
            start("run")
    assert not (tmp_path / "run" / "result.json").exists()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    check_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_a_success_and_says_what_comes_next(start, tmp_path, capsys):
    """A launcher that was stopped after the last save starts the command again."""
    assert start("run") == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    command = f"{terminal.command_name()} generate {tmp_path / 'run'}"
    assert capsys.readouterr().out == f"{tmp_path / 'run'} is finished; write with it:  {command}\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    line = refuse(capsys, "train", "--resume", tmp_path / "run", "--step", 10)
    assert "is finished, and --step goes back in a run that is not" in line


def test_a_run_that_is_there_is_not_started_again_and_the_next_step_is_said(start, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        kill_at(patch, QuickTrainer, "step", 7)
        with pytest.raises(Killed):
            start("run")
    flags = ("train", "--data", tmp_path, "--out", tmp_path / "run", *TINY)
    line = refuse(capsys, *flags)
    assert "run exists already and is a run that is not finished; nothing was overwritten. Go on with it by" in line
    assert f"by --resume {tmp_path / 'run'} in place of --out" in line
    loaded, load = [], RunFolder.load
    monkeypatch.setattr(RunFolder, "load", lambda run: loaded.append(run.path) or load(run))
    monkeypatch.setattr(finish_module, "open_run", lambda path: None)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert loaded == [tmp_path / "run"]
    line = refuse(capsys, *flags)
    assert line.endswith("run exists already and is a finished run; nothing was overwritten. Name another --out.")


@pytest.mark.parametrize("place", ["_save", "write_durable"])
def test_a_run_that_was_killed_before_it_began_is_started_again_as_before(start, tmp_path, monkeypatch, capsys, place):
    with monkeypatch.context() as patch:
        kill_at(patch, RunFolder if place == "_save" else run_folder, place)
        with pytest.raises(Killed):
            start("run")
    line = refuse(capsys, "train", "--resume", tmp_path / "run")
    assert "holds no run yet: its process was stopped before it began. Start it again as before." in line
    assert start("run") == 0 and start("whole") == 0
    check_same(tmp_path / "run", tmp_path / "whole")


class TestDivergence:
    @pytest.mark.parametrize("bad", [1, 7])
    def test_it_stops_at_its_step_and_keeps_the_last_checkpoint(self, start, tmp_path, monkeypatch, capsys, bad):
        monkeypatch.setattr(QuickTrainer, "bad", (bad,))
        assert start("run") == 3
        line = capsys.readouterr().err.strip().splitlines()[-1]
        kept = "The checkpoint of step 5 is kept." if bad > 5 else "No checkpoint was saved yet."
        assert f"attnax: step {bad}: the loss is nan, and the update was not made. In a new run, try a smaller" in line
        assert kept in line and f"--resume {tmp_path / 'run'} --max-skipped N" in line and "float16" not in line
        assert checkpoint_steps(tmp_path / "run" / "checkpoints") == ([5] if bad > 5 else [])
        assert main(["train", "--resume", str(tmp_path / "run"), "--max-skipped", "1"]) == 0
        assert all(row.get("loss", 0) is not None or row["skipped"] for row in rows(tmp_path / "run"))
        assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
        assert [row["skipped"] for row in rows(tmp_path / "run") if "skipped" in row] == [1] * (13 - bad)

    def test_updates_are_skipped_up_to_a_number_and_counted(self, start, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(QuickTrainer, "bad", (3, 4, 8))
        assert start("run", "--max-skipped", "2") == 3
        assert "step 8: the loss is nan, and of 2 to skip none is left." in capsys.readouterr().err
        assert main(["train", "--resume", str(tmp_path / "run"), "--max-skipped", "0"]) == 3
        assert "step 8: the loss is nan, and the update was not made." in capsys.readouterr().err
        assert start("other", "--max-skipped", "3") == 0
        made = [row for row in rows(tmp_path / "other") if "loss" in row]
        assert [row.get("skipped", 0) for row in made] == [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3]
        assert start("whole") == 3
        rates = [row["learning_rate"] for row in made]
        assert rates[2] == rates[3] == rates[4] and len(set(rates)) == 12 - 3  # of the updates that were made

    @pytest.mark.parametrize("field", ["bad_bits", "overflow"])
    def test_no_checkpoint_is_saved_of_weights_that_are_not_finite(self, start, tmp_path, monkeypatch, capsys, field):
        monkeypatch.setattr(QuickTrainer, field, (5,))
        assert start("run", "--param-dtype", "float16") == 3
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert ("held-out text is nan" if field == "bad_bits" else "parameters that are not finite") in line
        assert "bfloat16 or float32 in place of float16" in line
        assert (
            not checkpoint_steps(tmp_path / "run" / "checkpoints") and not (tmp_path / "run" / "result.json").exists()
        )


ROW = '{"step": 1, "tokens": 2}\n'


class TestDamage:
    @pytest.fixture
    def stopped(self, start, tmp_path, monkeypatch):
        """A run that has the checkpoints of steps 5 and 10."""
        with monkeypatch.context() as patch:
            kill_at(patch, QuickTrainer, "step", 12)
            with pytest.raises(Killed):
                start("run")
        return tmp_path / "run"

    @staticmethod
    def damage(run, step):
        path = next(path for path in (run / "checkpoints" / str(step) / "params").rglob("d/*") if path.is_file())
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    def test_a_damaged_checkpoint_is_said_and_the_older_one_is_taken(self, start, stopped, tmp_path, capsys):
        self.damage(stopped, 10)
        line = refuse(capsys, "train", "--resume", stopped, "--step", 10)
        assert "is damaged" in line and "That of step 5 is whole. Go on from it with: " in line
        assert line.endswith(f"train --resume {stopped} --step 5")
        assert main(["train", "--resume", str(stopped)]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnax: ")]
        assert len(lines) == 1 and "10 is damaged: " in lines[0] and lines[0].endswith("That of step 5 is taken.")
        assert start("whole") == 0
        check_same(stopped, tmp_path / "whole")

    @pytest.mark.parametrize(("name", "at"), [("_hash", None), ("_hash", 10), ("read_items", None)])
    def test_a_checkpoint_that_the_disk_fails_to_read_is_said_with_an_older_one(
        self, stopped, monkeypatch, capsys, name, at
    ):
        failed = OSError(errno.EIO, os.strerror(errno.EIO), str(stopped / "checkpoints"))
        original = manifest._hash

        def fails(path):
            if path.relative_to(stopped / "checkpoints").parts[0] == "10":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return original(path)

        with monkeypatch.context() as patch:
            patch.setattr(manifest, "_hash", fails)
            if name == "read_items":  # which does not say the file
                patch.setattr(manifest, "_hash", original)
                patch.setattr(restore, "read_items", raising(failed))
            flags, go_on = (() if at is None else ("--step", str(at))), f"train --resume {stopped}"
            assert main(["train", "--resume", str(stopped), *flags]) == 1  # a launcher tries again
            line = capsys.readouterr().err.strip()
            older = (
                f": Input/output error; an older checkpoint goes on with: {terminal.command_name()} {go_on} --step 5. "
            )
            assert line.endswith(f"{older}Mend it, then go on with: {terminal.command_name()} {go_on}")
            if name == "_hash":
                assert line.startswith(f"attnax: {stopped / 'checkpoints' / '10'}")
                shutil.rmtree(stopped / "checkpoints" / "5")
                (stopped / "checkpoints" / "5.attnax.json").unlink()
                assert main(["train", "--resume", str(stopped)]) == 1
                assert ": Input/output error. Mend it, then go on with: " in capsys.readouterr().err
        assert main(["train", "--resume", str(stopped)]) == 0

    def test_a_run_without_a_whole_checkpoint_is_started_anew(self, stopped, capsys):
        for step in (5, 10):
            self.damage(stopped, step)
        assert refuse(capsys, "train", "--resume", stopped).endswith("None is whole. Start a new run.")

    def test_a_later_checkpoint_that_was_given_up_does_not_come_back(self, start, stopped, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            kill_at(patch, QuickTrainer, "step", 3)
            with pytest.raises(Killed):
                main(["train", "--resume", str(stopped), "--step", "5"])
        assert checkpoint_steps(stopped / "checkpoints") == [5]
        assert main(["train", "--resume", str(stopped)]) == 0
        assert start("whole") == 0
        check_same(stopped, tmp_path / "whole")

    def test_steps_that_have_no_checkpoint_are_refused(self, stopped, capsys):
        line = refuse(capsys, "train", "--resume", stopped, "--step", 7)
        assert "step must be one of 5, 10; got step=7." in line
        assert "--step needs --resume" in refuse(capsys, "train", "--step", 7)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, None),
            ("", None),
            ('{"step": 1, "tokens": 2}\n{"step": 2, "to', None),
            ('{"step": 1, "tokens": 2}\n\0\0\0\0\n', None),  # a power cut may leave it so
            ("nonsense\n" + ROW, r"metrics.jsonl is damaged: line 1 has no step and tokens. Delete the line, or"),
            ("[3]\n" + ROW, "line 1 has no step and tokens"),
            (ROW + '{"loss": 2}\n' + ROW, "line 2 has no step and tokens"),
            ("\ud800\n" + ROW, "line 1"),
        ],
    )
    def test_metrics_that_are_missing_or_cut(self, stopped, capsys, text, words):
        path = stopped / "metrics.jsonl"
        path.unlink() if text is None else path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if words is not None:
            assert re.search(words, refuse(capsys, "train", "--resume", stopped))
            return
        assert main(["train", "--resume", str(stopped)]) == 0
        assert [row["step"] for row in rows(stopped) if "loss" in row] == [11, 12]
        assert ("has no rows any more; they begin after step 10" in capsys.readouterr().out) == (not text)

    def test_a_run_without_losses_has_no_picture(self, start, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            kill_at(patch, finish_module, "write_text")
            with pytest.raises(Killed):
                start("run")
        (tmp_path / "run" / "metrics.jsonl").unlink()
        (tmp_path / "run" / "loss.png").unlink()
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0
        assert not (tmp_path / "run" / "loss.png").exists() and (tmp_path / "run" / "sample.txt").exists()

    def test_a_newer_version_is_named(self, stopped, capsys):
        path = stopped / "config.json"
        config = json.loads(path.read_text())

        def save(**fields):
            made = {name: value for name, value in (config | fields).items() if name != "sha256"}
            path.write_text(json.dumps(made | {"sha256": run_folder._digest(made)}))
            return refuse(capsys, "train", "--resume", stopped)

        options = config["options"]
        assert config["attnax"] == run_folder.__version__
        line = save(attnax="9.1", options=options | {"model": options["model"] | {"x1": 1, "x2": 2, "x3": 3, "x4": 4}})
        assert "was written by attnax 9.1, and this is" in line and "it has options x1, x2, x3 and 1 more" in line
        assert "its format is 'attnax run 4'" in save(attnax="9.1", format="attnax run 4")
        assert "written by another version of attnax" in save(options=options | {"later": 1})
        assert "not written by attnax train" in save(format="something else")


def test_a_full_disk_is_one_line_and_loses_nothing(start, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3))
        assert start("run") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"attnax: {tmp_path / 'run' / 'checkpoints'}: No space left on device: a checkpoint takes")
    assert f"Mend it, then go on with: {terminal.command_name()} train --resume {tmp_path / 'run'}" in line
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", only_rows(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), json.dumps))
        assert start("other") == 1
    assert f"attnax: {tmp_path / 'other'}/metrics.jsonl: No space left on device" in capsys.readouterr().err


def test_a_disk_that_fails_while_training_goes_on_is_one_line_and_loses_nothing(start, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the manifest")
        patch.setattr(manifest, "write_durable", raising(full))
        assert start("run") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("attnax: the manifest: No space left on device. Mend it, then go on with: ")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0 and start("whole") == 0
    check_same(tmp_path / "run", tmp_path / "whole")


def only_rows(instead, original):
    """A function in place of `json.dumps`, which gets rows of metrics while their file is open."""
    return lambda value, **options: instead() if "grad_norm" in value else original(value, **options)


def raising(error):
    def call(*arguments, **options):
        raise error

    return call


def test_one_process_trains_in_a_folder_and_the_other_is_told_whose_it_is(start, tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, QuickTrainer, "step", 7)
        with pytest.raises(Killed):
            start("run")
    code = (
        "import sys; from pathlib import Path; from attnax.training import RunFolder\n"
        f"with RunFolder(Path({str(run.path)!r})).locked(): print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.read(1) == b"1"
        line = refuse(capsys, "train", "--resume", run.path)
        assert f"{run.path} is being trained by process {other.pid} on " in line
        other.kill()  # a dead process holds no lock
    assert main(["train", "--resume", str(run.path)]) == 0


def test_the_command_is_named_as_it_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert terminal.command_name() == f"{sys.executable} -m attnax"
    script = tmp_path / ".venv" / "bin" / "attnax"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    assert terminal.command_name() == ".venv/bin/attnax"
    monkeypatch.setenv("PATH", str(script.parent))
    assert terminal.command_name() == "attnax"


def test_the_rate_of_the_progress_line_is_without_the_first_step(start, monkeypatch):
    """The first step compiles. The looks at held-out text do not count either."""
    made, bits = [], QuickTrainer.bits
    monkeypatch.setattr(QuickTrainer, "bits", lambda *arguments: time.sleep(0.2) or bits(*arguments))
    original = progress_module.tqdm

    def progress(**options):
        made.append((original(**options), time.time()))
        return made[-1][0]

    monkeypatch.setattr(progress_module, "tqdm", progress)
    assert start("run") == 0
    *_, (bar, begun) = made  # the others are of passes over the text
    assert bar.initial == bar.total / 12 and bar.n == bar.total and bar.start_t - begun > 0.5  # three looks


def test_a_persons_folder_is_not_overwritten(start, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenizer.json").write_text('{"mine": 1}')
    assert start("mine") == 2 and "exists already; nothing was overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine" / "tokenizer.json").read_text() == '{"mine": 1}'


def test_skipped_updates_are_said_at_the_end(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(QuickTrainer, "bad", (3, 4))
    assert start("run", "--max-skipped", "2") == 0
    assert "\n2 updates were left out: they were not finite\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_updates"] == 2


def test_only_what_can_be_skipped_is_offered(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(QuickTrainer, "overflow", (5,))
    assert start("run") == 3 and "--max-skipped" not in capsys.readouterr().err
    assert rows(tmp_path / "run")[-1]["step"] == 5  # the metrics have the step that failed
