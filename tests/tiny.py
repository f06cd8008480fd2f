"""Models with weights made by NumPy: JAX compiles a program for every shape when it initialises a model."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SEED = int(os.environ.get("ATTNAX_SEED", "0"))
"""The seed of random tests; `make nightly` gives another one in each run."""


def build(make, seed=0):
    """The module that `make(rngs)` returns, with weights drawn by NumPy.

    Matrices are normal with the variance 1 / fan-in. Vectors named "scale" are near 1, all other vectors near 0 but not
    0, so that no option is without effect. Dropout streams get keys of their own.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = jax.random.key(int(rng.integers(2**31)))
            return jax.random.split(key, leaf.shape) if leaf.shape else key
        if not np.issubdtype(np.dtype(leaf.dtype), np.inexact) and leaf.dtype != jnp.bfloat16:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype))
        values = rng.normal(size=leaf.shape)
        if len(leaf.shape) >= 2:
            return jax.device_put((values / np.sqrt(leaf.shape[-2])).astype(leaf.dtype))
        is_scale = any(getattr(key, "key", getattr(key, "name", None)) == "scale" for key in path)
        return jax.device_put((is_scale + 0.1 * values).astype(leaf.dtype))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, abstract))
