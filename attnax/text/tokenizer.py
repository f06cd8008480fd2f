"""Text to token ids and back, exactly: any byte string survives the round trip.

The `tokenizers` library works on characters, so bytes travel as Latin-1, one character a byte. Id 0 is the document
token, which leads every document; ids 1 to 256 are the single bytes; byte-pair encoding adds its merges after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsInt

import numpy as np
import tokenizers

from attnax.errors import InputError

__all__ = ["DOCUMENT", "NUM_BYTE_TOKENS", "Tokenizer", "byte_tokenizer", "train_bpe"]

DOCUMENT = 0
NUM_BYTE_TOKENS = 257
_DOCUMENT_TEXT = "<|document|>"
# Where merges may not cross: words and numbers (up to three digits) with the space before them, runs of signs,
# a newline with the indentation after it.
_PIECES = r" ?[A-Za-z_\x80-\xff]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_\x80-\xff]+|\n[ \n]*|\s+"


class Tokenizer:
    """A byte-level tokenizer: the `tokenizers` library's object, and bytes in and out."""

    def __init__(self, model: tokenizers.Tokenizer):
        model.encode_special_tokens = True  # text that spells out the document token stays text
        self._model = model
        tokens = {token: text for text, token in model.get_vocab().items()}
        self._bytes = [b"", *(tokens[token].encode("latin-1") for token in range(1, len(tokens)))]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._bytes)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids by what they stand for, a character a byte."""
        vocabulary: dict[str, int] = self._model.get_vocab()
        return vocabulary

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of `text`, uint16 or uint32, without a document token."""
        return self._ids(self._model.encode(text.decode("latin-1")).ids)

    def encode_documents(self, texts: Sequence[bytes]) -> np.ndarray:
        """The ids of all texts in a row, each led by the document token."""
        parts = []
        for start in range(0, len(texts), 64):  # so that the library's own objects never pile up
            batch = [text.decode("latin-1") for text in texts[start : start + 64]]
            parts += [self._ids([DOCUMENT, *encoding.ids]) for encoding in self._model.encode_batch_fast(batch)]
        return np.concatenate(parts)

    def decode(self, ids: Iterable[SupportsInt]) -> bytes:
        """The bytes of `ids`; document tokens have none."""
        return b"".join(self._bytes[int(token)] for token in ids)

    def to_json(self) -> str:
        """All of it, in the format of the `tokenizers` library."""
        return self._model.to_str(pretty=True)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads what `to_json` wrote; the caller has checked that the file is whole."""
        return cls(tokenizers.Tokenizer.from_str(path.read_text("utf-8")))

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    model = tokenizers.models.BPE(vocab={_DOCUMENT_TEXT: DOCUMENT} | {chr(i): i + 1 for i in range(256)}, merges=[])
    return Tokenizer(tokenizers.Tokenizer(model))


def train_bpe(texts: Sequence[bytes], vocab_size: int, max_bytes: int = 12_000_000) -> Tokenizer:
    """Byte-pair encoding learned from `texts`, evenly thinned to about `max_bytes`.

    Args:
        texts: what to learn from.
        vocab_size: number of ids, the 257 of `byte_tokenizer` included; fewer are made if the text runs out of pairs.
        max_bytes: merges hardly change with more text, and the time grows with it.

    Raises:
        InputError: vocab_size below 257 or above 65,536.
    """
    if not NUM_BYTE_TOKENS <= vocab_size <= 2**16:
        raise InputError(
            f"a byte-pair vocabulary must have {NUM_BYTE_TOKENS} to {2**16} ids; got --vocab-size {vocab_size}."
        )
    thin = max(1, sum(map(len, texts)) // max_bytes)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_DOCUMENT_TEXT],
        initial_alphabet=[chr(byte) for byte in range(256)],
        show_progress=False,
    )
    model.train_from_iterator((text.decode("latin-1") for text in texts[::thin]), trainer)
    return Tokenizer(model)
