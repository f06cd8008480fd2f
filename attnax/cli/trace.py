"""A trace of some updates by JAX's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax

from attnax.errors import InputError

__all__ = ["Trace", "read_updates"]


def read_updates(text: str | None) -> range:
    """The updates of `--profile FROM:TO`, none for None.

    Raises:
        InputError: the text is no FROM:TO with 1 <= FROM <= TO.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"--profile must be FROM:TO, such as 10:12, the first and last update; got {text!r}.")
    return range(first, last + 1)


class Trace:
    """Traces `updates` into `folder`, for TensorBoard or Perfetto; those before the first one of this process are gone.

    Example:
        with contextlib.closing(Trace(read_updates("10:12"), folder)) as trace:
            for step in range(1, 100):
                trace.before(step, wait)
                dispatch(step)
                trace.after(step, wait)
    """

    def __init__(self, updates: range, folder: Path):
        self._updates, self._folder, self._is_running = updates, folder, False

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """Starts before an update of the trace; calls `wait` first, so that no update before is in it."""
        if step in self._updates and not self._is_running:
            wait()
            jax.profiler.start_trace(self._folder)
            self._is_running = True

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """Stops after the last update; calls `wait` first, so that all of it is in the trace."""
        if self._is_running and step == self._updates[-1]:
            wait()
            self.close()

    def close(self) -> None:
        """Stops, if it has not."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
            print(f"trace      {self._folder}")
