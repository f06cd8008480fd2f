"""Batches: a function of seed and update, the same for any number of processes and threads; each row once a pass."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnax.errors import InputError
from attnax.text import byte_tokenizer
from attnax.training import Batches, TokenStream, make_store, read_corpus

TOKENS = np.arange(23 * 7 + 3, dtype=np.uint16)  # 23 windows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index in range(30):
        (folder / f"{index:02d}.txt").write_text(f"text number {index}\n" * 5)
    return make_store(read_corpus(str(folder)), byte_tokenizer(), folder / "store", shard_tokens=333)


class TestTokenStream:
    @settings(deadline=None, derandomize=True)
    @given(st.integers(2, 40), st.integers(1, 9), st.data())
    def test_every_token_is_scored_once_with_its_context(self, length, window, data):
        stride = data.draw(st.integers(1, window))
        stream = TokenStream(np.arange(length, dtype=np.uint16) + 100, window)
        scored = []
        for number, (tokens, counts) in enumerate(stream.scoring_windows(stride)):
            assert tokens.shape == (window + 1,) and counts.shape == (window,)
            scored += list(tokens[1:][counts])
            if number:
                assert np.flatnonzero(counts)[0] >= min(window - stride, tokens[1:][counts][0] - 101)
        assert scored == list(range(101, 100 + length))

    def test_too_little_text_is_refused(self):
        stream = TokenStream(np.zeros(7, np.uint16), 7)
        assert len(stream) == 0
        with pytest.raises(InputError, match="its 7 tokens do not fill one window of 7"):
            stream.require_a_window()
        with pytest.raises(IndexError, match="below 0; got index=0"):
            stream[0]


def starts(batch):
    """The numbers of the windows in a batch of `TOKENS`."""
    return batch["tokens"][..., 0] // 7


class TestOrder:
    def test_every_pass_visits_all_rows_once_in_an_order_of_its_own(self):
        batches = Batches(TokenStream(TOKENS, 7), batch_size=3, accumulate=2, seed=1)
        rows = np.concatenate([starts(batches[update]).reshape(-1) for update in range(23 * 2 // 2)])[: 23 * 6]
        passes = rows.reshape(6, 23)
        assert all(sorted(each) == list(range(23)) for each in passes)
        assert len({tuple(each) for each in passes}) == 6 and any(tuple(each) != tuple(range(23)) for each in passes)
        batch = batches[5]
        assert batch["tokens"].shape == (2, 3, 8) and batch["tokens"].dtype == np.int32
        assert (np.diff(batch["tokens"]) == 1).all()

    def test_an_update_is_reached_at_once_and_depends_on_the_seed(self):
        stream = TokenStream(TOKENS, 7)
        one, other = (Batches(stream, batch_size=5, seed=seed) for seed in (1, 2))
        late = one[10**9]["tokens"]
        np.testing.assert_array_equal(late, Batches(stream, batch_size=5, seed=1)[10**9]["tokens"])
        assert (one[0]["tokens"] != other[0]["tokens"]).any()
        second = np.concatenate([starts(one[update]).reshape(-1) for update in range(10)])[23:46]
        first = np.concatenate([starts(other[update]).reshape(-1) for update in range(10)])[:23]
        assert (first != second).any()  # the passes of neighbouring seeds are no shifted copies

    def test_the_order_is_kept_from_version_to_version(self):
        """A resumed run goes on in this order; a change of it needs a new format of runs."""
        batches = Batches(TokenStream(TOKENS, 7), batch_size=8, seed=3)
        assert starts(batches[2]).tolist() == [[17, 1, 13, 3, 4, 12, 0, 4]]

    @pytest.mark.parametrize("processes", [1, 2, 4])
    @pytest.mark.parametrize("threads", [0, 4, 16])
    def test_processes_and_threads_give_the_same_batches(self, store, processes, threads):
        stream = TokenStream(store.tokens(), 11)
        kinds = {"batch_size": 8, "accumulate": 3, "seed": 5}
        whole = Batches(stream, **kinds)
        parts = [Batches(stream, **kinds, part=(i, processes)) for i in range(processes)]
        for part_first in (0, 17):
            found = []
            for part in parts:
                with part.start(part_first, threads=threads, ahead=3) as prefetched:
                    found.append([batch["tokens"] for batch in itertools.islice(prefetched, 5)])
                assert found[-1][0].shape == (3, 8 // processes, 12)
            for number, pieces in enumerate(zip(*found, strict=True)):
                np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[part_first + number]["tokens"])

    def test_a_store_and_memory_give_the_same_batches(self, store):
        inside = np.asarray(store.tokens()[:])
        one, other = (Batches(TokenStream(tokens, 11), batch_size=4) for tokens in (store.tokens(), inside))
        for update in (0, 1, 30):
            np.testing.assert_array_equal(one[update]["tokens"], other[update]["tokens"])

    def test_only_the_tokens_of_a_batch_are_read(self):
        class Counted:
            read = 0

            def __len__(self):
                return 10**12

            def __getitem__(self, where):
                self.read += where.stop - where.start
                return np.zeros(where.stop - where.start, np.uint32)

        tokens = Counted()
        Batches(TokenStream(tokens, 400), batch_size=6, accumulate=2, part=(1, 3))[123]
        assert tokens.read == 2 * 2 * 401


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_rows_is_one_source(kind):
    rows = kind({"x": np.full(3, number)} for number in range(5))
    batches = Batches(rows, batch_size=5, seed=1)
    for update in range(3):
        assert sorted(batches[update]["x"][0, :, 0]) == [0, 1, 2, 3, 4]
    mixture = Batches([rows, kind([{"x": np.full(3, 9)}])], batch_size=4)[0]["x"][0, :, 0]
    assert (mixture == 9).sum() == 2


class TestMixture:
    def sources(self):
        return [TokenStream(TOKENS[: 7 * size + 1] + 1000 * number, 7) for number, size in enumerate((5, 13))]

    def test_sources_are_mixed_by_weight_and_each_has_passes_of_its_own(self):
        batches = Batches(self.sources(), batch_size=4, weights=(3.0, 1.0), seed=2)
        first = np.concatenate([batches[update]["tokens"][0, :, 0] for update in range(52)])
        of_source = [first[first // 1000 == number] % 1000 // 7 for number in (0, 1)]
        assert [len(each) for each in of_source] == [156, 52]
        for rows, size in zip(of_source, (5, 13), strict=True):
            for start in range(0, len(rows) - size + 1, size):
                assert sorted(rows[start : start + size]) == list(range(size))
        np.testing.assert_array_equal(
            batches[7]["tokens"], Batches(self.sources(), batch_size=4, weights=(3.0, 1.0), seed=2)[7]["tokens"]
        )

    def test_equal_weights_by_default(self):
        batch = Batches(self.sources(), batch_size=10)[3]["tokens"][0, :, 0] // 1000
        assert sorted(batch) == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got batch_size=0"),
        ({"accumulate": 0}, "accumulate must be at least 1; got accumulate=0"),
        ({"seed": -1}, r"seed must be at least 0 and below 2 \*\* 32; got seed=-1"),
        ({"seed": 2**32}, "got seed=4294967296"),
        ({"part": (2, 2)}, r"part must be \(i, n\) with 0 <= i < n; got part=\(2, 2\)"),
        ({"part": (0, 3)}, r"parts must divide batch_size; got batch_size=4 and part=\(0, 3\)"),
        ({"weights": [1.0, 2.0]}, r"one number above 0 for each of 1 sources; got weights=\[1.0, 2.0\]"),
        ({"weights": [0.0]}, r"got weights=\[0.0\]"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Batches(TokenStream(TOKENS, 7), **{"batch_size": 4} | fields)


def test_sources_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"every source must have rows; got 2 sources, of which \[1\] are empty"):
        Batches([TokenStream(TOKENS, 7), TokenStream(TOKENS[:3], 7)], batch_size=1)
    with pytest.raises(IndexError, match="at least 0; got update=-1"):
        Batches(TokenStream(TOKENS, 7), batch_size=1)[-1]
