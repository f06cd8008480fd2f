"""Looks up rows of a table by indices that a mesh with Explicit axes may cut."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnax.typing import Array

__all__ = ["take_rows"]


def take_rows(table: Array, index: Array, **options: Any) -> Array:
    """`table.at[index].get(**options)`, cut as the index is: each device holds the whole table and reads its rows."""
    table, cut = jnp.asarray(table), jax.typeof(index).sharding
    if any(cut.spec):
        table = jax.sharding.reshard(table, jax.NamedSharding(cut.mesh, jax.P()))
        options["out_sharding"] = jax.NamedSharding(cut.mesh, jax.P(*cut.spec, *(None,) * (table.ndim - 1)))
    return table.at[index].get(**options)
