"""Tokenizers of published checkpoints, for documents to learn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers

from attnax.errors import InputError
from attnax.pretrained.json_object import read_object
from attnax.pretrained.tokenizer_file import load_tokenizer, refusals_as
from attnax.text.published_codec import PublishedCodec
from attnax.text.tokenizer import SpecialTokens, Tokenizer, byte_tokenizer, is_learned, train_bpe

__all__ = ["PublishedTokenizer", "TextTokenizer", "find_tokenizer", "make_tokenizer", "open_tokenizer"]


class PublishedTokenizer:
    """A `tokenizers.Tokenizer` with the tokens around texts; texts are UTF-8.

    Special tokens that a text spells out stay text.

    Args:
        model: of the library.
        special: the tokens around texts.
    """

    def __init__(self, model: tokenizers.Tokenizer, special: SpecialTokens):
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True
        self._model, self.special = model, special
        self.vocab_size: int = 1 + max(model.get_vocab().values())

    @property
    def codec(self) -> PublishedCodec:
        """Prompts to tokens, and tokens to text, for a model that writes."""
        return PublishedCodec(tokenizers.Tokenizer.from_str(self.to_json()), (self._end,), self.special.document)

    @property
    def _end(self) -> int:
        """The token that ends a text."""
        return self.special.document if self.special.end is None else self.special.end

    def encode_each(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, uint16 or uint32, with the document token before and the end token behind it.

        Raises:
            UnicodeDecodeError: a text is not UTF-8.
        """
        end = [] if self.special.end is None else [self.special.end]
        texts_of_ids = self._encode(texts, add_special_tokens=False)
        return [self._ids([self.special.document, *ids, *end]) for ids in texts_of_ids]

    def encode_rows(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text with the tokens that the tokenizer itself puts around it, for rows that a model reads.

        Raises:
            UnicodeDecodeError: a text is not UTF-8.
        """
        return [self._ids(ids) for ids in self._encode(texts, add_special_tokens=True)]

    def encode_targets(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of `encode_rows` with the start token before and the end token behind them, for a decoder's rows.

        Tokens that the tokenizer has put there itself come once.

        Raises:
            UnicodeDecodeError: a text is not UTF-8.
        """
        start, end = self.special.start, self._end
        rows = self._encode(texts, add_special_tokens=True)
        return [self._ids([start][ids[:1] == [start] :] + ids + [end][ids[-1:] == [end] :]) for ids in rows]

    def decode(self, ids: Iterable[SupportsInt]) -> bytes:
        """The text of `ids` in UTF-8, without special tokens."""
        with refusals_as(lambda why: InputError(f"the tokenizer has no text for some tokens: {why}.")):
            text: str = self._model.decode([int(token) for token in ids])
        return text.encode("utf-8", "surrogatepass")

    def to_json(self) -> str:
        """The tokenizer in the format of the `tokenizers` library."""
        text: str = self._model.to_str(pretty=True)
        return text

    def _encode(self, texts: Sequence[bytes], *, add_special_tokens: bool) -> list[list[int]]:
        read = [text.decode("utf-8") for text in texts]
        with refusals_as(lambda why: InputError(f"the tokenizer has no tokens for a text: {why}.")):
            encodings = self._model.encode_batch_fast(read, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)


TextTokenizer = Tokenizer | PublishedTokenizer
"""The tokenizer of a run: learned by it, or a published one."""


def open_tokenizer(path: Path, special: SpecialTokens | None = None) -> TextTokenizer:
    """The tokenizer in a file that `to_json` wrote.

    Args:
        path: of the file.
        special: the tokens around texts of a published tokenizer.

    Raises:
        InputError: there is no such file, or it is no tokenizer.
    """
    model = load_tokenizer(path)
    if model is None:
        raise InputError(f"{path}: there is no such file.")
    if is_learned(model):
        return Tokenizer(model)
    assert special is not None, path
    return PublishedTokenizer(model, special)


def find_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a run, of a store or of a published checkpoint: its folder, or its tokenizer.json.

    For a published one, a document begins with the token that the tokenizer puts before a text, or else with the
    bos_token_id or the eos_token_id of the config.json beside it, and ends with the eos_token_id, unless that began it.
    Rows are filled with the pad_token_id, or else the document token; a target starts with the
    decoder_start_token_id, or else the document token.

    Raises:
        InputError: there is no tokenizer, or no token that begins a document.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    model = load_tokenizer(file)
    if model is None:
        raise InputError(f"no tokenizer at {path}: there is no file {file}.")
    if is_learned(model):
        return Tokenizer(model)
    from attnax.pretrained.generation_config import (
        read_generation_config,  # it imports models, which others do not need
    )

    around: Any = model.encode("a")
    before = around.ids[:1] if around.special_tokens_mask[:1] == [1] else []
    config = file.parent / "config.json"
    given = read_object(config) if config.is_file() else {}
    settings = read_generation_config(file.parent, given)
    ends, start, padding = settings.eos_token_id, settings.decoder_start_token_id, given.get("pad_token_id")
    document = next((token for token in (*before, settings.bos_token_id, *ends) if token is not None), None)
    if document is None:
        raise InputError(
            f"{file} must have a token that begins a document: it puts none before a text, and no config.json beside "
            "it has a bos_token_id or an eos_token_id. Name the folder of its checkpoint."
        )
    special = SpecialTokens(
        document=document,
        end=None if not ends or document in ends else ends[0],
        padding=padding if type(padding) is int else document,
        start=document if start is None else start,
    )
    return PublishedTokenizer(model, special)


def make_tokenizer(name: str, texts: Iterable[bytes], vocab_size: int) -> TextTokenizer:
    """The tokenizer that a flag names.

    Args:
        name: "bpe" learns byte pairs from the texts, "bytes" has one token a byte; or a path, as in `find_tokenizer`.
        texts: for "bpe".
        vocab_size: for "bpe".
    """
    if name == "bytes":
        return byte_tokenizer()
    return train_bpe(texts, vocab_size) if name == "bpe" else find_tokenizer(Path(name))
