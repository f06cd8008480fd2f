"""Masks as values: which query may attend which key, written once and read in two ways, for a pair and for a tile.

A `Mask` is a callable pytree. Masks combine with `&`, `|` and `~`, with each other and with one-line functions and
boolean arrays. `mask.py` says what a mask is; a new kind goes into `kinds.py`.
"""

# ruff: noqa: F403  # every name stands once, in the `__all__` of its module
from attnax.masks import arguments, arrays, kinds, mask, positions, text
from attnax.masks.arguments import *
from attnax.masks.arrays import *
from attnax.masks.kinds import *
from attnax.masks.mask import *
from attnax.masks.positions import *
from attnax.masks.text import *

__all__ = [name for module in (arguments, arrays, kinds, mask, positions, text) for name in module.__all__]
