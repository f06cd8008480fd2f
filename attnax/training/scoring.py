"""The mean of the losses of many batches, and the batches that score a text."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from attnax.training.objectives import Batch, Loss
from attnax.training.state import Evaluation
from attnax.training.stream import TokenStream

__all__ = ["mean_of", "windows_of"]


def mean_of(losses: Iterable[Loss]) -> Evaluation:
    """The mean of losses by their weights, added up in float64.

    Args:
        losses: each is read after the next one is taken: if taking one dispatches its computation, the devices never
            wait for the host, and no more than two are computed or held at a time.

    Raises:
        ValueError: there is none.
    """
    total, weight, sums = 0.0, 0.0, defaultdict[str, float](float)
    for loss in _read_late(losses):
        of_loss = float(loss.weight)
        total, weight = total + float(loss.sum), weight + of_loss
        for name, value in loss.aux.items():
            sums[name] += of_loss * float(value)
    return Evaluation(total / (weight or 1.0), weight, {name: value / (weight or 1.0) for name, value in sums.items()})


def _read_late(losses: Iterable[Loss]) -> Iterator[Loss]:
    waiting: deque[Loss] = deque()
    for loss in losses:
        waiting.append(loss)
        if len(waiting) == 2:
            yield waiting.popleft()
    if not waiting:
        raise ValueError("Trainer.evaluate: batches must hold a batch; got none.")
    yield waiting.popleft()


def windows_of(stream: TokenStream, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """Batches for `causal_lm` that score each token of a stream but the first once, with 3/4 of a window as context.

    The tokens of a batch are read when it is taken.

    Args:
        stream: the tokens.
        batch_size: number of windows in a batch, of all processes together.
        part: which part of the rows of each batch to yield, and of how many, which divides `batch_size`.
    """
    index, count = part
    mine = slice(batch_size * index // count, batch_size * (index + 1) // count)
    windows = stream.scoring_windows(stride=max(1, stream.window // 4))
    while chosen := list(islice(windows, batch_size)):
        tokens = np.zeros((batch_size, stream.window + 1), np.int32)  # the last batch may have fewer windows
        weights = np.zeros((batch_size, stream.window), np.float32)
        tokens[: len(chosen)] = [window for window, _ in chosen]
        weights[: len(chosen)] = [count for _, count in chosen]
        yield {"tokens": tokens[mine], "weights": weights[mine]}
