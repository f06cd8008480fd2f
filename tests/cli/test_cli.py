"""The `attnax` command as a program."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnax import cli
from attnax.cli import main
from attnax.errors import install_command


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
        ("tensorboardX", "tensorboard", ["train", "--tensorboard"]),
    ],
)
def test_without_its_packages_the_command_says_what_to_install(package, extra, arguments):
    code = f"import sys; sys.modules[{package!r}] = None; from attnax.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    words = f"attnax: this needs the package {package}. Install it with: {install_command(extra)}\n"
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
