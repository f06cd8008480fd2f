"""Tokenizers of bytes: any text survives."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from attnax.errors import InputError
from attnax.text import Tokenizer, byte_tokenizer, open_tokenizer, train_bpe


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([b"def one(two):\n    return two + 1\n" * 30, "größer, 大きい\n".encode() * 30], 300)


ANY_BYTES = st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass"))
BYTES = byte_tokenizer()


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(size, dtype):
    vocabulary = {chr(number): number for number in range(256)} | {f"{number:x}": number for number in range(256, size)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])))
    assert tokenizer.vocab_size == size and tokenizer.encode(b"text").dtype == dtype
    assert tokenizer.encode("größe").tolist() == tokenizer.encode("größe".encode()).tolist()


def check_survival(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode_documents([text, text])
    assert tokenizer.decode(ids) == text + text and (ids == 0).sum() == 2 and ids[0] == 0


class TestTokenizer:
    @settings(deadline=None, max_examples=25, derandomize=True)
    @given(ANY_BYTES)
    def test_any_bytes_survive(self, bpe, text):
        for tokenizer in (bpe, BYTES):
            check_survival(tokenizer, text)

    @pytest.mark.contract
    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(ANY_BYTES)
    def test_more_bytes_survive(self, bpe, text):
        for tokenizer in (bpe, BYTES):
            check_survival(tokenizer, text)

    def test_text_that_spells_the_document_token_is_text(self, bpe):
        for tokenizer in (bpe, byte_tokenizer(), train_bpe([b"<|document|>" * 99], 300)):
            ids = tokenizer.encode(b"a<|document|>b")
            assert tokenizer.decode(ids) == b"a<|document|>b" and (ids != 0).all()

    def test_bpe_is_shorter_and_bytes_are_one_token_each(self, bpe):
        text = b"def one(two):\n    return two + 1\n"
        assert len(bpe.encode(text)) < len(text) / 2 and len(byte_tokenizer().encode(text)) == len(text)
        assert byte_tokenizer().vocab_size == 257 and 257 < bpe.vocab_size <= 300
        np.testing.assert_array_equal(byte_tokenizer().encode(bytes(range(256))), np.arange(1, 257))

    def test_it_comes_back_from_disk(self, bpe, tmp_path):
        (tmp_path / "tokenizer.json").write_text(bpe.to_json(), "utf-8")
        again = open_tokenizer(tmp_path / "tokenizer.json")
        text = "def größer(<|document|>)".encode()
        np.testing.assert_array_equal(again.encode(text), bpe.encode(text))

    @pytest.mark.parametrize("vocab_size", [256, 65537])
    def test_impossible_vocabularies_are_refused(self, vocab_size):
        with pytest.raises(InputError, match=f"257 to 65536 ids; got --vocab-size {vocab_size}"):
            train_bpe([b"text"], vocab_size)
