"""How a model reads prompts: in one call, or in chunks of bounded memory; also behind texts that it read before."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache import forget, select_rows
from attnax.checks import check_shape
from attnax.generation.request import Request
from attnax.generation.step import Model, Step, Tokens
from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Int

__all__ = ["Prompt", "TextCaches", "prefill", "read_prompt"]


@pytree_dataclass
class TextCaches:
    """Texts that a model has read, with the caches of its layers: from here another call goes on.

    The caches hold all tokens of a row but the last one, which the next call reads.

    Attributes:
        text: of each row.
        layers: the caches, of the same rows.
    """

    text: Text
    layers: Any

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> TextCaches:
        """The rows `rows`: in any order, also repeated or left out."""
        return TextCaches(*select_rows((self.text, self.layers), jnp.asarray(rows)))

    def forget(self, first: Int[ArrayLike, "B"]) -> TextCaches:
        """Takes back each row's tokens from position `first` on; the first token of a row stays.

        Behind a window some tokens are gone: where the next token needs one, its row's log-probabilities are NaN
        (`RingKVCache.forget`).
        """
        check_shape("TextCaches.forget", "first", first, self.text.lengths.shape, integers=True)
        lengths = jnp.clip(jnp.asarray(first, jnp.int32), 1, self.text.lengths)
        text = Text(self.text.ids, jnp.minimum(self.text.prompt_lengths, lengths), lengths)
        return TextCaches(text, forget(self.layers, lengths - 1))


class Prompt(NamedTuple):
    """The results of reading a prompt.

    Attributes:
        logits: (batch, vocabulary), after the last token of each row.
        cache: with the tokens that were read.
        context: as in `Tokens`.
        text: of each row, the earlier tokens included.
    """

    logits: Array
    cache: Any
    context: Any
    text: Text


def read_prompt(model: Model, request: Request, cache: Any, room: int, *, but_last: bool = False) -> Prompt:
    """Reads the tokens of each row that the cache does not hold; with `but_last` all but the last one.

    Args:
        model: reads.
        request: has the prompts and the earlier text.
        cache: of the prompts' rows; may be Planned.
        room: of the text, in tokens beyond the prompt.
        but_last: leaves the last token of each row to the call that goes on.
    """
    cache, context, text = model.made(cache), model.made(request.context), request.text(room)
    end = text.lengths - 1 if but_last else text.lengths
    if request.reads_at_once:
        ids, position_ids = jnp.asarray(request.ids), jnp.asarray(request.position_ids)
        position_ids = jnp.where(position_ids < end[:, None], position_ids, -1)
        logits, cache = model(Tokens(ids, position_ids, position_ids.argmax(axis=1)[:, None], context), cache)
        return Prompt(logits[:, 0], cache, context, text)
    first, num_unread = jnp.zeros_like(end), request.ids.shape[1]
    if request.earlier is not None:
        first, num_unread = jnp.broadcast_to(request.earlier.lengths - 1, end.shape), num_unread + 1
    read = partial(_read_chunk, model, context, text.ids, first, end)
    if request.prefill_chunk is None or num_unread <= request.prefill_chunk:
        logits, cache = read(num_unread, 0, cache)
        return Prompt(logits, cache, context, text)

    size = request.prefill_chunk

    def read_next(carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        index, logits, cache = carry
        chunk_logits, cache = read(size, index, cache)
        ends_here = (end > first + index * size) & (end <= first + (index + 1) * size)
        return index + 1, jnp.where(ends_here[:, None], chunk_logits, logits), cache

    like, _ = jax.eval_shape(partial(read, size), 0, cache)
    carry = jnp.int32(0), jnp.zeros(like.shape, like.dtype), cache
    _, logits, cache = lax.while_loop(lambda carry: (first + carry[0] * size < end).any(), read_next, carry)
    return Prompt(logits, cache, context, text)


def _read_chunk(
    model: Model, context: Any, ids: Array, first: Array, end: Array, size: int, index: int | Array, cache: Any
) -> tuple[Array, Any]:
    """Reads chunk `index` of `size` tokens of the texts `ids`, which begin at `first` and end before `end`.

    Returns the logits after the last token of the chunk in each row, and the cache.
    """
    position_ids = first[:, None] + index * size + jnp.arange(size, dtype=jnp.int32)[None]
    is_real = position_ids < end[:, None]
    chunk_ids = jnp.take_along_axis(ids, jnp.where(is_real, position_ids, 0), axis=1)
    wanted = jnp.maximum(is_real.sum(1, keepdims=True, dtype=jnp.int32) - 1, 0)
    logits, cache = model(Tokens(chunk_ids, jnp.where(is_real, position_ids, -1), wanted, context), cache)
    return logits[:, 0], cache


def prefill(step: Step, state: Any, request: Request, cache: Any) -> TextCaches:
    """Reads prompts and writes nothing.

    Args:
        step: the model.
        state: its parameters.
        request: the prompts.
        cache: of the prompts' rows; may be Planned.
    """
    return _prefill(Model(step, state), request, cache)


@jax.jit
def _prefill(model: Model, request: Request, cache: Any) -> TextCaches:
    prompt = read_prompt(model, request, cache, 0, but_last=True)
    return TextCaches(prompt.text, prompt.cache)
