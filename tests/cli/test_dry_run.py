"""`attnax train --dry-run`: the figures of a run, of which nothing is made, and what is wrong with its data."""

import gc
import json
import shutil

import jax
import pytest
from tiny_run import READY, TINY, refuse

from attnax.cli import main
from attnax.text import byte_tokenizer
from attnax.training import feasible, make_store, read_corpus


def num_arrays():
    gc.collect()  # those of other tests
    return len(jax.live_arrays())


@pytest.fixture
def plan(monkeypatch, tmp_path, capsys):
    """The lines of a dry run, without the first column; it makes no array, reads no whole text and writes no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("attnax.training.run_data.read_corpus", None)

    def call(*flags):
        before = num_arrays()
        capsys.readouterr()
        assert main(["train", "--dry-run", *map(str, flags)]) == 0
        assert num_arrays() == before and not list(tmp_path.iterdir())
        return [" ".join(line[11:].split()) for line in capsys.readouterr().out.splitlines()]

    return call


def test_the_lines_are_the_figures_of_the_run(plan):
    """300 ids of 16 numbers; q and out 16 x 16, k and v 16 x 8, three matrices of 16 x 24, three norms."""
    count = 300 * 16 + 2 * 256 + 2 * 128 + 3 * 384 + 3 * 16
    lines = plan(*TINY, "--accumulate", 3)
    assert f"{count:,} parameters, float32" in lines and "one device" in lines
    assert "27.1 kB parameters" in lines and "27.1 kB gradients" in lines
    assert "3 x 4 x 32 = 384 tokens" in lines
    pairs = 3 * 4 * 2 * 32 * 33 // 2  # of all heads
    matrices, attention = 6 * 384 * (count - 48) / 1e6, 12 * 8 * pairs / 1e6
    parts = f"{matrices:.4g} MFLOP of matrices, {attention:.4g} MFLOP of attention"
    assert f"{matrices + attention:.4g} MFLOP: {parts}" in lines
    assert any(line.startswith("12 updates, 4,608 tokens") for line in lines)
    assert "with all of --vocab-size; a small text has fewer tokens" in lines


def test_a_layout_needs_no_devices(plan, capsys):
    lines = plan(*TINY, "--batch-size", 64, "--layout", "fsdp=16,tensor=2,data=2", "--peak-flops", "1e12")
    assert "data=2,fsdp=16,tensor=2, 64 devices" in lines
    assert any("if 64 x 1 TFLOP/s were used in full" in line for line in lines)
    assert "tensor must divide num_heads; got tensor=3" in refuse(
        capsys, "train", "--dry-run", *TINY, "--layout", "tensor=3,fsdp=1"
    )


def test_a_run_that_goes_on_has_its_own_options(run, plan):
    lines = plan("--resume", run, "--layout", "fsdp=2")
    assert "fsdp=2, 2 devices" in lines and not any("--vocab-size" in line for line in lines)


def test_a_store_and_a_tokenizer_have_their_number_of_tokens(plan, corpus, capsys, tmp_path_factory):
    store = tmp_path_factory.mktemp("stores") / "store"
    assert main(["tokenize", str(corpus), "--out", str(store), "--tokenizer", "bytes"]) == 0
    count = 257 * 16 + 2 * 256 + 2 * 128 + 3 * 384 + 3 * 16
    for flag in ("--data", "--tokenizer"):
        lines = plan(*READY, flag, store)
        assert lines[0] == f"{count:,} parameters, float32" and not any("--vocab-size" in line for line in lines)
        line = refuse(capsys, "train", "--dry-run", *TINY, flag, store)
        assert "--vocab-size is for" in line and str(store) in line and "Leave it out" in line


def test_the_memory_of_the_machine_stands_beside(plan, monkeypatch):
    monkeypatch.setattr("attnax.cli.dry_run.memory_of_device", lambda: 7e9)
    assert "7.0 GB this machine" in plan(*READY, "--tokenizer", "bytes")
    assert feasible.memory_of_device() > 1e9


PAIR, LABEL = {"source": "a cat", "target": "eine Katze"}, {"text": "good", "label": 1}
WRONG = {
    "nothing": "no such file or folder: ",
    "folder": "no files in ",
    "folder/*": "no files in ",
    "empty.txt": "holds no text: 1 files, all of them empty or binary.",
    "binary": "holds no text: 2 files",
    "short.txt": "do not fill one window of 32",
    "line.txt": "is too small: 1 bytes cannot be split",
    "run": "is a run folder; name the text that it was trained on",
    "short.store": "do not fill one window of 32",
    "cut.store": "is an incomplete store",
    "labels.store": "For a classifier train in Python with attnax.training.classification (docs/guides/training.md). "
    "For a language model of the texts alone make another store of its source with --kind text.",
    "pairs.store": "For an encoder-decoder train in Python with attnax.training.seq2seq (docs/guides/training.md)",
    "labels.jsonl": "make a store with attnax tokenize {}/labels.jsonl --kind text --out STORE.",
    "pairs.jsonl": "For a language model write source and target into one field text.",
    "prompts.jsonl": "must have rows with a field text, from which attnax train makes a language model; got the fields "
    "completion, prompt. ",
    "broken.jsonl": "line 1 must be an object of JSON",
}


@pytest.fixture(scope="module")
def wrong(run, tmp_path_factory):
    """Data that no language model learns from."""
    root = tmp_path_factory.mktemp("wrong")
    for name, row in (("labels", LABEL), ("pairs", PAIR), ("prompts", {"prompt": "a", "completion": "b"})):
        (root / f"{name}.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    for name, content in (("empty", b""), ("short", b"a\n" * 3), ("line", b"a")):
        (root / f"{name}.txt").write_bytes(content)
    (root / "broken.jsonl").write_text("3\n")
    (root / "folder").mkdir()
    (root / "binary").mkdir()
    for name in "ab":
        (root / "binary" / name).write_bytes(b"\0" * 999)
    shutil.copytree(run, root / "run")
    for name in ("short.txt", "labels.jsonl", "pairs.jsonl"):
        make_store(read_corpus(str(root / name)), byte_tokenizer(), (root / name).with_suffix(".store"))
    shutil.copytree(root / "short.store", root / "cut.store")
    (root / "cut.store" / "store.json").unlink()
    return root


@pytest.mark.parametrize("name", WRONG)
def test_data_that_train_refuses_is_refused_in_the_same_words(wrong, tmp_path, capsys, name):
    arguments = ["train", "--data", wrong / name, "--out", tmp_path / "run", *READY]
    line = refuse(capsys, *arguments, "--dry-run")
    assert WRONG[name].format(wrong) in line and ("window" in line or str(wrong) in line)
    assert line == refuse(capsys, *arguments) and not (tmp_path / "run").exists()


def test_of_a_text_the_beginning_is_read(plan, corpus, monkeypatch):
    monkeypatch.setattr("attnax.text.published_tokenizer.train_bpe", None)
    opened, plain = [], type(corpus).open
    monkeypatch.setattr(
        type(corpus), "open", lambda path, *mode, **options: opened.append(path) or plain(path, *mode, **options)
    )
    plan(*TINY, "--data", corpus)
    assert [path for path in opened if path.suffix == ".py" and path.parent == corpus] == [min(corpus.iterdir())]
