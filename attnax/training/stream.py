"""Tokens in a row, cut into windows: to learn from, and to score."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from attnax.errors import InputError

__all__ = ["TokenStream", "Tokens"]


@runtime_checkable
class Tokens(Protocol):
    """Tokens in memory or in files, of an unsigned integer type; a slice of them is an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The tokens of all documents in a row, and a sequence of windows.

    `stream[i]` is `{"tokens": int32 (window + 1,)}`, the input of window i and the token after it; windows share no
    token that is predicted. `Batches` puts them in an order.

    Attributes:
        tokens: (length,) of an unsigned integer type, with the document token before each document: an array, or
            `Store.tokens`.
        window: number of tokens that a model reads at a time.

    Example:
        >>> import numpy as np
        >>> from attnax.training import TokenStream
        >>> stream = TokenStream(np.arange(8, dtype=np.uint16), window=3)
        >>> len(stream), stream[1]["tokens"].tolist()
        (2, [3, 4, 5, 6])
    """

    tokens: Tokens
    window: int

    def __len__(self) -> int:
        """Number of windows."""
        return max(0, len(self.tokens) - 1) // self.window

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self.window
        if not 0 <= start <= len(self.tokens) - self.window - 1:
            raise IndexError(f"TokenStream: index must be at least 0 and below {len(self)}; got index={index}.")
        return {"tokens": self.tokens[start : start + self.window + 1].astype(np.int32)}

    def require_a_window(self) -> None:
        """Raises InputError if the tokens do not fill one window."""
        if len(self) < 1:
            raise InputError(
                f"the text is too short: its {len(self.tokens):,} tokens do not fill one window of {self.window}. "
                "Give more text or a smaller max_len."
            )

    def scoring_windows(self, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Windows that score every token except the first once, with at least window - stride tokens of context.

        Yields:
            tokens, int32 (window + 1,), and the predictions that count, bool (window,). Only the first window scores
            tokens with less context.
        """
        scored = 1
        while scored < len(self.tokens):
            end = min(len(self.tokens), scored + (self.window if scored == 1 else stride))
            start = max(0, end - self.window - 1)
            tokens = np.zeros(self.window + 1, np.int32)
            tokens[: end - start] = self.tokens[start:end]
            counts = np.zeros(self.window, bool)
            counts[scored - start - 1 : end - start - 1] = True
            yield tokens, counts
            scored = end
