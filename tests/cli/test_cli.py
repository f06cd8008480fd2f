"""The `attnax` command, the whole way on a tiny corpus, and every wrong input in one line."""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build
from tiny_run import TINY, refuse

from attnax import Sampler, TransformerConfig, TransformerLM, cli
from attnax.cli import main
from attnax.cli.generate import _check_model as check_model
from attnax.cli.generate import _read_prompt as read_prompt
from attnax.cli.options import Generate
from attnax.errors import InputError
from attnax.generation import Beams, Generation
from attnax.text import DOCUMENT, ByteCodec, TextModel, TextStream, byte_tokenizer
from attnax.training import RunFolder, open_run, read_corpus
from attnax.training.run_model import _abstract as abstract


def load_model(run):
    """The model of a run, and its tokenizer."""
    text = open_run(run)
    return text.model, text.codec.tokenizer


def test_a_run_leaves_everything_that_it_promises(trained):
    out, printed = trained
    last = printed.strip().splitlines()[-1]
    match = re.fullmatch(r"held-out (\d+\.\d\d) bits per byte \(gzip -9: (\d\.\d\d), xz -9: (\d\.\d\d)\)", last)
    result = json.loads((out / "result.json").read_text())
    assert match and float(match[1]) == pytest.approx(result["held_out_bits_per_byte"], abs=0.005)
    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "sample.txt", "checkpoints"):
        assert (out / name).exists(), name
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "held_out_bits_per_byte" in row] == [5, 10, 12]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(300), abs=0.7) and losses[-1] < losses[0] - 0.5


def test_the_compressors_see_the_same_held_out_bytes(run, corpus):
    text = b"".join(document.text for document in read_corpus(str(corpus)).held_out)
    result = json.loads((run / "result.json").read_text())
    gzip = subprocess.run(["gzip", "-9", "-n"], input=text, capture_output=True, check=True).stdout
    assert result["held_out_bytes"] == len(text)
    assert result["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip) / len(text), rel=0.01)


def test_runs_are_numbered(run, corpus, tmp_path, monkeypatch):
    """From what a process left that was killed before its run began; a person's tokenizer is no such thing."""
    parts = RunFolder(run).load()[0], read_corpus(str(corpus)), byte_tokenizer()
    monkeypatch.chdir(tmp_path)
    for number, names in enumerate((["config.json"], [".lock", "tokenizer.json"], ["tokenizer.json"])):
        (tmp_path / "runs" / f"{number:03d}").mkdir(parents=True)
        for name in names:
            (tmp_path / "runs" / f"{number:03d}" / name).write_text("cut")
    (tmp_path / "runs" / "003").mkdir()
    with RunFolder(tmp_path / "runs" / "003").locked():
        assert [RunFolder.create(None, *parts).path.name for _ in range(2)] == ["001", "004"]
    assert RunFolder(tmp_path / "runs" / "001").load()[0] == parts[0]


def test_flags_become_the_trainer(capsys, corpus, tmp_path, monkeypatch):
    made = []

    def trainer(model, optimizer, seed, document_token):
        made.append((model, optimizer, seed, document_token))
        raise InputError("no training today")

    monkeypatch.setattr("attnax.cli.train.Trainer", trainer)
    for flags in (["--seed", "7"], ["--tokenizer", "bytes", "--pack"]):
        assert "no training" in refuse(capsys, "train", "--data", corpus, "--out", tmp_path / "run", *TINY, *flags)
    (model, optimizer, seed, document_token), packed = made
    assert (model.d_model, model.num_kv_heads, model.max_len, model.pos_emb_type) == (16, 1, 32, "rope")
    assert (optimizer.steps, optimizer.batch_size, optimizer.learning_rate) == (12, 4, 0.03)
    assert 257 < model.vocab_size <= 300 and (seed, document_token) == (7, None)
    assert packed[0].vocab_size == 257 and packed[2:] == (0, DOCUMENT)
    assert not (tmp_path / "run").exists()


@pytest.mark.contract
def test_a_run_of_packed_bytes_that_was_given_no_folder_takes_the_next(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "000" / "of another").mkdir(parents=True)
    assert main(["train", "--data", str(corpus), *TINY, "--steps", "1", "--tokenizer", "bytes", "--pack"]) == 0
    config = json.loads((tmp_path / "runs" / "001" / "config.json").read_text())
    assert config["options"]["model"]["vocab_size"] == 257 and (tmp_path / "runs" / "001" / "result.json").exists()


@pytest.fixture
def write(run, capsys):
    """What `attnax generate` prints after a prompt."""

    def call(*options):
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", *map(str, options)]) == 0
        return capsys.readouterr().out

    return call


GREEDY = ("--temperature", "0")
SAMPLED = ("--temperature", "1.5", "--seed", "4")


@pytest.fixture
def written(run, monkeypatch):
    """Three texts of three, one and two tokens, which the model is said to write; also the options that it got."""
    _, tokenizer = load_model(run)
    texts = ["?!%", "&", "$:"]
    tokens, lengths, seen = np.zeros((3, 9), np.int32), np.array([3, 1, 2], np.int32), []
    for row, text, length in zip(tokens, texts, lengths, strict=True):
        row[:length] = tokenizer.encode(text.encode())

    def generate(self, ids, **options):
        seen.append(options)
        rows = slice(options["num_samples"])
        return Generation(*map(jnp.asarray, (tokens[rows], lengths[rows], np.zeros((3, 9), "f")[rows], lengths[rows])))

    def beam_search(self, ids, **options):
        seen.append(options)
        rows = slice(options["num_beams"])
        return Beams(*map(jnp.asarray, (tokens[None, rows], lengths[None, rows], np.zeros((1, 3), "f")[:, rows])))

    monkeypatch.setattr(TransformerLM, "generate", generate)
    monkeypatch.setattr(TransformerLM, "beam_search", beam_search)
    monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: iter(tokens[0, :3, None]))
    return texts, tokens, seen


def test_generate_streams_a_text(run, capsys):
    """Without a prompt, as at the end of the training, whose compiled programs so serve again."""

    def text(*options):
        capsys.readouterr()
        assert main(["generate", str(run), *options]) == 0
        return capsys.readouterr().out

    assert text() == (run / "sample.txt").read_text() + "\n" != "\n"
    assert text(*GREEDY) == text(*GREEDY, "--seed", "5") != text()
    seeds = [text("--seed", str(seed), "--temperature", "2") for seed in (1, 1, 2, 3)]
    assert seeds[0] == seeds[1] and len(set(seeds)) > 1


@pytest.mark.contract
def test_generate_goes_on_with_the_prompt(write):
    greedy = write(*GREEDY)
    assert greedy.startswith("def nu") and len(greedy) > 8 and greedy == write(*GREEDY, "--seed", "5")


@pytest.mark.contract
def test_cuts_to_one_token_are_greedy(write):
    assert write("--top-k", "1", "--seed", "3") == write(*GREEDY) == write("--top-p", "0.000001", "--seed", "4")


def test_flags_become_the_sampler_and_the_cache(write, monkeypatch):
    seen = []
    monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: seen.append(options) or iter(()))
    flags = (
        "--min-p 0.125 --repetition-penalty 1.25 --presence-penalty 0.5 --frequency-penalty -0.25 --no-repeat-ngram 3"
    )
    write(*flags.split(), "--cache", "paged", "--cache-dtype", "int8", "--stop", "\n\n", "--stop", "x")
    (options,) = seen
    sampler = options["sampler"]
    numbers = (sampler.min_p, sampler.repetition_penalty, sampler.presence_penalty, sampler.frequency_penalty)
    assert [float(number) for number in numbers] == [0.125, 1.25, 0.5, -0.25] and sampler.no_repeat_ngram == 3
    assert (float(sampler.temperature), float(sampler.top_p), sampler.top_k) == (
        pytest.approx(0.8),
        pytest.approx(0.95),
        None,
    )
    assert (options["cache"], options["cache_dtype"], options["max_new_tokens"]) == ("paged", "int8", 9)
    assert len(options["stop_sequences"]) == 2 and options["end_token"] == [0]


@pytest.mark.contract
def test_no_token_stands_twice_where_no_ngram_of_one_may(run, write):
    _, tokenizer = load_model(run)
    ids = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStream, "feed", lambda self, token: ids.append(token) or "")
        write(*GREEDY, "--no-repeat-ngram", 1)
    ids += tokenizer.encode(b"def nu").tolist()
    assert len(set(ids)) == len(ids) > 9


def test_text_arrives_piece_by_piece(run, monkeypatch):
    """Each token's characters are written and flushed before the next token is drawn."""
    _, tokenizer = load_model(run)
    ids = [token for part in ("a", "\u00e9", "st", "op!", "sto", "p", "z") for token in tokenizer.encode(part.encode())]
    shown, arrived = io.StringIO(), []

    class Output(io.StringIO):
        def flush(self):
            shown.seek(0), shown.write(self.getvalue())

    def stream(self, prompt_ids, **options):
        for token in ids:
            arrived.append(shown.getvalue())
            yield np.array([token])

    monkeypatch.setattr(TransformerLM, "stream", stream)
    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["generate", str(run), "--prompt", "x", "--stop", "stop?", "--stop", "stopz"]) == 0
    assert sys.stdout.getvalue() == "xa\u00e9stop!\n"
    assert arrived[1:4] == ["xa", "xa", "xa\u00e9"]  # a character of two bytes comes when it is whole
    assert "xa\u00e9stop!" in arrived  # no stop any more, so that it was shown
    assert not any("!s" in text or "z" in text for text in arrived)  # what may become a stop was held back


@pytest.mark.contract
def test_whole_and_streamed_texts_are_the_same(write):
    for options in (GREEDY, SAMPLED):
        assert write(*options) == write(*options, "--stream") == write(*options, "--no-stream")


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
def test_a_stop_string_cuts_the_text(write, written, mode):
    assert write(mode) == "def nu?!%\n"
    assert write(mode, "--stop", "!%", "--stop", "not there") == "def nu?\n"


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
def test_stop_strings_end_the_text(write, mode):
    prompt = "    return"
    text = write(*GREEDY, "--prompt", prompt).removeprefix(prompt)
    stop = text[len(text) // 2 :][:4]
    assert stop.isascii()  # the model has learned so much
    out = write(*GREEDY, "--prompt", prompt, mode, "--stop", stop, "--stop", "not there")
    assert out == prompt + text[: text.index(stop)] + "\n"


def test_samples_stand_under_their_numbers(write, written):
    texts, _, seen = written
    out = write(*SAMPLED, "--num-samples", 3)
    assert out == "".join(f"--- {number} ---\ndef nu{text}\n" for number, text in enumerate(texts, 1))
    assert seen[0]["num_samples"] == 3 and float(seen[0]["sampler"].temperature) == 1.5
    assert (jax.random.key_data(seen[0]["key"]) == np.array([0, 4])).all()


@pytest.mark.contract
def test_samples_differ_and_the_first_is_that_of_its_seed(write):
    parts = re.split(r"--- (\d) ---\n", write(*SAMPLED, "--num-samples", 3))
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3"]
    texts = parts[2::2]
    assert len(set(texts)) == 3 and all(text.startswith("def nu") for text in texts)
    assert texts[0] == write(*SAMPLED)


def test_beams_print_the_best(write, written):
    texts, _, seen = written
    options = ("--beams", 3, "--length-penalty", 0.5)
    assert write(*options) == f"def nu{texts[0]}\n"
    assert write(*options, *GREEDY, "--num-samples", 2) == "".join(
        f"--- {number} ---\ndef nu{text}\n" for number, text in enumerate(texts[:2], 1)
    )
    for asked in seen:
        assert (asked["num_beams"], asked["length_penalty"], asked["max_new_tokens"]) == (3, 0.5, 9)
        assert asked["sampler"].temperature in (None, 0) and asked["end_token"] == [0]


@pytest.mark.contract
def test_beams_are_those_of_the_search(run, write):
    model, tokenizer = load_model(run)
    ids = jnp.asarray([[0, *tokenizer.encode(b"def nu").tolist()]])
    found = model.beam_search(ids, num_beams=3, max_new_tokens=9, length_penalty=0.5, end_token=0)
    best, second = (
        tokenizer.decode(row[:length]).decode("utf-8", "replace")
        for row, length in zip(found.tokens[0, :2].tolist(), found.lengths[0, :2].tolist(), strict=True)
    )
    options = ("--beams", 3, "--length-penalty", 0.5)
    assert write(*options) == f"def nu{best}\n"
    assert write(*options, *GREEDY, "--num-samples", 2) == f"--- 1 ---\ndef nu{best}\n--- 2 ---\ndef nu{second}\n"
    assert write("--beams", 1) == write(*GREEDY)


def test_a_draft_is_handed_to_the_model(other_run, write, written):
    texts, _, seen = written
    assert write(*GREEDY, "--draft", other_run, "--draft-tokens", 2, "--cache", "paged") == f"def nu{texts[0]}\n"
    (options,) = seen
    assert (options["num_draft_tokens"], options["cache"]) == (2, "paged")
    own, _ = load_model(other_run)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(model)) for model in (own, options["draft"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.thorough
def test_a_draft_changes_nothing_at_temperature_0(other_run, write):
    assert write(*GREEDY, "--draft", other_run, "--draft-tokens", 2, "--cache", "paged") == write(*GREEDY)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [("--cache", "ring"), ("--cache", "paged", "--cache-dtype", "int8")])
def test_every_cache_writes_the_same(write, options):
    assert write(*GREEDY, *options, "--log-probs") == write(*GREEDY)


LOG_PROBS = r"(?:\d: )?log-probability (-\d+\.\d\d), (\d) tokens, (\d+) bytes, (\d+\.\d\d) bits per byte"


def test_log_probs_are_those_of_the_model(run, written, capsys):
    model, tokenizer = load_model(run)
    prompt = [0, *tokenizer.encode(b"def nu").tolist()]
    texts, tokens, _ = written
    ids = np.zeros((3, len(prompt) + 9), np.int32)
    ids[:, : len(prompt)], ids[:, len(prompt) :] = prompt, tokens
    given = np.asarray(nnx.jit(TransformerLM.log_probs)(model, ids))
    command = ["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", "--log-probs", "--num-samples", "3"]
    assert main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    for row, (line, text, length) in enumerate(zip(lines, texts, (3, 1, 2), strict=True)):
        places = np.arange(len(prompt), len(prompt) + length)
        total = given[row, places - 1, ids[row, places]].sum()
        found = re.fullmatch(LOG_PROBS, line)
        assert line.startswith(f"{row + 1}: ") and (int(found[2]), int(found[3])) == (length, len(text))
        assert float(found[1]) == pytest.approx(total, abs=0.006)
        assert float(found[4]) == pytest.approx(-total / math.log(2) / len(text), abs=0.006)


@pytest.mark.contract
def test_log_probs_are_those_of_the_generation(run, capsys):
    model, tokenizer = load_model(run)
    ids = jnp.asarray([[0, *tokenizer.encode(b"def nu").tolist()]])
    sampler = Sampler(1.5, top_p=0.95)
    options = {"max_new_tokens": 9, "sampler": sampler, "key": jax.random.key(4), "end_token": 0, "num_samples": 3}
    made = model.generate(ids, **options)
    command = ["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", *SAMPLED, "--log-probs"]
    for samples in (1, 3):
        capsys.readouterr()
        assert main([*command, "--num-samples", str(samples)]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == samples
        for row, line in enumerate(lines):
            tokens = made.tokens[row, : made.lengths[row]].tolist()
            size, total = len(tokenizer.decode(tokens)), float(made.log_probs[row].sum())
            found = re.fullmatch(LOG_PROBS, line)
            assert (line[:3] == f"{row + 1}: ") == (samples > 1)
            assert float(found[1]) == pytest.approx(total, abs=0.006) and int(found[2]) == len(tokens)
            assert int(found[3]) == size and float(found[4]) == pytest.approx(-total / math.log(2) / size, abs=0.006)


def check_same_figures(out, run):
    assert json.loads((out / "result.json").read_text()) == json.loads((run / "result.json").read_text())
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        values = [
            [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines() if name in line]
            for folder in (out, run)
        ]
        assert values[0] == values[1], name


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(run, corpus, tmp_path, capsys, monkeypatch):
    """Ctrl-C in its first step, then --resume: the figures of the run that was left alone, to the last bit."""
    out, append = tmp_path / "run", RunFolder.append_metrics

    def interrupt(self, **row):
        append(self, **row)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", interrupt)
        assert main(["train", "--data", str(corpus), "--out", str(out), *TINY]) == 130
    assert f"attnax train --resume {out}" in capsys.readouterr().out
    assert not (out / "result.json").exists() and len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert main(["train", "--resume", str(out)]) == 0
    check_same_figures(out, run)


@pytest.mark.contract
def test_a_process_that_is_interrupted_saves_and_ends(run, corpus, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "attnax", "train", "--data", str(corpus), "--out", str(out), *TINY]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run ended before the signal came; make TINY longer")
    assert process.returncode == 130, stderr
    assert f"attnax train --resume {out}" in stdout and "Traceback" not in stderr
    assert not (out / "result.json").exists()
    assert main(["train", "--resume", str(out)]) == 0
    check_same_figures(out, run)


class TestWrongInput:
    def test_paths_that_are_not_there(self, capsys, tmp_path):
        assert "no such file or folder" in refuse(capsys, "train", "--data", tmp_path / "nope")
        assert "no such folder" in refuse(capsys, "generate", tmp_path / "nope")
        assert "no such folder" in refuse(capsys, "inspect", tmp_path / "nope")
        assert "no such run folder" in refuse(capsys, "train", "--resume", tmp_path / "nope")

    def test_an_empty_corpus_makes_no_run(self, capsys, tmp_path):
        (tmp_path / "empty.txt").touch()
        assert "holds no text" in refuse(capsys, "train", "--data", tmp_path / "empty.txt", "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_too_little_text_for_a_window_makes_no_run(self, capsys, tmp_path):
        (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
        out = tmp_path / "run"
        assert "do not fill one window of 128" in refuse(capsys, "train", "--data", tmp_path / "a.txt", "--out", out)
        assert not out.exists()

    def test_a_run_folder_that_exists_is_left_alone(self, capsys, run, corpus):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        line = refuse(capsys, "train", "--data", corpus, "--out", run, *TINY)
        assert "exists already; nothing was overwritten" in line
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    def test_resuming_what_cannot_be_resumed(self, capsys, run, corpus, tmp_path):
        assert "is finished" in refuse(capsys, "train", "--resume", run)
        assert "leave the other flags out" in refuse(capsys, "train", "--resume", run, "--steps", 3)
        assert "is not a run folder" in refuse(capsys, "train", "--resume", corpus)

    def test_a_changed_corpus_cannot_be_resumed(self, capsys, run, corpus, tmp_path):
        copy, changed = tmp_path / "copy", corpus / "file0.py"
        shutil.copytree(run, copy)
        (copy / "result.json").unlink()
        text = changed.read_text()
        try:
            changed.write_text("other text")
            assert "has changed since it was started" in refuse(capsys, "train", "--resume", copy)
        finally:
            changed.write_text(text)

    def test_prompts_and_lengths_beyond_the_context(self, capsys, run):
        assert "model's context of 32" in refuse(capsys, "generate", run, "--prompt", "x = y\n" * 99)
        line = refuse(capsys, "generate", run, "--prompt", "x", "--max-new-tokens", 99)
        assert "--max-new-tokens 99 is too many" in line and "has room for 30" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("generate {run} --temperature -1", "--temperature must be at least 0 and finite; got -1.0"),
            ("generate {run} --temperature nan", "--temperature must be at least 0 and finite; got nan"),
            ("generate {run} --top-k 0", "--top-k must be a whole number, at least 1 and below 2 ** 31; got 0"),
            ("generate {run} --top-k 2147483648", "below 2 ** 31; got 2147483648"),
            ("generate {long}", "File name too long"),
            ("train --data {long}", "File name too long"),
            ("train --max-len 1", "--max-len must be at least 2"),
            ("train --warmup 1", "warmup must be at least 0 and below 1; got warmup=1.0"),
            ("train --seed 4294967296", "--seed must be at least 0 and below 2 ** 32"),
            ("train --rope-max-positions 8", "rope_max_positions must be at least max_len"),
            ("generate {run} --top-p 1.5", "--top-p must be above 0 and at most 1; got 1.5"),
            ("generate {run} --max-new-tokens 0", "--max-new-tokens must be at least 1; got 0"),
            ("generate {run} --seed -1", "--seed must be at least 0 and below 2 ** 32; got -1"),
            ("generate {run} --temperature 1e39", "--temperature must be at least 0 and finite; got 1e+39"),
            ("generate {run} --top-p 1e-60", "--top-p must be above 0 and at most 1; got 1e-60"),
            ("generate {run} --min-p 1.5", "--min-p must be at least 0 and at most 1; got 1.5"),
            ("generate {run} --repetition-penalty 0", "--repetition-penalty must be above 0 and finite; got 0.0"),
            ("generate {run} --presence-penalty inf", "--presence-penalty must be finite; got inf"),
            ("generate {run} --frequency-penalty nan", "--frequency-penalty must be finite; got nan"),
            ("generate {run} --no-repeat-ngram 0", "--no-repeat-ngram must be at least 1 and a whole number; got 0"),
            (
                "generate {run} --no-repeat-ngram 33",
                "--no-repeat-ngram must be at most 32, the model's context; got 33",
            ),
            ("generate {run} --stop=", "--stop must not be empty"),
            ("generate {run} --stop \udcff", r"--stop must be text in UTF-8; got '\udcff'"),
            ("generate {run} --num-samples 0", "--num-samples must be at least 1; got 0"),
            ("generate {run} --beams 0", "--beams must be at least 1; got 0"),
            ("generate {run} --beams 301", "--beams must be at most 300, the tokens of the vocabulary; got 301"),
            ("generate {run} --beams 2 --num-samples 3", "--num-samples must be at most --beams 2; got 3"),
            ("generate {run} --beams 2 --length-penalty nan", "--length-penalty must be finite; got nan"),
            (
                "generate {run} --draft {run} --draft-tokens 17",
                "--draft-tokens must be at least 1 and at most 16; got 17",
            ),
            ("generate {run} --draft ./nowhere", "./nowhere: there is no such folder"),
            ("generate {run} --cache circular", "invalid choice 'circular' for argument '--cache'"),
            ("generate {run} --cache-dtype int4", "invalid choice 'int4' for argument '--cache-dtype'"),
            ("train --steps 0", "steps must be at least 1; got steps=0"),
            ("train --steps many", "invalid literal for int() with base 10: 'many'"),
            ("train --d-model 101", "d_model must be a multiple of num_heads"),
            ("train --held-out 1", "--held-out must be above 0 and below 1; got 1.0"),
            ("train --checkpoint-every 0", "--checkpoint-every must be at least 1; got 0"),
            ("train --dropout-rate 1", "dropout_rate must be at least 0 and below 1"),
            ("train --vocab-size 100", "got --vocab-size 100"),
            ("train --frobnicate 3", "--frobnicate"),
            ("train --tokenizer words", "words"),
            ("frobnicate", "there is no command 'frobnicate'; the commands are train, generate, inspect, bench"),
            ("generate {run} --max-new-tokens ten", "cannot read 'ten' as {None}|INT. See attnax generate --help."),
            ("generate", "FOLDER"),
            ("", "train, generate"),
        ],
    )
    def test_flags_out_of_range(self, capsys, run, corpus, tmp_path, monkeypatch, arguments, words):
        monkeypatch.chdir(tmp_path)
        arguments = arguments.format(run=run, long="x" * 300).split()
        if arguments[:1] == ["train"] and "--data" not in arguments:
            arguments += ["--data", str(corpus)]
        line = refuse(capsys, *arguments)
        assert words in line and "tyro" not in line
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("--beams 2 --temperature 0.5", "--beams and --temperature exclude each other: nothing is drawn"),
            ("--beams 2 --top-k 3", "--beams and --top-k exclude each other"),
            ("--beams 2 --top-p 0.5", "--beams and --top-p exclude each other"),
            ("--beams 2 --min-p 0.1", "--beams and --min-p exclude each other"),
            ("--beams 2 --seed 1", "--beams and --seed exclude each other"),
            ("--beams 2 --draft {run}", "--beams and --draft exclude each other: a beam search has no draft"),
            ("--stream --beams 2", "--stream and --beams exclude each other: its text is printed when it is whole"),
            ("--stream --draft {run}", "--stream and --draft exclude each other"),
            ("--stream --num-samples 2", "--stream and --num-samples exclude each other"),
            ("--stream --no-stream", "--stream and --no-stream exclude each other: give one of them"),
            ("--draft {run} --cache contiguous", "--draft and --cache contiguous exclude each other"),
            ("--length-penalty 0.5", "--length-penalty needs --beams"),
            ("--draft-tokens 3", "--draft-tokens needs --draft"),
        ],
    )
    def test_options_that_exclude_each_other(self, capsys, run, arguments, words):
        assert words in refuse(capsys, "generate", run, *arguments.format(run=run).split())

    def test_a_draft_of_another_tokenizer(self, capsys, run, draw_run, tmp_path):
        other = draw_run(tmp_path / "bytes", seed=0, tokenizer=byte_tokenizer())
        line = refuse(capsys, "generate", run, "--draft", other)
        assert f"--draft {other} has another tokenizer than {run}" in line

    def test_sums_of_linear_attention_are_no_tokens(self):
        config = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=8, max_len=16)

        def text(folder, model):
            return TextModel(Path(folder), model, ByteCodec(byte_tokenizer()))

        softmax, linear = (
            build(lambda rngs, kind=kind: TransformerLM(rngs, dataclasses.replace(config, attention_type=kind)))
            for kind in ("standard", "linear")
        )
        options = Generate(folder="a", draft="b")
        for model, draft, run in ((linear, softmax, "a"), (softmax, linear, "b")):
            with pytest.raises(InputError, match=f"--draft takes tokens back, .* linear attention in {run} cannot"):
                check_model(options, options, text("a", model), text("b", draft))
        with pytest.raises(InputError, match="--cache paged stores tokens, and linear attention in a has only sums"):
            check_model(*[Generate(folder="a", cache="paged")] * 2, text("a", linear), None)
        check_model(options, options, text("a", softmax), text("b", softmax))
        check_model(*[Generate(folder="a", cache="ring")] * 2, text("a", linear), None)

    def test_a_draft_with_a_smaller_context(self, run):
        text = open_run(run)
        small = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(text.config, max_len=8)))
        draft = dataclasses.replace(text, model=small)
        assert read_prompt(text, draft, "", None)[1] == 7
        with pytest.raises(InputError, match="the draft's context of 8 has room for 7"):
            read_prompt(text, draft, "", 8)
        with pytest.raises(InputError, match="has 9 tokens, and the draft's context of 8 must"):
            read_prompt(text, draft, "????????", None)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "checkpoints"])
    @pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "foreign"])
    def test_damaged_and_foreign_runs(self, capsys, run, tmp_path, name, damage):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        path = copy / name
        if name == "checkpoints":
            path = max(
                (path for path in (copy / name / "12" / "params").rglob("*") if path.is_file()),
                key=lambda p: p.stat().st_size,
            )
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            path.write_bytes(content[:100] + bytes([content[100] ^ 0x80]) + content[101:])
        else:
            path.write_text('{"format": "something else"}')
        line = refuse(capsys, "generate", copy)
        assert name.split(".")[0] in line or "not a run folder" in line

    def test_a_changed_option_is_noticed(self, capsys, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        config = (copy / "config.json").read_text()
        assert '"rope_base": 10000.0' in config
        (copy / "config.json").write_text(config.replace('"rope_base": 10000.0', '"rope_base": 10001.0'))
        assert "was changed after it was written" in refuse(capsys, "generate", copy)

    def test_a_checkpoint_of_another_run(self, capsys, run, other_run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(other_run, copy)
        shutil.rmtree(copy / "checkpoints")
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        assert "belongs to another run" in refuse(capsys, "generate", copy)

    def test_a_run_without_a_checkpoint(self, capsys, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "checkpoints")
        assert "has no checkpoint yet" in refuse(capsys, "generate", copy)


@pytest.mark.parametrize(
    "command", ["inspect {checkpoint}", pytest.param("generate {run} --prompt def", marks=pytest.mark.contract)]
)
def test_writing_into_a_closed_pipe_ends_quietly(run, command):
    command = command.format(run=run, checkpoint=Path(__file__).parents[1] / "goldens" / "pretrained" / "gpt2")
    command = f"set -o pipefail; {sys.executable} -m attnax {command} | true"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 141) and not done.stderr


def test_the_command_starts_itself_again_once_with_huge_pages(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    cli._use_huge_pages()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    cli._use_huge_pages()
    assert len(started) == 1


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("tyro", "pretrained", ["--help"]),
        ("tokenizers", "pretrained", ["generate", "x"]),
        ("matplotlib", "train", ["train"]),
    ],
)
def test_without_its_packages_the_command_says_what_to_install(package, extra, arguments):
    code = f"import sys; sys.modules[{package!r}] = None; from attnax.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    words = f"attnax: this needs the package {package}. Install it with: pip install 'attnax[{extra}]'\n"
    assert (done.returncode, done.stderr) == (2, words)


def test_bench_runs_the_repositorys_benchmark(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, check: ran.append(command) or argparse.Namespace(returncode=3)
    )
    assert main(["bench", "--cases", "causal", "window", "--lengths", "512", "--json", "figures.json"]) == 3
    script = Path(cli.__file__).parents[2] / "benchmarks" / "attention.py"
    options = ["--rounds", "5", "--cases", "causal", "window", "--lengths", "512", "--json", "figures.json"]
    assert ran == [[sys.executable, str(script), *options]]
    assert main(["bench", "--lengths", "0"]) == 2 and "--lengths must be at least 1; got 0" in capsys.readouterr().err
    monkeypatch.setattr("attnax.cli.bench.SCRIPT", tmp_path / "attention.py")
    assert main(["bench"]) == 2 and "bench needs a clone" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--data" in text and "--num-kv-heads" in text and "--learning-rate" in text and "standard library" in text


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_run_opens_without_initial_weights(scan_layers):
    config = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=2, d_ff=16, scan_layers=scan_layers)
    graphdef, params, streams = abstract(config)
    weights = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 0.1, x.dtype)), params)
    assert nnx.merge(graphdef, weights, streams)(np.zeros((1, 3), np.int32), deterministic=True).shape == (1, 3, 11)
