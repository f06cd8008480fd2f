"""The model of a published checkpoint, which writes text."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from attnax.cli.text_model import TextModel, Translator
from attnax.config import Dtype
from attnax.models import Transformer, TransformerLM
from attnax.models.sentence import SentenceEncoder
from attnax.pretrained import load_pretrained
from attnax.pretrained.inspect import find_family
from attnax.pretrained.json_object import read_object
from attnax.pretrained.sentence import MODULES
from attnax.pretrained.tokenizer_file import refusals_as
from attnax.typing import InputError

__all__ = ["PublishedCodec", "is_published", "open_published"]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class PublishedCodec:
    """The tokens of a `tokenizers.Tokenizer`, whose special ones are read and not printed.

    Attributes:
        tokenizer: which then neither pads nor cuts.
        ends: tokens that end a text.
        start: what an empty text starts with, where the tokenizer puts nothing before a text.
        whole: a prompt is a whole text, and keeps the end that the tokenizer puts after one.
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
        """What each token is."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return vocabulary

    @cached_property
    def _silent(self) -> frozenset[int]:
        """Tokens that are not printed."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset([*self.ends, *(token for token, what in added.items() if what.special)])

    def encode(self, prompt: bytes) -> list[int]:
        """The tokens of the prompt, after those that the tokenizer puts before a text."""
        text = prompt.decode("utf-8", "replace")
        if self.whole:
            ids = self._encode(text).ids
        else:
            # What the tokenizer puts after a text, such as BERT's [SEP], would end this one before it is written.
            around = self._encode(text or "a").special_tokens_mask
            count = 0 if all(around) else len(list(itertools.takewhile(bool, around)))
            ids = self._encode(text or "a").ids[:count] + self._encode(text, add_special_tokens=False).ids
        if ids:
            return ids
        if self.start is None:
            raise InputError(
                "--prompt must not be empty: neither the tokenizer nor a bos_token_id in config.json says what a text "
                "starts with."
            )
        return [self.start]

    def encode_stop(self, stop: bytes) -> list[int]:
        """The tokens of `stop`, unless they spell something else, as those of a lower-case tokenizer may."""
        ids = self._encode(stop.decode("utf-8", "replace"), add_special_tokens=False).ids
        return ids if stop in self._decode(ids).encode() else []

    def pieces(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[bytes]:
        """What each token adds to `tokenizer.decode` of all, as soon as no token to come can change it."""
        # Decoded are the tokens of the piece before, which decide on spaces between, and all after them.
        window = [token for token in before if self._is_shown(token)]
        known, told = len(window), self._decode(window)
        for token in tokens:
            if not self._is_shown(token):
                yield b""
                continue
            window.append(token)
            text = self._decode(window)
            # Of a character some bytes may be there, and bytes in a row are characters all together or not at all.
            if text.endswith("\ufffd") or _BYTE.fullmatch(str(self.tokenizer.id_to_token(token))):
                yield b""
                continue
            yield text[len(told) :].encode()
            if text != told:
                window = window[known:]
                known, told = len(window), self._decode(window)
        yield self._decode(window)[len(told) :].encode()

    def _is_shown(self, token: int) -> bool:
        """Whether it has a text: vocabularies of models may be padded."""
        return token not in self._silent and self.tokenizer.id_to_token(token) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        with refusals_as(lambda why: InputError(f"the tokenizer has no text for the tokens {str(ids)[:80]}: {why}.")):
            text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        with refusals_as(lambda why: InputError(f"the tokenizer has no tokens for {text[:80]!r}: {why}.")):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def is_published(folder: Path) -> bool:
    """Whether this is the folder of a published checkpoint, be it whole or not, rather than that of a run.

    Raises:
        InputError: it is neither, or its config.json is not one object of JSON of at most 16 MiB.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}.")
    if any(folder.glob("*.safetensors")):
        return True
    config = folder / "config.json"
    if not config.exists():
        raise InputError(f"{folder} is neither a run folder nor a published checkpoint: it has no config.json.")
    return "model_type" in read_object(config)


def open_published(folder: Path, dtype: Dtype | None = None) -> TextModel:
    """The model of a published checkpoint and its tokens, in the dtype of its tensors unless another is given.

    Raises:
        InputError: it cannot be loaded, writes no text, or has no tokenizer.json.
    """
    theirs = read_object(folder / "config.json")
    kind = find_family(theirs, folder / "config.json").model
    if kind not in (TransformerLM, Transformer):
        kind = SentenceEncoder if (folder / MODULES).is_file() else kind
        raise InputError(
            f"{folder} holds a {kind.__name__}, which writes no text; generate takes a TransformerLM or a Transformer."
        )
    if not (folder / "tokenizer.json").exists():
        raise InputError(
            f"{folder} has no tokenizer.json. Where there is another tokenizer, transformers makes one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    said = theirs
    if (folder / "generation_config.json").exists():
        generation = read_object(folder / "generation_config.json")
        said = theirs | {key: value for key, value in generation.items() if value is not None}
    ends = _tokens(said, "eos_token_id", folder)
    start = _token(said, "bos_token_id", folder)
    first = _token(said, "decoder_start_token_id", folder)
    model, tokenizer = load_pretrained(folder, dtype=dtype)
    assert tokenizer is not None
    if not isinstance(model, Transformer):
        return TextModel(folder, model, PublishedCodec(tokenizer, ends, start))
    first = start if first is None else first
    if first is None:
        raise InputError(f"{folder / 'config.json'} must have a decoder_start_token_id, with which a text starts.")
    return Translator(folder, model, PublishedCodec(tokenizer, ends, start, whole=True), first)


def _tokens(said: Mapping[str, Any], key: str, folder: Path) -> tuple[int, ...]:
    """The ids under a key, one or several or none."""
    value = said.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in values):
        raise InputError(f"{folder}: {key} must be a token or a list of them; got {key}={repr(value)[:80]}.")
    return tuple(values)


def _token(said: Mapping[str, Any], key: str, folder: Path) -> int | None:
    tokens = _tokens(said, key, folder)
    if len(tokens) > 1:
        raise InputError(f"{folder}: {key} must be one token; got {key}={str(list(tokens))[:80]}.")
    return tokens[0] if tokens else None
