"""The tokens that top_k, top_p and min_p keep, and a draw from them, found among a few candidates of each row.

Each cut keeps the first tokens of a row that is ordered from the likeliest on; of equal tokens the lower comes first.
So the 256 largest logits decide a cut that keeps fewer. Where cuts keep more, or may keep more, the row takes the
sorted vocabulary. What a row takes depends on its own numbers, and so does its token.

Noise has the numbers of `jax.random.gumbel(key, (vocabulary,))`, so a draw is that of `jax.random.categorical`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnax.typing import Array, Bool, Float, Int

__all__ = ["CUTS", "Cuts", "cut_logits", "draw_kept", "draw_token", "likeliest_token"]


class Cuts(NamedTuple):
    """The numbers of the fields of a `Sampler` that cut off tokens, in the order of their use; None leaves one out."""

    top_k: Int[Array, "R"] | None = None
    top_p: Float[Array, "R"] | None = None
    min_p: Float[Array, "R"] | None = None


CUTS = Cuts._fields

_CANDIDATES = 256  # of every row, before the whole vocabulary
_LARGE = 8192  # tokens of a vocabulary whose sort takes longer than the second program takes to compile
# Probabilities are added up in another order for a few candidates than for all. Both sums are within 1e-6 of the true
# one; where that could decide, the whole vocabulary does.
_MARGIN = np.float32(4e-6)

_Found = tuple[Any, Array]
"""Results of some rows, and whether they are certain (R,)."""


class _Kept(NamedTuple):
    """What the cuts keep of each row, as far as its candidates tell.

    Attributes:
        logits: (R, C) of the candidates, the largest first.
        tokens: (R, C), the candidates.
        number: (R,), how many of the candidates are kept; all tokens are if it is the size of the vocabulary.
        certain: (R,), whether the candidates tell.
    """

    logits: Float[Array, "R C"]
    tokens: Int[Array, "R C"]
    number: Int[Array, "R"]
    certain: Bool[Array, "R"]


def likeliest_token(logits: Float[Array, "R V"]) -> Int[Array, "R"]:
    """`argmax` of each row, in less time on CPUs: a search for the maximum, and one for its first place."""
    return _likeliest(logits, _iota(logits), logits.shape[-1])


def draw_token(logits: Float[Array, "R V"], keys: Array) -> Int[Array, "R"]:
    """`jax.random.categorical` of each row with its key."""
    return likeliest_token(_noise(keys, logits.shape[-1]) + logits)


def draw_kept(logits: Float[Array, "R V"], keys: Array, cuts: Cuts, wanted: Bool[Array, "R"]) -> Int[Array, "R"]:
    """The tokens of `draw_token(cut_logits(logits, cuts), keys)`; any token in rows that are not wanted."""
    vocab_size = logits.shape[-1]

    def look(size: int, wanted: Array, logits: Array, keys: Array, cuts: Cuts) -> _Found:
        kept = _kept(size, logits, cuts)
        scores = _noise_at(keys, kept.tokens, vocab_size) + _cut(kept)
        token = _likeliest(scores, kept.tokens, vocab_size)
        return (token, wanted & (kept.number > size)), kept.certain | ~wanted

    token, is_uncut = _look(look, wanted, logits, keys, cuts)
    return lax.cond(is_uncut.any(), lambda: jnp.where(is_uncut, draw_token(logits, keys), token), lambda: token)


def cut_logits(logits: Float[Array, "R V"], cuts: Cuts, wanted: Bool[Array, "R"]) -> Float[Array, "R V"]:
    """-inf for the tokens that the cuts do not keep; anything in rows that are not wanted."""
    vocab_size = logits.shape[-1]

    def look(size: int, wanted: Array, logits: Array, cuts: Cuts) -> _Found:
        kept = _kept(size, logits, cuts)
        last = jnp.clip(kept.number - 1, 0, size - 1)[:, None]
        floor, token = (jnp.take_along_axis(x, last, axis=1) for x in (kept.logits, kept.tokens))
        is_empty, is_uncut = (kept.number == 0)[:, None], (kept.number > size)[:, None]
        floor = jnp.where(is_empty, jnp.inf, jnp.where(is_uncut, -jnp.inf, floor))
        return (floor, jnp.where(is_empty, -1, jnp.where(is_uncut, vocab_size, token))), kept.certain | ~wanted

    floor, last = _look(look, wanted, logits, cuts)
    tokens = _iota(logits)
    keep = (logits > floor) | ((logits == floor) & (tokens < last)) | (tokens == last)
    if cuts.top_k is not None:
        keep = keep & ~jnp.isnan(logits)
    return jnp.where(keep, logits, -jnp.inf)


def _look(look: Callable[..., _Found], wanted: Array, logits: Array, *others: Any) -> Any:
    """The results of `look(size, *rows) -> (results, certain)`: of few candidates, or of all where a row needs them."""
    vocab_size = logits.shape[-1]

    def once(*rows: Any) -> Any:
        return look(vocab_size, *rows)[0]

    rows = wanted, logits, *others
    if vocab_size < _LARGE:
        return once(*rows)
    # Elsewhere XLA sorts for so many candidates too, and single rows are no work for an accelerator.
    return lax.platform_dependent(*rows, cpu=partial(_look_closer, look, once), default=once)


def _look_closer(look: Callable[..., _Found], once: Callable[..., Any], *rows: Any) -> Any:
    """The results of the rows with few candidates, or of `once` in rows that are not certain."""
    results, certain = look(_CANDIDATES, *rows)
    if certain.shape == (1,):  # a loop over one row would be no loop for XLA, which runs the work of its body before it
        return lax.cond(certain[0], lambda: results, lambda: once(*rows))

    def go_on(found: _Found) -> _Found:
        results, certain = found
        row = certain.astype(np.int32).argmin()
        alone = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1), rows)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
        return jax.tree.map(put, results, once(*alone)), certain.at[row].set(True)

    return lax.while_loop(lambda found: ~found[1].all(), go_on, (results, certain))[0]


def _kept(size: int, logits: Float[Array, "R V"], cuts: Cuts) -> _Kept:
    """What the cuts keep, from the `size` largest logits of each row; all are certain if these are all."""
    num_rows, vocab_size = logits.shape
    number, certain = jnp.full(num_rows, vocab_size, np.int32), jnp.ones(num_rows, bool)
    missing = jnp.zeros(num_rows, np.int32)
    if size == vocab_size:
        if cuts.top_k is not None:  # which counts a NaN as the largest, and does not keep it
            missing = _count(jnp.isnan(logits))
            logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
        ordered, tokens = _sort(logits)
    else:
        largest = lax.top_k(jnp.where(logits == 0, 0.0, logits), size)  # which puts -0.0 below 0.0
        # Without the barrier XLA merges later slices into it, and then sorts all logits.
        ordered, tokens = lax.optimization_barrier(largest)
        # NaN are counted: XLA's optimised maximum of a row with NaN may be finite on CPUs.
        certain = jnp.isfinite(logits.max(-1)) & (_count(jnp.isnan(logits)) == 0)
        number = jnp.where(jnp.isneginf(ordered[:, -1]), np.int32(size), number)  # no other token can be drawn
    kept = _Kept(ordered, tokens, number, certain)
    if cuts.top_k is not None:
        kept = _keep_top_k(kept, cuts.top_k, missing, vocab_size)
    if cuts.top_p is not None:
        kept = _keep_top_p(kept, cuts.top_p, logits)
    if cuts.min_p is not None:
        floor = ordered[:, :1] + jnp.log(cuts.min_p)[:, None]
        kept = _shorten(kept, _count(ordered >= floor), cuts.min_p == 0, vocab_size)
    return kept


def _keep_top_k(kept: _Kept, k: Array, missing: Array, vocab_size: int) -> _Kept:
    """The k likeliest tokens, and tokens that tie with the last of them."""
    size = kept.logits.shape[1]
    place = jnp.clip(k, 1, vocab_size) - 1 - missing
    threshold = jnp.take_along_axis(kept.logits, jnp.clip(place, 0, size - 1)[:, None], axis=1)
    number = _count(kept.logits >= threshold)
    if size == vocab_size:
        return kept._replace(number=jnp.where(place < 0, 0, number))
    return _shorten(kept, jnp.where(place < size, number, size), k >= vocab_size, vocab_size)


def _keep_top_p(kept: _Kept, p: Array, logits: Float[Array, "R V"]) -> _Kept:
    """The fewest likeliest tokens whose probabilities sum to p."""
    (size, vocab_size), peak = (kept.logits.shape[1], logits.shape[1]), kept.logits[:, :1]
    weights = jnp.exp(_cut(kept) - peak)
    total, others = weights.sum(-1, keepdims=True), jnp.zeros_like(peak)
    if size < vocab_size:
        is_uncut = kept.number[:, None] > size
        mass = partial(_mass_of_others, logits, kept.logits[:, -1:], peak, size)
        others = lax.cond(is_uncut.any(), lambda: jnp.where(is_uncut, mass(), 0.0), lambda: others)
        total = total + others
    # Mass of each token and all less likely tokens: a sum from the front loses a tail below 1e-7, even for p = 1.
    rest, least = lax.cumsum(weights / total, axis=1, reverse=True) + others / total, (1 - p)[:, None]
    number = jnp.maximum(_count(rest > least), 1)
    if size < vocab_size:
        # The first token stays in any case.
        clear = (jnp.abs(rest - least) - _MARGIN * jnp.maximum(rest, least))[:, 1:].min(-1) > 0
        kept = kept._replace(certain=kept.certain & (clear | (p == 1)))
    return _shorten(kept, number, p == 1, vocab_size)


def _mass_of_others(logits: Float[Array, "R V"], last: Array, peak: Array, size: int) -> Float[Array, "R 1"]:
    """The sum of exp(logits - peak) of all tokens but the first `size`, of which `last` is the least."""
    lower = jnp.where(logits < last, jnp.exp(logits - peak), 0.0).sum(-1, keepdims=True)
    equal = (_count(logits >= last) - np.int32(size)).astype(np.float32)[:, None]
    return lower + equal * jnp.exp(last - peak)


def _shorten(kept: _Kept, number: Array, is_neutral: Array, vocab_size: int) -> _Kept:
    """At most `number` of the candidates, and as many as before where the number of a cut is neutral.

    If all candidates are kept, there may be more tokens to keep.
    """
    size = kept.logits.shape[1]
    if size == vocab_size:
        return kept._replace(number=jnp.minimum(kept.number, number))
    told = is_neutral | (number < size) | (kept.number <= size)
    number = jnp.where(is_neutral, kept.number, jnp.minimum(kept.number, number))
    return kept._replace(number=number, certain=kept.certain & told)


def _cut(kept: _Kept) -> Float[Array, "R C"]:
    """The logits of the candidates, -inf for those that are not kept."""
    return jnp.where(_iota(kept.logits) < kept.number[:, None], kept.logits, -jnp.inf)


def _sort(logits: Float[Array, "R V"]) -> tuple[Float[Array, "R V"], Int[Array, "R V"]]:
    """The logits from the largest on, NaN first, and their tokens; of equal logits the lower token comes first."""
    ascending = lax.sort_key_val(lax.rev(logits, (1,)), lax.rev(_iota(logits), (1,)), is_stable=True)
    ordered, tokens = (lax.rev(x, (1,)) for x in ascending)
    return ordered, tokens


def _likeliest(scores: Float[Array, "R C"], tokens: Int[Array, "R C"], vocab_size: int) -> Int[Array, "R"]:
    """The lowest token of the greatest score, or of a NaN."""
    best = (scores == scores.max(-1, keepdims=True)) | jnp.isnan(scores)
    return jnp.where(best, tokens, np.int32(vocab_size)).min(-1)


def _noise(keys: Array, vocab_size: int) -> Float[Array, "R V"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), np.float32))(keys)


def _noise_at(keys: Array, tokens: Int[Array, "R C"], vocab_size: int) -> Float[Array, "R C"]:
    """`_noise` of some tokens of each row."""
    options = jax.config.jax_threefry_partitionable, jax.config.jax_high_dynamic_range_gumbel
    if str(jax.random.key_impl(keys)) != "threefry2x32" or options != (True, False):
        return jnp.take_along_axis(_noise(keys, vocab_size), tokens, axis=1)
    # Bits of element i of a random array are a hash of the key and i, which is what fold_in computes too.
    words = jax.random.key_data(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, tokens))
    bits = words[..., 0] ^ words[..., 1]
    one, tiny = np.float32(1), np.finfo(np.float32).tiny
    uniform = lax.bitcast_convert_type((bits >> np.uint32(9)) | one.view(np.uint32), np.float32) - one
    return -jnp.log(-jnp.log(jnp.maximum(tiny, uniform * (one - tiny) + tiny)))


def _count(where: Bool[Array, "R C"]) -> Int[Array, "R"]:
    """How many are True in each row, as a sum of float32: exact up to 2 ** 24, and quicker than a sum of integers."""
    return where.astype(np.float32).sum(-1).astype(np.int32)


def _iota(x: Array) -> Int[Array, "R C"]:
    """The index of each element within its row."""
    return lax.broadcasted_iota(np.int32, x.shape, 1)
