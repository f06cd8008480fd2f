"""A model as a function, which is all that generation knows of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, Int

__all__ = ["Model", "Planned", "Step", "Tokens"]


class Tokens(NamedTuple):
    """The input of a step.

    Attributes:
        ids: (rows, T).
        position_ids: (rows, T), each token's index within its row's text, -1 for padding.
        wanted: (rows, n), the indices within T of the tokens after which logits are wanted.
        context: arrays of each row beside its text, rows first: an encoder's keys and values, the index of its prompt;
            or None.
    """

    ids: Int[Array, "R T"]
    position_ids: Int[Array, "R T"]
    wanted: Int[Array, "R n"]
    context: Any = None


@runtime_checkable
class Step(Protocol):
    """A model that decodes; a step must hash by value, since it is a key of compiled programs."""

    def __call__(self, state: Any, tokens: Tokens, cache: Any, /) -> tuple[Array, Any]:
        """Logits (rows, n, vocabulary) of the token after each wanted token, and the cache with all tokens appended."""


@pytree_dataclass
class Model:
    """A step with its parameters."""

    step: Step = dataclasses.field(metadata={"static": True})
    state: Any

    def __call__(self, tokens: Tokens, cache: Any) -> tuple[Array, Any]:
        """As `Step`."""
        return self.step(self.state, tokens, cache)

    def made(self, value: Any) -> Any:
        """The cache or context; made here if it is Planned."""
        return value.make(self.state) if isinstance(value, Planned) else value


@runtime_checkable
class Planned(Protocol):
    """A pytree from which the program that reads the prompt makes a cache or a context."""

    def make(self, state: Any, /) -> Any:
        """The empty caches, or the context of the rows, from the parameters of the model."""
