"""Writing the slow way, a whole forward for every token, in one program: the reference for all faster ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax import Sampler
from attnax.generation import Text

ROWS, LENGTH = 6, 24  # of the program; fewer rows and shorter texts are filled up


@functools.partial(jax.jit, static_argnames="graphdef")
def _read(graphdef, state, ids, prompt_lengths, lengths, keys, sampler):
    """Log-probabilities (ROWS, LENGTH, V) of the token after each token, and a draw of the token after each text."""
    logits = nnx.merge(graphdef, state)(ids)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), lengths)
    return jax.nn.log_softmax(logits), sampler(last, keys, Text(ids, prompt_lengths, lengths))


def read(model, texts, prompt_lengths=None, sampler=None, keys=None):
    """`_read` of any number of texts of any lengths, without the filling rows of the program."""
    graphdef, state = nnx.split(model)
    log_probs, tokens = [], []
    for start in range(0, len(texts), ROWS):
        part = texts[start : start + ROWS]
        ids, lengths, prompts = np.zeros((ROWS, LENGTH), np.int32), np.ones(ROWS, np.int32), np.ones(ROWS, np.int32)
        for row, text in enumerate(part):
            ids[row, : len(text)], lengths[row] = text, len(text)
        if prompt_lengths is not None:
            prompts[: len(part)] = prompt_lengths[start : start + ROWS]
        own = np.zeros((ROWS, 2), np.uint32)
        if keys is not None:
            own[: len(part)] = key_data(keys)[start : start + ROWS]
        sampler = (sampler or Sampler()).as_arrays(model.config.vocab_size)
        out = _read(graphdef, state, ids, prompts, lengths, own, sampler)
        log_probs.append(np.asarray(out[0])[: len(part)])
        tokens.append(np.asarray(out[1])[: len(part)])
    return np.concatenate(log_probs), np.concatenate(tokens)


def key_data(keys):
    """Keys as NumPy, which it need not be turned into any more."""
    return keys if isinstance(keys, np.ndarray) else np.asarray(jax.random.key_data(keys))


def write(model, prompts, count, sampler=None, keys=None):
    """Tokens (rows, count) after the prompts, which are lists, and the model's log-probabilities of them."""
    texts, sizes = [list(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    for _ in range(count):
        _, tokens = read(model, texts, sizes, sampler, keys)
        texts = [[*text, int(token)] for text, token in zip(texts, tokens, strict=True)]
    tokens = np.array([text[size:] for text, size in zip(texts, sizes, strict=True)])
    return tokens, log_probs(model, prompts, tokens)


def log_probs(model, prompts, tokens):
    """The model's log-probabilities of the tokens (rows, count) after the prompts."""
    texts = [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)]
    whole, _ = read(model, texts)
    return np.stack(
        [
            row[len(prompt) - 1 + np.arange(tokens.shape[1]), written]
            for row, prompt, written in zip(whole, prompts, tokens, strict=True)
        ]
    )


def end(tokens, stops, fill):
    """Rows that end with the first of the stops that they hold as a whole, and their lengths."""
    tokens, lengths = tokens.copy(), []
    for row in tokens:
        written = row.tolist()
        ends = [n for n in range(1, len(row) + 1) if any(written[:n][-len(stop) :] == list(stop) for stop in stops)]
        lengths.append(min(ends, default=len(row)))
        row[lengths[-1] :] = fill
    return tokens, lengths


def lay_out(prompts, width, seed=0):
    """The prompts as ids (rows, width), and True for real tokens: padding left, right, between and left."""
    rng = np.random.default_rng(seed)
    ids, real = rng.integers(0, 11, (len(prompts), width)).astype(np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        size = len(prompt)
        places = (np.arange(width - size, width), np.arange(size), np.sort(rng.permutation(width)[:size]))[row % 3]
        ids[row, places], real[row, places] = prompt, True
    return ids, real


@jax.jit
def fold(key, numbers):
    """`fold_in(key, number)` for each of the numbers."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)


def keys_of(seed, numbers):
    """The keys of the rows with these numbers under `key=jax.random.key(seed)`."""
    return fold(jax.random.key(seed), numbers)
