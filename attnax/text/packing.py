"""pack: several sequences in each row of a batch, so that few tokens are padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attnax.typing import ArrayLike

__all__ = ["Packed", "pack"]


class Packed(NamedTuple):
    """Rows of packed sequences, each array int32 (rows, length).

    Attributes:
        ids: the tokens, and `pad_token_id` behind the last sequence of a row.
        document_ids: the index of each token's sequence among the given ones, ascending in a row; -1 for padding.
        position_ids: the index of each token within its sequence; -1 for padding.
    """

    ids: np.ndarray
    document_ids: np.ndarray
    position_ids: np.ndarray


def pack(sequences: Sequence[ArrayLike | Sequence[int]], length: int, *, pad_token_id: int = 0) -> Packed:
    """Puts whole sequences into rows of `length` tokens; no sequence is cut.

    The longest sequence comes first, and each goes into the row in which it leaves the least space (best fit
    decreasing). A model reads the rows with `mask=masks.documents(document_ids)` and `position_ids=position_ids`, and
    gives each sequence the results that it has alone. `packed.document_ids == i` are the places of sequence i.

    Args:
        sequences: tokens, each of any length up to `length`. A sequence without tokens takes no place.
        length: tokens of a row.
        pad_token_id: the token of padding.

    Raises:
        ValueError: a sequence that is longer than a row, or that is not a list of integers.

    Example:
        >>> from attnax.text import pack
        >>> packed = pack([[5, 6, 7], [8, 9, 3, 4], [2]], 5)
        >>> packed.ids.tolist()
        [[8, 9, 3, 4, 2], [5, 6, 7, 0, 0]]
        >>> packed.document_ids.tolist()
        [[1, 1, 1, 1, 2], [0, 0, 0, -1, -1]]
        >>> packed.position_ids.tolist()
        [[0, 1, 2, 3, 0], [0, 1, 2, -1, -1]]
    """
    tokens = [_check_sequence(index, sequence, length) for index, sequence in enumerate(sequences)]
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    filled = [index for index, sequence in enumerate(tokens) if len(sequence)]
    for index in sorted(filled, key=lambda index: -len(tokens[index])):
        place = bisect.bisect_left(spaces, (len(tokens[index]), 0))
        if place == len(spaces):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = spaces.pop(place)
        rows[row].append(index)
        bisect.insort(spaces, (free - len(tokens[index]), row))

    ids = np.full((len(rows), length), pad_token_id, np.int32)
    document_ids, position_ids = np.full((2, len(rows), length), -1, np.int32)
    for row, members in enumerate(rows):
        start = 0
        for index in sorted(members):
            here = slice(start, start := start + len(tokens[index]))
            ids[row, here] = tokens[index]
            document_ids[row, here] = index
            position_ids[row, here] = np.arange(len(tokens[index]))
    return Packed(ids, document_ids, position_ids)


def _check_sequence(index: int, sequence: ArrayLike | Sequence[int], length: int) -> np.ndarray:
    tokens = np.asarray(sequence)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(
            f"pack: a sequence must be integers in one axis; got shape={tokens.shape}, dtype={tokens.dtype} "
            f"of sequences[{index}]."
        )
    if len(tokens) > length:
        raise ValueError(
            f"pack: a sequence must fit into a row; got {len(tokens)} tokens in sequences[{index}], length={length}. "
            "Cut it, or make the rows longer."
        )
    return tokens
