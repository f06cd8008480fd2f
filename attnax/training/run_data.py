"""The tokens of a run: a store in its folder, made of a corpus, or a store that was there before."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from attnax.errors import InputError
from attnax.text.published_tokenizer import TextTokenizer, make_tokenizer
from attnax.training.corpus import Corpus, look_at, read_corpus
from attnax.training.run_folder import RunFolder
from attnax.training.run_options import RunOptions, check_vocab_size
from attnax.training.store import Store, open_store
from attnax.training.store_format import STORE, is_store
from attnax.training.store_writer import make_store
from attnax.training.stream import TokenStream
from attnax.training.text_files import FIELDS, fields_of

__all__ = ["RunData", "Watch", "choose_data", "learn_tokenizer", "look_at_data", "reopen_data"]

Watch = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Shows how far a pass over the text is, given its name and the bytes of all of it, if that is known."""

_SHORT = 1 << 20  # bytes of a text that is read and tokenized in no time


def _unwatched(name: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    return contextlib.nullcontext(lambda _: None)


@dataclasses.dataclass(frozen=True)
class RunData:
    """Where the tokens of a run come from.

    Attributes:
        tokenizer: of the tokens.
        corpus: to make the store of; None if there is a store.
        store: of the tokens; None if it must be made.
    """

    tokenizer: TextTokenizer
    corpus: Corpus | None = None
    store: Store | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text, or of the store that was there before the run."""
        source = self.corpus or self.store
        assert source is not None
        return source.fingerprint

    def require_a_window(self, window: int) -> None:
        """Raises InputError if the tokens do not fill one window; encodes no more of a corpus than that needs."""
        if self.store is not None:
            TokenStream(self.store.tokens(), window).require_a_window()
            return
        assert self.corpus is not None
        count = 0
        for document in self.corpus.train:
            count += len(self.tokenizer.encode_each([document.text])[0])
            if count > window:
                return
        raise InputError(
            f"the text is too short: its {count:,} tokens do not fill one window of {window}. Give more text or a "
            "smaller max_len."
        )

    def open(self, run: RunFolder, watch: Watch = _unwatched) -> Store:
        """The store; one of a corpus is made in the folder of the run."""
        if self.store is not None:
            return self.store
        assert self.corpus is not None
        with watch("tokens", self.corpus.num_bytes) as count:
            return make_store(self.corpus, self.tokenizer, run.data, on_progress=count)


def choose_data(options: RunOptions, watch: Watch = _unwatched) -> RunData:
    """The data of a new run.

    Args:
        options: of the run.
        watch: shows how far reading and learning a tokenizer are.

    Raises:
        InputError: the text or the store cannot be used, or the options ask for what a store or a tokenizer has itself.
    """
    _check_options(options)
    if options.data is not None and is_store(Path(options.data)):
        store = _open_text_store(options.data)
        return RunData(store.tokenizer, store=store)
    _look_at_text(options.data)
    corpus = _read_text(options, watch)
    return RunData(learn_tokenizer(options.tokenizer, corpus, options.model.vocab_size, watch), corpus)


def look_at_data(options: RunOptions) -> TextTokenizer | None:
    """The tokenizer of a new run, or None if it would be learned from its text, of which this reads the beginning.

    Raises:
        InputError: in the words of `choose_data` and `RunData.require_a_window`, what shows without reading all of the
            data: there is no text or no complete store, it is of another kind, or it is too short for a window.
    """
    _check_options(options)
    if options.data is not None and is_store(Path(options.data)):
        store = _open_text_store(options.data, verify=False)
        RunData(store.tokenizer, store=store).require_a_window(options.model.max_len)
        return store.tokenizer
    if _look_at_text(options.data) <= min(4 * options.model.max_len, _SHORT):  # it may be too short
        choose_data(options).require_a_window(options.model.max_len)
    return None if options.tokenizer == "bpe" else make_tokenizer(options.tokenizer, (), options.model.vocab_size)


def learn_tokenizer(name: str, corpus: Corpus, vocab_size: int, watch: Watch = _unwatched) -> TextTokenizer:
    """The tokenizer that a flag names; "bpe" is learned from a sample of the texts to learn from."""
    with watch("learning", None) as count:
        return make_tokenizer(name, _counted(corpus.train.sample(), count), vocab_size)


def _read_text(options: RunOptions, watch: Watch) -> Corpus:
    with watch("reading", None) as count:
        return read_corpus(options.data, held_out=options.held_out, kind="text", on_progress=count)


def _counted(texts: Iterable[bytes], count: Callable[[int], None]) -> Iterator[bytes]:
    for text in texts:
        count(len(text))
        yield text


def _check_options(options: RunOptions) -> None:
    """Raises InputError if the options of a new run ask for what its store or its tokenizer has itself."""
    size, default = options.model.vocab_size, RunOptions.model.vocab_size
    if options.data is not None and is_store(Path(options.data)):
        asked = {
            "--tokenizer": options.tokenizer != RunOptions.tokenizer,
            "--held-out": options.held_out != RunOptions.held_out,
            "--vocab-size": size != default,
        }
        for flag, is_asked in asked.items():
            if is_asked:
                raise InputError(f"{flag} is for text; {options.data} is a store, which has its own. Leave it out.")
    check_vocab_size(options.tokenizer, size)


def _open_text_store(path: str, *, verify: bool = True) -> Store:
    """The store, if a language model learns from it.

    Raises:
        InputError: it is of another kind; the message says what learns from that.
    """
    store = open_store(path, verify=verify)
    if store.kind == "labels":
        raise InputError(f"{_of_labels(path)} make another store of its source with --kind text.")
    if store.kind == "pairs":
        raise InputError(_of_pairs(path))
    return store


def _look_at_text(data: str | None) -> int:
    """The bytes of the files of a text.

    Raises:
        InputError: there is none, or its first rows are not what a language model learns from; the message says what
            does.
    """
    path, size = look_at(data)
    fields = fields_of(path)
    if fields is None or (fields >= {"text"} and "label" not in fields):
        return size
    if fields >= {*FIELDS["labels"]}:
        raise InputError(f"{_of_labels(path)} make a store with attnax tokenize {data} --kind text --out STORE.")
    if fields >= {*FIELDS["pairs"]}:
        raise InputError(_of_pairs(path))
    raise InputError(
        f"{path} must have rows with a field text, from which attnax train makes a language model; got the fields "
        f"{', '.join(sorted(fields)) or 'of an empty row'}. Write what it shall learn into text. To learn a part of "
        "each text, such as the answers to prompts, train in Python with the weights of "
        "attnax.training.causal_lm (docs/guides/training.md)."
    )


def _of_labels(where: str | Path) -> str:
    return (
        f"{where} holds labelled texts, and attnax train makes language models. For a classifier train in Python with "
        "attnax.training.classification (docs/guides/training.md). For a language model of the texts alone"
    )


def _of_pairs(where: str | Path) -> str:
    return (
        f"{where} holds pairs, and attnax train makes language models. For an encoder-decoder train in Python with "
        "attnax.training.seq2seq (docs/guides/training.md). For a language model write source and target into one "
        "field text."
    )


def reopen_data(
    run: RunFolder, loaded: tuple[RunOptions, TextTokenizer, str], watch: Watch = _unwatched, *, verify: bool = True
) -> RunData:
    """The data of a run that was stopped. The text is read only if its store was not finished.

    Args:
        run: the folder.
        loaded: the options, the tokenizer and the fingerprint that `run.load()` returned.
        watch: shows how far reading is.
        verify: compare the digests of a store's shards.

    Raises:
        InputError: the store, or the text that it must be made of, is not the one of the run.
    """
    options, tokenizer, fingerprint = loaded
    if (run.data / STORE).is_file():
        store = open_store(run.data, verify=verify)
        store.require_tokenizer(tokenizer)
        if store.facts["source"]["sha256"] != fingerprint:
            raise InputError(f"{run.data} is the store of another run. Delete it, and it is made again.")
        return RunData(tokenizer, store=store)
    if options.data is not None and is_store(Path(options.data)):
        store = open_store(options.data, verify=verify)
        if store.fingerprint != fingerprint:
            raise InputError(f"the store {options.data} is not the one of {run.path}; start a new run.")
        return RunData(tokenizer, store=store)
    corpus = _read_text(options, watch)
    if corpus.fingerprint != fingerprint:
        raise InputError(f"the text of {run.path} has changed since it was started; start a new run.")
    return RunData(tokenizer, corpus)
