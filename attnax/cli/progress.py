"""The lines on standard error that show the progress of a training, and of a pass over its text."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from attnax.distributed import beat

__all__ = ["Progress", "counting"]


@contextlib.contextmanager
def counting(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Bytes of text that are done, on a line of a terminal, if it takes more than a second; each call adds some.

    Each call is a sign of life for the launcher, with or without a terminal.
    """
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, mininterval=0.5, delay=1.0, disable=hidden) as bar:

        def count(size: int) -> None:
            beat()
            bar.update(size)

        yield count


class Progress:
    """A line with the number of tokens, their rate and the loss; the line stays on the terminal.

    The rate counts no pauses and no compilation, since the line begins after the first update of a process.

    Args:
        steps: number of updates of the run.
        tokens_per_step: number of tokens of an update.
        is_shown: whether there is a line.
    """

    def __init__(self, steps: int, tokens_per_step: int, is_shown: bool = True):
        self._steps, self._tokens_per_step, self._pause = steps, tokens_per_step, 0.0
        self._is_shown = is_shown
        self._bar: tqdm[Any] | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        begun = time.time()
        yield
        self._pause += time.time() - begun

    def advance(self, step: int, loss: float) -> None:
        """Update number `step` is done."""
        if not self._is_shown:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._steps * self._tokens_per_step,
                initial=step * self._tokens_per_step,
                unit="tok",
                unit_scale=True,
                mininterval=0.5 if sys.stderr.isatty() else 15.0,
            )
            self._pause = 0.0
        else:
            self._leave_out_pauses(self._bar)
            self._bar.update(self._tokens_per_step)
        self._bar.set_description(f"loss {loss:.3f}", refresh=False)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._leave_out_pauses(self._bar)
            self._bar.close()

    def _leave_out_pauses(self, bar: tqdm[Any]) -> None:
        bar.start_t += self._pause
        bar.last_print_t += self._pause
        self._pause = 0.0
