"""The times of a training: seconds of updates, tokens a second, the share of the peak, and goodput."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

__all__ = ["TIMED", "Stopwatch"]

TIMED = ("seconds", "step_seconds", "tokens_per_second", "mfu", "goodput", "memory")
"""The fields of a row of metrics that differ when a run is repeated."""


class Stopwatch:
    """Measures updates that follow each other without a gap, so that one is computed while the next waits.

    The seconds of an update go from the end of the update before, or of a pause, to its own end. The first update of a
    process has none: it compiles. Goodput is the sum of these seconds of all updates that the run keeps, over all
    seconds since the run was started. Lost are compilation, evaluation, waiting for checkpoints, updates that are made
    again after a restart, and the time between two processes.

    Args:
        started: Unix time of the run's start, or None if it is unknown: goodput then counts from this process on.
        rows: rows of metrics of earlier processes.
        tokens: of an update.
        flops: of an update.
        peak: operations a second of all devices, or None if it is unknown.
    """

    def __init__(
        self,
        *,
        started: float | None,
        rows: Iterable[Mapping[str, Any]],
        tokens: int,
        flops: float,
        peak: float | None,
    ):
        self._tokens, self._flops, self._peak = tokens, flops, peak
        self._seconds = self._productive = 0.0
        for row in rows:
            self._seconds = row.get("seconds", self._seconds)
            self._productive += row.get("step_seconds", 0.0)
        self._begun = time.perf_counter() - self._seconds
        self._started = time.time() - self._seconds if started is None else started
        self._mark: float | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside belongs to no update; the update before has been measured."""
        yield
        if self._mark is not None:
            self._mark = time.perf_counter()

    def measure(self) -> dict[str, float]:
        """The fields `TIMED` of the row of an update that has ended now."""
        now = time.perf_counter()
        mark, self._mark = self._mark, now
        fields = {"seconds": round(now - self._begun, 3)}
        if mark is not None:
            seconds = now - mark
            self._productive += seconds
            fields |= {"step_seconds": _short(seconds), "tokens_per_second": _short(self._tokens / seconds)}
            if self._peak is not None:
                fields["mfu"] = _short(self._flops / (seconds * self._peak))
        fields["goodput"] = _short(self._productive / max(time.time() - self._started, self._productive, 1e-9))
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return fields if memory is None else {**fields, "memory": memory}


def _short(number: float) -> float:
    return float(f"{number:.6g}")
