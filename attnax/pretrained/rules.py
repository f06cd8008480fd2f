"""The tensors of a published checkpoint, and the parameters of a model that they hold.

A `Rule` covers one kind of tensor in all layers; a `Binding` is a rule applied to one layer of one model. Both are used
in both directions, to read a checkpoint and to write one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from attnax.pretrained.layout import Places, Shape, arrange, arranged_shape, find_places, reverse

__all__ = ["Binding", "Rule", "attention", "embedding", "linear", "norm", "within"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Attributes:
        tensor: its name, where {base} stands for the prefix of the family, {layer} for the number of the layer and
            {expert} for the number of the expert. With {expert}, the tensors of all experts make one array, whose first
            axis is the expert.
        parameters: names of the parameters that the tensor holds, side by side along their last axis.
        layout: from the tensor to that array.
        gated: True for layers whose feed-forward has a gate, False for layers without one, None for both.
    """

    tensor: str
    parameters: tuple[str, ...]
    layout: str | None = None
    gated: bool | None = None


def linear(
    tensor: str, *parameters: str, weight: str = "O I -> I O", bias: str | None = None, gated: bool | None = None
) -> tuple[Rule, ...]:
    """Weight and bias of a projection, or of several projections in one tensor; `weight` and `bias` are layouts."""
    return (
        Rule(f"{tensor}.weight", tuple(f"{name}.kernel" for name in parameters), weight, gated),
        Rule(f"{tensor}.bias", tuple(f"{name}.bias" for name in parameters), bias, gated),
    )


def attention(query: str, key: str, value: str, out: str, *, parameter: str = "attention") -> tuple[Rule, ...]:
    """The four projections of an attention, each a tensor of its own."""
    names = {"query": query, "key": key, "value": value, "out": out}
    return tuple(rule for name, tensor in names.items() for rule in linear(tensor, f"{parameter}.{name}"))


def norm(tensor: str, parameter: str) -> tuple[Rule, ...]:
    """Scale and bias of a norm."""
    return Rule(f"{tensor}.weight", (f"{parameter}.scale",)), Rule(f"{tensor}.bias", (f"{parameter}.bias",))


def embedding(tensor: str, parameter: str) -> tuple[Rule, ...]:
    """The table of an embedding."""
    return (Rule(f"{tensor}.weight", (f"{parameter}.embedding",)),)


def within(tensor: str, parameter: str, *groups: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of the groups with these prefixes before their names, such as the rules of every layer."""
    return tuple(
        dataclasses.replace(
            rule, tensor=f"{tensor}.{rule.tensor}", parameters=tuple(f"{parameter}.{name}" for name in rule.parameters)
        )
        for group in groups
        for rule in group
    )


@dataclasses.dataclass(frozen=True)
class Binding:
    """A rule applied to one layer of one model.

    Attributes:
        tensors: names of the tensors: one, or one for each expert.
        parameters: names of the parameters.
        shapes: of the parameters.
        layout: from the tensors to the parameters side by side, or None where both are laid out alike.
        sizes: of the layout's axes.
        stacked: whether the tensors are entries of one array, along a first axis that the parameters have too.
    """

    tensors: tuple[str, ...]
    parameters: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layout: str | None
    sizes: Mapping[str, int]
    stacked: bool

    @property
    def tensor_shape(self) -> Shape:
        """The shape of each tensor."""
        whole = (*self.shapes[0][:-1], sum(shape[-1] for shape in self.shapes))
        if self.layout is not None:
            whole = arranged_shape(whole, reverse(self.layout), self.sizes)
        return whole[1:] if self.stacked else whole

    @property
    def num_elements(self) -> int:
        """The number of elements of all the parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def places(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, Places]]:
        """The name of each tensor, and the places of its elements in `arrays`, which become the parameters."""
        places = find_places(arrays, self.layout, self.sizes)
        for index, name in enumerate(self.tensors):
            yield name, places.at(index) if self.stacked else places

    def join(self, parameters: Sequence[np.ndarray], name: str) -> np.ndarray:
        """The tensor `name`, which holds the parameters, or one expert's part of them."""
        if self.stacked:
            expert = self.tensors.index(name)
            parameters = [parameter[expert : expert + 1] for parameter in parameters]
        whole = np.concatenate(parameters, axis=-1) if len(parameters) > 1 else parameters[0]
        if self.layout is not None:
            whole = arrange(whole, reverse(self.layout), self.sizes)
        return whole[0] if self.stacked else whole
