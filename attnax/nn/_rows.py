"""Rows of a table, however a mesh with Explicit axes cuts the indices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnax.typing import Array

__all__ = ["take_rows"]


def take_rows(table: Array, index: Array, **options: Any) -> Array:
    """`table.at[index].get(**options)`, cut as the index is: every device holds the table and looks up its own."""
    table, cut = jnp.asarray(table), jax.typeof(index).sharding
    if any(cut.spec):
        table = jax.sharding.reshard(table, jax.NamedSharding(cut.mesh, jax.P()))
        options["out_sharding"] = jax.NamedSharding(cut.mesh, jax.P(*cut.spec, *(None,) * (table.ndim - 1)))
    return table.at[index].get(**options)
