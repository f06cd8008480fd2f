"""Attention functions that obey `attnax.typing.AttentionFn`; they need only jax and numpy.

The files without an underscore hold the functions that people call; `standard.py` is the definition, `score_mods.py`
the biases. `_call.py` prepares one call and hands it to an engine, `_decode_call.py` a call of few queries against a
cache. `_xla/`, `_gpu/` and `_tpu/` are the engines; none imports another. `_core/` is below them: the softmax of a
tile, dropout, the arrays inside a user's function, meshes and platforms. `tests/test_layers.py` checks the directions.
"""

# ruff: noqa: F403  # every name stands once, in the `__all__` of its module
from attnax.kernels import cached, flash, linear, lite, nnx_adapter, paged, ring, standard
from attnax.kernels.cached import *
from attnax.kernels.flash import *
from attnax.kernels.linear import *
from attnax.kernels.lite import *
from attnax.kernels.nnx_adapter import *
from attnax.kernels.paged import *
from attnax.kernels.ring import *
from attnax.kernels.standard import *

__all__ = [
    name for module in (cached, flash, linear, lite, nnx_adapter, paged, ring, standard) for name in module.__all__
]
