"""The `attnax` command, the whole way on a tiny corpus, and every wrong input in one line."""

import argparse
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

import pytest

from attnax import cli
from attnax.cli import main

TINY = [
    *("--d-model", "16", "--num-heads", "2", "--num-kv-heads", "1", "--d-ff", "24", "--num-layers", "1"),
    *("--max-len", "32", "--vocab-size", "300", "--batch-size", "4", "--learning-rate", "0.03"),
    *("--steps", "12", "--checkpoint-every", "5"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty short files of a text that is easy to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        (folder / f"file{index}.py").write_text(f"def number_{index}(x):\n    return x + {index}\n\n\n" * 8)
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), *TINY]) == 0
    return out


def refuse(capsys, *arguments):
    """The one line with which a command ends that was refused."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("attnax: ")
    return lines[0]


def test_a_run_leaves_everything_that_it_promises(run, capsys, corpus, tmp_path):
    out = tmp_path / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), *TINY]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
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
    # The same command gives the same numbers.
    assert result == json.loads((run / "result.json").read_text())


def test_the_compressors_see_the_same_held_out_bytes(run, corpus):
    from attnax.training import read_corpus

    text = b"".join(document.text for document in read_corpus(str(corpus)).held_out)
    result = json.loads((run / "result.json").read_text())
    gzip = subprocess.run(["gzip", "-9", "-n"], input=text, capture_output=True, check=True).stdout
    assert result["held_out_bytes"] == len(text)
    assert result["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip) / len(text), rel=0.01)


def test_runs_are_numbered(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "000").mkdir(parents=True)
    assert main(["train", "--data", str(corpus), *TINY, "--steps", "1", "--tokenizer", "bytes", "--pack"]) == 0
    config = json.loads((tmp_path / "runs" / "001" / "config.json").read_text())
    assert config["options"]["model"]["vocab_size"] == 257


def test_generate_streams_a_continuation(run, capsys):
    def text(*options):
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", *options]) == 0
        return capsys.readouterr().out

    greedy = text("--temperature", "0")
    assert greedy.startswith("def nu") and greedy == text("--temperature", "0", "--seed", "5")
    assert text("--seed", "1", "--temperature", "2") == text("--seed", "1", "--temperature", "2")
    assert len({text("--seed", str(seed), "--temperature", "2") for seed in range(4)}) > 1
    assert text("--top-k", "1", "--seed", "3") == greedy == text("--top-p", "0.000001", "--seed", "4")


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(run, corpus, tmp_path):
    """Ctrl-C in a process of its own, then --resume: the figures of the run that was left alone, to the last bit."""
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
    assert f"go on with: attnax train --resume {out}" in stdout and "Traceback" not in stderr
    assert not (out / "result.json").exists()
    assert main(["train", "--resume", str(out)]) == 0
    assert json.loads((out / "result.json").read_text()) == json.loads((run / "result.json").read_text())
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        values = [
            [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines() if name in line]
            for folder in (out, run)
        ]
        assert values[0] == values[1], name


class TestWrongInput:
    def test_paths_that_are_not_there(self, capsys, tmp_path):
        assert "no such file or folder" in refuse(capsys, "train", "--data", tmp_path / "nope")
        assert "no such run folder" in refuse(capsys, "generate", tmp_path / "nope")
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

    def test_a_changed_corpus_cannot_be_resumed(self, capsys, corpus, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        for index in range(9):
            (data / f"{index}.txt").write_text(f"number {index} " * 99)
        out = tmp_path / "run"
        assert main(["train", "--data", str(data), "--out", str(out), *TINY, "--steps", "1"]) == 0
        (out / "result.json").unlink()
        (data / "0.txt").write_text("other text")
        assert "has changed since it was started" in refuse(capsys, "train", "--resume", out)

    def test_prompts_and_lengths_beyond_the_context(self, capsys, run):
        assert "model's context of 32" in refuse(capsys, "generate", run, "--prompt", "x = y\n" * 99)
        line = refuse(capsys, "generate", run, "--prompt", "x", "--max-new-tokens", 99)
        assert "--max-new-tokens 99 is too many" in line and "has room for 30" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("generate {run} --temperature -1", "--temperature must be at least 0 and finite; got -1.0"),
            ("generate {run} --temperature nan", "--temperature must be at least 0 and finite; got nan"),
            ("generate {run} --top-k 0", "--top-k must be at least 1 and below 2 ** 31; got 0"),
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
            ("train --steps 0", "steps must be at least 1; got steps=0"),
            ("train --steps many", "invalid literal for int() with base 10: 'many'"),
            ("train --d-model 101", "d_model must be a multiple of num_heads"),
            ("train --held-out 1", "--held-out must be above 0 and below 1; got 1.0"),
            ("train --checkpoint-every 0", "--checkpoint-every must be at least 1; got 0"),
            ("train --dropout-rate 1", "dropout_rate must be at least 0 and below 1"),
            ("train --vocab-size 100", "got --vocab-size 100"),
            ("train --frobnicate 3", "--frobnicate"),
            ("train --tokenizer words", "words"),
            ("frobnicate", "frobnicate"),
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

    def test_a_checkpoint_of_another_run(self, capsys, run, corpus, tmp_path):
        other = tmp_path / "other"
        assert main(["train", "--data", str(corpus), "--out", str(other), *TINY, "--seed", "1", "--steps", "1"]) == 0
        shutil.rmtree(other / "checkpoints")
        shutil.copytree(run / "checkpoints", other / "checkpoints")
        assert "belongs to another run" in refuse(capsys, "generate", other)

    def test_a_run_without_a_checkpoint(self, capsys, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "checkpoints")
        assert "has no checkpoint yet" in refuse(capsys, "generate", copy)


def test_generating_into_a_closed_pipe_ends_quietly(run):
    command = f"{sys.executable} -m attnax generate {run} --prompt def | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=False, capture_output=True, text=True)
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


def test_without_its_packages_the_command_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; import attnax.cli"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == (
        "attnax: the command needs tyro. Install it with: pip install 'attnax[train]'"
    )


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
