"""A look inside a model: hidden states and attention weights of all layers, and a patch of the stream between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnax.checks import is_concrete
from attnax.typing import Array

__all__ = ["Probe", "Probed", "as_probe", "join_layers", "with_probe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What a `run` of a stack or a model returns in `Output.probed`, and a patch of its stream.

    It works with `scan_layers` and remat, and has gradients.

    Attributes:
        hidden_states: return the stream before the first and after each layer.
        attention_weights: return the weights of every layer, without dropout. They take O(T * S) memory for each head
            of each layer, and are computed beside the attention itself. Not with caches.
        edit: `(layer, x) -> x` gives the stream after `layer` layers, (batch, T, d_model), and 0 is the stream that
            enters the first one. The layer is an int, and with `scan_layers` a traced int32: choose by
            `jnp.where(layer == 3, patched, x)`, which serves both. The edit does not reach a carry.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax import TransformerLM
        >>> from attnax.nn import Probe
        >>> lm = TransformerLM(nnx.Rngs(0), vocab_size=11, d_model=8, num_heads=2, num_layers=3, d_ff=16)
        >>> seen = lm.run(jnp.zeros((1, 5), int), probe=Probe(hidden_states=True, attention_weights=True)).probed
        >>> seen.hidden_states.shape, seen.attention_weights.shape
        ((4, 1, 5, 8), (3, 1, 2, 5, 5))
        >>> lm.logits(lm.decoder.norm(seen.hidden_states[1])).shape  # the logit lens after one layer
        (1, 5, 11)
    """

    hidden_states: bool = False
    attention_weights: bool = False
    edit: Callable[[Any, Array], Array] | None = None

    def edited(self, layer: int | Array, x: Array) -> Array:
        """The stream after `layer` layers.

        Raises:
            ValueError: `edit` asks for the value of a traced layer, or returns another shape or dtype.
        """
        if self.edit is None:
            return x
        try:
            new = self.edit(layer, x)
        except jax.errors.ConcretizationTypeError as error:
            if is_concrete(layer):
                raise
            raise ValueError(
                "Probe: with scan_layers the layer that edit gets is traced and has no value for Python; got an edit "
                "that asks for it. Choose by jnp.where(layer == 3, patched, x), or probe "
                "attnax.nn.with_scan_layers(model, False)."
            ) from error
        if jnp.shape(new) != x.shape or jnp.result_type(new) != x.dtype:
            raise ValueError(
                f"Probe: edit must return the stream in its shape and dtype, {x.dtype}{list(x.shape)}; "
                f"got {jnp.result_type(new)}{list(jnp.shape(new))}."
            )
        return new


class Probed(NamedTuple):
    """What a `Probe` asked for, and None for the rest.

    Attributes:
        hidden_states: (num_layers + 1, batch, T, d_model); entry i is the stream after i layers and after the edit,
            before the model's last norm.
        attention_weights: (num_layers, batch, num_heads, T, T) of self-attention; of a block alone without the first
            axis. A tuple with one array a layer, if layers differ in their number of heads.
        cross_attention_weights: (num_layers, batch, num_heads, T, S) of blocks with cross-attention, in the same form.
    """

    hidden_states: Any = None
    attention_weights: Any = None
    cross_attention_weights: Any = None


def as_probe(probe: Probe | None) -> Probe:
    """The probe, or one that asks for nothing; raises ValueError for another object."""
    if probe is not None and not isinstance(probe, Probe):
        raise ValueError(
            f"Stack: probe must be an attnax.nn.Probe; got probe={probe!r}. Write Probe(hidden_states=True)."
        )
    return Probe() if probe is None else probe


def with_probe(probe: Probe | None) -> dict[str, Probe]:
    """The option of a `run` that may be a user's and know no probe: it is handed down only where there is one."""
    return {} if probe is None else {"probe": probe}


def join_layers(streams: Sequence[Array], weights: Sequence[Probed | None]) -> Probed:
    """The results of all layers: streams before and after them, and the weights of each."""
    looks = [one for one in weights if one is not None]
    return Probed(
        jnp.stack(streams) if streams else None,
        _stack_equal([look.attention_weights for look in looks]),
        _stack_equal([look.cross_attention_weights for look in looks]),
    )


def _stack_equal(arrays: Sequence[Any]) -> Any:
    if not arrays or all(array is None for array in arrays):
        return None
    return jnp.stack(arrays) if len({jnp.shape(array) for array in arrays}) == 1 else tuple(arrays)
