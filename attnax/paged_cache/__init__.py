"""Keys and values of many sequences in one pool of fixed-size blocks, which sequences take as they grow.

A row of the block table names the blocks of one sequence in the order of its text: token `t` lies in block
`block_table[row, t // block_size]` at offset `t % block_size`.

`allocate_rows`, `append_rows`, `gather_rows` and `free_rows` serve all rows at once, under jit too; every block that no
row holds is free. `allocate_blocks`, `append_kv` and `gather_kv` serve one sequence outside jit, with a list of free
blocks that the caller keeps. As a cache of a layer (`attnax.cache.LayerCache`) a row takes blocks as its text grows.
"""

from attnax.paged_cache.cache import (
    PagedKVCache,
    allocate_rows,
    append_rows,
    free_rows,
    gather_rows,
    init_paged_kv_cache,
    init_paged_kv_caches_from_config,
)
from attnax.paged_cache.pool import Pool
from attnax.paged_cache.sequence import allocate_blocks, append_kv, gather_kv

__all__ = [
    "PagedKVCache",
    "Pool",
    "allocate_blocks",
    "allocate_rows",
    "append_kv",
    "append_rows",
    "free_rows",
    "gather_kv",
    "gather_rows",
    "init_paged_kv_cache",
    "init_paged_kv_caches_from_config",
]
