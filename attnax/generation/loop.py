"""Autoregressive generation: one compiled program reads the prompt, a second loops over the new tokens.

With two programs, prompts of different lengths share the loop, and a single new token needs no loop. This package needs
no model class, only a `Step`: a function `(state, tokens, cache) -> (logits, cache)` of new tokens of every row and a
cache of the earlier tokens. The texts and caches at the end of a call are a `TextCaches`, with which another call can
go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.cache import select_rows
from attnax.checks import is_concrete
from attnax.generation.prompt import TextCaches, read_prompt
from attnax.generation.request import Request
from attnax.generation.step import Model, Planned, Step, Tokens
from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Bool, Float, Int

__all__ = ["Generation", "Stream", "generate"]


class Generation(NamedTuple):
    """The generated texts; rows are the prompts, or the samples of the first prompt, of the second, and so on.

    Attributes:
        tokens: (rows, max_new_tokens) int32; after its end a row is filled with the first end token, else with padding.
        lengths: (rows,) int32, the tokens of each row, with its end token or stop sequence.
        log_probs: (rows, max_new_tokens) float32, the model's log-probability of each token (before penalties,
            temperature and cuts); 0 after the end.
        steps: (rows,) int32, the calls of the model for the row: one for each token, fewer with a draft.
        caches: the texts with their caches, from which another call goes on; None unless asked for.
    """

    tokens: Int[Array, "R T"]
    lengths: Int[Array, "R"]
    log_probs: Float[Array, "R T"]
    steps: Int[Array, "R"]
    caches: TextCaches | None = None


@pytree_dataclass
class Progress:
    """The state that the loop carries from token to token."""

    keys: Array | None  # (R,), None where nothing is drawn
    text: Text
    log_probs: Float[Array, "R T"]
    finished: Bool[Array, "R"]
    steps: Int[Array, "R"]
    cache: Any

    @property
    def caches(self) -> TextCaches:
        """The texts so far and their caches."""
        return TextCaches(self.text, self.cache)


def generate(
    step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int
) -> tuple[Generation, TextCaches]:
    """Reads the prompt and writes until every row has ended.

    Args:
        step: the model.
        state: its parameters.
        request: the prompts, and how to continue them.
        cache: of the prompts' rows; must have room for the prompt and max_new_tokens - 1 tokens. The cache is donated,
            unless there are several samples, whose cache has other shapes, or it is Planned.
        max_new_tokens: static, the room of the result; at least the request's max_new_tokens, which may be traced.

    Returns:
        The generation, and the texts with the cache, which holds all tokens but the last.
    """
    model = Model(step, state)
    progress, context, written, _ = _read_prompt(model, request, cache, max_new_tokens)
    if is_concrete(progress.finished) and np.asarray(progress.finished).all():
        return written, progress.caches
    rest = dataclasses.replace(progress, cache=None)
    return _write_rest(model, request.after_prompt(), rest, progress.cache, context)


class Stream(Iterator[np.ndarray]):
    """The tokens of `generate`, (rows,) int32 at a time, each as soon as it is drawn.

    Ends after the request's max_new_tokens, or when every row has ended. Arguments are as in `generate`.
    """

    def __init__(self, step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int):
        self._model, self._request, self._cache, self._room = Model(step, state), request, cache, max_new_tokens
        self._progress: Progress | None = None
        self._context: Any = None
        self._has_ended = False

    def __next__(self) -> np.ndarray:
        if self._has_ended:
            raise StopIteration
        if self._progress is None:
            read = _read_prompt(self._model, self._request, self._cache, self._room)
            self._progress, self._context, _, token = read
            self._request, self._cache = self._request.after_prompt(), None
            if not is_concrete(token):
                raise ValueError("stream: tokens must be known to be yielded; got traced ones. Use generate under jit.")
        else:
            self._progress, token = _next_token(self._model, self._request, self._progress, self._context)
        self._has_ended = bool(np.asarray(self._progress.finished).all())
        return np.asarray(token)

    def stop(self) -> TextCaches:
        """Ends the stream, and returns the texts so far with their caches.

        The texts hold the tokens that were yielded. The stream ends because its next token would reuse the memory of
        the caches.

        Raises:
            ValueError: no token was yielded yet.
        """
        if self._progress is None:
            raise ValueError("Stream.stop: there are no caches before the first token; got none yet. Call next first.")
        self._has_ended = True
        return self._progress.caches


def _begin(model: Model, request: Request, cache: Any, room: int) -> tuple[Progress, Any, Generation, Array]:
    progress, context = start(model, request, cache, room)
    return progress, context, result(progress, request), progress.text.last(1)[:, 0]


_begin_program = jax.jit(_begin, static_argnames="room")
_begin_in_place = jax.jit(_begin, static_argnames="room", donate_argnames="cache")


def _read_prompt(model: Model, request: Request, cache: Any, room: int) -> tuple[Progress, Any, Generation, Array]:
    """The first program: the results of `start`, the generation so far and the first token of each row."""
    begin = _begin_in_place if can_donate(request, cache) else _begin_program
    return begin(model, request, cache, room)


def can_donate(request: Request, *caches: Any) -> bool:
    """Whether the first program may reuse the memory of its caches; what is Planned may hold arrays of a user."""
    return request.num_samples == 1 and not any(isinstance(cache, Planned) for cache in caches)


@partial(jax.jit, donate_argnames="cache")
def _write_rest(
    model: Model, request: Request, progress: Progress, cache: Any, context: Any
) -> tuple[Generation, TextCaches]:
    def go_on(progress: Progress) -> Progress:
        return advance(model, request, progress, context)

    progress = dataclasses.replace(progress, cache=cache)
    progress = lax.while_loop(lambda progress: ~progress.finished.all(), go_on, progress)
    return result(progress, request), progress.caches


@partial(jax.jit, donate_argnames="progress")
def _next_token(model: Model, request: Request, progress: Progress, context: Any) -> tuple[Progress, Int[Array, "R"]]:
    before = progress.text.lengths
    progress = advance(model, request, progress, context)
    text = progress.text
    return progress, jnp.where(text.lengths > before, text.last(1)[:, 0], request.fill)


def start(model: Model, request: Request, cache: Any, room: int, spare: int = 0) -> tuple[Progress, Any]:
    """Reads the prompt and draws the first of `room` tokens: the progress, and the context of each row."""
    logits, cache, context, text = for_samples(request, read_prompt(model, request, cache, room + spare))
    num_rows = request.num_rows
    progress = Progress(
        keys=request.row_keys(),
        text=text,
        log_probs=jnp.zeros((num_rows, room), jnp.float32),
        finished=jnp.zeros((num_rows,), bool),
        steps=jnp.ones((num_rows,), jnp.int32),
        cache=cache,
    )
    token = request.sampler(logits, position_keys(progress.keys, text), text)
    return append(progress, token, logits, request, progress.steps > 0), context


def for_samples(request: Request, rows_of_prompts: Any) -> Any:
    """The rows of the prompts, repeated for their samples: a prompt is read once."""
    if request.num_samples == 1:
        return rows_of_prompts
    return select_rows(rows_of_prompts, jnp.repeat(jnp.arange(request.ids.shape[0]), request.num_samples))


def advance(model: Model, request: Request, progress: Progress, context: Any) -> Progress:
    """One more token in every row that has not ended."""
    text, running = progress.text, ~progress.finished
    # An ended row gets padding, which takes at most a slot of its cache.
    position_ids = jnp.where(running[:, None], text.last_positions(1), -1)
    tokens = Tokens(text.last(1), position_ids, jnp.zeros_like(position_ids), context)
    logits, cache = model(tokens, progress.cache)
    token = request.sampler(logits[:, 0], position_keys(progress.keys, text), text)
    progress = dataclasses.replace(progress, cache=cache, steps=progress.steps + running.astype(jnp.int32))
    return append(progress, token, logits[:, 0], request, running)


def append(progress: Progress, token: Array, logits: Array, request: Request, where: Array) -> Progress:
    """Writes a token to the rows where `where` is True, and marks the rows that it ends."""
    text, (num_rows, room) = progress.text, progress.log_probs.shape
    log_prob = _log_prob(logits.astype(jnp.float32), token)
    index = jnp.where(where, text.lengths - text.prompt_lengths, room)  # out-of-range: dropped
    log_probs = progress.log_probs.at[jnp.arange(num_rows), index].set(log_prob, mode="drop")
    text = text.append(token, where)
    ended = text.ends_with(request.stops) | (text.lengths - text.prompt_lengths >= request.max_new_tokens)
    return dataclasses.replace(progress, text=text, log_probs=log_probs, finished=progress.finished | (where & ended))


def _log_prob(logits: Float[Array, "R V"], token: Int[Array, "R"]) -> Float[Array, "R"]:
    """`log_softmax` at one token of each row, without those of all tokens."""
    peak = logits.max(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return (chosen - peak - jnp.log(jnp.exp(logits - peak).sum(-1, keepdims=True)))[:, 0]


def position_keys(keys: Array | None, text: Text, stream: int | None = None) -> Array | None:
    """One key a row for the next token; `stream` numbers the draws at one position."""
    if keys is None:
        return None
    keys = jax.vmap(jax.random.fold_in)(keys, text.lengths)
    return keys if stream is None else jax.vmap(lambda key: jax.random.fold_in(key, stream))(keys)


def result(progress: Progress, request: Request) -> Generation:
    """The result for the user."""
    text, room = progress.text, progress.log_probs.shape[1]
    lengths = text.lengths - text.prompt_lengths
    return Generation(text.written(room, request.fill), lengths, progress.log_probs, progress.steps)
