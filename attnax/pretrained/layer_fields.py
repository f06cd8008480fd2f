"""Fields of a `config.json` that differ from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnax.config import StackConfig
from attnax.pretrained.errors import quoted
from attnax.pretrained.fields import Field, true_or_false, whole, whole_number

__all__ = ["FULL", "MOST_LAYERS", "SLIDING", "LayerTypes", "alternate_layers", "by_layer", "layer_types", "windows"]

FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = Callable[[Mapping[str, Any], int], Sequence[str]]
MOST_LAYERS = 1024


def windows(default: LayerTypes, window: int | None, *, switch: str | None = None) -> Field:
    """The layers that attend only a window: `layer_types`, one name a layer, and `sliding_window`.

    Args:
        default: the types in a file without `layer_types`, from the other keys and the number of layers.
        window: the sliding_window in a file without one.
        switch: a key without which no layer has a window; its default is false.
    """
    size = whole("sliding_window", "size", window, null=True)

    def read(given: Mapping[str, Any]) -> dict[str, Any]:
        on = switch is None or true_or_false(given.get(switch, False), switch)
        types = layer_types(given, default)
        width = size.read(given)["size"] if on else None
        if SLIDING in types and width is None:
            raise ValueError(f"sliding_window must be a whole number where layer_types has {SLIDING}; got None.")
        return by_layer([{"attention_window": width} if kind == SLIDING else {} for kind in types])

    def write(config: StackConfig) -> dict[str, Any]:
        sizes = [config.layer(index).attention_window for index in range(config.num_layers)]
        types = [FULL if size is None else SLIDING for size in sizes]
        first = next((size for size in sizes if size is not None), window)
        written = {"layer_types": types, "sliding_window": first}
        return written if switch is None else written | {switch: SLIDING in types}

    keys = ("layer_types", "sliding_window", "num_hidden_layers", "max_window_layers")
    return Field(keys if switch is None else (*keys, switch), read, write)


def layer_types(given: Mapping[str, Any], default: LayerTypes) -> Sequence[str]:
    """`FULL` or `SLIDING` for each layer.

    Raises:
        ValueError: there is another type, or the number of types is not the number of layers.
    """
    count = whole_number(given.get("num_hidden_layers"), "num_hidden_layers")
    if count > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}; got num_hidden_layers={count}.")
    types = given.get("layer_types")
    if types is None:
        return default(given, count)
    if not isinstance(types, list) or len(types) != count or any(kind not in (FULL, SLIDING) for kind in types):
        raise ValueError(f"layer_types must be {count} times {FULL} or {SLIDING}; got {quoted(types)}.")
    return types


def alternate_layers(_: Mapping[str, Any], count: int) -> list[str]:
    """A window in every other layer, the first included."""
    return [FULL if layer % 2 else SLIDING for layer in range(count)]


def by_layer(overrides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a config from the fields of its layers; where layers differ, the shortest `layer_pattern`."""
    if all(fields == overrides[0] for fields in overrides):
        return dict(overrides[0])
    periods = range(2, len(overrides) + 1)
    period = next(count for count in periods if list(overrides[count:]) == list(overrides[:-count]))
    return {"layer_pattern": tuple(overrides[:period])}
