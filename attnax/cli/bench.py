"""`attnax bench`: runs the benchmark of attention, which is in the repository and not in the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from attnax.cli.options import Bench
from attnax.errors import InputError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"


def bench(options: Bench) -> int:
    """Runs the benchmark; returns its exit code."""
    if not SCRIPT.is_file():
        raise InputError(f"bench needs a clone of the repository, installed with pip install -e; no file {SCRIPT}.")
    command = [sys.executable, str(SCRIPT), "--rounds", str(options.rounds)]
    for name in ("cases", "lengths"):
        values = getattr(options, name)
        command += [f"--{name}", *map(str, values)] if values else []
    for name in ("json", "markdown"):
        path = getattr(options, name)
        command += [f"--{name}", str(path)] if path is not None else []
    return subprocess.run(command, check=False).returncode
