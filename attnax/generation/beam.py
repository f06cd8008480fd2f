"""Beam search: likely texts, found by keeping the best few running texts of each prompt, in one compiled program."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache import select_rows
from attnax.generation.prompt import read_prompt
from attnax.generation.request import Request
from attnax.generation.step import Model, Step, Tokens
from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Float, Int

__all__ = ["Beams", "EarlyStopping", "beam_search"]

EarlyStopping = Literal["heuristic", "first", "never"]

_WORST = -1e9  # the score of a missing beam; finite, so that scores can be ordered and divided


class Beams(NamedTuple):
    """The texts that a beam search found, the best first.

    Attributes:
        tokens: (batch, num_beams, max_new_tokens) int32; after its end a text is filled as in `Generation`.
        lengths: (batch, num_beams) int32, the tokens of each text, with its end token or stop sequence.
        scores: (batch, num_beams) float32, log-probability / lengths ** length_penalty. Where penalties leave fewer
            texts than beams, the missing texts have length 0 and the score -1e9.
    """

    tokens: Int[Array, "B N T"]
    lengths: Int[Array, "B N"]
    scores: Float[Array, "B N"]


@pytree_dataclass
class _Search:
    """The state of the loop for B prompts: N running beams each, and the N best ended texts."""

    text: Text  # B * N rows
    log_probs: Float[Array, "B N"]
    done: Text  # B * N rows
    scores: Float[Array, "B N"]
    ended: Array  # (B, N), whether this row of `done` holds a text
    hopeful: Array  # (B,), whether a running beam may still become one of the best texts
    cache: Any


@partial(jax.jit, static_argnames=("step", "num_beams", "max_new_tokens", "early_stopping"))
def beam_search(
    step: Step,
    state: Any,
    request: Request,
    cache: Any,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float | Array = 1.0,
    early_stopping: EarlyStopping = "heuristic",
) -> Beams:
    """The best texts after each prompt.

    A step scores every continuation of every running beam. A continuation among the best `num_beams` that ends joins
    the ended texts, of which the best `num_beams` are kept. The best continuations that do not end run on. Scores and
    early stopping are as in Hugging Face transformers.

    Args:
        step: the model.
        state: its parameters.
        request: the prompts; only the penalties of its sampler apply, to log-probabilities.
        cache: of the prompts' rows; may be Planned.
        num_beams: beams of each prompt.
        max_new_tokens: static, the room of the result; at least the request's max_new_tokens.
        length_penalty: exponent of the length that the log-probability of a text is divided by.
        early_stopping: "first" stops with num_beams ended texts; "heuristic" when no running beam, if it ended now,
            would beat the worst ended text; "never" when no running beam can beat that text at any length.
    """
    batch = request.ids.shape[0]
    model = Model(step, state)
    rows = jnp.repeat(jnp.arange(batch), num_beams)
    logits, cache, context, text = select_rows(read_prompt(model, request, cache, max_new_tokens), rows)
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, _WORST)  # all beams are equal at first: only one runs on
    search = _Search(
        text=text,
        log_probs=jnp.broadcast_to(first, (batch, num_beams)),
        done=text,
        scores=jnp.full((batch, num_beams), _WORST, jnp.float32),
        ended=jnp.zeros((batch, num_beams), bool),
        hopeful=jnp.ones((batch,), bool),
        cache=cache,
    )
    request = dataclasses.replace(request, sampler=request.sampler.repeat_rows(batch, num_beams))
    choose = partial(_choose, request=request, length_penalty=length_penalty, early_stopping=early_stopping)

    def unfinished(search: _Search) -> Array:
        written = search.text.lengths - search.text.prompt_lengths
        running = search.hopeful
        if early_stopping == "first":
            running = running & ~search.ended.all(1)
        return running.any() & (written < request.max_new_tokens).any()

    def advance(search: _Search) -> _Search:
        text = search.text
        wanted = jnp.zeros((text.lengths.shape[0], 1), jnp.int32)
        tokens = Tokens(text.last(1), text.last_positions(1), wanted, context)
        logits, cache = model(tokens, search.cache)
        return choose(dataclasses.replace(search, cache=cache), logits[:, 0])

    search = lax.while_loop(unfinished, advance, choose(search, logits))
    lengths = (search.done.lengths - search.done.prompt_lengths).reshape(batch, num_beams)
    tokens = search.done.written(max_new_tokens, request.fill).reshape(batch, num_beams, max_new_tokens)
    return Beams(tokens, lengths, search.scores)


def _choose(
    search: _Search, logits: Array, *, request: Request, length_penalty: float | Array, early_stopping: EarlyStopping
) -> _Search:
    """The next running beams and the best ended texts, from the logits (B * N, V) of the next token."""
    (batch, num_beams), size = search.log_probs.shape, logits.shape[-1]
    scores = request.sampler.penalise(jax.nn.log_softmax(logits.astype(jnp.float32)), search.text)
    scores = (scores.reshape(batch, num_beams, size) + search.log_probs[..., None]).reshape(batch, -1)
    # Each beam has at most one continuation for each stop sequence that ends it, so at least num_beams do not end.
    count = min((1 + max(1, request.stops.shape[0])) * num_beams, scores.shape[1])
    scores, index = lax.top_k(scores, count)
    parents = (jnp.arange(batch, dtype=jnp.int32)[:, None] * num_beams + index // size).reshape(-1)
    text = search.text.select_rows(parents).append((index % size).reshape(-1))
    written = (text.lengths - text.prompt_lengths).reshape(batch, count)
    ends = text.ends_with(request.stops).reshape(batch, count) | (written >= request.max_new_tokens)

    # Only a continuation among the best num_beams may join the ended texts.
    stops = ends & (jnp.arange(count) < num_beams)[None]
    if early_stopping == "first":
        stops = stops & ~search.ended.all(1, keepdims=True)
    exists = scores > _WORST / 2
    stops = stops & search.hopeful[:, None] & exists
    penalised = jnp.where(stops, scores / written.astype(jnp.float32) ** length_penalty, _WORST)
    merged = jnp.concatenate([search.scores, penalised], axis=1)
    best, kept = lax.top_k(merged, num_beams)
    done = _pick(jax.tree.map(partial(_beside, batch=batch), search.done, text), kept)
    ended = jnp.take_along_axis(jnp.concatenate([search.ended, stops], axis=1), kept, axis=1)

    log_probs, running = lax.top_k(jnp.where(ends | ~exists, _WORST, scores), num_beams)
    parents = jnp.take_along_axis(parents.reshape(batch, count), running, axis=1).reshape(-1)
    text = _pick(jax.tree.map(lambda x: x.reshape(batch, count, *x.shape[1:]), text), running)
    # The score of the best running beam at the length that gives it the best score.
    reached = (text.lengths - text.prompt_lengths).reshape(batch, num_beams)[:, 0].astype(jnp.float32)
    length = reached
    if early_stopping == "never":
        length = jnp.where(jnp.asarray(length_penalty) > 0, jnp.float32(request.max_new_tokens), reached)
    hope = log_probs[:, 0] / length**length_penalty
    worst = jnp.where(ended.all(1), best.min(1), _WORST)
    return _Search(
        text,
        log_probs,
        done,
        best,
        ended,
        search.hopeful & (hope > worst) & (log_probs[:, 0] > _WORST / 2),
        select_rows(search.cache, parents),
    )


def _beside(left: Array, right: Array, batch: int) -> Array:
    return jnp.concatenate([x.reshape(batch, -1, *x.shape[1:]) for x in (left, right)], axis=1)


def _pick(text: Text, index: Array) -> Text:
    """The texts (B, C, ...) named by `index` (B, N), as B * N rows."""

    def pick(x: Array) -> Array:
        where = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, where, axis=1).reshape(-1, *x.shape[2:])

    return jax.tree.map(pick, text)
