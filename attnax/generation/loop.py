"""Autoregressive generation: one compiled program reads the prompt, a second loops over the new tokens.

With two programs, prompts of different lengths share the loop, and a single new token needs no loop. This package needs
no model class, only a `Step`: a function `(state, tokens, cache) -> (logits, cache)` of new tokens of every row and a
cache of the earlier tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.cache import select_rows
from attnax.checks import is_concrete
from attnax.generation.request import Request, padded_length
from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Bool, Float, Int

__all__ = ["Generation", "Planned", "Step", "Tokens", "generate", "stream"]


class Tokens(NamedTuple):
    """The input of a step.

    Attributes:
        ids: (rows, T).
        position_ids: (rows, T), each token's index within its row's text, -1 for padding.
        wanted: (rows, n), the indices within T of the tokens after which logits are wanted.
        context: arrays that a row attends beside its text, rows first: an encoder's keys and values, or None.
    """

    ids: Int[Array, "R T"]
    position_ids: Int[Array, "R T"]
    wanted: Int[Array, "R n"]
    context: Any = None


@runtime_checkable
class Step(Protocol):
    """A model that decodes; a step must hash by value, since it is a key of compiled programs."""

    def __call__(self, state: Any, tokens: Tokens, cache: Any, /) -> tuple[Array, Any]:
        """Logits (rows, n, vocabulary) of the token after each wanted token, and the cache with all tokens appended."""


@pytree_dataclass
class Model:
    """A step with its parameters."""

    step: Step = dataclasses.field(metadata={"static": True})
    state: Any

    def __call__(self, tokens: Tokens, cache: Any) -> tuple[Array, Any]:
        """As `Step`."""
        return self.step(self.state, tokens, cache)

    def made(self, value: Any) -> Any:
        """The cache or context; made here if it is Planned."""
        return value.make(self.state) if isinstance(value, Planned) else value


class Generation(NamedTuple):
    """The generated texts; rows are the prompts, or the samples of the first prompt, of the second, and so on.

    Attributes:
        tokens: (rows, max_new_tokens) int32; after its end a row is filled with the first end token, else with padding.
        lengths: (rows,) int32, the tokens of each row, with its end token or stop sequence.
        log_probs: (rows, max_new_tokens) float32, the model's log-probability of each token (before penalties,
            temperature and cuts); 0 after the end.
        steps: (rows,) int32, the calls of the model for the row: one for each token, fewer with a draft.
    """

    tokens: Int[Array, "R T"]
    lengths: Int[Array, "R"]
    log_probs: Float[Array, "R T"]
    steps: Int[Array, "R"]


@runtime_checkable
class Planned(Protocol):
    """A pytree from which the program that reads the prompt makes a cache or a context."""

    def make(self, state: Any, /) -> Any:
        """The empty caches, or the context of the rows, from the parameters of the model."""


@pytree_dataclass
class Progress:
    """The state that the loop carries from token to token."""

    keys: Array | None  # (R,), None where nothing is drawn
    text: Text
    log_probs: Float[Array, "R T"]
    finished: Bool[Array, "R"]
    steps: Int[Array, "R"]
    cache: Any


def generate(step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int) -> tuple[Generation, Any]:
    """Reads the prompt and writes until every row has ended.

    Args:
        step: the model.
        state: its parameters.
        request: the prompts, and how to continue them.
        cache: of the prompts' rows; must have room for the prompt and max_new_tokens - 1 tokens. The cache is donated,
            unless there are several samples, whose cache has other shapes. It may be Planned.
        max_new_tokens: static, the room of the result; at least the request's max_new_tokens, which may be traced.

    Returns:
        The generation and the cache, which holds all tokens but the last.
    """
    model = Model(step, state)
    progress, context, written, _ = _read_prompt(model, request, cache, max_new_tokens)
    if is_concrete(progress.finished) and np.asarray(progress.finished).all():
        return written, progress.cache
    rest = dataclasses.replace(progress, cache=None)
    return _write_rest(model, request.after_prompt(), rest, progress.cache, context)


def stream(step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int) -> Iterator[np.ndarray]:
    """Yields the next token of each row, (rows,) int32, as soon as drawn; the same tokens as `generate`.

    Stops after the request's max_new_tokens, or when every row has ended.
    """
    model = Model(step, state)
    progress, context, _, token = _read_prompt(model, request, cache, max_new_tokens)
    request = request.after_prompt()
    if not is_concrete(token):
        raise ValueError("stream: tokens must be known to be yielded; got traced ones. Use generate under jit.")
    while True:
        yield np.asarray(token)
        if np.asarray(progress.finished).all():
            return
        progress, token = _next_token(model, request, progress, context)


def _begin(model: Model, request: Request, cache: Any, room: int) -> tuple[Progress, Any, Generation, Array]:
    progress, context = start(model, request, cache, room)
    return progress, context, result(progress, request), progress.text.last(1)[:, 0]


_begin_program = jax.jit(_begin, static_argnames="room")
_begin_in_place = jax.jit(_begin, static_argnames="room", donate_argnames="cache")


def _read_prompt(model: Model, request: Request, cache: Any, room: int) -> tuple[Progress, Any, Generation, Array]:
    """The first program: the results of `start`, the generation so far and the first token of each row.

    The cache is donated if each prompt has one sample.
    """
    return (_begin_in_place if request.num_samples == 1 else _begin_program)(model, request, cache, room)


@partial(jax.jit, donate_argnames="cache")
def _write_rest(model: Model, request: Request, progress: Progress, cache: Any, context: Any) -> tuple[Generation, Any]:
    def go_on(progress: Progress) -> Progress:
        return advance(model, request, progress, context)

    progress = dataclasses.replace(progress, cache=cache)
    progress = lax.while_loop(lambda progress: ~progress.finished.all(), go_on, progress)
    return result(progress, request), progress.cache


@partial(jax.jit, donate_argnames="progress")
def _next_token(model: Model, request: Request, progress: Progress, context: Any) -> tuple[Progress, Int[Array, "R"]]:
    before = progress.text.lengths
    progress = advance(model, request, progress, context)
    text = progress.text
    return progress, jnp.where(text.lengths > before, text.last(1)[:, 0], request.fill)


def start(model: Model, request: Request, cache: Any, room: int, spare: int = 0) -> tuple[Progress, Any]:
    """Reads the prompt and draws the first of `room` tokens: the progress, and the context of each row."""
    cache, context = model.made(cache), model.made(request.context)
    logits, cache = model(prompt_tokens(request, context), cache)
    logits = logits[:, 0]
    text = Text.of_prompt(request.ids, request.position_ids, text_length(request, room + spare))
    cache, context, logits, text = for_samples(request, (cache, context, logits, text))
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


def text_length(request: Request, room: int) -> int:
    """The room of a row's text in tokens: one of a few lengths, so that prompts of several lengths share the loop."""
    return padded_length(request.ids.shape[1] + room)


def for_samples(request: Request, rows_of_prompts: Any) -> Any:
    """The rows of the prompts, repeated for their samples: a prompt is read once."""
    if request.num_samples == 1:
        return rows_of_prompts
    return select_rows(rows_of_prompts, jnp.repeat(jnp.arange(request.ids.shape[0]), request.num_samples))


def prompt_tokens(request: Request, context: Any) -> Tokens:
    """The prompt as the input of a step; logits are wanted after the last real token of each row."""
    ids, position_ids = jnp.asarray(request.ids), jnp.asarray(request.position_ids)
    return Tokens(ids, position_ids, position_ids.argmax(axis=1)[:, None], context)


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
