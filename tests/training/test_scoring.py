"""Scores of long texts: nothing is held that is not needed."""

import numpy as np
import pytest

from attnax.training import Loss, TokenStream
from attnax.training.scoring import mean_of, windows_of


class Scalar:
    """A number on a device, which tells when it is read."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __float__(self):
        self.read.append(self)
        return self.value


class Recorded:
    """Tokens that tell which of them were read."""

    def __init__(self, length):
        self.length, self.read = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        self.read = max(self.read, where.stop)
        return np.arange(where.start, where.stop).astype(np.uint16)


def test_no_more_than_two_losses_wait_to_be_read():
    read, waiting = [], []

    def dispatch():
        for index in range(7):
            waiting.append(index + 1 - len(read))
            yield Loss(Scalar(2.0 * index, read), np.float32(index), {"even": np.float32(index % 2 == 0)})

    found = mean_of(dispatch())
    assert waiting == [1, 2, 2, 2, 2, 2, 2] and len(read) == 7
    assert found.loss == 2.0 and found.weight == 21 and found.aux == {"even": pytest.approx(12 / 21)}


def test_losses_without_a_weight_have_the_mean_0():
    assert mean_of([Loss(0.0, 0.0, {"part": 3.0})]) == (0.0, 0.0, {"part": 0.0})


def test_windows_are_read_when_their_batch_is_taken():
    tokens = Recorded(1009)
    batches = windows_of(TokenStream(tokens, 8), batch_size=3)
    assert tokens.read == 0
    next(batches)
    assert tokens.read == 9 + 2 * 2  # a first window, and two that score 2 tokens more each
    rest = list(batches)
    assert tokens.read == 1009 and all(batch["tokens"].shape == (3, 9) for batch in rest)
    assert sum(batch["weights"].sum() for batch in rest) == 1008 - 8 - 2 * 2
