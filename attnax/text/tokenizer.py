"""Tokenizers that `attnax train` learns: text to token ids and back, without loss for any byte string.

The `tokenizers` library works on characters; each byte is one character of Latin-1. Id 0 is the document token, which
begins every document. Ids 1 to 256 are the single bytes. Byte-pair encoding adds its merges after them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsInt

import numpy as np
import tokenizers

from attnax.errors import InputError
from attnax.text.codec import ByteDecoder, Decoder

__all__ = [
    "DOCUMENT",
    "NUM_BYTE_TOKENS",
    "ByteCodec",
    "SpecialTokens",
    "Tokenizer",
    "byte_tokenizer",
    "is_learned",
    "train_bpe",
]

DOCUMENT = 0
"""The token between documents, of every `Tokenizer`."""
NUM_BYTE_TOKENS = 257
"""The tokens of bytes alone: `DOCUMENT` and one for each byte."""
_DOCUMENT_TEXT = "<|document|>"
# No merge crosses the ends of these pieces: a word or up to three digits with the space before it, a run of signs, a
# newline with the indentation after it.
_PIECES = r" ?[A-Za-z_\x80-\xff]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_\x80-\xff]+|\n[ \n]*|\s+"


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The tokens that stand around texts.

    Attributes:
        document: before each document.
        end: behind each document and each target; None if the document token ends a text too.
        padding: fills rows.
        start: of a target, before its first token.
    """

    document: int
    end: int | None
    padding: int
    start: int


class Tokenizer:
    """A byte-level tokenizer of the `tokenizers` library, with bytes in and out."""

    def __init__(self, model: tokenizers.Tokenizer):
        model.encode_special_tokens = True  # the spelling of the document token in a text stays text
        self._model = model
        tokens = {token: text for text, token in model.get_vocab().items()}
        self._bytes = [b"", *(tokens[token].encode("latin-1") for token in range(1, len(tokens)))]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._bytes)

    @property
    def special(self) -> SpecialTokens:
        """The document token is every special token."""
        return SpecialTokens(DOCUMENT, None, DOCUMENT, DOCUMENT)

    @property
    def codec(self) -> ByteCodec:
        """Prompts to tokens, and tokens to text, for a model that writes."""
        return ByteCodec(self)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids by their bytes, one character a byte."""
        vocabulary: dict[str, int] = self._model.get_vocab()
        return vocabulary

    def encode(self, text: bytes | str) -> np.ndarray:
        """The ids of `text`, uint16 or uint32, without a document token; a str is its bytes in UTF-8."""
        text = text.encode() if isinstance(text, str) else text
        return self._ids(self._model.encode(text.decode("latin-1")).ids)

    def encode_documents(self, texts: Sequence[bytes]) -> np.ndarray:
        """The ids of all texts in a row, with the document token before each text."""
        batches = (texts[start : start + 64] for start in range(0, len(texts), 64))
        return np.concatenate([ids for batch in batches for ids in self.encode_each(batch)])

    def encode_each(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, with the document token before it.

        The library's own objects take much memory, so a few texts at a time are best.
        """
        encodings = self._model.encode_batch_fast([text.decode("latin-1") for text in texts])
        return [self._ids([DOCUMENT, *encoding.ids]) for encoding in encodings]

    def encode_rows(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text alone, for rows that a model reads; the document token may pad them."""
        return [ids[1:] for ids in self.encode_each(texts)]

    def encode_targets(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text between two document tokens, for rows that a decoder writes."""
        return [np.append(ids, ids[:1]) for ids in self.encode_each(texts)]

    def decode(self, ids: Iterable[SupportsInt]) -> bytes:
        """The bytes of `ids`; document tokens have none."""
        return b"".join(self._bytes[int(token)] for token in ids)

    def to_json(self) -> str:
        """The tokenizer in the format of the `tokenizers` library."""
        return self._model.to_str(pretty=True)

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)


def is_learned(model: tokenizers.Tokenizer) -> bool:
    """Whether the model is of a `Tokenizer`, rather than of a published checkpoint."""
    token: str | None = model.id_to_token(DOCUMENT)
    return token == _DOCUMENT_TEXT and model.token_to_id(chr(255)) == NUM_BYTE_TOKENS - 1


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one token for each byte."""
    model = tokenizers.models.BPE(vocab={_DOCUMENT_TEXT: DOCUMENT} | {chr(i): i + 1 for i in range(256)}, merges=[])
    return Tokenizer(tokenizers.Tokenizer(model))


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding learned from `texts`.

    Args:
        texts: of the training corpus. More than some 12 MB takes more time and hardly changes the merges.
        vocab_size: number of ids, the 257 of `byte_tokenizer` included; a text with too few pairs gives fewer.

    Raises:
        InputError: vocab_size below 257 or above 65,536.
    """
    if not NUM_BYTE_TOKENS <= vocab_size <= 2**16:
        raise InputError(
            f"a byte-pair vocabulary must have {NUM_BYTE_TOKENS} to {2**16} ids; got --vocab-size {vocab_size}."
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_DOCUMENT_TEXT],
        initial_alphabet=[chr(byte) for byte in range(256)],
        show_progress=False,
    )
    model.train_from_iterator((text.decode("latin-1") for text in texts), trainer)
    return Tokenizer(model)


@dataclasses.dataclass(frozen=True)
class ByteCodec:
    """The tokens of a `Tokenizer`: each token is a byte string, and the document token begins and ends every text.

    Attributes:
        tokenizer: of the bytes.
    """

    tokenizer: Tokenizer
    ends = (DOCUMENT,)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokens by their text."""
        return self.tokenizer.vocabulary

    def encode(self, prompt: bytes) -> list[int]:
        """The document token, and the tokens of the prompt."""
        return [DOCUMENT, *self.tokenizer.encode(prompt).tolist()]

    def encode_stop(self, stop: str) -> list[int]:
        """The tokens of `stop`."""
        ids: list[int] = self.tokenizer.encode(stop.encode()).tolist()
        return ids

    def decoder(self, before: Sequence[int] = ()) -> Decoder:
        """Decodes the tokens that follow `before`."""
        return _TokenDecoder(self.tokenizer, before)

    def num_bytes(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """Number of bytes of the tokens; `before` has no effect."""
        return len(self.tokenizer.decode(tokens))


class _TokenDecoder:
    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]):
        self._tokenizer = tokenizer
        self._bytes = ByteDecoder(tokenizer.decode(before[-8:]))

    def feed(self, token: int) -> str:
        return self._bytes.feed(self._tokenizer.decode([token]))

    def finish(self) -> str:
        return self._bytes.finish()
