"""The model of a run of `attnax train`, which writes text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.cli.run_folder import RunFolder
from attnax.cli.text_model import TextModel
from attnax.config import Dtype, TransformerConfig
from attnax.models import TransformerLM
from attnax.training import DOCUMENT, Tokenizer, latest_checkpoint, restore_checkpoint
from attnax.typing import InputError

__all__ = ["RunCodec", "open_run"]


@dataclasses.dataclass(frozen=True)
class RunCodec:
    """The tokens of a run: each is bytes of its own, and the document token leads every text and ends it."""

    tokenizer: Tokenizer
    ends = (DOCUMENT,)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """What each token is."""
        return self.tokenizer.vocabulary

    def encode(self, prompt: bytes) -> list[int]:
        """The document token, and those of the prompt."""
        return [DOCUMENT, *self.encode_stop(prompt)]

    def encode_stop(self, stop: bytes) -> list[int]:
        """The tokens of `stop`."""
        ids: list[int] = self.tokenizer.encode(stop).tolist()
        return ids

    def pieces(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[bytes]:
        """The bytes of each token, whatever comes before it."""
        return (self.tokenizer.decode([token]) for token in tokens)


def open_run(path: Path, dtype: Dtype | None = None) -> TextModel:
    """The model of a run at its newest checkpoint, in the run's dtype unless another is given.

    Raises:
        InputError: not a run, no checkpoint, or a damaged one.
    """
    folder = RunFolder(path)
    options, tokenizer, _ = folder.load()
    step = latest_checkpoint(folder.checkpoints)
    if step is None:
        raise InputError(f"{path} has no checkpoint yet.")
    # Initial weights would take JAX longer than the checkpoint, which replaces them.
    graphdef, state, streams = _abstract(options.model)
    params = restore_checkpoint(folder.checkpoints, step, "params", nnx.to_pure_dict(state), owner=folder.owner)
    if dtype is not None:
        params = jax.tree.map(lambda array: array.astype(dtype), params)
        graphdef, state, streams = _abstract(dataclasses.replace(options.model, dtype=dtype, param_dtype=dtype))
    nnx.replace_by_pure_dict(state, params)
    return TextModel(path, nnx.merge(graphdef, state, streams), RunCodec(tokenizer))


def _abstract(config: TransformerConfig) -> Any:
    """The structure of a model, the shapes of its parameters, and streams of dropout, of which writing reads none."""
    model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config))
    graphdef, *states = nnx.split(model, nnx.Param, nnx.RngState)
    params, streams = states

    def stream(x: Any) -> jax.Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jnp.broadcast_to(jax.random.key(0), x.shape) if is_key else jax.device_put(np.zeros(x.shape, x.dtype))

    return graphdef, params, jax.tree.map(stream, streams)
