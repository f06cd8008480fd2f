"""The text of each row so far, prompt and written tokens: one token a position, without the prompt's padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from attnax.checks import check_shape
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["Text"]


@pytree_dataclass
class Text:
    """Tokens of R rows, each of its own length, in arrays of a fixed size.

    Methods raise ValueError for arrays of another shape.

    Attributes:
        ids: int32 (R, L), the token at each position; ids from `lengths` on mean nothing.
        prompt_lengths: int32 (R,), the tokens of the prompt.
        lengths: int32 (R,), the tokens of the text.
    """

    ids: Int[Array, "R L"]
    prompt_lengths: Int[Array, "R"]
    lengths: Int[Array, "R"]

    @classmethod
    def of_prompt(cls, ids: Int[ArrayLike, "R T"], position_ids: Int[ArrayLike, "R T"], size: int) -> Text:
        """The prompt, with room for `size` tokens in all; a position of -1 is padding."""
        check_shape("Text", "ids", ids, ("rows", "length"), integers=True)
        rows = ids.shape[0]
        empty = jnp.zeros((rows,), jnp.int32)
        return cls(jnp.zeros((rows, size), jnp.int32), empty, empty).with_prompt(ids, position_ids, size)

    def with_prompt(self, ids: Int[ArrayLike, "R T"], position_ids: Int[ArrayLike, "R T"], size: int) -> Text:
        """A longer prompt: the tokens so far and new ones at `position_ids`, with room for `size` tokens in all.

        A position of -1 is padding. `size` must be at least the tokens of the longest row.
        """
        check_shape("Text", "ids", ids, ("rows", "length"), integers=True)
        check_shape("Text", "position_ids", position_ids, ids.shape, integers=True)
        ids, position_ids, rows = jnp.asarray(ids), jnp.asarray(position_ids), ids.shape[0]
        missing = ((0, 0), (0, max(0, size - self.ids.shape[1])))
        before = jnp.broadcast_to(jnp.pad(self.ids, missing)[:, :size], (rows, size))
        lengths = jnp.maximum(self.lengths, position_ids.max(1, initial=-1) + 1)
        where = jnp.where(position_ids < 0, size, position_ids)  # out-of-range: dropped
        text = before.at[jnp.arange(rows)[:, None], where].set(ids.astype(jnp.int32), mode="drop")
        return Text(text, lengths, lengths)

    def select_rows(self, rows: Int[Array, "Q"]) -> Text:
        """The text of the rows with these indices."""
        check_shape("Text", "rows", rows, ("rows",), integers=True)
        return jax.tree.map(lambda x: x[rows], self)

    def append(self, token: Int[Array, "R"], where: Bool[Array, "R"] | None = None) -> Text:
        """One more token in the rows where `where` is True, by default in all."""
        rows, size = self.ids.shape
        check_shape("Text", "token", token, (rows,), integers=True)
        if where is not None:
            check_shape("Text", "where", where, (rows,))
        index = self.lengths if where is None else jnp.where(where, self.lengths, size)
        ids = self.ids.at[jnp.arange(rows), index].set(token.astype(jnp.int32), mode="drop")
        return dataclasses.replace(
            self, ids=ids, lengths=self.lengths + (1 if where is None else where.astype(jnp.int32))
        )

    def last(self, count: int) -> Int[Array, "R n"]:
        """The last `count` tokens of each row; before the first token, the first token repeats."""
        index = self.lengths[:, None] + jnp.arange(-count, 0, dtype=jnp.int32)[None]
        return jnp.take_along_axis(self.ids, jnp.maximum(index, 0), axis=1)

    def last_positions(self, count: int) -> Int[Array, "R n"]:
        """The positions of the last `count` tokens; -1 before the first token."""
        return jnp.maximum(self.lengths[:, None] + jnp.arange(-count, 0, dtype=jnp.int32)[None], -1)

    def written(self, count: int, fill: Int[ArrayLike, ""]) -> Int[Array, "R n"]:
        """The first `count` tokens after each prompt, then `fill`."""
        check_shape("Text", "fill", fill, (), integers=True)
        steps = jnp.arange(count, dtype=jnp.int32)[None]
        index = jnp.minimum(self.prompt_lengths[:, None] + steps, self.ids.shape[1] - 1)
        real = steps < (self.lengths - self.prompt_lengths)[:, None]
        return jnp.where(real, jnp.take_along_axis(self.ids, index, axis=1), fill)

    def counts(self, vocab_size: int) -> Int[Array, "R V"]:
        """How often each token was written."""
        counts = jnp.zeros((self.ids.shape[0], vocab_size), jnp.int32)
        return counts.at[self._rows(), self.ids].add(self._counted(prompt=False).astype(jnp.int32), mode="drop")

    def change(
        self, logits: Float[Array, "R V"], function: Callable[[Array], Array], *, prompt: bool
    ) -> Float[Array, "R V"]:
        """`function` of the logits (R, L) of written tokens, and of the prompt's tokens with `prompt`.

        Only these logits are computed, so it takes less time than `function` of all logits.
        """
        check_shape("Text", "logits", logits, (self.ids.shape[0], "vocab_size"))
        index = jnp.where(self._counted(prompt), self.ids, logits.shape[1])  # out-of-range: dropped
        # A token that occurs twice is set to the same number twice.
        changed = function(logits.at[self._rows(), index].get(mode="clip"))
        return logits.at[self._rows(), index].set(changed, mode="drop")

    def _rows(self) -> Array:
        return jnp.arange(self.ids.shape[0])[:, None]

    def _counted(self, prompt: bool) -> Bool[Array, "R L"]:
        """Where written tokens stand and, with `prompt`, tokens of the prompt."""
        index = jnp.arange(self.ids.shape[1], dtype=jnp.int32)[None]
        counted = index < self.lengths[:, None]
        return counted if prompt else counted & (index >= self.prompt_lengths[:, None])

    def ends_with(self, sequences: Int[ArrayLike, "K n"]) -> Bool[Array, "R"]:
        """Whether the written tokens end with one of the sequences, which are filled with -1 on the left."""
        check_shape("Text", "sequences", sequences, ("sequences", "length"), integers=True)
        sequences, size = jnp.asarray(sequences), sequences.shape[1]
        if 0 in sequences.shape:
            return jnp.zeros(self.lengths.shape, bool)
        written = self.last_positions(size) >= self.prompt_lengths[:, None]
        equal = (self.last(size)[:, None] == sequences[None]) & written[:, None]
        return (equal | (sequences < 0)[None]).all(-1).any(-1)

    def completes_ngram(self, size: int, vocab_size: int) -> Bool[Array, "R V"]:
        """The tokens that would complete a sequence of `size` tokens that the text already holds."""
        rows, length = self.ids.shape
        if size > length:
            return jnp.zeros((rows, vocab_size), bool)
        start = jnp.arange(length, dtype=jnp.int32)[None]
        suffix = self.last(size - 1)

        def begins_alike(offset: Array, repeats: Array) -> Array:
            return repeats & (jnp.roll(self.ids, -offset, axis=1) == suffix[:, offset, None])

        repeats = start + size - 1 < self.lengths[:, None]  # the n-gram that starts here lies in the text
        repeats = lax.fori_loop(0, size - 1, begins_alike, repeats) if size > 1 else repeats
        follows = jnp.where(repeats, jnp.roll(self.ids, 1 - size, axis=1), vocab_size)
        banned = jnp.zeros((rows, vocab_size), bool)
        banned = banned.at[jnp.arange(rows)[:, None], follows].set(True, mode="drop")
        return banned & (self.lengths >= size - 1)[:, None]
