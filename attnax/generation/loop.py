"""Autoregressive generation: one compiled program that reads the prompt and then loops over the new tokens.

Nothing here knows a model. A `Step` is a function `(state, tokens, cache) -> (logits, cache)` of some new tokens of
every row and of a cache of what came before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.cache import select_rows
from attnax.generation.request import Request
from attnax.generation.text import Text
from attnax.typing import Array, Bool, Float, Int, pytree_dataclass

__all__ = ["Generation", "Step", "Tokens", "generate", "stream"]


class Tokens(NamedTuple):
    """What a step reads.

    Attributes:
        ids: (rows, T).
        position_ids: (rows, T), each token's index within its row's text, -1 for padding.
        wanted: (rows, n), the indices within T of the tokens that the logits are to follow.
        context: what a row attends beside its text, with the rows first: an encoder's keys and values, or None.
    """

    ids: Int[Array, "R T"]
    position_ids: Int[Array, "R T"]
    wanted: Int[Array, "R n"]
    context: Any = None


@runtime_checkable
class Step(Protocol):
    """A model that decodes; it must hash by value, since the compiled program is found again by it."""

    def __call__(self, state: Any, tokens: Tokens, cache: Any, /) -> tuple[Array, Any]:
        """Logits (rows, n, vocabulary) of what follows the wanted tokens, and the cache with all tokens appended."""


class Generation(NamedTuple):
    """What was generated after the prompt; rows are those of the prompts, or the samples of the first, the second, ...

    Attributes:
        tokens: (rows, max_new_tokens) int32; after its end a row is filled with the first end token, else with padding.
        lengths: (rows,) int32, tokens of each row up to and with what ended it.
        log_probs: (rows, max_new_tokens) float32, the model's log-probability of each token (before penalties,
            temperature and cuts); 0 after the end.
        steps: (rows,) int32, how often the model ran for the row: once for each token, or less often with a draft.
    """

    tokens: Int[Array, "R T"]
    lengths: Int[Array, R]
    log_probs: Float[Array, "R T"]
    steps: Int[Array, R]


@pytree_dataclass
class Progress:
    """Everything that the loop carries from token to token."""

    text: Text
    log_probs: Float[Array, "R T"]
    finished: Bool[Array, R]
    steps: Int[Array, R]
    cache: Any


def generate(step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int) -> tuple[Generation, Any]:
    """Reads the prompt and writes up to `max_new_tokens`, in one program.

    Args:
        step: the model.
        state: its parameters.
        request: what to continue, and how.
        cache: of the prompts' rows; must have room for the prompt and max_new_tokens - 1 tokens. It is donated, unless
            there are several samples, whose cache has other shapes.
        max_new_tokens: static, at least 1.

    Returns:
        The generation and the cache, which holds all tokens but the last.
    """
    run = _generate_in_place if request.keys.shape[0] == request.ids.shape[0] else _generate
    return run(step, state, request, cache, max_new_tokens)


def _write_all(step: Step, state: Any, request: Request, cache: Any, max_new_tokens: int) -> tuple[Generation, Any]:
    progress, context = start(step, state, request, cache, max_new_tokens)

    def go_on(progress: Progress) -> Progress:
        return advance(step, state, request, progress, context)

    progress = lax.while_loop(lambda progress: ~progress.finished.all(), go_on, progress)
    return result(progress, request), progress.cache


_generate = jax.jit(_write_all, static_argnames=("step", "max_new_tokens"))
_generate_in_place = jax.jit(_write_all, static_argnames=("step", "max_new_tokens"), donate_argnames="cache")


def stream(step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int) -> Iterator[np.ndarray]:
    """Yields each row's next token, (rows,) int32, as soon as it is drawn; the same tokens as `generate`.

    Stops after `max_new_tokens`, or when every row has ended.
    """
    begin = _start_stream_in_place if request.keys.shape[0] == request.ids.shape[0] else _start_stream
    progress, context = begin(step, state, request, cache, max_new_tokens)
    for count in range(max_new_tokens):
        yield np.asarray(_column(progress, request, jnp.int32(count)))
        if count + 1 == max_new_tokens or progress.finished.all():
            return
        progress = _continue_stream(step, state, request, progress, context)


def start(step: Step, state: Any, request: Request, cache: Any, room: int, spare: int = 0) -> tuple[Progress, Any]:
    """Reads the prompt and draws the first token; `room` tokens may follow. Also the context of each row."""
    logits, cache = step(state, prompt_tokens(request), cache)
    context, logits = request.context, logits[:, 0]
    text = Text.of_prompt(request.ids, request.position_ids, room + spare)
    cache, context, logits, text = for_samples(request, (cache, context, logits, text))
    num_rows = request.keys.shape[0]
    progress = Progress(
        text=text,
        log_probs=jnp.zeros((num_rows, room), jnp.float32),
        finished=jnp.zeros((num_rows,), bool),
        steps=jnp.ones((num_rows,), jnp.int32),
        cache=cache,
    )
    token = request.sampler(logits, position_keys(request, progress.text), progress.text)
    return append(progress, token, logits, request, progress.steps > 0), context


def for_samples(request: Request, rows_of_prompts: Any) -> Any:
    """The rows of the prompts, which are read once, as rows of their samples."""
    batch, num_rows = request.ids.shape[0], request.keys.shape[0]
    if num_rows == batch:
        return rows_of_prompts
    return select_rows(rows_of_prompts, jnp.repeat(jnp.arange(batch), num_rows // batch))


def prompt_tokens(request: Request) -> Tokens:
    """The prompt as a step reads it; the logits wanted follow the last real token of each row."""
    last = request.position_ids.argmax(axis=1)
    return Tokens(request.ids, request.position_ids, last[:, None], request.context)


def advance(step: Step, state: Any, request: Request, progress: Progress, context: Any) -> Progress:
    """One more token in every row that has not ended."""
    text, running = progress.text, ~progress.finished
    # A row that has ended goes on as padding, so that it costs its cache nothing but the slot.
    position_ids = jnp.where(running[:, None], text.last_positions(1), -1)
    tokens = Tokens(text.last(1), position_ids, jnp.zeros_like(position_ids), context)
    logits, cache = step(state, tokens, progress.cache)
    token = request.sampler(logits[:, 0], position_keys(request, text), text)
    progress = dataclasses.replace(progress, cache=cache, steps=progress.steps + running)
    return append(progress, token, logits[:, 0], request, running)


def append(progress: Progress, token: Array, logits: Array, request: Request, where: Array) -> Progress:
    """Writes a token to the rows where that is so, and looks whether it ends them."""
    text, (num_rows, room) = progress.text, progress.log_probs.shape
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), token[:, None], axis=-1)[:, 0]
    index = jnp.where(where, text.lengths - text.prompt_lengths, room)  # past the end: dropped
    log_probs = progress.log_probs.at[jnp.arange(num_rows), index].set(log_prob, mode="drop")
    text = text.append(token, where)
    ended = text.ends_with(request.stops) | (text.lengths - text.prompt_lengths >= room)
    return dataclasses.replace(progress, text=text, log_probs=log_probs, finished=progress.finished | (where & ended))


def position_keys(request: Request, text: Text, stream: int | None = None) -> Array:
    """One key a row for the token that comes next; `stream` tells several draws at one position apart."""
    keys = jax.vmap(jax.random.fold_in)(request.keys, text.lengths)
    return keys if stream is None else jax.vmap(lambda key: jax.random.fold_in(key, stream))(keys)


def result(progress: Progress, request: Request) -> Generation:
    """What was written, as users get it."""
    text, room = progress.text, progress.log_probs.shape[1]
    lengths = text.lengths - text.prompt_lengths
    return Generation(text.written(room, request.fill), lengths, progress.log_probs, progress.steps)


@jax.jit
def _column(progress: Progress, request: Request, index: Array) -> Array:
    text = progress.text
    ended = index >= text.lengths - text.prompt_lengths
    return jnp.where(ended, request.fill, text.last_column(index))


_start_stream = jax.jit(start, static_argnames=("step", "room"))
_start_stream_in_place = jax.jit(start, static_argnames=("step", "room"), donate_argnames="cache")
_continue_stream = jax.jit(advance, static_argnames="step", donate_argnames="progress")
