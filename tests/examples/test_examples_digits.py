"""The example of the vision transformer runs, at a small size."""

import digits
import numpy as np
import pytest


@pytest.mark.contract
@pytest.mark.parametrize("main", ["digits"], indirect=True)
def test_a_short_run_learns_and_draws(main, tmp_path, capsys):
    out = tmp_path / "digits.png"
    accuracy = main(epochs=5, learning_rate=5e-3, d_model=32, num_layers=1, out=out)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [*(["epoch", str(n)] for n in range(1, 6)), ["test", "accuracy"]]
    assert printed[-1] == f"test accuracy {accuracy:.4f}"
    assert accuracy > 0.3  # ten digits: chance is 0.1
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_the_split_is_fixed_by_its_seed_and_keeps_every_image():
    one, again, other = (digits.load_splits(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[1].images, again[1].images)
    assert not np.array_equal(one[1].labels, other[1].labels)
    assert [len(part.labels) for part in one] == [1437, 360]
    key = lambda part: part.images.reshape(len(part.images), -1).sum(1)
    for a, b in (one, other):
        assert a.images.min() == 0 and a.images.max() == 1
        np.testing.assert_array_equal(
            np.sort(np.concatenate([key(a), key(b)])), np.sort(np.concatenate([key(part) for part in one]))
        )
