"""The codec of the tokenizers of published checkpoints."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from attnax.errors import InputError
from attnax.pretrained.tokenizer_file import refusals_as
from attnax.text.codec import REPLACEMENT, Decoder

if TYPE_CHECKING:
    import tokenizers

__all__ = ["PublishedCodec"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CONTEXT = 8  # number of tokens that decide about spaces between them, and about an incomplete character
_LONGEST_RUN = 256


@dataclasses.dataclass(frozen=True)
class PublishedCodec:
    """The tokens of a `tokenizers.Tokenizer`. Special tokens are read and not printed.

    Attributes:
        tokenizer: its padding and truncation are switched off.
        ends: tokens that end a text.
        start: the token that starts an empty text, if the tokenizer puts no tokens before a text.
        whole: whether a prompt is a complete text, and keeps the tokens that the tokenizer puts after a text.
    """

    tokenizer: tokenizers.Tokenizer
    ends: tuple[int, ...] = ()
    start: int | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokens by their text."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return vocabulary

    @cached_property
    def _silent(self) -> frozenset[int]:
        """Tokens that are not printed."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset([*self.ends, *(token for token, kind in added.items() if kind.special)])

    @cached_property
    def spells_bytes(self) -> bool:
        """Whether characters without a token are spelled in tokens of one byte, such as <0xE2>."""
        token = self.tokenizer.token_to_id("<0x41>")
        return token is not None and self.decode([token]) == "A"

    def encode(self, prompt: bytes) -> list[int]:
        """The tokens of the prompt; the tokens that the tokenizer puts before a text come first, once."""
        text = prompt.decode("utf-8", "replace")
        around = self._encode(text or "a")
        count = len(list(itertools.takewhile(bool, around.special_tokens_mask)))
        start = [] if count == len(around.ids) else around.ids[:count]
        ids = self._encode(text, add_special_tokens=False).ids
        begins_with_start = ids[: len(start)] == start
        if self.whole:
            ids = self._encode(text).ids[len(start) if begins_with_start else 0 :]
        elif not begins_with_start:
            # The tokens that the tokenizer puts after a text, such as BERT's [SEP], would end the new text at once.
            ids = start + ids
        if ids:
            return ids
        if self.start is None:
            raise InputError(
                "the prompt must not be empty: neither the tokenizer nor a bos_token_id in config.json gives the token "
                "that starts a text."
            )
        return [self.start]

    def encode_stop(self, stop: str) -> list[int]:
        """The tokens of `stop`; empty if their text lacks `stop`, as with a tokenizer that changes case."""
        ids = self._encode(stop, add_special_tokens=False).ids
        return ids if stop in self.decode(ids) else []

    def decoder(self, before: Sequence[int] = ()) -> Decoder:
        """A decoder of the tokens' text, `tokenizer.decode` of all tokens, in pieces that no later token changes.

        Where a tokenizer rewrites the text of several tokens together, the decoder does not wait for all of them.
        """
        return _RunDecoder(self, before) if self.spells_bytes else _WindowDecoder(self, before)

    def num_bytes(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """Number of bytes, in UTF-8, of the text that the tokens add."""
        decoder = self.decoder(before)
        return sum(len(piece.encode()) for piece in (*map(decoder.feed, tokens), decoder.finish()))

    def is_shown(self, token: int) -> bool:
        """Whether the token has a text; padding in the vocabulary of a model has no text."""
        return token not in self._silent and self.tokenizer.id_to_token(token) is not None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included.

        Raises:
            InputError: the tokenizer refuses them.
        """
        if not ids:
            return ""
        with refusals_as(lambda why: InputError(f"the tokenizer has no text for the tokens {str(ids)[:80]}: {why}.")):
            text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        with refusals_as(lambda why: InputError(f"the tokenizer has no tokens for {text[:80]!r}: {why}.")):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


class _WindowDecoder:
    """Decodes each token with a few earlier tokens; the text of a token is the text that it adds.

    U+FFFD at the end is uncertain, since the bytes of a character may span several tokens.
    """

    def __init__(self, codec: PublishedCodec, before: Sequence[int]):
        self._codec = codec
        self._window = [token for token in before if codec.is_shown(token)][-_CONTEXT:]
        self._told = codec.decode(self._window)

    def feed(self, token: int) -> str:
        if not self._codec.is_shown(token):
            return ""
        self._window.append(token)
        text = self._codec.decode(self._window)
        new = self._tell(text, text.removesuffix(REPLACEMENT))
        if len(self._window) > 2 * _CONTEXT:
            self._cut(_CONTEXT, uncertain=len(text) - len(self._told))
        return new

    def finish(self) -> str:
        text = self._codec.decode(self._window)
        return self._tell(text, text)

    def _tell(self, text: str, certain: str) -> str:
        """The part of `certain`, a prefix of the window's `text`, that was not returned yet."""
        # A prompt that ends inside a character was shown with U+FFFD; the character replaces the U+FFFD.
        same = _num_shared(self._told, text)
        if len(certain) <= same:
            return ""
        self._told = certain
        return certain[same:]

    def _cut(self, kept: int, uncertain: int = 0) -> None:
        self._window = self._window[-kept:]
        text = self._codec.decode(self._window)
        self._told = text[: len(text) - uncertain]


def _num_shared(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


class _RunDecoder(_WindowDecoder):
    """A `_WindowDecoder` for tokenizers that spell bytes: a run of bytes decodes as a whole or not at all.

    The text of a run is returned when the run ends, or once its bytes can no longer be characters. The text of a very
    long run is returned at the end of a character.
    """

    def __init__(self, codec: PublishedCodec, before: Sequence[int]):
        self._run = _Run()
        shown = [token for token in before if codec.is_shown(token)]
        for token in shown:
            self._run.add(_byte_of(codec, token))
        super().__init__(codec, shown)
        self._window = shown[-self._run.num_tokens() :]
        # An incomplete character was shown as one U+FFFD, even where `decode` gives another text for its run.
        whole = self._window[: len(self._window) - self._run.num_begun]
        self._told = codec.decode(whole) + (REPLACEMENT if self._run.num_begun else "")
        self._held = 0  # number of bytes that were fed and not returned

    def feed(self, token: int) -> str:
        if not self._codec.is_shown(token):
            return ""
        byte, was_open = _byte_of(self._codec, token), self._run.is_open
        is_whole = not self._run.num_begun
        self._run.add(byte)
        broken = ""
        if self._run.is_broken or (byte is None and was_open and not is_whole):
            # The part of the run in the prompt is shown already.
            broken, self._held = REPLACEMENT * (self._held + (byte is not None)), 0
            self._cut(1)
        self._window.append(token)
        if byte is not None:
            if self._run.is_broken:
                self._cut(1)
                return broken
            if self._run.is_open:
                self._held += 1
                return ""
        self._held = 0
        text = self._codec.decode(self._window)
        new = self._tell(text, text)
        kept = self._run.num_tokens()
        if kept < _CONTEXT or len(self._window) > 2 * _CONTEXT:
            self._cut(kept)
        return broken + new

    def finish(self) -> str:
        if self._run.num_begun:
            return REPLACEMENT * self._held
        return super().finish()


class _Run:
    """The run of single-byte tokens at the end of a text.

    Attributes:
        is_broken: whether the bytes can no longer be characters.
        is_open: whether the next token decides if the bytes are characters.
        num_begun: number of bytes of an incomplete character at the end.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.is_broken = self.is_open = self._is_cut = False
        # Numbers of bytes: of the run, of its last complete character, and after that character.
        self._size = self._size_of_last = self.num_begun = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, byte: bytes | None) -> None:
        """Adds the next token: its byte, or None for another token."""
        if byte is None:
            self._begin()
        if byte is None or self.is_broken:
            return
        try:
            character = self._decoder.decode(byte)
        except UnicodeDecodeError:
            self.is_broken, self.is_open, self.num_begun = True, False, 0
            return
        self._size += 1
        self.num_begun += 1
        if character:
            self._size_of_last, self.num_begun = self.num_begun, 0
        self.is_open = self._size < _LONGEST_RUN or not character
        if not self.is_open:
            self._is_cut, self._size = True, self._size_of_last

    def num_tokens(self) -> int:
        """Number of tokens at the end that can change the text of the next token."""
        if self.is_broken:
            return 1
        return self._size if self._is_cut else self._size + _CONTEXT


def _byte_of(codec: PublishedCodec, token: int) -> bytes | None:
    """The byte of a token such as <0xE2>; None for other tokens."""
    match = _BYTE.fullmatch(str(codec.tokenizer.id_to_token(token)))
    return None if match is None else bytes.fromhex(match[1])
