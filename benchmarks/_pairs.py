"""Timing of two or more sides, each in a process of its own, in turns: A B A B ...

Machines are shared and their speed drifts, so only ratios from one run are comparable. A side is a command. It prints a
line of JSON when it is warm. For every empty line that it reads, it does its work once and prints `{"seconds": ...}`. A
side of many cases reads each case as a line of JSON, prepares it, and prints a line of JSON again. While one side
works, the other sides are stopped.

Attnax runs in the environment of the benchmark. PyTorch runs in `.venv-torch` if `make` has installed it there, with
the Python and the versions that it needs.
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
    """The command of a side of a benchmark; with `torch`, in PyTorch's environment."""
    return [_python(torch), script, "--side", side]


def peer_version(package: str) -> str | None:
    """The version of a package in PyTorch's environment; None if it is not installed."""
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    run = subprocess.run([_python(True), "-c", code], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def _python(torch: bool) -> str:
    return str(_TORCH_PYTHON) if torch and _TORCH_PYTHON.exists() else sys.executable


def serve(work: Work, **about: Any) -> None:
    """Runs a side: prints `about` when it is warm, then times `work()` for each line that it reads."""
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": _seconds(work)}), flush=True)


def peak_bytes(work: Work) -> int | None:
    """The most memory that is resident in this process while it does its work, or None where Linux does not say it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now: without compilation
    except OSError:
        return None
    work()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def serve_cases(
    prepare: Callable[[dict[str, Any]], tuple[Work | None, dict[str, Any]]], shortest: float = 0.05
) -> None:
    """Runs a side of many cases.

    Args:
        prepare: returns a case's work, None if there is nothing to time, and facts about the case.
        shortest: the least seconds of a round; quicker work is done several times, after one untimed call.
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
    """A side's process. It is stopped between requests, because its idle threads would slow down the other sides.

    Attributes:
        about: the side's line of JSON when it was warm.
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
            raise SystemExit(f"a side's process ended early: {self.process.args!r}")
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
    """The processes, warm, while the context lasts; each has the same two processors, and two threads."""
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
    """Seconds of each round of each side of one case, and the `about` of each side."""
    with started(sides, environment) as processes:
        return take_turns(processes, rounds), {name: side.about for name, side in processes.items()}
