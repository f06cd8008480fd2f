"""A small state, its checkpoints, and whether it came back."""

import jax
import jax.numpy as jnp
import numpy as np

from attnax.training import Checkpoints

STATE = {
    "params": {"a": np.arange(6, dtype="f").reshape(2, 3), "b": (np.int32(7), {"c": np.ones(5, jnp.bfloat16)})},
    "counters": np.int32(3),
    "ema": (),
}
ITEMS = jax.device_put(STATE)


def save(folder, *updates, items=ITEMS, **options):
    with Checkpoints(folder, **options) as saving:
        for update in updates:
            saving.save(update, items)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_equal(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for one, two in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
