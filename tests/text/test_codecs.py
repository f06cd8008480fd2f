"""Codecs: the pieces of a text are the text of all its tokens, and a prompt gets the start of a text."""

import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import (
    AROUND,
    END,
    KINDS,
    PANICS,
    START,
    byte_fallback,
    byte_level,
    copy_of,
    panicking,
    unigram,
    word_pieces,
)
from tokenizers import decoders, models

from attnax.errors import InputError
from attnax.text import ByteCodec, ByteDecoder, PublishedCodec, TextStream, byte_tokenizer, spell


def decode(codec, tokens, before=()):
    """The pieces of a text, and the rest at its end."""
    decoder = codec.decoder(before)
    return [*map(decoder.feed, tokens), decoder.finish()]


def added(start, whole):
    """The part of a text that was not shown; U+FFFD stood for an incomplete character."""
    while not whole.startswith(start):
        start = start[:-1]
    return whole[len(start) :]


def is_byte(tokenizer, token):
    return re.fullmatch("<0x..>", str(tokenizer.id_to_token(token))) is not None


def byte_tokens(tokenizer, data):
    """A token for each byte, of any value."""
    names = [f"<0x{byte:02X}>" for byte in data]
    if tokenizer.token_to_id("<0x00>") is None:  # GPT-2's names of them
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = iter(range(256, 512))
        names_of = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
        names = [names_of[byte] for byte in data]
    return [tokenizer.token_to_id(name) for name in names]


class TestDecoding:
    @pytest.mark.parametrize("kind", KINDS)
    @given(data=st.data())
    def test_pieces_are_what_decoding_all_tokens_gives(self, kind, data):
        """All that a model may write: parts of characters, special tokens, tokens that the tokenizer lacks."""
        tokenizer = copy_of(kind)
        size = tokenizer.get_vocab_size()
        some = st.lists(st.integers(0, size + 9), max_size=30)
        spelled = st.text(st.sampled_from("é ü日本😀▁ \nfx.,\ufffd"), max_size=6).map(
            lambda text: tokenizer.encode(text).ids
        )
        tokens = [token for part in data.draw(st.lists(some | spelled, max_size=5)) for token in part]
        cut = data.draw(st.integers(0, len(tokens)))  # a prompt may end inside a character
        while cut and is_byte(tokenizer, tokens[cut - 1]):  # the next token may change the text that a prompt has shown
            cut -= 1
        before, after = tokens[:cut], tokens[cut:]
        codec = PublishedCodec(tokenizer)
        pieces = decode(codec, after, before)
        assert len(pieces) == len(after) + 1
        expected = added(tokenizer.decode(before), tokenizer.decode(tokens))
        assert "".join(pieces) == expected and codec.num_bytes(after, before) == len(expected.encode())

    @pytest.mark.parametrize("kind", [byte_level, byte_fallback])
    @given(data=st.lists(st.sampled_from([b"\xc3", b"\xa9", b"\xf0\x9f\x98\x80", b"a", b"\xff"]), max_size=60))
    def test_bytes_in_a_row_are_what_decoding_all_gives(self, kind, data):
        codec = PublishedCodec(copy_of(kind))
        tokens = byte_tokens(codec.tokenizer, b"".join(data))
        assert "".join(decode(codec, tokens)) == codec.tokenizer.decode(tokens)

    def test_pieces_come_as_soon_as_they_are_certain(self):
        codec = PublishedCodec(copy_of(byte_fallback))
        space, f, *bytes_of_eszett = codec.tokenizer.encode("fß").ids[-4:]
        assert len(bytes_of_eszett) == 2
        assert decode(codec, [f, space, *bytes_of_eszett, f], [f]) == ["f", " ", "", "", "ßf", ""]
        lone = byte_tokens(codec.tokenizer, b"\xc3\xc3\xc3")
        assert decode(codec, lone, [f]) == ["", "\ufffd\ufffd", "\ufffd", ""]
        codec = PublishedCodec(copy_of(byte_level))
        euro = codec.tokenizer.encode("€x").ids
        assert decode(codec, euro) == ["", "", "€", "x", ""]
        lone = byte_tokens(codec.tokenizer, b"\xc3\xc3\xc3")
        assert decode(codec, lone) == ["", "\ufffd", "\ufffd", "\ufffd"]

    @pytest.mark.parametrize("kind", [byte_level, byte_fallback])
    def test_a_prompt_that_ends_inside_a_character_does_not_lose_it(self, kind):
        codec = PublishedCodec(copy_of(kind))
        tokens = byte_tokens(codec.tokenizer, "😀!".encode())
        for cut in range(1, 4):
            assert "".join(decode(codec, tokens[cut:], tokens[:cut])) == "😀!"
        codec = ByteCodec(byte_tokenizer())
        tokens = codec.encode("😀!".encode())
        for cut in range(2, 5):
            assert decode(codec, tokens[cut:], tokens[:cut]) == ["", "", "", "😀", "!", ""][cut - 1 :]
            assert decode(codec, tokens[1:2], tokens[:cut]) == ["", "\ufffd"]  # the first U+FFFD is shown already

    def test_what_a_prompt_has_shown_is_not_shown_again(self):
        """In the text of all tokens, a byte that is no character takes the bytes beside it with it."""
        codec = PublishedCodec(copy_of(byte_fallback))
        (f,) = codec.tokenizer.encode("f").ids[-1:]
        shown = byte_tokens(codec.tokenizer, "日本".encode() * 5)
        bad, lead, first = byte_tokens(codec.tokenizer, b"\xff\xe6\x97")
        for before, after, expected in (
            (shown, [bad, bad, f], ["\ufffd", "\ufffd", "f", ""]),
            (shown, [lead, f], ["", "\ufffdf", ""]),
            (shown, [lead], ["", "\ufffd"]),
            (shown, [lead, first, bad], ["", "", "\ufffd\ufffd\ufffd", ""]),
            ([*shown, lead], [f], ["f", ""]),
            ([*shown, lead], [bad, f], ["\ufffd", "f", ""]),
            ([*shown, bad], [lead, f], ["\ufffd", "f", ""]),
            ([*shown, lead], [*shown[1:3], f], ["", "", "日f", ""]),
        ):
            assert decode(codec, after, before) == expected
            assert codec.num_bytes(after, before) == len("".join(expected).encode())

    def test_a_decoder_that_takes_no_empty_text_is_not_given_one(self):
        tokenizer = copy_of(unigram)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)])
        codec = PublishedCodec(tokenizer)
        ids = tokenizer.encode("return x").ids
        assert "".join(decode(codec, ids)) == tokenizer.decode(ids) and decode(codec, []) == [""]

    @pytest.mark.parametrize("kind", [byte_level, byte_fallback])
    @pytest.mark.parametrize("data", [b"\xc3", "é".encode(), b"\xff"])
    def test_time_is_linear_in_the_tokens(self, kind, data, monkeypatch):
        """The cost is the number of decoded tokens, and a window holds a few."""
        codec, sizes = PublishedCodec(copy_of(kind)), []
        monkeypatch.setattr(PublishedCodec, "decode", noting(PublishedCodec.decode, sizes))
        tokens = byte_tokens(codec.tokenizer, data * 1600)
        assert "".join(decode(codec, tokens)) == codec.tokenizer.decode(tokens)
        assert sum(sizes) < 40 * len(tokens)

    @pytest.mark.parametrize("size", [1, 255, 256, 300, 600])
    def test_a_long_run_of_bytes_is_told_before_it_ends(self, size):
        codec = PublishedCodec(copy_of(byte_fallback))
        (f,) = codec.tokenizer.encode("f").ids[-1:]
        run = byte_tokens(codec.tokenizer, "é".encode() * size)
        for before in range(0, len(run), 97):
            pieces = decode(codec, [*run[before:], f], run[:before])
            assert "".join(pieces) == "é" * (size - before // 2) + "f"
            assert max(map(len, pieces)) <= 129

    @pytest.mark.parametrize("kind", [unigram, byte_fallback])
    def test_the_space_after_the_prompt_is_kept(self, kind):
        codec = PublishedCodec(copy_of(kind))
        ids = codec.encode(b"a return")
        before = codec.encode(b"a")
        assert ids[: len(before)] == before
        assert "".join(decode(codec, ids[len(before) :], before)) == " return"

    def test_tokens_that_end_a_text_are_not_printed(self):
        tokenizer = copy_of(byte_level)
        x, y = tokenizer.encode("x").ids + tokenizer.encode("y").ids
        assert "".join(decode(PublishedCodec(tokenizer, ends=(y,)), [x, y])) == "x"

    @pytest.mark.parametrize("fields", PANICS)
    def test_a_panic_is_an_error_in_words(self, fields):
        codec = PublishedCodec(panicking(fields))
        with pytest.raises(InputError, match=r"the tokenizer has no (tokens for 'a'|text for the tokens \[0\]): \w+"):
            decode(codec, codec.encode(b"a"))


def noting(function, sizes):
    def call(self, ids):
        sizes.append(len(ids))
        return function(self, ids)

    return call


class Pieces:
    """A decoder whose tokens are bytes."""

    def __init__(self, pieces):
        self.pieces, self.bytes = pieces, ByteDecoder()

    def feed(self, token):
        return self.bytes.feed(self.pieces[token])

    def finish(self):
        return self.bytes.finish()


PARTS = [b"ab", b"bc", b"abca", b"\xc3", b"\xa9"]


class TestStops:
    @given(st.lists(st.sampled_from([b"a", b"b", b"c", *PARTS]), max_size=12), st.data())
    def test_a_stop_cuts_the_text_in_whatever_tokens_it_comes(self, tokens, data):
        """The result is that of characters that come one by one, and no token after the stop is read."""
        stops = data.draw(st.lists(st.sampled_from(["bca", "c", "abab", "bb", "éa"]), unique=True, max_size=3))
        want, ended = b"".join(tokens).decode("utf-8", "replace"), False
        for end in range(len(want) + 1):
            starts = [end - len(stop) for stop in stops if want[:end].endswith(stop)]
            if starts:
                want, ended = want[: min(starts)], True
                break
        stream, left = TextStream(Pieces(tokens), stops), iter(range(len(tokens)))
        pieces = list(spell(left, stream))
        read = len(tokens) - len(list(left))
        assert "".join(pieces) == want and stream.stopped == ended and stream.finish() == ""
        assert ended or read == len(tokens)
        if ended:
            text = b"".join(tokens[: read - 1]).decode("utf-8", "ignore")
            assert len(text) < end <= len(b"".join(tokens[:read]).decode("utf-8", "replace"))
            assert stream.feed(0) == ""


class TestEncoding:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_prompt_gets_the_start_and_not_the_end_of_a_text(self, kind):
        plain, around = copy_of(kind), copy_of(kind, AROUND)
        ids = plain.encode("return").ids
        assert PublishedCodec(plain).encode(b"return") == ids
        assert PublishedCodec(around).encode(b"return") == [START, *ids]
        assert PublishedCodec(around, whole=True).encode(b"return") == [START, *ids, END]
        assert PublishedCodec(around).encode(b"") == [START]

    def test_ends_that_a_person_wrote_stay(self):
        codec = PublishedCodec(copy_of(byte_level, AROUND))
        assert codec.encode(b"</s>") == [START, END]

    def test_a_tokenizer_that_pads_or_cuts_does_neither(self):
        tokenizer = copy_of(byte_level, AROUND)
        tokenizer.enable_padding(length=40)
        tokenizer.enable_truncation(3)
        assert PublishedCodec(tokenizer).encode(b"return x") == [START, *copy_of(byte_level).encode("return x").ids]

    def test_an_empty_prompt_needs_something_to_start_with(self):
        assert PublishedCodec(copy_of(byte_level), start=7).encode(b"") == [7]
        with pytest.raises(InputError, match="the prompt must not be empty: neither the tokenizer nor a bos_token_id"):
            PublishedCodec(copy_of(byte_level)).encode(b"")

    def test_what_has_no_token_is_refused(self):
        words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
        with pytest.raises(InputError, match="the tokenizer has no tokens for 'b'"):
            PublishedCodec(words).encode(b"b")

    def test_bytes_that_are_no_text_are_replaced(self):
        codec = PublishedCodec(copy_of(byte_level))
        assert codec.encode(b"x\xff") == codec.encode("x\ufffd".encode())

    def test_stops_are_tokens_only_where_these_spell_them(self):
        lower = PublishedCodec(copy_of(word_pieces))
        assert lower.encode_stop("return") and not lower.encode_stop("Return")

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_prompt_that_begins_with_the_start_gets_no_second(self, kind):
        plain, around = copy_of(kind), copy_of(kind, AROUND)
        ids = plain.encode("return").ids
        for whole in (False, True):
            codec = PublishedCodec(around, whole=whole)
            assert codec.encode(b"<s>return") == codec.encode(b"return")
            assert codec.encode(b"<s>") == codec.encode(b"")
            assert codec.encode(b"<s><s>return").count(START) == 2  # a start token that the user wrote twice stays
        assert PublishedCodec(plain).encode(b"<s>return") == [START, *ids]
