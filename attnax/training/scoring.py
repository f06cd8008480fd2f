"""The mean of the losses of many batches, and the batches that score a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from attnax.training.corpus import TokenStream
from attnax.training.objectives import Batch, Loss
from attnax.training.state import Evaluation

__all__ = ["mean_of", "windows_of"]


def mean_of(losses: Sequence[Loss]) -> Evaluation:
    """The mean of losses by their weights, added up in float64.

    Raises:
        ValueError: there is none.
    """
    if not losses:
        raise ValueError("Trainer.evaluate: batches must hold a batch; got none.")
    weights = [float(loss.weight) for loss in losses]
    total = sum(weights)
    means = {
        name: sum(weight * float(loss.aux[name]) for weight, loss in zip(weights, losses, strict=True)) / (total or 1.0)
        for name in losses[0].aux
    }
    return Evaluation(sum(float(loss.sum) for loss in losses) / (total or 1.0), total, means)


def windows_of(stream: TokenStream, batch_size: int) -> Iterator[Batch]:
    """Batches for `causal_lm` that score each token of a stream but the first once, with 3/4 of a window as context."""
    windows = list(stream.scoring_windows(stride=max(1, stream.window // 4)))
    for start in range(0, len(windows), batch_size):
        chosen = windows[start : start + batch_size]
        tokens = np.zeros((batch_size, stream.window + 1), np.int32)  # the last batch may have fewer windows
        weights = np.zeros((batch_size, stream.window), np.float32)
        tokens[: len(chosen)] = [window for window, _ in chosen]
        weights[: len(chosen)] = [count for _, count in chosen]
        yield {"tokens": tokens, "weights": weights}
