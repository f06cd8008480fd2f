"""Timing of two or more sides, each in a process of its own, in turns: A B A B ...

Machines are shared and their speed drifts, so only ratios taken in one run mean anything. A side is a command that
prints a line of JSON when it is warm, then for every empty line that it reads does its work once and prints
`{"seconds": ...}`. A side of many cases is sent each case as a line of JSON, gets ready for it, and answers as when it
starts. While one side works, the others are stopped.

Attnax runs in the environment that the benchmark was started in, PyTorch in `.venv-torch` where `make` has put it
there: each with the Python and the versions that suit it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Work = Callable[[], Any]

_TORCH_PYTHON = Path(__file__).parents[1] / ".venv-torch" / "bin" / "python"


def side_command(script: str, side: str, *, torch: bool = False) -> list[str]:
    """The command of a side of a benchmark, in the environment of PyTorch if it is `torch`'s."""
    return [_python(torch), script, "--side", side]


def peer_version(package: str) -> str | None:
    """The version of a package in the environment of PyTorch's sides; None if it is not there."""
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    run = subprocess.run([_python(True), "-c", code], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def _python(torch: bool) -> str:
    return str(_TORCH_PYTHON) if torch and _TORCH_PYTHON.exists() else sys.executable


def serve(work: Work, **about: Any) -> None:
    """The side's part: says that it is warm, then times `work()` whenever it is asked to."""
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": _seconds(work)}), flush=True)


def serve_cases(
    prepare: Callable[[dict[str, Any]], tuple[Work | None, dict[str, Any]]], shortest: float = 0.05
) -> None:
    """The same for a side of many cases.

    Args:
        prepare: makes a case's work, None if there is nothing to time, and says something about it.
        shortest: seconds that a round lasts at least; quicker work is done several times, after once untimed.
    """
    print("{}", flush=True)
    work: Work | None = None
    calls = 1
    for line in sys.stdin:
        if line.strip():
            work = None  # frees the last case's arrays first
            work, about = prepare(json.loads(line))
            if work is not None:
                work()
                calls = max(1, round(shortest / _seconds(work)))
            print(json.dumps(about), flush=True)
        else:
            assert work is not None
            if calls > 1:
                work()
            print(json.dumps({"seconds": _seconds(work, calls)}), flush=True)


def _seconds(work: Work, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


class Side:
    """A side's process, stopped except while it is asked something: its idle threads would spin in others' time.

    Attributes:
        about: what it said when it was warm.
    """

    about: dict[str, Any]

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
        )

    def answer(self) -> dict[str, Any]:
        """Waits for the next line, then stops the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended before its time: {self.process.args!r}")
        self.process.send_signal(signal.SIGSTOP)
        return dict(json.loads(line))

    def ask(self, line: str = "") -> dict[str, Any]:
        """Sends a line, by default the request to do the work once; returns the answer."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends the process, stopped or not."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def started(
    sides: Mapping[str, Sequence[str]], environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Side]]:
    """The processes, warm, while the context lasts; two processors and two threads for every side alike."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    environment = {**os.environ, **threads, **(environment or {})}
    processes = {name: Side(command, environment) for name, command in sides.items()}
    try:
        for side in processes.values():
            side.about = side.answer()
        yield processes
    finally:
        for side in processes.values():
            side.close()


def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each side.

    A round in which a side takes more than 1.3 times its median is repeated once at the end, for all sides.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}

    def one_round() -> None:
        for name, side in sides.items():
            seconds[name].append(side.ask()["seconds"])

    for _ in range(rounds):
        one_round()
    noisy = {
        index
        for values in seconds.values()
        for index, value in enumerate(values)
        if value > 1.3 * statistics.median(values)
    }
    for _ in noisy:
        one_round()
    return {
        name: [value for index, value in enumerate(values) if index not in noisy] for name, values in seconds.items()
    }


def compare(
    sides: Mapping[str, Sequence[str]], *, rounds: int = 7, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each round of each side of one case, and what the sides said about themselves."""
    with started(sides, environment) as processes:
        return take_turns(processes, rounds), {name: side.about for name, side in processes.items()}
