"""`attnax train --layout`: a run is the same on any layout, and a layout that does not fit is refused in words."""

import json
import os
import signal
from pathlib import Path

import pytest
from tiny_run import TINY, refuse

from attnax.cli import main
from attnax.cli.options import Train
from attnax.training import RunFolder


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a command that Ctrl-C interrupts in update number `last`, while the row of the one before is written."""
    append = RunFolder.append_metrics

    def call(last, *arguments):
        def interrupt(self, **row):
            append(self, **row)
            if row["step"] == last - 1:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "append_metrics", interrupt)
            assert main([str(argument) for argument in arguments]) == 130

    return call


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_run_goes_on_on_another_layout_with_the_losses_of_one_device(run, corpus, tmp_path, capsys, interrupted):
    out = tmp_path / "run"
    interrupted(2, "train", "--data", corpus, "--out", out, *TINY, "--layout", "fsdp=4,tensor=2")
    printed = capsys.readouterr().out
    assert "layout     fsdp=4,tensor=2, 8 devices" in printed
    assert f"attnax train --resume {out} --layout fsdp=4,tensor=2" in printed
    before = (out / "config.json").read_bytes()
    interrupted(4, "train", "--resume", out, "--layout", "data=4,tensor=2")
    rows, whole = rows_of(out), rows_of(run)[:4]
    assert [row.get("layout") for row in rows] == [*["fsdp=4,tensor=2"] * 2, *["data=4,tensor=2"] * 2]
    for name, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole], rel=rel), name
    assert (out / "config.json").read_bytes() == before
    assert "layout" not in json.loads(before)["options"] and "layout" not in whole[0]
    assert main(["generate", str(out), "--prompt", "def ", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("def ")


def test_layouts_that_do_not_fit_are_refused_before_the_text_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("attnax.cli.train.choose_data", None)

    def why(layout, *flags):
        return refuse(capsys, "train", "--out", tmp_path / "run", *TINY, "--layout", layout, *flags)

    devices = why("fsdp=3,tensor=3")
    assert "--layout: fsdp=3,tensor=3 needs 9 devices; got 8 devices." in devices
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=9 in the environment" in devices
    assert "tensor must divide num_heads; got tensor=4, num_heads=2." in why("fsdp=2,tensor=4")
    assert "data * fsdp * expert must divide the batch; got 8 of data=8 and batch_size=4." in why("data")
    assert "got 'tensor' in 'fsdp=4,tensor'" in why("fsdp=4,tensor")
    assert not (tmp_path / "run").exists()


def test_a_layout_is_no_flag_of_the_run_itself():
    Train(resume=Path("run"), layout="fsdp=4,tensor=2").check()
