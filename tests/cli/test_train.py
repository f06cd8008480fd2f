"""`attnax train`: a run, interruptions, and its model."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import READY, TINY, refuse

from attnax import TransformerConfig
from attnax.cli import main
from attnax.cli.stopwatch import TIMED
from attnax.errors import InputError
from attnax.text import DOCUMENT, byte_tokenizer
from attnax.training import Checkpoints, RunFolder, open_run, read_corpus
from attnax.training.run_folder import _digest as digest
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
    """A process that was killed before its run began leaves files; a user's own tokenizer is not one of them."""
    parts = RunFolder(run).load()[0], read_corpus(str(corpus)), byte_tokenizer(), {}
    monkeypatch.chdir(tmp_path)
    for number, names in enumerate((["config.json"], [".lock", "tokenizer.json"], ["tokenizer.json"])):
        (tmp_path / "runs" / f"{number:03d}").mkdir(parents=True)
        for name in names:
            (tmp_path / "runs" / f"{number:03d}" / name).write_text("cut")
    (tmp_path / "runs" / "003").mkdir()
    with RunFolder(tmp_path / "runs" / "003").locked():
        assert [RunFolder.create(None, *parts).path.name for _ in range(2)] == ["001", "004"]
    assert RunFolder(tmp_path / "runs" / "001").load()[0] == parts[0]


def test_a_run_from_before_muon_has_adamw(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["optimizer"].pop("algorithm") == "muon"
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"sha256": digest(config)}))
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    assert RunFolder(tmp_path).load()[0].optimizer.algorithm == "adamw"


def test_flags_become_the_trainer(capsys, corpus, tmp_path, monkeypatch):
    made = []

    def trainer(model, objective, optimizer, *, layout, ema, seed):
        assert layout is None and ema == (0.9 if seed == 0 else None)
        made.append((model, optimizer, seed, objective["document_token"], objective["loss_weights"]))
        raise InputError("no training today")

    monkeypatch.setattr("attnax.cli.session.Trainer", trainer)
    monkeypatch.setattr("attnax.cli.session.causal_lm", lambda **options: options)
    packed = ["--tokenizer", "bytes", "--pack", "--algorithm", "adamw", "--router-z-loss", "0.5", "--ema", "0.9"]
    for flags in ([*TINY, "--seed", "7"], [*READY, *packed]):
        assert "no training" in refuse(capsys, "train", "--data", corpus, "--out", tmp_path / "run", *flags)
    (model, optimizer, seed, document_token, losses), packed = made
    assert losses == {"load_balance_loss": 0.01, "router_z_loss": 0.001} and packed[4]["router_z_loss"] == 0.5
    assert (optimizer.algorithm, packed[1].algorithm) == ("muon", "adamw")
    assert (model.d_model, model.num_kv_heads, model.max_len, model.pos_emb_type) == (16, 1, 32, "rope")
    assert (optimizer.steps, optimizer.batch_size, optimizer.learning_rate) == (12, 4, 0.03)
    assert 257 < model.vocab_size <= 300 and (seed, document_token) == (7, None)
    assert packed[0].vocab_size == 257 and packed[2:4] == (0, DOCUMENT)
    assert not (tmp_path / "run").exists()


def test_a_run_opens_with_the_average_of_its_parameters_too(run, corpus, tmp_path, capsys):
    options, tokenizer, _ = RunFolder(run).load()
    model = dataclasses.replace(options.model, param_dtype="bfloat16")
    settings = dataclasses.replace(options, ema=0.9, model=model)
    made = RunFolder.create(tmp_path / "run", settings, read_corpus(str(corpus)), tokenizer, {})
    shapes = nnx.to_pure_dict(abstract(model, {})[1])
    params, ema = (
        jax.tree.map(lambda x, dtype=dtype, value=value: np.full(x.shape, value, dtype), shapes)
        for value, dtype in ((0.25, jnp.bfloat16), (0.5, np.float32))
    )
    with Checkpoints(made.checkpoints, owner=made.owner) as checkpoints:
        checkpoints.save(1, {"params": params, "ema": ema})
    for weights, value in (("params", 0.25), ("ema", 0.5)):
        opened = jax.tree.leaves(nnx.state(open_run(made.path, weights=weights).model, nnx.Param))
        assert all(x.dtype == jnp.bfloat16 and (x == value).all() for x in opened)
    assert "has no average of its parameters, because it was trained without --ema" in refuse(
        capsys, "generate", run, "--weights", "ema"
    )


@pytest.mark.contract
def test_a_run_of_packed_bytes_that_was_given_no_folder_takes_the_next(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "000" / "of another").mkdir(parents=True)
    assert main(["train", "--data", str(corpus), *READY, "--steps", "1", "--tokenizer", "bytes", "--pack"]) == 0
    config = json.loads((tmp_path / "runs" / "001" / "config.json").read_text())
    assert config["options"]["model"]["vocab_size"] == 257 and (tmp_path / "runs" / "001" / "result.json").exists()


def check_same_figures(out, run):
    assert json.loads((out / "result.json").read_text()) == json.loads((run / "result.json").read_text())
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        values = [
            [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines() if name in line]
            for folder in (out, run)
        ]
        assert values[0] == values[1], name


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(run, corpus, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second update, then --resume: the figures equal those of an undisturbed run to the last bit."""
    out, append = tmp_path / "run", RunFolder.append_metrics

    def interrupt(self, **row):
        append(self, **row)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", interrupt)
        assert main(["train", "--data", str(corpus), "--out", str(out), *TINY]) == 130
    assert f"attnax train --resume {out}" in capsys.readouterr().out
    assert not (out / "result.json").exists() and len((out / "metrics.jsonl").read_text().splitlines()) == 2
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


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_run_opens_without_initial_weights(scan_layers):
    config = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=2, d_ff=16, scan_layers=scan_layers)
    graphdef, params, rest = abstract(config, {})
    weights = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 0.1, x.dtype)), params)
    assert nnx.merge(graphdef, weights, *rest)(np.zeros((1, 3), np.int32), deterministic=True).shape == (1, 3, 11)


@pytest.mark.contract
def test_a_run_with_a_moving_average_and_accumulation_goes_on_bit_for_bit(corpus, tmp_path):
    flags = ["--ema", "0.9", "--schedule", "wsd", "--algorithm", "lion", "--moment-dtype", "bfloat16"]
    flags += [
        "--accumulate",
        "2",
        "--dropout-rate",
        "0.1",
        "--eval-every",
        "2",
        "--steps",
        "6",
        "--learning-rate",
        "0.003",
    ]

    def start(name):
        return main(["train", "--data", str(corpus), "--out", str(tmp_path / name), *TINY, *flags])

    def interrupt(self, **row):
        append(self, **row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    append = RunFolder.append_metrics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", interrupt)
        assert start("run") == 130
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0 and start("whole") == 0
    run, whole = (rows_of(tmp_path / name) for name in ("run", "whole"))
    assert run == whole
    looks = [row for row in whole if "ema_held_out_bits_per_byte" in row]
    assert [row["step"] for row in looks] == [2, 4, 6]
    assert all(row["ema_held_out_bits_per_byte"] != row["held_out_bits_per_byte"] for row in looks)
    assert [row["weight"] for row in whole if "loss" in row] == [2 * 4 * 32] * 6
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole")]
    assert results[0] == results[1] and "ema_held_out_bits_per_byte" in results[0]
    assert main(["generate", str(tmp_path / "run"), "--weights", "ema", "--max-new-tokens", "1"]) == 0


def rows_of(folder):
    """The rows of metrics, without what differs when a run is repeated."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]
