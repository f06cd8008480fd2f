"""`attnax generate`: text from a trained model."""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cli.options import Generate
from attnax.cli.run_folder import RunFolder
from attnax.config import AttentionType
from attnax.generation import Sampler
from attnax.models import TransformerLM
from attnax.training import Tokenizer, latest_checkpoint, restore_checkpoint
from attnax.training.tokenizer import DOCUMENT
from attnax.typing import InputError


def generate(options: Generate) -> int:
    """Runs the command; the text goes to standard output as it is drawn, or when it is whole."""
    model, tokenizer = load_model(options.run)
    draft = None if options.draft is None else _load_draft(options, tokenizer)
    _check_model(options, model, draft)
    ids, room = _read_prompt(model, draft, tokenizer, options.prompt, options.max_new_tokens)
    sampler = _make_sampler(options, model.config.vocab_size)
    stops = [_encode(stop) for stop in options.stop]
    how = _how(options, room, tokenizer, stops)
    prompt = options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    rows: Iterable[Iterable[int]]
    if options.beams is not None:
        rows = _search(model, ids, options, sampler, how)
    elif options.draft is None and options.num_samples == 1 and not options.no_stream:
        rows = [_stream(model, ids, sampler, options.seed, how)]
    else:
        rows = _sample(model, draft, ids, options, sampler, how)
    read: list[list[int]] = []
    for row in rows:
        read.append([])
        if options.num_samples > 1:
            sys.stdout.write(f"--- {len(read)} ---\n")
        sys.stdout.write(prompt)
        for piece in spell(tokenizer, row, stops, read[-1]):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    sys.stdout.flush()
    if options.log_probs:
        for number, line in enumerate(_score(model, tokenizer, ids, read), 1):
            print(line if len(read) == 1 else f"{number}: {line}", file=sys.stderr)
    return 0


def load_model(run: Path) -> tuple[TransformerLM, Tokenizer]:
    """The model of a run at its newest checkpoint, and its tokenizer.

    Raises:
        InputError: not a run, no checkpoint, or a damaged one.
    """
    folder = RunFolder(run)
    options, tokenizer, _ = folder.load()
    step = latest_checkpoint(folder.checkpoints)
    if step is None:
        raise InputError(f"{run} has no checkpoint yet.")
    model = TransformerLM(nnx.Rngs(0), options.model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(model, restore_checkpoint(folder.checkpoints, step, "params", params, owner=folder.owner))
    return model, tokenizer


def write_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int | None,
    sampler: Sampler,
    seed: int,
) -> Iterator[str]:
    """Checks that everything fits, then continues `prompt` in pieces of whole characters until its document ends.

    Raises:
        InputError: the prompt, or the prompt and the new tokens, are longer than the model's context.
    """
    ids, room = _read_prompt(model, None, tokenizer, prompt, max_new_tokens)
    return spell(tokenizer, _stream(model, ids, sampler, seed, {"max_new_tokens": room, "end_token": DOCUMENT}))


def spell(
    tokenizer: Tokenizer, tokens: Iterable[int], stops: Sequence[bytes] = (), read: list[int] | None = None
) -> Iterator[str]:
    """The text of `tokens` in pieces of whole characters, up to the stop that is complete first.

    Bytes that may yet become a stop are held back until they cannot.

    Args:
        tokenizer: of the tokens.
        tokens: read one at a time, and no further than the stop.
        stops: end the text, in whatever tokens they come.
        read: gets the tokens that were read.
    """
    # A character's bytes may be spread over several tokens.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = b""
    for token in tokens:
        if read is not None:
            read.append(token)
        held += tokenizer.decode([token])
        # If one token completes several, the first to end counts, as if bytes had come one by one.
        found = [(start + len(stop), start) for stop in stops if (start := held.find(stop)) >= 0]
        if found:
            held = held[: min(found)[1]]
            break
        kept = max((_begun(held, stop) for stop in stops), default=0)
        yield decoder.decode(held[: len(held) - kept])
        held = held[len(held) - kept :]
    yield decoder.decode(held, final=True)


def _begun(text: bytes, stop: bytes) -> int:
    """How many bytes at the end of `text` are the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def _encode(text: str) -> bytes:
    """The bytes that a person gave, be they UTF-8 or not."""
    return text.encode("utf-8", "surrogateescape")


def _load_draft(options: Generate, tokenizer: Tokenizer) -> TransformerLM:
    assert options.draft is not None
    draft, other = load_model(options.draft)
    if other.to_json() != tokenizer.to_json():
        raise InputError(f"--draft {options.draft} has another tokenizer than {options.run}; train both on one corpus.")
    return draft


def _check_model(options: Generate, model: TransformerLM, draft: TransformerLM | None) -> None:
    """Raises InputError for options that this model cannot follow."""
    size, context = model.config.vocab_size, model.config.max_len
    if options.beams is not None and options.beams > size:
        raise InputError(f"--beams must be at most {size}, the tokens of the vocabulary; got {options.beams}.")
    if options.no_repeat_ngram is not None and options.no_repeat_ngram > context:
        raise InputError(
            f"--no-repeat-ngram must be at most {context}, the model's context; got {options.no_repeat_ngram}."
        )
    for run, used in ((options.run, model), (options.draft, draft)):
        if used is None or all(layer.attention_type != AttentionType.LINEAR for layer in _layers(used)):
            continue
        if options.draft is not None:
            raise InputError(f"--draft takes tokens back, and the sums of linear attention in {run} cannot.")
        if options.cache == "paged":
            raise InputError(f"--cache paged stores tokens, and linear attention in {run} has only sums.")


def _layers(model: TransformerLM) -> list[Any]:
    return [model.config.layer(index) for index in range(model.config.num_layers)]


def _read_prompt(
    model: TransformerLM, draft: TransformerLM | None, tokenizer: Tokenizer, prompt: str, max_new_tokens: int | None
) -> tuple[jax.Array, int]:
    """The prompt's ids (1, T), and how many tokens to write.

    Raises:
        InputError: they are longer than the model's context, or the draft's.
    """
    ids = np.concatenate([[DOCUMENT], tokenizer.encode(_encode(prompt))]).astype(np.int32)
    owner, context = "model", model.config.max_len
    if draft is not None and draft.config.max_len < context:
        owner, context = "draft", draft.config.max_len
    room = context - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt is too long: it has {len(ids)} tokens, and the {owner}'s context of {context} "
            "must also hold what comes after it."
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} is too many: after the prompt's {len(ids)} tokens the {owner}'s "
            f"context of {context} has room for {room}."
        )
    return jnp.asarray(ids)[None], max_new_tokens or room


def _make_sampler(options: Generate, vocab_size: int) -> Sampler:
    """Raises InputError for a number that is out of range once it is a float32."""
    draws: dict[str, Any] = {}  # a beam search draws nothing
    if options.beams is None:
        draws = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    try:
        return Sampler(
            **draws,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            no_repeat_ngram=options.no_repeat_ngram,
        ).as_arrays(vocab_size)
    except ValueError as error:
        raise InputError(str(error)) from error


def _how(options: Generate, room: int, tokenizer: Tokenizer, stops: Sequence[bytes]) -> dict[str, Any]:
    return {
        "max_new_tokens": room,
        "end_token": DOCUMENT,
        "stop_sequences": [tokenizer.encode(stop).tolist() for stop in stops],
        "cache": options.cache,
        "cache_dtype": options.cache_dtype,
    }


def _stream(model: TransformerLM, ids: jax.Array, sampler: Sampler, seed: int, how: dict[str, Any]) -> Iterator[int]:
    for token in model.stream(ids, sampler=sampler, key=jax.random.key(seed), **how):
        yield int(token[0])


def _sample(
    model: TransformerLM,
    draft: TransformerLM | None,
    ids: jax.Array,
    options: Generate,
    sampler: Sampler,
    how: dict[str, Any],
) -> list[list[int]]:
    written = model.generate(
        ids,
        sampler=sampler,
        key=jax.random.key(options.seed),
        num_samples=options.num_samples,
        draft=draft,
        num_draft_tokens=options.draft_tokens,
        **how,
    )
    return _rows(written.tokens, written.lengths)


def _search(
    model: TransformerLM, ids: jax.Array, options: Generate, sampler: Sampler, how: dict[str, Any]
) -> list[list[int]]:
    """The best texts of a beam search, the best first."""
    assert options.beams is not None
    found = model.beam_search(
        ids, num_beams=options.beams, length_penalty=options.length_penalty, sampler=sampler, **how
    )
    return _rows(found.tokens[0], found.lengths[0])[: options.num_samples]


def _rows(tokens: jax.Array, lengths: jax.Array) -> list[list[int]]:
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _score(model: TransformerLM, tokenizer: Tokenizer, ids: jax.Array, rows: list[list[int]]) -> Iterator[str]:
    """A line for each text: what the model, read once over all of it, gives the tokens after the prompt."""
    longest, start = max(map(len, rows)), ids.shape[1]
    texts = np.zeros((len(rows), start + longest), np.int32)  # what follows a text changes nothing in it
    texts[:, :start] = ids
    for text, row in zip(texts, rows, strict=True):
        text[start : start + len(row)] = row
    log_probs = nnx.jit(TransformerLM.log_probs)(model, jnp.asarray(texts[:, :-1]))
    for text, row, given in zip(texts, rows, np.asarray(log_probs), strict=True):
        places = np.arange(start, start + len(row))
        total = float(given[places - 1, text[places]].sum())
        size = len(tokenizer.decode(row))
        line = f"log-probability {total:.2f}, {len(row)} tokens, {size} bytes"
        yield f"{line}, {-total / math.log(2) / size:.2f} bits per byte" if size else line
