"""Speculative decoding: a small model drafts a few tokens, the large model reads them at once and accepts some.

A drafted token x, drawn from q, is accepted with probability min(1, p(x) / q(x)); the first rejected token is replaced
by a draw from max(p - q, 0), normalised. So with any draft every token has the distribution p of the large model;
at temperature 0 the tokens are the same as without a draft.

References:
    Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2022,
        https://arxiv.org/abs/2211.17192, algorithm 1 and appendix A.1.
    C. Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023,
        https://arxiv.org/abs/2302.01318.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache import forget
from attnax.generation.candidates import draw_token, likeliest_token
from attnax.generation.loop import (
    Generation,
    Progress,
    append,
    can_donate,
    for_samples,
    position_keys,
    result,
    start,
)
from attnax.generation.prompt import TextCaches, read_prompt
from attnax.generation.request import Request
from attnax.generation.step import Model, Step, Tokens
from attnax.generation.text import Text
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Bool, Float, Int

__all__ = ["Draft", "accept_drafted", "generate_with_draft"]

_ACCEPT, _REPLACE = 1, 2  # draws at one position, independent of each other and of the draft's draw


@pytree_dataclass
class Draft:
    """The small model.

    Attributes:
        step: over the same vocabulary.
        state: its parameters.
        context: as in `Tokens`.
    """

    step: Step = dataclasses.field(metadata={"static": True})
    state: Any
    context: Any = None


def generate_with_draft(
    step: Step,
    state: Any,
    request: Request,
    cache: Any,
    draft: Draft,
    draft_cache: Any,
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
) -> tuple[Generation, TextCaches, Any]:
    """`generate` with a draft: the same tokens at temperature 0, the same distribution at other temperatures.

    Where the cache holds an earlier text, the draft reads that text too: its cache begins empty.

    Args:
        step: the model.
        state: its parameters.
        request: the prompts, and how to continue them.
        cache: of the prompts' rows; must be able to forget tokens, with room for num_draft_tokens more than in
            `generate`. The cache is donated as in `generate`.
        draft: the small model.
        draft_cache: the same for the draft.
        max_new_tokens: static, at least 1.
        num_draft_tokens: static, tokens drafted in each round.

    Returns:
        The generation, whose `steps` count the calls of the large model, the texts with the cache, and the draft's
        cache.
    """
    run = _generate_in_place if can_donate(request, cache, draft_cache) else _generate
    return run(Model(step, state), request, cache, draft, draft_cache, max_new_tokens, num_draft_tokens)


def _write_all(
    model: Model, request: Request, cache: Any, draft: Draft, draft_cache: Any, room: int, num_draft_tokens: int
) -> tuple[Generation, TextCaches, Any]:
    progress, context = start(model, request, cache, room, num_draft_tokens)
    small = Model(draft.step, draft.state)
    prompt = read_prompt(small, dataclasses.replace(request.as_one_prompt(), context=draft.context), draft_cache, 0)
    draft_cache, draft_context = for_samples(request, (prompt.cache, prompt.context))

    def go_on(carry: tuple[Progress, Any]) -> tuple[Progress, Any]:
        progress, draft_cache = carry
        drafted, q, draft_cache = _write_draft(small, draft_context, draft_cache, request, progress, num_draft_tokens)
        return _read_draft(model, request, progress, context, drafted, q), draft_cache

    def unfinished(carry: tuple[Progress, Any]) -> Array:
        return ~carry[0].finished.all()

    progress, draft_cache = lax.while_loop(unfinished, go_on, (progress, draft_cache))
    return result(progress, request), progress.caches, draft_cache


_STATIC = ("room", "num_draft_tokens")
_generate = jax.jit(_write_all, static_argnames=_STATIC)
_generate_in_place = jax.jit(_write_all, static_argnames=_STATIC, donate_argnames=("cache", "draft_cache"))


def _write_draft(
    draft: Model, context: Any, cache: Any, request: Request, progress: Progress, count: int
) -> tuple[Int[Array, "R k"], Float[Array, "R k V"], Any]:
    """`count` tokens of the small model, the distributions that they were drawn from, and its cache."""
    text, running = progress.text, ~progress.finished
    # The last two tokens are read: if the whole last draft was accepted, the small model has not read its last token.
    cache = forget(cache, text.lengths - 2)

    def read(text: Text, cache: Any, num_tokens: int) -> tuple[Array, Array, Any]:
        position_ids = jnp.where(running[:, None], text.last_positions(num_tokens), -1)
        wanted = jnp.full((text.lengths.shape[0], 1), num_tokens - 1, jnp.int32)
        logits, cache = draft(Tokens(text.last(num_tokens), position_ids, wanted, context), cache)
        q = request.sampler.probabilities(logits[:, 0], text)
        return _draw(q, position_keys(progress.keys, text)), q, cache

    def go_on(carry: tuple[Text, Array, Any], _: None) -> tuple[tuple[Text, Array, Any], tuple[Array, Array]]:
        text, token, cache = carry
        text = text.append(token)
        token, q, cache = read(text, cache, 1)
        return (text, token, cache), (token, q)

    token, q, cache = read(text, cache, 2)
    (_, _, cache), (tokens, qs) = lax.scan(go_on, (text, token, cache), None, length=count - 1)
    drafted = jnp.concatenate([token[None], tokens]).swapaxes(0, 1)
    return drafted, jnp.concatenate([q[None], qs]).swapaxes(0, 1), cache


def _read_draft(model: Model, request: Request, progress: Progress, context: Any, drafted: Array, q: Array) -> Progress:
    """Reads the draft with the model, and writes the accepted tokens and one token more."""
    text, running, count = progress.text, ~progress.finished, drafted.shape[1]
    num_rows = drafted.shape[0]
    steps = jnp.arange(count + 1, dtype=jnp.int32)[None]
    position_ids = jnp.where(running[:, None], text.last_positions(1) + steps, -1)
    ids = jnp.concatenate([text.last(1), drafted], axis=1)
    wanted = jnp.broadcast_to(steps, (num_rows, count + 1))
    logits, cache = model(Tokens(ids, position_ids, wanted, context), progress.cache)

    progress = dataclasses.replace(progress, cache=cache, steps=progress.steps + running.astype(jnp.int32))
    going_on = running  # rows that accepted all tokens so far
    for index in range(count + 1):
        text = progress.text  # of a row that goes on, with the draft up to here
        p = request.sampler.probabilities(logits[:, index], text)
        if index == count:  # one token more, which was not drafted
            token, fits = _draw(p, position_keys(progress.keys, text, _REPLACE)), ~running
        else:
            uniform = _uniform(position_keys(progress.keys, text, _ACCEPT), num_rows)
            fits = accept_drafted(p, q[:, index], drafted[:, index], uniform)
            replaced = _draw(_residual(p, q[:, index]), position_keys(progress.keys, text, _REPLACE))
            token = jnp.where(fits, drafted[:, index], replaced)
        progress = append(progress, token, logits[:, index], request, going_on)
        going_on = going_on & fits & ~progress.finished
    # The last token is not read yet; later drafted tokens are removed.
    return dataclasses.replace(progress, cache=forget(progress.cache, progress.text.lengths - 1))


def accept_drafted(
    p: Float[Array, "R V"], q: Float[Array, "R V"], token: Int[Array, "R"], uniform: Float[Array, "R"]
) -> Bool[Array, "R"]:
    """True with probability min(1, p(token) / q(token)), for `uniform` in [0, 1)."""
    p, q = (jnp.take_along_axis(x, token[:, None], axis=1)[:, 0] for x in (p, q))
    return uniform * q < p


def _residual(p: Array, q: Array) -> Array:
    """The distribution that replaces a rejected token: max(p - q, 0), up to a factor."""
    rest = jnp.maximum(p - q, 0)
    return jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)  # p = q up to rounding: no token is rejected


def _uniform(keys: Array | None, num_rows: int) -> Array:
    """A number in [0, 1) for each row; without keys all probabilities are 0 or 1, so 0.5 serves."""
    return jnp.full(num_rows, 0.5) if keys is None else jax.vmap(jax.random.uniform)(keys)


def _draw(weights: Array, keys: Array | None) -> Array:
    if keys is None:
        return likeliest_token(weights)
    return draw_token(jnp.log(weights), keys)
