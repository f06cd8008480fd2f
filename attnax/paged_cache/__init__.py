"""Keys and values of many sequences in one pool of fixed-size blocks, which sequences take as they grow.

A row of the block table names the blocks of one sequence in the order of its text: token `t` lies in block
`block_table[row, t // block_size]` at offset `t % block_size`.

`allocate_rows`, `append_rows`, `gather_rows` and `free_rows` serve all rows at once, under jit too; every block that no
row holds is free. `allocate_blocks`, `append_kv` and `gather_kv` serve one sequence outside jit, with a list of free
blocks that the caller keeps. As a cache of a layer (`attnax.cache.LayerCache`) a row takes blocks as its text grows.
"""

# ruff: noqa: F403  # every name stands once, in the `__all__` of its module
from attnax.paged_cache import cache, pool, sequence
from attnax.paged_cache.cache import *
from attnax.paged_cache.pool import *
from attnax.paged_cache.sequence import *

__all__ = [name for module in (cache, pool, sequence) for name in module.__all__]
