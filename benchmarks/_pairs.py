"""Timing of two or more sides, each in a process of its own, in turns: A B A B ...

Machines are shared and their speed drifts, so only ratios taken in one run mean anything. A side is a command that
prints a line of JSON when it is warm, then for every line that it reads does its work once and prints
`{"seconds": ...}`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def serve(work: Any, **about: Any) -> None:
    """The side's part: says that it is warm, then times `work()` whenever it is asked to."""
    import time

    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def compare(
    sides: Mapping[str, Sequence[str]], *, rounds: int = 7, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each round of each side, and what the sides said about themselves.

    A round in which a side takes more than 1.3 times its median is repeated once at the end, for all sides.
    """
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))  # two processors for every side alike
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    processes = {
        name: subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **(environment or {})},
        )
        for name, command in sides.items()
    }

    def read(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended before its time: {process.args!r}")
        return dict(json.loads(line))

    about = {name: read(process) for name, process in processes.items()}
    for process in processes.values():
        process.send_signal(signal.SIGSTOP)
    seconds: dict[str, list[float]] = {name: [] for name in sides}

    def one_round() -> None:
        for name, process in processes.items():
            assert process.stdin is not None
            process.send_signal(signal.SIGCONT)
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[name].append(read(process)["seconds"])
            process.send_signal(signal.SIGSTOP)  # or its idle threads would still spin in the others' time

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
    for name, values in seconds.items():
        seconds[name] = [value for index, value in enumerate(values) if index not in noisy]
    for process in processes.values():
        process.send_signal(signal.SIGCONT)
        process.communicate()
    return seconds, about
