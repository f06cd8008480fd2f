"""The memory of a layer for earlier tokens: a pytree of fixed shape, so that decoding compiles once.

Every kind of cache obeys `LayerCache`, and attention takes any of them:

- `KVLayerCache`: tokens lie in the order in which they were written, padding included;
- `RingKVCache`: the token at position p of a row lies in slot p % slots, so that rows of different lengths waste
  nothing, tokens can be taken back, and a layer with a window needs the memory of the window only;
- `LinearLayerCache`: the sums of linear attention, of one size for any length;
- `attnax.paged_cache.PagedKVCache`: all rows share a pool of pages;
- `ScalarCache`: a cache of tokens with numbers of each token, for layers with `token_scalars`;
- `EmptyCache`: a cache of any of these kinds before its first token.

A model takes one cache a layer, in a tuple or a list. A model whose layers are one loop (`scan_layers`) returns
`StackedCaches`: the same sequence of caches, as arrays of all layers.

Keys and values may be stored as 8-bit integers: with `dtype="int8"` each head of each token has a scale of its own.
"""

# ruff: noqa: F403  # every name stands once, in the `__all__` of its module
from attnax.cache import chunks, empty, from_config, kv, layer_cache, linear, ring, scalars, stacked
from attnax.cache.chunks import *
from attnax.cache.empty import *
from attnax.cache.from_config import *
from attnax.cache.kv import *
from attnax.cache.layer_cache import *
from attnax.cache.linear import *
from attnax.cache.ring import *
from attnax.cache.scalars import *
from attnax.cache.stacked import *

_MODULES = chunks, empty, from_config, kv, layer_cache, linear, ring, scalars, stacked

__all__ = [name for module in _MODULES for name in module.__all__]
