"""Packed sequences are whole, and a model reads each as if it were alone."""

import jax
import numpy as np
import pytest
from tiny import build

from attnax import TransformerConfig, TransformerLM, masks
from attnax.text import pack


def make_sequences(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 17, length) for length in lengths]


def test_every_sequence_is_whole_and_in_one_place():
    sequences = make_sequences(*np.random.default_rng(1).integers(0, 24, 101))
    packed = pack(sequences, 23, pad_token_id=99)
    for index, sequence in enumerate(sequences):
        rows, places = np.nonzero(packed.document_ids == index)
        assert len(set(rows)) == min(1, len(sequence))
        np.testing.assert_array_equal(np.diff(places), 1)
        np.testing.assert_array_equal(packed.ids[rows, places], sequence)
        np.testing.assert_array_equal(packed.position_ids[rows, places], np.arange(len(sequence)))
    padding = packed.document_ids < 0
    assert (packed.ids[padding] == 99).all() and (packed.position_ids[padding] == -1).all()
    real_first = np.where(padding, 101, packed.document_ids)
    assert (np.diff(real_first) >= 0).all()  # so that masks skip tiles
    assert {x.dtype for x in packed} == {np.dtype(np.int32)}


def test_few_tokens_are_padding():
    rows, length = pack(make_sequences(7, 5, 6, 2, 4, 8, 3, 1), 9).ids.shape
    assert (rows, length) == (4, 9)  # 36 tokens
    assert pack([], 9).ids.shape == pack([[], []], 9).ids.shape == (0, 9)


@pytest.mark.parametrize("pos_emb_type", ["rope", "learned"])
def test_a_model_gives_each_sequence_the_logits_that_it_has_alone(pos_emb_type):
    config = TransformerConfig(
        vocab_size=17, d_model=8, num_heads=2, num_layers=2, d_ff=11, max_len=11, pos_emb_type=pos_emb_type
    )
    model = build(lambda rngs: TransformerLM(rngs, config))
    sequences = make_sequences(5, 11, 3, 7, 2, 3)
    packed = jax.device_put(pack(sequences, 11))
    mask = masks.documents(packed.document_ids)
    logits = np.asarray(model(packed.ids, mask=mask, position_ids=packed.position_ids))
    alone = np.asarray(model(jax.device_put(np.stack([np.resize(sequence, 11) for sequence in sequences]))))
    assert len(packed.ids) == 3
    for index, sequence in enumerate(sequences):
        here = np.asarray(packed.document_ids) == index
        np.testing.assert_allclose(logits[here], alone[index, : len(sequence)], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([[1, 2], [1, 2, 3, 4]], r"got 4 tokens in sequences\[1\], length=3. Cut it"),
        ([np.ones((1, 2), int)], r"integers in one axis; got shape=\(1, 2\), dtype=int64 of sequences\[0\]"),
        ([np.ones(2)], "dtype=float64"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(sequences, words):
    with pytest.raises(ValueError, match=words):
        pack(sequences, 3)
