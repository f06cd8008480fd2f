"""Updates of one process beside updates of two, with the same global batch, on the cores of this machine.

    python benchmarks/processes.py              # the model of `attnax train`; --rounds, --updates, --batch

Each side trains the same model on the same tokens under `attnax launch`: one process with one device, which has all
cores; one process with two devices; two processes with one device each, which send each other sums through gloo.
The sides take turns; the seconds of an update are the median of a side, without its first five updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

FIRST = 5  # updates that are left out
SIDES = {"one process": (1, 1), "one process, two devices": (1, 2), "two processes": (2, 1)}  # processes, devices


def side(updates: int, batch: int) -> None:
    """What each process runs; process 0 prints the seconds of each update."""
    import jax
    import numpy as np

    from attnax import Layout
    from attnax.distributed import connect, disconnect, is_main
    from attnax.training import Batches, OptimizerConfig, RunOptions, TokenStream, Trainer, causal_lm

    connect()
    model = RunOptions.model
    layout = Layout(data=-1, fsdp=1) if jax.device_count() > 1 else None
    optimizer = OptimizerConfig(steps=updates, batch_size=batch)
    trainer = Trainer(model, causal_lm(), optimizer, layout=layout)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 100_000).astype(np.uint16)
    batches = Batches(TokenStream(tokens, model.max_len), batch_size=batch, part=trainer.part)
    state, seconds = trainer.init(), []
    for update in range(updates):
        begun = time.perf_counter()
        state, metrics = trainer.step(state, batches[update])
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
    if is_main():
        print("seconds", json.dumps(seconds[FIRST:]))
    disconnect()


def measure(processes: int, devices: int, updates: int, batch: int) -> list[float]:
    command = [sys.executable, "-m", "attnax", "launch", "--processes", str(processes), "--devices", str(devices), "--"]
    command += [sys.executable, str(Path(__file__).absolute()), "--side"]
    command += ["--updates", str(updates), "--batch", str(batch)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in run.stdout.splitlines() if line.startswith("[0] seconds "))
    seconds: list[float] = json.loads(line.removeprefix("[0] seconds "))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40, help="of a side in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="rows of an update, of all devices together")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.updates, options.batch)
        return
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name, (processes, devices) in SIDES.items():
            seconds[name] += measure(processes, devices, options.updates, options.batch)
    alone = statistics.median(seconds["one process"])
    print(f"batch {options.batch}, medians of {len(seconds['one process'])} updates")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:25} {1e3 * median:8.1f} ms an update   {alone / median:.2f}x of one process")


if __name__ == "__main__":
    main()
