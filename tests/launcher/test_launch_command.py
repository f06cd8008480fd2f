"""The command `attnax launch`: its words, and what it loads."""

import contextlib
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from children import ROOT, program

from attnax import cli, distributed
from attnax.cli import main
from attnax.cli.launch import _BARE, _VALUED, Launch, go_on
from attnax.errors import InputError


def refuse(capsys, *arguments):
    """The line of a command that is refused, after those about attempts."""
    assert main(["launch", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("attnax launch: ")]
    return line


def test_the_words_behind_two_dashes_are_the_command(capfd):
    # capfd: the processes write to the streams of this one
    assert main(["launch", "--processes", "2", "--stall", "30", "--", "echo", "--processes", "--", "x"]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] --processes -- x", "[1] --processes -- x"]


def test_the_exit_code_is_that_of_the_process(capfd):
    assert main(["launch", "--processes=1", "--restarts=1", "--", *program("print(attempt); sys.exit(9)")]) == 9
    assert capfd.readouterr().out == "[0] 1\n[0] 2\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "attnax: Missing from attnax launch: --processes INT"),
        (["--processes", "2"], "attnax: launch needs a command after two dashes, such as: -- train --out runs/a."),
        (["--processes", "2", "--"], "attnax: launch needs a command after two dashes"),
        (["--processes", "0", "--", "true"], "attnax: --processes must be at least 1; got 0."),
        (["--processes", "1", "--", "train"], "attnax: launch needs --out or --resume in the flags of train"),
        (["--processes", "1", "--", "attnax", "train"], "attnax: launch needs --out or --resume in the flags"),
        (["--processes", "1", "--", "no-such-program"], "attnax: no-such-program: No such file or directory."),
        (["--processes", "1", "--port", "3", "--", "true"], "See attnax launch --help."),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, words):
    assert words in refuse(capsys, *arguments)


def test_train_is_the_command_of_this_python():
    for words in (("train", "--out", "a"), ("attnax", "train", "--out", "a")):
        job = Launch(processes=1, command=words).job()
        assert job.line(None) == [sys.executable, "-m", "attnax", "train", "--out", "a"]


def test_a_restart_goes_on_with_the_run_and_keeps_the_flags_that_are_not_of_the_run(tmp_path):
    folder = tmp_path / "run"
    words = ["train", "--data", "text", f"--out={folder}", "--layout", "fsdp=4", "--no-compile-cache"]
    words += ["--max_skipped=3", "--steps", "100"]
    assert go_on(words) == words  # the run has not begun
    folder.mkdir()
    (folder / "config.json").touch()
    kept = ["--layout", "fsdp=4", "--no-compile-cache", "--max_skipped=3"]
    assert go_on(words) == ["train", "--resume", str(folder), *kept]
    back = ["train", "--resume", str(folder), "--step", "20"]
    assert go_on(back) == back and go_on(back, 30) == ["train", "--resume", str(folder)]
    away = ["train", "--out", str(tmp_path / "away")]  # its disk is away, but it has a checkpoint
    assert go_on(away) == away and go_on(away, 30) == ["train", "--resume", str(tmp_path / "away")]
    assert go_on(["python", "loop.py", "--out", str(folder)]) == ["python", "loop.py", "--out", str(folder)]


def test_a_restart_keeps_every_flag_that_train_takes_beside_resume():
    from attnax.cli.options import Train

    values = {"str": ("data", "1:2"), "int": (1,), "float": (1.0,), "bool": (True, False), "Path": (Path("x"),)}
    taken = set()
    for field in dataclasses.fields(Train):
        for value in (value for kind in re.findall(r"\w+", str(field.type)) for value in values.get(kind, ())):
            with contextlib.suppress(InputError):
                Train(**{"resume": Path("run"), field.name: value}).check()
                taken |= {field.name} if value != field.default else set()
    kept = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in (*_VALUED, *_BARE)}
    assert kept == taken - {"resume", "step", "dry_run"}


def test_the_launcher_loads_neither_jax_nor_numpy():
    code = """
import sys
from attnax.cli import main
assert main(["launch", "--processes", "1", "--", "true"]) == 0
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"jax", "jaxlib", "numpy", "flax", "optax"}), len(sys.modules) < 700)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "[] True\n"


def test_a_command_that_fails_does_not_wait_for_other_processes(monkeypatch):
    left = []
    monkeypatch.setattr(cli, "_use_huge_pages", lambda: None)
    monkeypatch.setattr(distributed, "leave", left.append)
    for code in (0, 1, 2, 130, 143):
        monkeypatch.setattr(cli, "main", lambda arguments, code=code: code)
        with pytest.raises(SystemExit, match=str(code)):
            cli.entry()
    assert left == [1, 2, 130, 143]
