"""Masks: both readings agree, they combine, and positions replace indices in one place."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnax import (
    alibi_mod,
    causal_mod,
    compose_score_mods,
    masks,
    memory_efficient_attention,
    soft_cap_mod,
    standard_attention,
)
from attnax.masks import (
    combine_masks,
    make_causal_mask,
    make_document_mask,
    make_padding_mask,
    make_sliding_window_mask,
)


def dense(many, *score_shape):
    """The array of a mask, or of each mask of a list or dict; computed by one program."""
    read = jax.jit(lambda many: jax.tree.map(lambda mask: mask(*masks.index_grid(*score_shape)), many, is_leaf=is_mask))
    return jax.tree.map(lambda array: np.broadcast_to(array, score_shape), read(many))


def is_mask(x):
    return isinstance(x, masks.Mask)


LENGTH = 53  # three blocks of ids or positions and a part of a fourth
LENGTHS = np.array([29, 11])
WINDOW, PREFIXES = 7, np.array([17, 41])
SORTED = np.array([[0] * 16 + [1] * 3 + [2] * 29 + [7] * 5, [3] * 2 + [5] * 50 + [9]])
SHUFFLED = np.random.default_rng(0).integers(0, 3, (2, LENGTH))
RUNS = np.repeat([[2, 0, 2, 1]], [13, 11, 17, 12], axis=1)[0]  # ids in runs, not sorted
POSITIONS = np.where(np.arange(LENGTH) < 19, -1, np.arange(LENGTH) - 19)  # left padding
RING = (np.arange(LENGTH) + np.array([[5], [30]])) % LENGTH  # a ring buffer


def positions(b, kv):
    return np.stack([POSITIONS, POSITIONS])[b, kv]


@functools.cache  # making masks compiles programs, which the collection of tests should not
def all_masks():
    """By name: (a mask, its formula in NumPy)."""
    return {
        "causal": (masks.causal(), lambda b, h, q, kv: kv <= q),
        "lengths": (masks.padding(LENGTHS), lambda b, h, q, kv: kv < LENGTHS[b]),
        "real tokens": (masks.padding(np.arange(LENGTH) < LENGTHS[:, None]), lambda b, h, q, kv: kv < LENGTHS[b]),
        "window": (masks.sliding_window(WINDOW), lambda b, h, q, kv: (kv <= q) & (q - kv < WINDOW)),
        "array window": (masks.sliding_window(jnp.int32(WINDOW)), lambda b, h, q, kv: (kv <= q) & (q - kv < WINDOW)),
        "first": (masks.first(21), lambda b, h, q, kv: kv < 21),
        "window of both sides": (masks.sliding_window(WINDOW, causal=False), lambda b, h, q, kv: abs(q - kv) < WINDOW),
        "prefix": (masks.prefix(PREFIXES), lambda b, h, q, kv: (kv <= q) | (kv < PREFIXES[b])),
        "documents": (masks.documents(SORTED), lambda b, h, q, kv: SORTED[b, q] == SORTED[b, kv]),
        "documents of all rows": (masks.documents(RUNS), lambda b, h, q, kv: RUNS[q] == RUNS[kv]),
        "shuffled documents": (masks.documents(SHUFFLED), lambda b, h, q, kv: SHUFFLED[b, q] == SHUFFLED[b, kv]),
        "documents of other keys": (masks.documents(RUNS, SORTED), lambda b, h, q, kv: RUNS[q] == SORTED[b, kv]),
        "not documents": (~masks.documents(SORTED), lambda b, h, q, kv: SORTED[b, q] != SORTED[b, kv]),
        "function": (masks.as_mask(lambda b, h, q, kv: q != kv), lambda b, h, q, kv: q != kv),
        "all of three": (
            masks.causal() & masks.padding(LENGTHS) & masks.documents(RUNS),
            lambda b, h, q, kv: (kv <= q) & (kv < LENGTHS[b]) & (RUNS[q] == RUNS[kv]),
        ),
        "either of three": (
            ~masks.causal() | masks.sliding_window(3) | masks.padding(LENGTHS),
            lambda b, h, q, kv: (kv > q) | (q - kv < 3) | (kv < LENGTHS[b]),
        ),
        "nested": (
            ~(masks.causal() & ~(masks.documents(SORTED) | ~masks.prefix(PREFIXES)))
            & (lambda b, h, q, kv: (q + kv) % 3 > 0),
            lambda b, h, q, kv: ((kv > q) | (SORTED[b, q] == SORTED[b, kv])) & ((q + kv) % 3 > 0),
        ),
        "causal at positions": (
            masks.at_positions(masks.causal(), POSITIONS, POSITIONS),
            lambda b, h, q, kv: (positions(b, kv) >= 0) & (positions(b, kv) <= positions(b, q)),
        ),
        "window at turning positions": (
            masks.at_positions(masks.sliding_window(WINDOW), np.arange(LENGTH) + 9, RING),
            lambda b, h, q, kv: (RING[b, kv] <= q + 9) & (q + 9 - RING[b, kv] < WINDOW),
        ),
        "present at positions": (
            masks.at_positions(None, POSITIONS, POSITIONS),
            lambda b, h, q, kv: positions(b, kv) >= 0,
        ),
        "documents at positions": (
            masks.at_positions(masks.documents(SORTED), POSITIONS, POSITIONS),
            lambda b, h, q, kv: (
                (positions(b, kv) >= 0) & (SORTED[b, np.maximum(positions(b, q), 0)] == SORTED[b, positions(b, kv)])
            ),
        ),
        "not causal at positions": (
            masks.at_positions(~masks.causal(), POSITIONS, POSITIONS),
            lambda b, h, q, kv: (positions(b, kv) >= 0) & (positions(b, kv) > positions(b, q)),
        ),
    }


# Masks whose bounds are safe but wide. The bounds of the others are exact, of "documents" for aligned tiles.
INEXACT = {
    *("real tokens", "function", "all of three", "either of three", "nested", "present at positions"),
    *("documents of all rows", "shuffled documents", "documents of other keys", "not documents"),
    *("causal at positions", "window at turning positions", "documents at positions", "not causal at positions"),
}


@functools.cache
def formula_of(name):
    """The mask by its formula in NumPy, (2, 1, LENGTH, LENGTH)."""
    score_shape = 2, 1, LENGTH, LENGTH
    return np.broadcast_to(all_masks()[name][1](*np.indices(score_shape)), score_shape)


def test_a_window_longer_than_any_text_hides_nothing():
    q, kv = np.array([2**31 - 2], np.int32), np.arange(3, dtype=np.int32)
    assert masks.sliding_window(10**12)(0, 0, q, kv).all()


def test_a_mask_is_its_formula():
    for name, array in dense({name: mask for name, (mask, _) in all_masks().items()}, 2, 1, LENGTH, LENGTH).items():
        np.testing.assert_array_equal(array, formula_of(name), err_msg=name)


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0))
def read_tiles(many, q_range, kv_range):
    """The bounds of the masks' tiles, for many ranges and both rows."""

    def read(mask):
        return [jnp.broadcast_to(bound, 2) for bound in mask.tile(jnp.arange(2), jnp.zeros(2, int), q_range, kv_range)]

    return jax.tree.map(read, many, is_leaf=is_mask)


def count_pairs(array, q_range, kv_range):
    """The number of true entries of an array (2, LENGTH, LENGTH), for each of many ranges and both rows."""
    sums = np.pad(array.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    (q, q_end), (kv, kv_end) = ((first, last + 1) for first, last in (q_range, kv_range))
    return (sums[:, q_end, kv_end] - sums[:, q, kv_end] - sums[:, q_end, kv] + sums[:, q, kv]).T


def test_tile_reading_bounds_the_pointwise_reading():
    rng, number = np.random.default_rng(0), 6000

    def make_range():
        first = rng.integers(0, LENGTH, number)
        last = np.minimum(first + rng.integers(0, rng.choice([1, 5, 20, LENGTH], number)), LENGTH - 1)
        # Half of the ranges align with the blocks of ids that documents summarise.
        first[::2], last[::2] = first[::2] // 16 * 16, np.minimum(last[::2] // 16 * 16 + 15, LENGTH - 1)
        return first, last

    ranges = make_range(), make_range()
    sizes = np.prod([last - first + 1 for first, last in ranges], axis=0)[:, None]
    bounds = read_tiles({name: mask for name, (mask, _) in all_masks().items()}, *ranges)
    for name, (some, every) in bounds.items():
        allowed = count_pairs(formula_of(name)[:, 0], *ranges)
        assert (some >= (allowed > 0)).all(), name
        assert (every <= (allowed == sizes)).all(), name
        exact = slice(None, None, 2) if name == "documents" else slice(0) if name in INEXACT else slice(None)
        np.testing.assert_array_equal(some[exact], (allowed > 0)[exact], err_msg=name)
        np.testing.assert_array_equal(every[exact], (allowed == sizes)[exact], err_msg=name)


def test_is_opaque_marks_masks_whose_tiles_have_no_bounds():
    opaque = {"real tokens", "function", "nested"}
    assert {name for name, (mask, _) in all_masks().items() if mask.is_opaque} == opaque


def test_masks_know_how_many_positions_their_arrays_serve():
    dense = np.ones((1, 1, 3, 5), bool)
    known = {
        None: masks.causal() & masks.sliding_window(3) & masks.padding(np.array([3])),
        7: masks.documents(np.arange(7)),
        5: masks.as_mask(dense[:, :, :1]),  # one row for all queries
        3: masks.causal() & ~masks.as_mask(dense) & masks.documents(np.arange(7)),
        2: masks.at_positions(masks.causal(), np.arange(4), np.arange(2)),
        4: masks.at_positions(masks.documents(np.arange(2)), np.arange(4), np.arange(9)),
    }
    assert {number: mask.num_positions for number, mask in known.items()} == {number: number for number in known}


def test_positions_alone_and_around_a_mask_are_checked_against_the_lengths():
    for mask in (None, masks.documents(np.arange(9))):
        at = masks.at_positions(mask, np.arange(3), np.arange(5))
        at.check("attend", (2, 1, 3, 5))
        with pytest.raises(ValueError, match="attend: "):
            at.check("attend", (2, 1, 4, 5))


def test_empty_slots_do_not_make_a_tile_look_nearer_than_its_keys():
    slots = np.where(np.arange(LENGTH) % 2 == 0, -1, np.arange(LENGTH))
    mask = masks.at_positions(masks.causal(), np.arange(LENGTH), slots)
    none = masks.at_positions(masks.causal(), np.arange(LENGTH), np.full(LENGTH, -1))
    before, behind, empty = jax.jit(
        lambda mask, none: [
            mask.tile(0, 0, (0, 15), (16, 31)),  # the keys are at 17 and later
            mask.tile(0, 0, (48, 52), (16, 31)),  # the keys are before the queries, between empty slots
            none.tile(0, 0, (0, 52), (0, 52)),
        ]
    )(mask, none)
    assert [bool(x) for x in before] == [False, False]
    assert [bool(x) for x in behind] == [True, False]
    assert [bool(x) for x in empty] == [False, False]


def test_and_and_or_take_masks_functions_and_arrays_on_either_side():
    odd, causal = np.arange(5) % 2 == 1, masks.causal()
    is_odd = lambda b, h, q, kv: kv % 2 == 1
    both = [causal & odd, odd & causal, jnp.asarray(odd) & causal, causal & is_odd, is_odd & causal]
    either = [causal | odd, odd | causal, jnp.asarray(odd) | causal, causal | is_odd, is_odd | causal]
    arrays = dense(both + either, 1, 1, 5, 5)
    for index in range(5):
        np.testing.assert_array_equal(arrays[index][0, 0], np.tri(5, dtype=bool) & odd)
        np.testing.assert_array_equal(arrays[5 + index][0, 0], np.tri(5, dtype=bool) | odd)


def test_masks_are_pytrees_with_arrays_as_leaves():
    mask = masks.causal() & masks.padding(np.array([1, 2])) & masks.at_positions(None, np.arange(3), np.arange(3))
    assert len(jax.tree.leaves(mask)) == 3
    doubled = jax.tree.map(lambda x: np.asarray(x) * 2, mask)
    assert doubled.left.right.lengths.tolist() == [2, 4]
    through_jit = jax.jit(lambda mask: mask(*masks.index_grid(2, 1, 3, 3)))(mask)
    keys = np.arange(3) < np.array([1, 2])[:, None]
    np.testing.assert_array_equal(through_jit, (np.tri(3, dtype=bool) & keys[:, None])[:, None])


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


def test_positions_shift_the_mask_of_a_chunk():
    chunk = masks.at_positions(masks.causal(), np.arange(4, 7), np.arange(7))
    np.testing.assert_array_equal(dense(chunk, 1, 1, 3, 7)[0, 0], np.tri(7, dtype=bool)[4:])


def test_positions_apply_to_score_mods():
    mod = masks.at_positions(lambda s, b, h, q, kv: s + 100 * q + kv, np.array([[5], [7]]), np.array([[1, 2], [3, 4]]))
    scores = jax.jit(lambda mod, scores: mod(scores, *masks.index_grid(2, 1, 1, 2)))(mod, np.zeros((2, 1, 1, 2)))
    np.testing.assert_array_equal(scores[:, 0, 0], [[501, 502], [703, 704]])
    assert len(jax.tree.leaves(mod)) == 2


def test_nothing_is_attended_past_a_dense_mask():
    mask = masks.at_positions(masks.as_mask(np.ones((3, 3), bool)), np.array([1]), np.array([0, 2, 3, 9]))
    assert dense(mask, 1, 1, 1, 4)[0, 0, 0].tolist() == [True, True, False, False]


def test_make_functions_give_the_masks_as_arrays():
    ids = np.array([[5, 7, 0, 0, 3], [0, 1, 2, 3, 0]])
    q, kv = np.indices((5, 7))
    cases = [
        (make_padding_mask, (ids != 0)[:, None, None]),
        (lambda ids: make_padding_mask(ids, pad_token_id=3), (ids != 3)[:, None, None]),
        (lambda _: make_causal_mask(5), np.tri(5, dtype=bool)[None, None]),
        (lambda _: make_sliding_window_mask(5, 7, window_size=2), ((kv <= q) & (q - kv < 2))[None, None]),
        (lambda _: make_sliding_window_mask(5, window_size=3, causal=False), (abs(q - kv) < 3)[None, None, :, :5]),
        (make_document_mask, (ids[:, :, None] == ids[:, None, :])[:, None]),
        (lambda ids: make_document_mask(ids[1]), (ids[1][:, None] == ids[1])[None, None]),
    ]
    arrays = jax.jit(lambda ids: [make(ids) for make, _ in cases])(ids)
    for array, (_, expected) in zip(arrays, cases, strict=True):
        np.testing.assert_array_equal(array, expected, strict=True)


def test_combined_arrays_are_an_array_and_anything_else_a_mask():
    left, right = np.arange(5) < 3, np.tri(5, dtype=bool)[None]
    assert combine_masks() is combine_masks(None, None) is None
    array = combine_masks(left, None, jnp.asarray(right))
    assert isinstance(array, jax.Array) and array.dtype == jnp.bool_
    np.testing.assert_array_equal(np.broadcast_to(array, (1, 1, 5, 5))[0], left & right)
    for other in (masks.causal(), lambda b, h, q, kv: kv <= q):
        mask = combine_masks(left, None, other)
        assert isinstance(mask, masks.Mask)
        np.testing.assert_array_equal(dense(mask, 1, 1, 5, 5)[0], left & right)
    assert combine_masks(None, masks.causal()) == masks.causal()


def test_a_mask_has_no_truth():
    mod = soft_cap_mod(3.0)
    both, array = masks.causal() & masks.padding(LENGTHS), masks.as_mask(np.ones(3, bool))
    for value in (masks.causal(), both, ~both, both | array, array):
        for ask in (bool, lambda x: x and masks.causal(), lambda x: x or masks.causal(), lambda x: not x):
            with pytest.raises(TypeError, match="Combine masks by `&`, `|` and `~`"):
                ask(value)
    for value in (mod, causal_mod(), compose_score_mods(mod, alibi_mod(2)), masks.at_positions(mod, RUNS, RUNS)):
        with pytest.raises(TypeError, match="score mods by compose_score_mods"):
            bool(value)


def test_padding_among_documents_attends_nothing_and_is_attended_by_nothing():
    ids = np.array([[0, 0, -1, 1, -1, -7], [-1, 2, 2, 2, 0, -1]])
    want = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids >= 0)[:, None, :, None]
    np.testing.assert_array_equal(make_document_mask(ids), want)
    mask, first = masks.documents(np.repeat(ids, 16, axis=1)), np.arange(0, 96, 16)
    for rows in (0, 1):
        some, every = mask.tile(rows, 0, (first, first + 15), (first, first + 15))
        np.testing.assert_array_equal((some, every), [ids[rows] >= 0] * 2)
    x = jax.device_put(np.random.default_rng(0).standard_normal((2, 1, 6, 3), np.float32))
    out = memory_efficient_attention(x, x, x, mask=masks.documents(ids), block_size=2)
    assert not np.asarray(out)[np.broadcast_to((ids < 0)[:, None], (2, 1, 6))].any()


def test_padding_at_the_end_of_documents_does_not_widen_their_tiles():
    # Tiles of 16 tokens. The row ends within its last tile, whose tokens meet the tile of their own document only.
    mask = masks.documents(np.repeat([0, 1, 2, -1], [16, 16, 5, 11]))
    q, kv = 16 * np.indices((3, 3))
    some, every = jax.jit(lambda q, kv: mask.tile(0, 0, (q, q + 15), (kv, kv + 15)))(q, kv)
    np.testing.assert_array_equal(some, np.eye(3, dtype=bool))
    np.testing.assert_array_equal(every, np.diag([True, True, False]))


def test_document_ids_are_those_of_cumulative_lengths():
    ends = np.array([[0, 3, 3, 7, 11], [0, 0, 5, 5, 5]], np.int32)  # with documents without tokens
    want = np.array([[0] * 3 + [2] * 4 + [3] * 4 + [-1] * 2, [1] * 5 + [-1] * 8])
    of_length = jax.jit(partial(masks.document_ids, length=13))
    np.testing.assert_array_equal(of_length(ends), want)
    np.testing.assert_array_equal(of_length(ends[0]), want[0])
    assert masks.document_ids(np.zeros(1, np.int32), 2).tolist() == [-1, -1]


def test_images_see_themselves_and_text_is_causal_in_one_line():
    # Two images of 32 and 16 tokens in a text, and tiles of 16 tokens.
    image = np.repeat([-1, 0, -1, 1, -1], [16, 32, 16, 16, 48])
    mask = masks.causal() | masks.documents(image)
    q, kv = np.indices((128, 128))
    want = (kv <= q) | ((image[q] == image[kv]) & (image[q] >= 0))
    np.testing.assert_array_equal(dense(mask, 1, 1, 128, 128)[0, 0], want)
    first_q, first_kv = 16 * np.indices((8, 8))
    some, every = mask.tile(0, 0, (first_q, first_q + 15), (first_kv, first_kv + 15))
    tiles = want.reshape(8, 16, 8, 16)
    np.testing.assert_array_equal(some, tiles.any((1, 3)))
    np.testing.assert_array_equal(every, tiles.all((1, 3)))


def test_functions_that_do_not_take_masks_get_an_array_as_small_as_the_mask():
    score_shape = (2, 3, 5, 7)
    plain = lambda query, key, value, *, mask: mask
    attend = partial(standard_attention, scale=2.0)
    assert masks.mask_argument("test", attend, masks.causal(), score_shape) == masks.causal()
    array = masks.mask_argument("test", plain, masks.causal(), score_shape)
    assert array.shape == (1, 1, 5, 7) and array.dtype == jnp.bool_
    constant = masks.mask_argument("test", plain, masks.as_mask(lambda b, h, q, kv: True), score_shape)
    assert constant.shape == (1, 1, 1, 1)
    assert masks.mask_argument("test", plain, None, score_shape) is None


X = np.ones((2, 1, 5, 3), np.float32)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: masks.padding(np.ones((2, 3))), "integer lengths .* or booleans .*; got shape=.2, 3., dtype=float"),
        (lambda: masks.padding(np.ones((2, 3, 1), bool)), "got shape=.2, 3, 1."),
        (lambda: masks.as_mask(np.ones(3)), "must be boolean"),
        (lambda: masks.as_mask(3), "a boolean array, a Mask or a function"),
        (lambda: masks.causal() & 3, "a boolean array, a Mask or a function"),
        (lambda: masks.causal() | 3, "a boolean array, a Mask or a function"),
        (lambda: masks.sliding_window(0), "sliding_window: window_size must be .*, at least 1; got window_size=0"),
        (lambda: masks.sliding_window(2.5), "whole number, at least 1; got window_size=2.5"),
        (lambda: masks.sliding_window(np.array([2, 3])), "must be a whole number"),
        (lambda: masks.first(-1), "first: num_tokens must be a whole number, at least 0; got num_tokens=-1"),
        (lambda: masks.first(np.array([2, 3])), "must be a whole number"),
        (lambda: masks.sliding_window(True), "got window_size=True"),
        (lambda: masks.sliding_window("3"), "got window_size='3'"),
        (lambda: masks.prefix(np.ones(2)), "prefix: give one whole length a batch row; .* dtype=float"),
        (lambda: masks.prefix(np.ones((2, 1), int)), "got shape=.2, 1."),
        (lambda: masks.documents(np.ones(3)), "documents: ids must be integers .* dtype=float"),
        (lambda: masks.documents(SORTED[None]), "got shape=.1, 2, 53."),
        (lambda: masks.documents(RUNS, np.int32(3)), "got shape=.., dtype=int32"),
        (lambda: masks.document_ids(np.array([1, 3]), 5), r"begin with 0, .* got cu_seqlens=.1, 3., length=5"),
        (lambda: masks.document_ids(np.array([0, 3, 2]), 5), "never decrease"),
        (lambda: masks.document_ids(np.array([0, 3, 6]), 5), "end at most at the length"),
        (lambda: masks.document_ids(np.zeros(0, int), 5), "begin with 0"),
        (lambda: masks.document_ids(np.zeros((1, 1, 2), int), 5), "cu_seqlens must be integers of shape"),
        (lambda: make_sliding_window_mask(5, window_size=-2), "got window_size=-2"),
        (lambda: standard_attention(X, X, X, mask=lambda b, h, q, kv: q - kv), "must return booleans"),
        (lambda: standard_attention(X, X, X, mask=~masks.padding(LENGTHS[:1])), "one length a batch row; got .*=.1,"),
        (
            lambda: standard_attention(X, X, X, mask=masks.causal() | masks.documents(RUNS)),
            "standard_attention: documents need one id a token, .5,. or .2, 5. for document_ids; got .*=.1, 53.",
        ),
        (lambda: standard_attention(X, X, X, mask=masks.documents(RUNS[:5], RUNS)), "for kv_ids; got kv_ids.shape"),
        (lambda: standard_attention(X, X, X, mask=masks.causal() & np.ones((3, 5), bool)), "mask must broadcast to"),
        (
            lambda: standard_attention(X, X, X, mask=masks.at_positions(masks.causal(), RUNS, RUNS[:5])),
            "q_positions must be integers of shape .5,. or .2, 5.; got shape=.1, 53.",
        ),
    ],
)
def test_wrong_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(make)
