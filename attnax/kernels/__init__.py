"""Attention functions of the protocol `attnax.typing.AttentionFn`. The only dependencies are jax and numpy.

Files without an underscore hold the public functions. `standard.py` is the definition, and `score_mods.py` holds the
biases. `_call.py` prepares a call and hands the call to an engine. `_decode_call.py` does the same for a few queries
against a cache. `_xla/`, `_gpu/` and `_tpu/` are the engines; no engine imports another engine. `_core/` is below the
engines: softmax of a tile, dropout, captured arrays, meshes, platforms. `tests/test_layers.py` checks the imports.
"""

# ruff: noqa: F403  # every name stands once, in the `__all__` of its module
from attnax.kernels import cached, flash, linear, lite, merge, nnx_adapter, paged, ring, standard
from attnax.kernels.cached import *
from attnax.kernels.flash import *
from attnax.kernels.linear import *
from attnax.kernels.lite import *
from attnax.kernels.merge import *
from attnax.kernels.nnx_adapter import *
from attnax.kernels.paged import *
from attnax.kernels.ring import *
from attnax.kernels.standard import *

__all__ = [
    name
    for module in (cached, flash, linear, lite, merge, nnx_adapter, paged, ring, standard)
    for name in module.__all__
]
