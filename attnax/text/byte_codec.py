"""The codec of the tokenizers that `attnax train` learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from attnax.text.codec import ByteDecoder, Decoder
from attnax.text.tokenizer import DOCUMENT, Tokenizer

__all__ = ["ByteCodec"]


@dataclasses.dataclass(frozen=True)
class ByteCodec:
    """The tokens of a `Tokenizer`: each is bytes of its own, and the document token leads every text and ends it.

    Attributes:
        tokenizer: of the bytes.
    """

    tokenizer: Tokenizer
    ends = (DOCUMENT,)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """What each token is."""
        return self.tokenizer.vocabulary

    def encode(self, prompt: bytes) -> list[int]:
        """The document token, and those of the prompt."""
        return [DOCUMENT, *self.tokenizer.encode(prompt).tolist()]

    def encode_stop(self, stop: str) -> list[int]:
        """The tokens of `stop`."""
        ids: list[int] = self.tokenizer.encode(stop.encode()).tolist()
        return ids

    def decoder(self, before: Sequence[int] = ()) -> Decoder:
        """Decodes the tokens that follow `before`."""
        return _TokenDecoder(self.tokenizer, before)

    def num_bytes(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """The bytes of the tokens, whatever comes before them."""
        return len(self.tokenizer.decode(tokens))


class _TokenDecoder:
    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]):
        self._tokenizer = tokenizer
        self._bytes = ByteDecoder(tokenizer.decode(before[-8:]))

    def feed(self, token: int) -> str:
        return self._bytes.feed(self._tokenizer.decode([token]))

    def finish(self) -> str:
        return self._bytes.finish()
