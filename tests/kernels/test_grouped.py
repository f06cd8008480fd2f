"""The grouped product: tiles cover every row once, at the cost of the rows, and each row meets its group's matrix."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attnax.kernels.grouped import grouped_product, make_tiles, tile_length

tiles_of = jax.jit(make_tiles, static_argnums=(1, 2))


@given(st.lists(st.integers(0, 101), min_size=6, max_size=6), st.sampled_from([1, 16]))
def test_tiles_cover_every_row_once(cuts, length):
    sizes = np.diff([0, *sorted(cuts), 101])
    tiles = jax.tree.map(np.asarray, tiles_of(sizes, 101, length))
    assert tiles.used == sum(-(-size // length) for size in sizes) <= tiles.group.shape[0]
    rows = [
        (row, tiles.group[i])
        for i in range(tiles.used)
        for row in range(tiles.start[i], min(tiles.start[i] + length, tiles.stop[i]))
    ]
    assert rows == list(enumerate(np.repeat(np.arange(7), sizes)))


def test_cost_follows_the_rows_and_not_the_groups():
    cases = [(num_groups, 2 * num_tokens) for num_groups in (8, 64) for num_tokens in (1, 127, 2048)]

    @jax.jit
    def used():
        numbers = []
        for num_groups, num_rows in cases:
            choices = np.random.default_rng(0).integers(0, num_groups, num_rows)
            sizes = jax.device_put(np.bincount(choices, minlength=num_groups))
            numbers.append(make_tiles(sizes, num_rows, tile_length(num_rows, num_groups)).used)
        return numbers

    for (num_groups, num_rows), number in zip(cases, used(), strict=True):
        assert int(number) <= num_rows, num_groups  # matrices read
        # Rows computed; every expert of every token would be num_groups / 2 as many.
        assert int(number) * tile_length(num_rows, num_groups) <= 1.7 * num_rows, (num_groups, num_rows)


def test_grouped_product_is_its_definition_for_groups_of_any_size():
    rng, sizes = np.random.default_rng(0), np.array([0, 1, 17, 0, 300, 2, 0])
    x, weights, bias = (rng.standard_normal(shape, np.float32) for shape in ((320, 3), (7, 3, 5), (7, 5)))
    group = np.repeat(np.arange(7), sizes)
    have = jax.jit(grouped_product)(x, weights, bias, sizes)
    expected = np.einsum("RI,RIO->RO", x, weights[group]) + bias[group]
    np.testing.assert_allclose(have, expected, atol=1e-5)
