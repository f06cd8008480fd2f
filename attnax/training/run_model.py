"""The model of a run of `attnax train`, ready to write text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.config import Dtype, TransformerConfig
from attnax.errors import InputError
from attnax.models import TransformerLM
from attnax.nn._parts import MakeBlock, Parts
from attnax.text import ByteCodec, TextModel
from attnax.training.checkpoints import checkpoint_steps, restore_items
from attnax.training.run_folder import RunFolder
from attnax.typing import AttentionFn

__all__ = ["open_run"]


def open_run(
    path: Path,
    dtype: Dtype | None = None,
    step: int | None = None,
    *,
    make_block: MakeBlock | None = None,
    attention_fn: AttentionFn | None = None,
) -> TextModel:
    """The model of a run.

    Args:
        path: of the run folder.
        dtype: of parameters and computation, by default the run's.
        step: of the checkpoint, by default the newest.
        make_block: of the run, if it has one; a folder holds the names of such parts.
        attention_fn: of the run, if it has one.

    Raises:
        InputError: the folder is not a run, or the checkpoint is missing or damaged; the message names the newest
            complete one. Or the parts are not those that the run was made with.
    """
    folder = RunFolder(path)
    options, tokenizer, _ = folder.load()
    parts: Parts = {"make_block": make_block, "attention_fn": attention_fn}
    folder.require_parts(parts)
    if not checkpoint_steps(folder.checkpoints):
        raise InputError(f"{path} has no checkpoint yet.")
    # Not initialised: that would take JAX longer than restoring the checkpoint.
    graphdef, state, streams = _abstract(options.model, parts)
    likes = {"params": nnx.to_pure_dict(state)}
    _, items = restore_items(folder.checkpoints, likes, step=step, owner=folder.owner)
    params = items["params"]
    if dtype is not None:
        params = jax.tree.map(lambda array: array.astype(dtype), params)
        graphdef, state, streams = _abstract(dataclasses.replace(options.model, dtype=dtype, param_dtype=dtype), parts)
    nnx.replace_by_pure_dict(state, params)
    return TextModel(path, nnx.merge(graphdef, state, streams), ByteCodec(tokenizer))


def _abstract(config: TransformerConfig, parts: Parts) -> Any:
    """The structure of a model, the shapes of its parameters, and dropout streams, which generation does not use."""
    model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config, **parts))
    graphdef, *states = nnx.split(model, nnx.Param, nnx.RngState)
    params, streams = states

    def stream(x: Any) -> jax.Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jnp.broadcast_to(jax.random.key(0), x.shape) if is_key else jax.device_put(np.zeros(x.shape, x.dtype))

    return graphdef, params, jax.tree.map(stream, streams)
