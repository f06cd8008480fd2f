"""Masks: both readings agree, they combine, and positions replace indices in one place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnax import masks, standard_attention


def dense(mask, *full):
    return np.broadcast_to(mask(*masks.index_grid(*full)), full)


MASKS = {
    "causal": masks.causal(),
    "lengths": masks.padding(jnp.array([3, 11])),
    "real tokens": masks.padding(np.arange(13) < np.array([[3], [11]])),
    "causal & lengths": masks.causal() & masks.padding(jnp.array([3, 11])),
    "function": masks.as_mask(lambda b, h, q, kv: q != kv),
    "at positions": masks.at_positions(masks.causal(), jnp.arange(13) + 2, jnp.arange(13) - 1),
}


@pytest.mark.parametrize("name", MASKS)
@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.data())
def test_tile_reading_bounds_the_pointwise_reading(name, data):
    mask = MASKS[name]
    ranges = [tuple(sorted(data.draw(st.tuples(st.integers(0, 12), st.integers(0, 12))))) for _ in range(2)]
    (q_first, q_last), (kv_first, kv_last) = ranges
    tile = dense(mask, 2, 1, 13, 13)[:, :, q_first : q_last + 1, kv_first : kv_last + 1]
    for row in range(2):
        some, every = mask.tile(row, 0, *ranges)
        assert some or not tile[row].any()
        assert not every or tile[row].all()
        if name in ("causal", "lengths"):
            assert bool(some) == tile[row].any() and bool(every) == tile[row].all()


def test_and_takes_masks_functions_and_arrays_on_either_side():
    odd = np.arange(5) % 2 == 1
    expected = np.tri(5, dtype=bool) & odd
    for mask in (
        masks.causal() & odd,
        odd & masks.causal(),
        jnp.asarray(odd) & masks.causal(),
        masks.causal() & (lambda b, h, q, kv: kv % 2 == 1),
        (lambda b, h, q, kv: kv % 2 == 1) & masks.causal(),
    ):
        np.testing.assert_array_equal(dense(mask, 1, 1, 5, 5)[0, 0], expected)


def test_masks_are_pytrees_with_arrays_as_leaves():
    mask = masks.causal() & masks.padding(jnp.array([1, 2])) & masks.at_positions(None, jnp.arange(3), jnp.arange(3))
    assert len(jax.tree.leaves(mask)) == 3
    doubled = jax.tree.map(lambda x: x * 2, mask)
    assert doubled.left.right.lengths.tolist() == [2, 4]
    through_jit = jax.jit(lambda mask: mask(*masks.index_grid(2, 1, 3, 3)))(mask)
    np.testing.assert_array_equal(through_jit, mask(*masks.index_grid(2, 1, 3, 3)))


def test_a_callable_pytree_keeps_its_arrays_as_leaves():
    mask = masks.as_mask(jax.tree_util.Partial(lambda limit, b, h, q, kv: kv < limit, jnp.int32(3)))
    assert len(jax.tree.leaves(mask)) == 1
    assert dense(mask, 1, 1, 2, 5)[0, 0].sum() == 6


def test_rebuilt_masks_compile_nothing_new(count_compilations):
    run = jax.jit(lambda x, mask: standard_attention(x, x, x, mask=mask))
    x = jnp.ones((2, 1, 5, 3))
    run(x, masks.causal() & masks.padding(jnp.array([3, 4])))
    del count_compilations[:]
    lengths = jnp.array([5, 1])
    run(x, masks.causal() & masks.padding(lengths))
    assert not count_compilations


def test_positions_shift_what_a_chunk_sees():
    whole = dense(masks.causal(), 1, 1, 7, 7)
    chunk = masks.at_positions(masks.causal(), jnp.arange(4, 7), jnp.arange(7))
    np.testing.assert_array_equal(dense(chunk, 1, 1, 3, 7), whole[:, :, 4:])


def test_positions_apply_to_score_mods():
    mod = masks.at_positions(
        lambda s, b, h, q, kv: s + 100 * q + kv, jnp.array([[5], [7]]), jnp.array([[1, 2], [3, 4]])
    )
    scores = mod(jnp.zeros((2, 1, 1, 2)), *masks.index_grid(2, 1, 1, 2))
    np.testing.assert_array_equal(scores[:, 0, 0], [[501, 502], [703, 704]])
    assert len(jax.tree.leaves(mod)) == 2


def test_nothing_is_attended_past_a_dense_mask():
    mask = masks.at_positions(masks.as_mask(np.ones((3, 3), bool)), jnp.array([1]), jnp.array([0, 2, 3, 9]))
    assert dense(mask, 1, 1, 1, 4)[0, 0, 0].tolist() == [True, True, False, False]


def test_functions_that_do_not_take_masks_get_a_dense_array():
    full = (2, 3, 5, 7)
    plain = lambda query, key, value, *, mask: mask
    assert masks.mask_argument("test", partial(standard_attention, scale=2.0), masks.causal(), full) == masks.causal()
    array = masks.mask_argument("test", plain, masks.causal(), full)
    assert array.shape == full and array.dtype == jnp.bool_
    assert masks.mask_argument("test", plain, None, full) is None


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: masks.padding(np.ones((2, 3))), "integer lengths .* or booleans .*; got shape=.2, 3., dtype=float"),
        (lambda: masks.padding(np.ones((2, 3, 1), bool)), "got shape=.2, 3, 1."),
        (lambda: masks.as_mask(np.ones(3)), "must be boolean"),
        (lambda: masks.as_mask(3), "a boolean array, a Mask or a function"),
        (lambda: masks.causal() & 3, "a boolean array, a Mask or a function"),
    ],
)
def test_wrong_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()
