"""`attnax tokenize`: from text to a store, with or without a stop, and a run that learns from it."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from tiny_run import READY, refuse

from attnax.cli import main, progress
from attnax.cli import tokenize as command
from attnax.errors import install_command
from attnax.text import byte_tokenizer
from attnax.training import RunFolder, RunOptions, open_store, read_corpus, store_writer
from attnax.training.run_data import choose_data


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def make(corpus, tmp_path):
    def call(name, *flags):
        return main(["tokenize", str(corpus), "--out", str(tmp_path / name), "--tokenizer", "bytes", *flags])

    return call


def test_the_command_says_what_it_made(make, tmp_path, capsys):
    assert make("store") == 0
    printed, store = capsys.readouterr().out, open_store(tmp_path / "store")
    assert (
        f"{store.num_documents():,} documents" in printed and f"{store.num_tokens():,} tokens to learn from" in printed
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir() if path.name != ".lock"}
    assert make("store") == 0  # it is complete
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_tokenizer_may_be_learned_or_of_a_run(corpus, run, tmp_path):
    flags = ["tokenize", str(corpus), "--out"]
    assert main([*flags, str(tmp_path / "bpe"), "--vocab-size", "300"]) == 0
    assert main([*flags, str(tmp_path / "run"), "--tokenizer", str(run)]) == 0
    assert files_of(tmp_path / "bpe") == files_of(tmp_path / "run")  # the run has learned on the same text
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_ctrl_c_and_the_same_command_again_make_the_same_store(make, tmp_path, capsys, monkeypatch):
    assert make("whole", "--shard-tokens", "2000") == 0
    finish, count = store_writer._Shard.finish, []

    def interrupt(shard):
        count.append(shard)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return finish(shard)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer._Shard, "finish", interrupt)
        assert make("store", "--shard-tokens", "2000") == 130
    assert "the same command goes on after the last finished shard" in capsys.readouterr().out
    line = refuse(capsys, "train", "--data", tmp_path / "store", "--out", tmp_path / "run", *READY)
    assert (
        "is an incomplete store: it has no store.json, since its process was stopped" in line
        and not (tmp_path / "run").exists()
    )
    assert make("store", "--shard-tokens", "2000") == 0
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


class Bar:
    """Like tqdm; the lines that were begun, with what they counted."""

    begun: ClassVar = []

    def __init__(self, *, total, desc, disable, **_):
        self.line = [desc, total, disable, 0]
        self.begun.append(self.line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, size):
        self.line[-1] += size


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("name", ["tokenize", "train"])
def test_each_pass_over_the_text_is_shown_at_a_terminal_and_is_a_sign_of_life(
    corpus, tmp_path, monkeypatch, name, is_terminal
):
    beats = []
    monkeypatch.setattr(Bar, "begun", [])
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(progress, "beat", lambda: beats.append(1))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    if name == "tokenize":
        assert main(["tokenize", str(corpus), "--out", str(tmp_path / "store"), "--vocab-size", "300"]) == 0
    else:
        options = RunOptions(data=str(corpus), model=dataclasses.replace(RunOptions.model, vocab_size=300))
        data = choose_data(options, progress.counting)
        data.open(RunFolder(tmp_path), progress.counting)
    text = read_corpus(str(corpus))
    whole, hidden = text.num_bytes, not is_terminal
    assert Bar.begun == [
        ["reading", None, hidden, whole],
        ["learning", None, hidden, text.train.num_bytes],
        ["tokens", whole, hidden, whole],
    ]
    assert len(beats) == 1 + 60 + len(text.train) + 60  # and what was made before counts at once


def test_rows_say_their_classes(tmp_path, capsys):
    rows = [{"text": f"text {index}", "label": ["good", "bad"][index % 2]} for index in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["tokenize", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes"]
    assert main([*flags, "--out", str(tmp_path / "labels")]) == 0
    assert "classes    bad, good" in capsys.readouterr().out
    assert main([*flags, "--out", str(tmp_path / "text"), "--kind", "text"]) == 0
    assert open_store(tmp_path / "text").kind == "text"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{corpus}"], "out"),
        (["", "--out", "x"], "SOURCE must not be empty"),
        (["{corpus}", "--out", ""], "--out must not be empty"),
        (["{corpus}", "--out", "x", "--tokenizer", ""], "--tokenizer must not be empty"),
        (["{corpus}", "--out", "x", "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (
            ["{corpus}", "--out", "x", "--tokenizer", "bytes", "--vocab-size", "9"],
            "--vocab-size is for --tokenizer bpe",
        ),
        (["{corpus}", "--out", "x", "--vocab-size", "9"], "257 to 65536 ids; got --vocab-size 9"),
        (["{corpus}", "--out", "x", "--held-out", "1"], "--held-out must be above 0 and below 1"),
        (["{corpus}", "--out", "x", "--shard-tokens", "0"], "--shard-tokens must be at least 1"),
        (["{corpus}/nothing", "--out", "x"], "no such file or folder"),
        (["{run}", "--out", "x"], "is a run folder; name the text"),
    ],
)
def test_wrong_input_is_a_line(capsys, corpus, run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refuse(capsys, "tokenize", *(flag.format(corpus=corpus, run=run) for flag in flags))
    assert not Path("x").exists()


def test_a_missing_package_is_named_with_its_extra(capsys, tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(command, "read_corpus", missing)
    line = refuse(capsys, "tokenize", tmp_path, "--out", tmp_path / "x")
    assert f"pyarrow. Install it with: {install_command('parquet')}" in line


@pytest.mark.contract
def test_a_run_on_a_store_is_the_run_on_its_text(corpus, run, tmp_path):
    """The store is made with the tokenizer of the run, so that both see the same tokens in the same order."""
    assert main(["tokenize", str(corpus), "--out", str(tmp_path / "store"), "--tokenizer", str(run)]) == 0
    assert main(["train", "--data", str(tmp_path / "store"), "--out", str(tmp_path / "run"), *READY]) == 0
    results = [json.loads((path / "result.json").read_text()) for path in (run, tmp_path / "run")]
    assert results[0] == results[1]
    assert not (tmp_path / "run" / "data").exists() and (run / "data" / "store.json").exists()


@pytest.mark.contract
def test_a_run_with_a_published_tokenizer_writes(corpus, published, tmp_path, write):
    out = tmp_path / "run"
    flags = ["--out", str(out), "--tokenizer", str(published), *READY, "--steps", "1", "--pack"]
    assert main(["train", "--data", str(corpus), *flags]) == 0
    assert json.loads((out / "result.json").read_text())["held_out_bits_per_byte"] > 0
    assert open_store(out / "data").tokenizer.to_json() != byte_tokenizer().to_json()
    assert write(out, "--prompt", "def ", "--max-new-tokens", 3).startswith("def ")
