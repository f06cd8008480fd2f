"""What a layer remembers of the tokens read so far, as pytrees of fixed shape, so that decoding compiles once.

Every kind of cache obeys `LayerCache`, and attention takes any of them:

- `KVLayerCache`: tokens lie in the order in which they were written, padding included;
- `RingKVCache`: the token at position p of a row lies in slot p % slots, so that rows of different lengths waste
  nothing, tokens can be taken back, and a layer with a window needs the memory of the window only;
- `LinearLayerCache`: the sums of linear attention, of one size whatever the length;
- `attnax.paged_cache.PagedKVCache`: all rows share a pool of blocks;
- `EmptyCache`: a cache of any of these kinds before its first token.

Keys and values may be stored as 8-bit integers: with `dtype="int8"` each head of each token has a scale of its own.
"""

from attnax.cache.empty import EmptyCache
from attnax.cache.from_config import init_decoder_kv_caches, init_decoder_kv_caches_from_config
from attnax.cache.kv import KVLayerCache, init_kv_layer_cache, update_kv_layer_cache
from attnax.cache.layer_cache import LayerCache, StoredTokens, check_rows, forget, select_rows
from attnax.cache.linear import LinearLayerCache, LinearState, init_linear_layer_cache
from attnax.cache.ring import SPARE_SLOTS, RingKVCache, init_ring_kv_cache

__all__ = [
    "SPARE_SLOTS",
    "EmptyCache",
    "KVLayerCache",
    "LayerCache",
    "LinearLayerCache",
    "LinearState",
    "RingKVCache",
    "StoredTokens",
    "check_rows",
    "forget",
    "init_decoder_kv_caches",
    "init_decoder_kv_caches_from_config",
    "init_kv_layer_cache",
    "init_linear_layer_cache",
    "init_ring_kv_cache",
    "select_rows",
    "update_kv_layer_cache",
]
