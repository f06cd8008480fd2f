"""Time that a checkpoint of 400 MB takes from training, until it is on the disk, and to be read again.

    python benchmarks/checkpoints.py

`Checkpoints` beside Orbax's own AsyncCheckpointer with its defaults, and beside one save of Orbax for each item that
training waits for, with digests of all files. All sides save the same state, in turns: parameters and two moments.
"blocks" is the time until the call returns. "with the next update" adds what the save costs an update that donates the
state right after it, beyond the same update without a save: buffers that are still being read cannot be used again, and
threads that write share the cores. "saved" is the time until the save is complete: for `Checkpoints` with digests and
on the disk (fsync). Orbax does neither, and the synchronous side has digests without fsync. "read" is the time to read
all arrays again, with digests where there are some; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from _machine import measure
from _pages import markdown_table

from attnax.training import Checkpoints

ARRAYS, SHAPE = 28, (1090, 1092)  # times three items and four bytes: 400 MB
COLUMNS = ("blocks", "with the next update", "saved", "read")


class Side(Protocol):
    """A way to save: `save` returns when training may go on, `wait` when the save is complete."""

    def save(self, number: int, state: Any) -> None: ...
    def wait(self) -> None: ...
    def restore(self, number: int, like: Any) -> Any: ...


class Attnax:
    """`Checkpoints`, as in a training."""

    def __init__(self, folder: Path):
        self._checkpoints = Checkpoints(folder)

    def save(self, number: int, state: Any) -> None:
        self._checkpoints.save(number, state)

    def wait(self) -> None:
        self._checkpoints.wait()

    def restore(self, number: int, like: Any) -> Any:
        return self._checkpoints.restore(like, step=number)


class Orbax:
    """Orbax with its defaults."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def save(self, number: int, state: Any) -> None:
        self._checkpointer.save(self._folder / str(number), args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def restore(self, number: int, like: Any) -> Any:
        return self._checkpointer.restore(self._folder / str(number), args=ocp.args.StandardRestore(like))


class Synchronous:
    """A save of Orbax for each item, then the digest of each file, before training goes on."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, number: int, state: Any) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            for item, tree in state.items():
                checkpointer.save(self._folder / str(number) / item, tree)
                checkpointer.wait_until_finished()
        self._digests(number)

    def wait(self) -> None:
        pass

    def restore(self, number: int, like: Any) -> Any:
        self._digests(number)
        with ocp.StandardCheckpointer() as checkpointer:
            return {item: checkpointer.restore(self._folder / str(number) / item, tree) for item, tree in like.items()}

    def _digests(self, number: int) -> list[str]:
        files = (path for path in (self._folder / str(number)).rglob("*") if path.is_file())
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


SIDES: dict[str, Callable[[Path], Side]] = {
    "`Checkpoints`": Attnax,
    "Orbax `AsyncCheckpointer`": Orbax,
    "synchronous": Synchronous,
}


def make() -> Any:
    """A state of 400 MB: random numbers, as weights are."""
    keys = jax.random.split(jax.random.key(0), (3, ARRAYS))

    def item(keys: jax.Array) -> dict[str, jax.Array]:
        return {f"array{number}": jax.random.normal(key, SHAPE) for number, key in enumerate(keys)}

    return {name: item(keys) for name, keys in zip(("params", "mean", "variance"), keys, strict=True)}


@partial(jax.jit, donate_argnums=0)
def update(state: Any) -> Any:
    return jax.tree.map(lambda x: jnp.tanh(x) * 1.001, state)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def measure_save(side: Side, number: int, state: Any) -> tuple[dict[str, float], Any]:
    """The seconds of a row of the table, and the state after a few updates."""
    _, state = timed(update, state)
    alone, state = timed(update, state)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    start = time.perf_counter()
    side.save(number, state)
    blocks = time.perf_counter() - start
    _, state = timed(update, state)
    with_update = time.perf_counter() - start - alone
    side.wait()
    saved = time.perf_counter() - start
    read, _ = timed(side.restore, number, like)
    return dict(zip(COLUMNS, (blocks, with_update, saved, read), strict=True)), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the one of temporary files")
    options = parser.parse_args()
    print(measure().line)
    state = make()
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number in range(options.rounds + 1):
            for name, make_side in SIDES.items():
                place = Path(folder) / str(len(name))
                place.mkdir()
                seconds, state = measure_save(make_side(place), number, state)
                shutil.rmtree(place)
                if number:  # the first round imports and compiles
                    figures[name].append(seconds)
    rows = [[f"{size:.0f} MB, seconds", *COLUMNS]]
    for name, found in figures.items():
        medians = (statistics.median(row[column] for row in found) for column in COLUMNS)
        rows.append([name, *(f"{seconds:.2f}" for seconds in medians)])
    print(f"medians of {options.rounds} rounds in turns\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
