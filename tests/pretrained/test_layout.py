"""Layouts of tensors."""

import math

import numpy as np
import pytest

from attnax.pretrained.layout import arrange, arranged_shape, find_places, reverse


@pytest.mark.parametrize(
    ("layout", "shape", "other"),
    [
        ("O I -> I O", (5, 3), (3, 5)),
        ("(N 3 H) I -> I (3 N H)", (30, 7), (7, 30)),
        ("E D (F 2) -> E D (2 F)", (3, 5, 14), (3, 5, 14)),
        ("D C h w -> (h w C) D", (11, 3, 2, 7), (42, 11)),
        ("1 T D -> T D", (1, 5, 7), (5, 7)),
    ],
)
def test_a_layout_is_its_own_inverse(layout, shape, other):
    sizes = {"N": 5, "H": 2, "h": 2, "w": 7}
    array = np.arange(math.prod(shape)).reshape(shape)
    there = arrange(array, layout, sizes)
    assert there.shape == arranged_shape(shape, layout, sizes) == other
    np.testing.assert_array_equal(arrange(there, reverse(layout), sizes), array)


def test_a_layout_means_what_einops_says():
    np.testing.assert_array_equal(arrange(np.arange(6), "(F 2) -> (2 F)", {}), [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(
        arrange(np.arange(12), "(N 3 H) -> (3 N H)", {"N": 2}), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    )
    with pytest.raises(ValueError, match="layout: .* does not fit the shape"):
        arrange(np.zeros((5, 2)), "(N 3 H) I -> I (3 N H)", {"H": 2})


def test_an_array_must_end_where_an_axis_of_the_tensor_does():
    arrays = [np.zeros((7, width)) for width in (9, 21)]
    with pytest.raises(ValueError, match=r"layout: '.*' has no place for arrays of widths \[9, 21\]"):
        find_places(arrays, "(N 3 H) I -> I (3 N H)", {"N": 5, "H": 2})
