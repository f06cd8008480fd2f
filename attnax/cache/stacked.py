"""The caches of layers that are one loop in the program: arrays of all layers, which the loop writes in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnax.cache.layer_cache import forget, grow, select_rows
from attnax.cache.scalars import ScalarCache
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, ArrayLike, Int

__all__ = ["StackedCaches", "cache_kinds", "slots_in_use", "stack_caches"]


@pytree_dataclass
class StackedCaches(Sequence[Any]):
    """One cache a layer, as a tuple has them, for layers whose pattern repeats: a stack with `scan_layers`.

    An index gives a copy of the cache of that layer.

    Attributes:
        places: for each layer of a period, a cache whose arrays have one entry a period along axis 0.
        rest: the caches of the layers after the last whole period.
        num_periods: whole periods.
    """

    places: tuple[Any, ...]
    rest: tuple[Any, ...]
    num_periods: int = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.num_periods * len(self.places) + len(self.rest)

    def __getitem__(self, index: Any) -> Any:
        layer = range(len(self))[index]
        if isinstance(layer, range):
            return tuple(self[one] for one in layer)
        scanned = self.num_periods * len(self.places)
        if layer >= scanned:
            return self.rest[layer - scanned]
        period, place = divmod(layer, len(self.places))
        return jax.tree.map(lambda x: lax.index_in_dim(x, period, keepdims=False), self.places[place])

    def map_layers(self, function: Callable[[Any], Any]) -> StackedCaches:
        """The results of `function` for the cache of each layer; it is traced once for all layers of a place."""
        places = tuple(jax.vmap(function)(place) for place in self.places)
        return StackedCaches(places, tuple(map(function, self.rest)), self.num_periods)

    def select_rows(self, rows: Int[ArrayLike, "R"]) -> StackedCaches:
        """As in `LayerCache`, for every layer; what a cache holds is traced, so a lack of room sets `overflowed`."""
        return self.map_layers(lambda cache: select_rows(cache, rows))

    def forget(self, first: Int[ArrayLike, "B"]) -> StackedCaches:
        """As in `LayerCache`, for every layer."""
        return self.map_layers(lambda cache: forget(cache, first))

    def grow(self, max_len: int, num_rows: int) -> StackedCaches:
        """As in `LayerCache`, for every layer."""
        return self.map_layers(lambda cache: grow(cache, max_len, num_rows))


def stack_caches(caller: str, caches: Sequence[Any], num_places: int, num_periods: int) -> StackedCaches:
    """The caches of all layers, stacked; StackedCaches of these periods stay as they are.

    Raises:
        ValueError: two layers at one place of the period have caches of different kinds, sizes or dtypes.
    """
    if isinstance(caches, StackedCaches) and (len(caches.places), caches.num_periods) == (num_places, num_periods):
        return caches
    layers, scanned = tuple(caches), num_places * num_periods
    for layer in range(num_places, scanned):
        first = layer % num_places
        want, have = (jax.tree.map(_kind_of_array, layers[index]) for index in (first, layer))
        if jax.tree.flatten(want) != jax.tree.flatten(have):
            raise ValueError(
                f"{caller}: with scan_layers the caches of layers {first} and {layer} are stacked, so they must be of "
                f"one kind and size; got {want} and {have}. Make them alike, or make the model with scan_layers=False "
                "(attnax.nn.with_scan_layers)."
            )
    of_places = (layers[place:scanned:num_places] for place in range(num_places))
    places = tuple(jax.tree.map(lambda *arrays: jnp.stack(arrays), *of_place) for of_place in of_places)
    return StackedCaches(places, layers[scanned:], num_periods)


def cache_kinds(caches: Sequence[Any]) -> tuple[Any, ...]:
    """Caches with every kind and size that is among `caches`, those inside of ScalarCaches.

    The arrays of StackedCaches are replaced by shapes.
    """
    kinds = caches
    if isinstance(caches, StackedCaches):
        num_places = len(caches.places)
        kinds = (*jax.eval_shape(lambda stacked: stacked[:num_places], caches), *caches.rest)
    return tuple(cache.cache if isinstance(cache, ScalarCache) else cache for cache in kinds)


def slots_in_use(caches: Sequence[Any]) -> list[Int[Array, "..."]]:
    """The slots in use of every layer; those of a place of StackedCaches are one array."""
    if not isinstance(caches, StackedCaches):
        return [cache.slots_in_use() for cache in caches]
    return [jax.vmap(lambda cache: cache.slots_in_use())(place) for place in caches.places] + slots_in_use(caches.rest)


def _kind_of_array(x: Any) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
