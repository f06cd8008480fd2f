"""Goodput of `attnax train` while it is killed again and again, and the seconds from a start to the first new update.

    python benchmarks/goodput.py                          # kill -9 every 300 s, for 20 minutes
    python benchmarks/goodput.py --every 60 --minutes 10

The run is the default one of `attnax train` with more updates, on the source of Python's standard library, and programs
are kept between starts. Goodput is the last one of the run's metrics: the seconds of all updates that are kept, over
all seconds since the run was started. Lost are the tokens of the text, which are made once, compilation, evaluation,
checkpoints, and the updates after the last checkpoint before each kill.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of the updates; the last line may be cut."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def train(run: Path, flags: list[str], seconds: float) -> float | None:
    """Starts or goes on with the run, and kills it; returns the seconds to the first new update, None if none came."""
    exists = (run / "config.json").exists()
    command = [sys.executable, "-m", "attnax", "train", *(["--resume", str(run)] if exists else flags)]
    begun, first, changed = time.perf_counter(), None, None
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while time.perf_counter() - begun < seconds:
            if process.poll() is not None:
                raise SystemExit(f"the training ended with code {process.returncode}: {command!r}")
            if first is None:  # a process that goes on writes the file anew, and then a row for its first update
                size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
                if changed is not None and size > changed:
                    first = time.perf_counter() - begun
                changed = size
            time.sleep(0.05)
        process.kill()
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=300.0, help="seconds between kills")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--checkpoint-every", type=int, default=25, help="updates between checkpoints")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        flags = ["--out", str(run), "--steps", "1000000", "--eval-every", "500"]
        flags += ["--checkpoint-every", str(options.checkpoint_every)]
        starts = [train(run, flags, options.every) for _ in range(max(1, round(60 * options.minutes / options.every)))]
        rows = rows_of(run)
    if not rows:
        raise SystemExit(f"no update was made in {options.every:.0f} s; give more seconds")
    again = [seconds for seconds in starts[1:] if seconds is not None]
    step = statistics.median(row["step_seconds"] for row in rows if "step_seconds" in row)
    print(f"{len(starts)} kills, one every {options.every:.0f} s; {rows[-1]['step']:,} updates of {1e3 * step:.0f} ms")
    print(f"goodput {rows[-1]['goodput']:.1%}, a checkpoint every {options.checkpoint_every} updates")
    if again:
        print(f"start to first new update: median {statistics.median(again):.1f} s, at most {max(again):.1f} s")


if __name__ == "__main__":
    main()
