"""`attnax generate`: text from a model."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax

from attnax.cli import terminal
from attnax.cli.options import Generate
from attnax.config import AttentionType, Dtype
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.pretrained.hub import find_folder
from attnax.text import TextModel, TextStream, is_published, open_published, prompt_array, spell
from attnax.training import DamagedCheckpointError, open_run
from attnax.training.run_model import Weights

MOST_NEW_TOKENS = 4096  # by default; memory may not hold the whole context of a published model


def generate(options: Generate) -> int:
    """Runs the command; the text goes to standard output as it is drawn, or when it is complete."""
    terminal.keep_programs(options.compile_cache)
    which: dict[str, Any] = {"step": options.step, "weights": options.weights, "revision": options.revision}
    text = open_text_model(options.folder, options.dtype, ignore=options.ignore, **which)
    given, options = options, options.settle(text.settings)
    if options.no_repeat_ngram is not None and given.no_repeat_ngram is None and options.no_repeat_ngram > text.context:
        options = dataclasses.replace(options, no_repeat_ngram=None)  # no text has as many tokens
    complaint = text.settings.complaint(obeyed=() if options.beams is not None else ("do_sample",))
    if complaint is not None:
        terminal.warn(f"{options.folder}: {complaint}")
    draft = None if options.draft is None else _open_draft(options, text)
    _check_model(given, options, text, draft)
    ids, room = _read_prompt(text, draft, options.prompt, options.max_new_tokens)
    writing = _prepare(text, ids, room, options)
    terminal.say_wait(terminal.compiling())
    written = _print_texts(writing, writing.rows(options, draft), options)
    if options.log_probs:
        for number, line in enumerate(_score(text, ids, written), 1):
            print(line if len(written) == 1 else f"{number}: {line}", file=sys.stderr)
    return 0


@dataclasses.dataclass(frozen=True)
class _Writing:
    """A model, the ids of a prompt, and the keywords of `stream`, `generate` and `beam_search`."""

    text: TextModel
    ids: list[int]
    keywords: dict[str, Any]

    def stream(self, seed: int) -> Iterator[int]:
        """The tokens of one text, as they are drawn."""
        for token in self.text.model.stream(prompt_array(self.ids), key=jax.random.key(seed), **self.keywords):
            yield int(token[0])

    def rows(self, options: Generate, draft: TextModel | None) -> Iterable[Iterable[int]]:
        """The tokens of each text; with beams the best text first."""
        prompt = prompt_array(self.ids)
        assert options.seed is not None and options.num_samples is not None
        if options.beams is not None:
            search = self.text.settings.search() | {"length_penalty": options.length_penalty}
            found = self.text.model.beam_search(prompt, num_beams=options.beams, **search, **self.keywords)
            return _rows(found.tokens[0], found.lengths[0])[: options.num_samples]
        if draft is None and options.num_samples == 1 and not options.no_stream:
            return [self.stream(options.seed)]
        written = self.text.model.generate(
            prompt,
            key=jax.random.key(options.seed),
            num_samples=options.num_samples,
            draft=None if draft is None else draft.model,
            num_draft_tokens=options.draft_tokens,
            **self.keywords,
        )
        return _rows(written.tokens, written.lengths)

    def text_stream(self, stops: Sequence[str] = ()) -> TextStream:
        """Turns new tokens into text."""
        return TextStream(self.text.codec.decoder(self.text.begin(self.ids)), stops)


def _prepare(text: TextModel, ids: list[int], room: int, options: Generate) -> _Writing:
    size = text.config.vocab_size
    rules = text.settings.constraints(size, len(text.begin(ids)), room)
    sequences = [text.codec.encode_stop(stop) for stop in options.stop]
    keywords = {
        "sampler": options.sampler(**rules).as_arrays(size),
        "end_token": [token for token in text.codec.ends if token < size],  # the tokenizer may have more tokens
        "stop_sequences": [stop for stop in sequences if stop and max(stop) < size],
        "cache": options.cache,
        "cache_dtype": options.cache_dtype,
    }
    return _Writing(text, ids, text.options(room) | keywords)


def _print_texts(writing: _Writing, rows: Iterable[Iterable[int]], options: Generate) -> list[list[int]]:
    """Prints the texts as their tokens come; returns the tokens that were read."""

    def noted(tokens: Iterable[int], read: list[int]) -> Iterator[int]:
        for token in tokens:
            read.append(token)
            yield token

    prompt = _encode(options.prompt).decode("utf-8", "replace") if writing.text.goes_on else ""
    written: list[list[int]] = []
    for row in rows:
        written.append([])
        if options.num_samples != 1:
            sys.stdout.write(f"--- {len(written)} ---\n")
        sys.stdout.write(prompt)
        sys.stdout.flush()
        for piece in spell(noted(row, written[-1]), writing.text_stream(options.stop)):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    sys.stdout.flush()
    return written


def open_text_model(
    name: str,
    dtype: Dtype | None = None,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    revision: str | None = None,
    ignore: Collection[str] = (),
) -> TextModel:
    """The model in a run folder or a published checkpoint, or the model of this name on the hub.

    Raises:
        InputError: there is no such model, it writes no text, or an option belongs to the other kind of folder.
    """
    terminal.say_wait(f"loading    {name}")
    folder = find_folder(name, revision)
    if not is_published(folder):
        if ignore:
            raise InputError(f"--ignore is of a published checkpoint, and {name} is a run folder.")
        try:
            with terminal.warnings_as_lines():
                return open_run(folder, dtype, step, weights=weights or "params")
        except DamagedCheckpointError as error:
            raise InputError(f"{error}" + ("" if error.whole is None else f" Give --step {error.whole}.")) from error
    for flag, value in (("--step", step), ("--weights", weights)):
        if value is not None:
            raise InputError(f"{flag} is of a run folder, and {name} is a published checkpoint.")
    with terminal.warnings_as_lines():
        return open_published(folder, dtype, ignore=ignore)


def write_text(text: TextModel, prompt: str, max_new_tokens: int | None, sampler: Sampler, seed: int) -> Iterator[str]:
    """Checks the lengths, then continues `prompt` in pieces of complete characters until the text ends.

    Raises:
        InputError: the prompt, or the prompt with the new tokens, is longer than the model's context.
    """
    ids, room = _read_prompt(text, None, prompt, max_new_tokens)
    writing = _Writing(text, ids, text.options(room) | {"sampler": sampler, "end_token": text.codec.ends})
    return spell(writing.stream(seed), writing.text_stream())


def _encode(text: str) -> bytes:
    """The bytes of an argument; they may not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _open_draft(options: Generate, text: TextModel) -> TextModel:
    assert options.draft is not None
    draft = open_text_model(options.draft, options.dtype)
    kinds = [type(used.model).__name__ for used in (draft, text)]
    if kinds[0] != kinds[1]:
        raise InputError(f"--draft {options.draft} holds a {kinds[0]}; the draft of a {kinds[1]} must be a {kinds[1]}.")
    if draft.codec.vocabulary != text.codec.vocabulary:
        raise InputError(f"--draft {options.draft} has another tokenizer than {options.folder}; it must have the same.")
    sizes = [used.config.vocab_size for used in (draft, text)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"--draft {options.draft} must have a vocabulary of {sizes[1]} tokens, as {options.folder} has; "
            f"got {sizes[0]}."
        )
    return draft


def _check_model(given: Generate, options: Generate, text: TextModel, draft: TextModel | None) -> None:
    """Raises InputError for options, given or settled, that this model cannot obey."""
    size, context = text.config.vocab_size, text.context
    if options.beams is not None and options.beams > size:
        name = "--beams" if given.beams is not None else "num_beams of generation_config.json"
        raise InputError(f"{name} must be at most {size}, the tokens of the vocabulary; got {options.beams}.")
    if given.no_repeat_ngram is not None and given.no_repeat_ngram > context:
        raise InputError(
            f"--no-repeat-ngram must be at most {context}, the model's context; got {given.no_repeat_ngram}."
        )
    for used in (text, draft):
        if used is None:
            continue
        layers = map(used.config.layer, range(used.config.num_layers))
        if all(layer.attention_type != AttentionType.LINEAR for layer in layers):
            continue
        if options.draft is not None:
            raise InputError(f"--draft takes tokens back, and the linear attention in {used.folder} has only sums.")
        if options.cache == "paged":
            raise InputError(f"--cache paged stores tokens, and the linear attention in {used.folder} has only sums.")


def _read_prompt(
    text: TextModel, draft: TextModel | None, prompt: str, max_new_tokens: int | None
) -> tuple[list[int], int]:
    """The ids of the prompt, and the greatest number of new tokens.

    Raises:
        InputError: together they are longer than the context of the model or of the draft.
    """
    ids = text.codec.encode(_encode(prompt))
    used = {"model": text} if draft is None else {"model": text, "draft": draft}
    for model in used.values():
        model.check(ids)
    owner = min(used, key=lambda owner: used[owner].context)
    context, taken = used[owner].context, len(text.begin(ids))
    room = context - taken
    if room < 1:
        raise InputError(
            f"the prompt is too long: it has {taken} tokens, and the {owner}'s context of {context} "
            "must also hold a new token."
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} is too many: after the prompt's {taken} tokens the {owner}'s "
            f"context of {context} has room for {room}."
        )
    if max_new_tokens is None:
        usual = text.settings.room(taken) or (room if room < math.inf else text.config.max_len)
        max_new_tokens = int(min(room, MOST_NEW_TOKENS, usual))
    return ids, max_new_tokens


def _rows(tokens: jax.Array, lengths: jax.Array) -> list[list[int]]:
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _score(text: TextModel, ids: list[int], rows: list[list[int]]) -> Iterator[str]:
    """A line for each text: the log-probability of the tokens after the prompt."""
    for row, total in zip(rows, text.log_prob(ids, rows), strict=True):
        size = text.codec.num_bytes(row, text.begin(ids))
        line = f"log-probability {total:.2f}, {len(row)} tokens, {size} bytes"
        yield f"{line}, {-total / math.log(2) / size:.2f} bits per byte" if size else line
