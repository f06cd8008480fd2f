"""Autoregressive generation: one compiled program that reads the prompt and then loops over the new tokens.

Nothing here knows a model. A `Step` is a function `(state, ids, position_ids, cache) -> (logits, cache)`, where
`logits` (batch, vocabulary) follow each row's last token and a position of -1 marks padding.
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

from attnax.generation.samplers import Sampler
from attnax.typing import Array, ArrayLike, Bool, Float, Int, pytree_dataclass

__all__ = ["Generation", "Request", "Step", "generate", "make_request", "row_keys", "stream"]


@runtime_checkable
class Step(Protocol):
    """Must hash by value: the compiled program is found again by it."""

    def __call__(self, state: Any, ids: Array, position_ids: Array, cache: Any, /) -> tuple[Array, Any]: ...


class Generation(NamedTuple):
    """What was generated after the prompt.

    Attributes:
        tokens: (batch, max_new_tokens) int32; after its end a row is filled with the end token.
        lengths: (batch,) int32, tokens of each row up to and with its end token.
        log_probs: (batch, max_new_tokens) float32, the model's log-probability of each token (before temperature
            and cuts); 0 after the end.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, B]
    log_probs: Float[Array, "B T"]


@pytree_dataclass
class Request:
    """What to continue, and how.

    Attributes:
        ids: (batch, T) prompt.
        position_ids: (batch, T), each token's index within its row's prompt, -1 for padding.
        keys: one a row. A token at position p is drawn with `fold_in(key, p)`, so a row's text depends on its key and
            prompt, not on its neighbours.
        sampler: draws tokens.
        end_token: ends a row; negative for none.
    """

    ids: Int[Array, "B T"]
    position_ids: Int[Array, "B T"]
    keys: Array
    sampler: Sampler
    end_token: Int[Array, ""]


@pytree_dataclass
class _Progress:
    """Everything that the loop carries from token to token."""

    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, B]
    count: Int[Array, ""]  # tokens written to every row
    positions: Int[Array, B]  # of the last token
    finished: Bool[Array, B]
    cache: Any


def make_request(
    prompt_ids: Int[ArrayLike, "B T"],
    *,
    vocab_size: int,
    max_new_tokens: int,
    sampler: Sampler | None,
    key: Array | None,
    padding_mask: Bool[ArrayLike, "B T"] | None,
    end_token: int | None,
) -> Request:
    """The arguments of a model's `generate`, checked.

    Raises:
        ValueError: arguments out of range, a row without a token, or sampling without a key.
    """
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] < 1:
        raise ValueError(
            f"generate: prompt_ids must be (batch, length) with at least one token; got {prompt_ids.shape}."
        )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1; got max_new_tokens={max_new_tokens}.")
    known = np.asarray(prompt_ids)
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"generate: token ids must be at least 0 and below {vocab_size}; got {low if low < 0 else high}."
        )
    real = np.ones(known.shape, bool) if padding_mask is None else np.asarray(padding_mask)
    if real.shape != known.shape or real.dtype != bool or not real.any(axis=1).all():
        raise ValueError(
            f"generate: padding_mask must be boolean {known.shape} with a real token in every row; "
            f"got shape={real.shape}, dtype={real.dtype}."
        )
    sampler = (Sampler() if sampler is None else sampler).as_arrays()
    if key is None:
        if float(sampler.temperature) > 0:
            raise ValueError(
                f"generate: sampling needs a key; got temperature={sampler.temperature}, key=None. "
                "Pass key=jax.random.key(seed)."
            )
        key = jax.random.key(0)
    return Request(
        ids=jnp.asarray(prompt_ids),
        position_ids=jnp.asarray(np.where(real, np.cumsum(real, axis=1) - 1, -1), jnp.int32),
        keys=row_keys(key, known.shape[0]),
        sampler=sampler,
        end_token=jnp.int32(-1 if end_token is None else end_token),
    )


def row_keys(key: Array, batch: int) -> Array:
    """One key a row: `key` itself if it holds `batch` keys, else `fold_in(key, row)`.

    Raises:
        ValueError: not a typed key, or another number of them.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise ValueError(
            f"generate: key must be one typed key (jax.random.key(seed)) or one a row, here {batch}; "
            f"got shape={key.shape}, dtype={key.dtype}."
        )
    if key.shape:
        return key
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))


@partial(jax.jit, static_argnames=("step", "max_new_tokens"), donate_argnames="cache")
def generate(step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int) -> tuple[Generation, Any]:
    """Reads the prompt and writes up to `max_new_tokens`, in one program.

    Args:
        step: the model.
        state: its parameters.
        request: what to continue, and how.
        cache: donated; must have room for the prompt and max_new_tokens - 1 tokens.
        max_new_tokens: static, at least 1.

    Returns:
        The generation and the cache, which holds all tokens but the last.
    """
    progress = _read_prompt(step, state, request, cache, max_new_tokens)
    progress = _write(step, state, request, progress, max_new_tokens)
    return Generation(progress.tokens, progress.lengths, progress.log_probs), progress.cache


def stream(step: Step, state: Any, request: Request, cache: Any, *, max_new_tokens: int) -> Iterator[np.ndarray]:
    """Yields each row's next token, (batch,) int32, as soon as it is drawn; the same tokens as `generate`.

    Stops after `max_new_tokens`, or when every row has ended.
    """
    progress = _start_stream(step, state, request, cache, max_new_tokens)
    for count in range(1, max_new_tokens + 1):
        yield np.asarray(progress.tokens[:, count - 1])
        if count == max_new_tokens or progress.finished.all():
            return
        progress = _continue_stream(step, state, request, progress, jnp.int32(count + 1))


def _read_prompt(step: Step, state: Any, request: Request, cache: Any, max_new_tokens: int) -> _Progress:
    batch = request.ids.shape[0]
    logits, cache = step(state, request.ids, request.position_ids, cache)
    progress = _Progress(
        tokens=jnp.full((batch, max_new_tokens), jnp.maximum(request.end_token, 0), jnp.int32),
        log_probs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        positions=request.position_ids.max(axis=1, initial=-1),
        finished=jnp.zeros((batch,), bool),
        cache=cache,
    )
    return _append(progress, logits, request)


def _write(step: Step, state: Any, request: Request, progress: _Progress, limit: int | Array) -> _Progress:
    """Goes on until `limit` tokens are written or every row has ended."""

    def unfinished(progress: _Progress) -> Array:
        return (progress.count < limit) & ~progress.finished.all()

    def advance(progress: _Progress) -> _Progress:
        last = lax.dynamic_index_in_dim(progress.tokens, progress.count - 1, axis=1)
        # A row that has ended goes on as padding, so that it costs its cache nothing but the slot.
        position_ids = jnp.where(progress.finished, -1, progress.positions)[:, None]
        logits, cache = step(state, last, position_ids, progress.cache)
        return _append(dataclasses.replace(progress, cache=cache), logits, request)

    return lax.while_loop(unfinished, advance, progress)


def _append(progress: _Progress, logits: Array, request: Request) -> _Progress:
    """Draws the token that follows and writes it to the rows that have not ended."""
    positions = progress.positions + 1
    token = request.sampler(logits, jax.vmap(jax.random.fold_in)(request.keys, positions))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), token[:, None], axis=-1)[:, 0]
    running = ~progress.finished
    token = jnp.where(running, token, jnp.maximum(request.end_token, 0))
    write = partial(lax.dynamic_update_index_in_dim, index=progress.count, axis=1)
    return dataclasses.replace(
        progress,
        tokens=write(progress.tokens, token),
        log_probs=write(progress.log_probs, jnp.where(running, log_prob, 0.0)),
        lengths=progress.lengths + running,
        count=progress.count + 1,
        positions=positions,
        finished=progress.finished | (token == request.end_token),
    )


_start_stream = jax.jit(_read_prompt, static_argnames=("step", "max_new_tokens"), donate_argnames="cache")
_continue_stream = jax.jit(_write, static_argnames="step", donate_argnames="progress")
