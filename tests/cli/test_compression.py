"""The figures of the compressors are those of the whole text, and no more than a piece of it is in memory."""

import gzip
import lzma
import tracemalloc

import numpy as np
import pytest
from small_tokenizers import AROUND, END, START, byte_level, copy_of

from attnax.cli import compression
from attnax.cli.compression import Sizes, compressed_sizes, decode_in_pieces
from attnax.text import DOCUMENT, PublishedTokenizer, SpecialTokens, byte_tokenizer
from attnax.training.store import StoredTexts


def stored(*documents):
    """Documents as a store has them."""
    starts = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    return StoredTexts([np.concatenate(documents)], [starts])


@pytest.mark.parametrize("size", [1, 7, 10_007])
def test_the_sizes_are_those_of_the_whole_text(size):
    text = np.random.default_rng(0).integers(0, 11, 10_007, np.uint8).tobytes()
    pieces = (text[start : start + size] for start in range(0, len(text), size))
    whole = Sizes(len(text), len(gzip.compress(text, 9)), len(lzma.compress(text, preset=9)))
    assert compressed_sizes(pieces) == whole


def test_a_long_document_is_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(compression, "_PIECE", 5)
    tokenizer = byte_tokenizer()
    documents = tokenizer.encode_each(["a document é".encode(), b"another"])
    pieces = list(decode_in_pieces(stored(*documents), tokenizer))
    assert b"".join(pieces).decode() == "a document éanother" and max(map(len, pieces)) <= 5


def test_a_document_of_a_published_tokenizer_is_decoded_as_a_whole(monkeypatch):
    monkeypatch.setattr(compression, "_PIECE", 1)
    tokenizer = PublishedTokenizer(
        copy_of(byte_level, AROUND), SpecialTokens(document=START, end=END, padding=END, start=START)
    )
    documents = tokenizer.encode_each(["è a".encode(), "日本".encode()])  # characters of several tokens
    assert [piece.decode() for piece in decode_in_pieces(stored(*documents), tokenizer)] == ["è a", "日本"]


def test_memory_does_not_grow_with_the_text_and_each_piece_is_a_sign_of_life(monkeypatch):
    beats, peaks, tokenizer = [], [], byte_tokenizer()
    monkeypatch.setattr(compression, "beat", lambda: beats.append(1))
    monkeypatch.setattr(compression, "_PIECE", 1 << 12)
    for size in (1 << 13, 1 << 19):
        tokens = np.full(size, 98, np.uint16)
        tokens[0] = DOCUMENT
        texts = stored(tokens)
        tracemalloc.start()
        try:
            found = compressed_sizes(decode_in_pieces(texts, tokenizer))
            peaks.append(tracemalloc.get_traced_memory()[1])  # `xz -9` alone has hundreds of MB
        finally:
            tracemalloc.stop()
        assert found.text == size - 1 and found.xz < found.gzip + 200
    assert peaks[1] - peaks[0] < 1 << 17 and len(beats) == 2 + 128
