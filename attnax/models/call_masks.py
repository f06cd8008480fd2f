"""The masks and the score mod of a call that writes: inputs of its programs, read at positions of each row's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from attnax.checks import is_concrete
from attnax.generation.request import Request, place_like
from attnax.generation.step import Tokens
from attnax.masks import And, Causal, Mask, as_mask, causal, has_arrays, least_positions, over_text, resolve_masks
from attnax.pytrees import function_pytree, is_own, pytree_dataclass
from attnax.typing import Array, ArrayLike, MaskMod, ScoreMod

__all__ = ["CallMasks", "MaskOptions", "State", "check_covers", "is_causal", "masks_of_call"]


class MaskOptions(TypedDict, total=False):
    """The masks and the score mod of a call that writes, which `TransformerLM.generate` describes."""

    mask: Mask | MaskMod | ArrayLike | None
    self_mask: Mask | MaskMod | ArrayLike | None
    score_mod: ScoreMod | None


@pytree_dataclass
class CallMasks:
    """What a model attends in a call, where that is not its own mask alone.

    Attributes:
        self_mask: of the whole text, in place of the model's own; None leaves the model's own.
        score_mod: of the call.
    """

    self_mask: Mask | None
    score_mod: ScoreMod | None

    @property
    def num_positions(self) -> int | None:
        """The positions that the arrays cover; None if there is no limit."""
        return least_positions(self.self_mask, self.score_mod)

    def check(self, caller: str, batch: int, num_heads: int) -> None:
        """Raises ValueError for arrays of other rows or heads."""
        resolve_masks(caller, self.self_mask, self.score_mod, (batch, num_heads, None, None))


class State(NamedTuple):
    """The state of a step.

    Attributes:
        params: the parameters of the model.
        masks: of the call; None if the model's own mask is all.
    """

    params: Any
    masks: CallMasks | None = None

    def mask_options(self, tokens: Tokens, rows: Array | None) -> dict[str, Any]:
        """The options of a decoder for tokens in rows of the prompts `rows` (R,)."""
        if self.masks is None:
            return {}
        mask, are_drafted = self.masks.self_mask, tokens.wanted.shape[1] > 1
        if mask is not None and are_drafted and not is_causal(mask):
            mask = causal() & mask  # without a draft no later token is there
        given = {"self_mask": mask, "score_mod": self.masks.score_mod}
        return {name: over_text(value, rows) for name, value in given.items() if value is not None}


def masks_of_call(caller: str, own: Mask | None, options: Mapping[str, Any]) -> tuple[Mask | None, CallMasks | None]:
    """The mask of the text, and what a call has beside the model's own mask; None if there is nothing of the kind.

    The options are MaskOptions, among others.

    Raises:
        ValueError: an object that is no mask or score mod.
    """
    given, score_mod = {name: options.get(name) for name in ("self_mask", "mask")}, options.get("score_mod")
    masks = {name: _as_mask(caller, name, mask) for name, mask in given.items() if mask is not None}
    if score_mod is not None and not callable(score_mod):
        raise ValueError(
            f"{caller}: score_mod must be a function (scores, b, h, q, kv) -> scores; got {type(score_mod).__name__}. "
            "Give an array as additive_bias_mod(array)."
        )
    mask, narrow = masks.get("self_mask", own), masks.get("mask")
    if narrow is not None:
        mask = narrow if mask is None else mask & narrow
    # Of its own mask the model knows neither the length of the text, nor the rows of prompts, nor drafted tokens.
    reads_own = own is None or (is_causal(own) and is_own(own) and not has_arrays(own))
    if not masks and reads_own and score_mod is None:
        return mask, None
    mod = None if score_mod is None else function_pytree(score_mod)
    call = CallMasks(None if not masks and reads_own else mask, mod)
    # Each device has the whole arrays, as it has the whole prompt.
    return mask, jax.tree.map(lambda x: place_like(x, x) if isinstance(x, jax.Array) else x, call)


def is_causal(mask: Mask | None) -> bool:
    """Whether the mask is known to let no token attend a later one."""
    if isinstance(mask, And):
        return is_causal(mask.left) or is_causal(mask.right)
    return mask is None or isinstance(mask, Causal)


def check_covers(
    caller: str, masks: CallMasks | None, request: Request, *, earlier: int, prompt: int, new: int
) -> None:
    """Raises ValueError unless the arrays cover every text: earlier tokens, at most `prompt` tokens and `new` ones."""
    limit = None if masks is None else masks.num_positions
    if limit is None:
        return
    length = earlier + prompt
    if is_concrete(request.position_ids):  # without padding
        length = max(earlier, int(np.asarray(request.position_ids).max(initial=-1)) + 1)
    if length + new - 1 > limit:  # the last token is written and not read
        raise ValueError(
            f"{caller}: arrays of mask, self_mask and score_mod must cover all positions of prompt and new tokens; "
            f"got {limit} positions for {length} + {new} tokens. Give arrays of {length + new} positions or more, or "
            "functions of positions."
        )


def _as_mask(caller: str, name: str, mask: Any) -> Mask:
    try:
        return as_mask(np.asarray(mask) if isinstance(mask, list | tuple) else mask)
    except ValueError as error:
        raise ValueError(
            f"{caller}: {name} must be a Mask, a function (b, h, q, kv) -> bool or a boolean array of at most 4 axes; "
            f"{str(error).split('; ')[-1]}"
        ) from error
