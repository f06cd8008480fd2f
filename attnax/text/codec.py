"""Text to tokens and tokens to text, for any kind of tokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

__all__ = ["ByteDecoder", "Codec", "Decoder", "TextStream", "spell"]

REPLACEMENT = "\ufffd"  # stands for bytes that are no character


@runtime_checkable
class Decoder(Protocol):
    """Tokens to text, one at a time."""

    def feed(self, token: int) -> str:
        """The part of the text that this token makes certain."""

    def finish(self) -> str:
        """The rest of the text when no token follows."""


@runtime_checkable
class Codec(Protocol):
    """Text to tokens, and tokens to text."""

    @property
    def ends(self) -> Sequence[int]:
        """Tokens that end a text."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokens by their text; two models may share tokens only if their vocabularies are equal."""

    def encode(self, prompt: bytes) -> list[int]:
        """The tokens that the model reads: the start of a text, and the prompt.

        Raises:
            InputError: the prompt has no tokens.
        """

    def encode_stop(self, stop: str) -> list[int]:
        """Tokens whose text contains `stop`; empty if no such tokens are certain."""

    def decoder(self, before: Sequence[int] = ()) -> Decoder:
        """A decoder for the tokens after `before`, whose text is already shown."""

    def num_bytes(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """Number of bytes that the tokens add to the text of `before`."""


class ByteDecoder:
    r"""Bytes to text: characters once they are complete, and U+FFFD for bytes that cannot become a character.

    Args:
        before: bytes whose text is shown already, with U+FFFD for a character that is not complete at their end.

    Example:
        >>> from attnax.text import ByteDecoder
        >>> decoder = ByteDecoder()
        >>> [decoder.feed(piece) for piece in (b"a", b"\xc3", b"\xa9", b"\xff")] + [decoder.finish()]
        ['a', '', 'é', '�', '']
    """

    def __init__(self, before: bytes = b""):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(before[-3:])  # a character has four bytes at most
        begun, _ = self._decoder.getstate()
        self._is_shown = bool(begun)

    def feed(self, piece: bytes) -> str:
        """The characters that are certain now."""
        return self._new(self._decoder.decode(piece))

    def finish(self) -> str:
        """U+FFFD for a character that is not complete."""
        return self._new(self._decoder.decode(b"", final=True))

    def _new(self, text: str) -> str:
        if text and self._is_shown:
            self._is_shown = False
            return text.removeprefix(REPLACEMENT)
        return text


class TextStream:
    """The text of tokens, one at a time, up to the stop that is complete first.

    Characters that may begin a stop are held back until later characters decide. If one token completes several stops,
    the stop that ends first counts, as if characters came one by one.

    Args:
        decoder: of the tokens.
        stops: strings that end the text.

    Attributes:
        stopped: whether a stop was found; no text comes after it.

    Example:
        >>> from attnax.text import ByteCodec, TextStream, byte_tokenizer
        >>> codec = ByteCodec(byte_tokenizer())
        >>> stream = TextStream(codec.decoder(), stops=["end"])
        >>> [stream.feed(token) for token in codec.encode(b"an end.")]
        ['', 'a', 'n', ' ', '', '', '', '']
        >>> stream.stopped, stream.finish()
        (True, '')
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()):
        self.stopped = False
        self._decoder, self._stops, self._held = decoder, tuple(stops), ""

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        return "" if self.stopped else self._release(self._decoder.feed(token))

    def finish(self) -> str:
        """The rest of the text when no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        held = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := held.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return held[: min(ends)[1]]
        kept = len(held) - max((_begun(held, stop) for stop in self._stops), default=0)
        self._held = held[kept:]
        return held[:kept]


def spell(tokens: Iterable[int], stream: TextStream) -> Iterator[str]:
    """The text of the tokens in pieces; no token is read after a stop."""
    for token in tokens:
        yield stream.feed(token)
        if stream.stopped:
            return
    yield stream.finish()


def _begun(text: str, stop: str) -> int:
    """Number of characters at the end of `text` that are the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
