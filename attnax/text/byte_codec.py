"""The codec of the tokenizers that `attnax train` learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from attnax.text.codec import ByteDecoder, Decoder
from attnax.text.tokenizer import DOCUMENT, Tokenizer

__all__ = ["ByteCodec"]


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
