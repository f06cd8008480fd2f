"""The batches of a training, in an order that depends on the seed and the number of the update alone.

Grain draws the order: its shuffle is a function from places to rows, so that no permutation is held and any update is
reached at once. Nothing of its state needs to be saved.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

__all__ = ["Batches", "Rows"]


@runtime_checkable
class Rows(Protocol):
    """Rows by number, all with the same names, shapes and types: a `TokenStream`, `TextRows` or `ImageFolder`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Batches:
    """`batches[update]` is the batch of an update: a dict of arrays (accumulate, rows, ...), a pure function.

    Every pass visits all rows once, in an order of its own, and the next pass begins within a batch where the number of
    rows asks for it. A mixture takes rows from several sources in turns, in the proportions of their weights; each
    source has passes of its own.

    Args:
        rows: the rows, or a list of several sources of rows. A list of dicts is one source, whose rows are in memory.
        batch_size: rows of a microbatch, of all processes together.
        accumulate: microbatches of an update.
        seed: of the order; at least 0 and below 2 ** 32.
        weights: of several sources, by default the same for all; they are kept to a percent of the smallest.
        part: which part of each microbatch to read, from 0, and of how many, which divides batch_size; `Trainer.part`
            is that of a process. The parts in their order, joined along axis 1, are the batch of one process.

    Raises:
        ValueError: a source without rows, weights that do not fit, or numbers out of range.

    Example:
        >>> import numpy as np
        >>> from attnax.training import Batches, TokenStream
        >>> batches = Batches(TokenStream(np.arange(100, dtype=np.uint16), 4), batch_size=3, accumulate=2, seed=1)
        >>> batches[7]["tokens"].shape
        (2, 3, 5)
        >>> with batches.start(7) as prefetched:
        ...     bool((next(prefetched)["tokens"] == batches[7]["tokens"]).all())
        True
    """

    def __init__(
        self,
        rows: Rows | Sequence[Rows],
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        part: tuple[int, int] = (0, 1),
    ):
        sources: Sequence[Any] = [rows]
        if isinstance(rows, list | tuple) and not (rows and isinstance(rows[0], Mapping)):
            sources = rows
        _check(sources, weights, batch_size, accumulate, seed, part)
        orders = [
            grain.MapDataset.source(source).seed(_seed_of(seed, number)).shuffle().repeat()
            for number, source in enumerate(sources)
        ]
        self._order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)
        self._batch_size, self._accumulate = batch_size, accumulate
        self._count = batch_size // part[1]
        self._first = part[0] * self._count

    def __getitem__(self, update: int) -> dict[str, np.ndarray]:
        if update < 0:
            raise IndexError(f"Batches: update must be at least 0; got update={update}.")
        start = update * self._accumulate * self._batch_size + self._first
        rows = [
            self._order[start + micro * self._batch_size + row]
            for micro in range(self._accumulate)
            for row in range(self._count)
        ]
        shape = self._accumulate, self._count
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: values.reshape(shape + values.shape[1:]) for name, values in stacked.items()}

    @contextlib.contextmanager
    def start(self, update: int = 0, *, threads: int = 2, ahead: int = 2) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        """The batches from `update` on, without an end; threads read `ahead` of them in advance.

        Args:
            update: number of the first batch.
            threads: 0 reads each batch when it is asked for.
            ahead: number of batches that are read in advance, at least one for each thread.
        """
        updates = grain.MapDataset.range(update, sys.maxsize).map(self.__getitem__)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads) if threads else 0)
        prefetched = iter(updates.to_iter_dataset(options))
        try:
            yield prefetched
        finally:
            prefetched.close()


def _seed_of(seed: int, number: int) -> int:
    """The seed of a source. Grain's passes have the seeds seed, seed + 1, ..., so that those of users would overlap."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _check(
    sources: Sequence[Any],
    weights: Sequence[float] | None,
    batch_size: int,
    accumulate: int,
    seed: int,
    part: tuple[int, int],
) -> None:
    empty = [number for number, source in enumerate(sources) if not len(source)]
    if not sources or empty:
        raise ValueError(
            f"Batches: every source must have rows; got {len(sources)} sources, of which {empty} are empty."
        )
    if weights is not None and (
        len(weights) != len(sources) or not all(weight > 0 and math.isfinite(weight) for weight in weights)
    ):
        raise ValueError(
            f"Batches: weights must be one number above 0 for each of {len(sources)} sources; got weights={weights}."
        )
    for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"Batches: {name} must be at least 1; got {name}={value}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"Batches: seed must be at least 0 and below 2 ** 32; got seed={seed}.")
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"Batches: part must be (i, n) with 0 <= i < n; got part={part}.")
    if batch_size % count:
        raise ValueError(
            f"Batches: the number of parts must divide batch_size; got batch_size={batch_size} and part={part}. Take "
            "a multiple."
        )
