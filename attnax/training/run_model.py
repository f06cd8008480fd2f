"""The model of a run of `attnax train`, ready to write text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.config import Dtype, TransformerConfig
from attnax.errors import InputError
from attnax.models import TransformerLM
from attnax.nn._parts import MakeBlock, Parts
from attnax.text import TextModel
from attnax.training.precision import widen
from attnax.training.restore import checkpoint_steps, restore_items
from attnax.training.run_folder import RunFolder
from attnax.typing import AttentionFn

__all__ = ["Weights", "open_run"]

Weights = Literal["params", "ema"]


def open_run(
    path: str | Path,
    dtype: Dtype | None = None,
    step: int | None = None,
    *,
    weights: Weights = "params",
    make_block: MakeBlock | None = None,
    attention_fn: AttentionFn | None = None,
) -> TextModel:
    """The model of a run.

    Args:
        path: of the run folder.
        dtype: of parameters and computation, by default the run's.
        step: of the checkpoint, by default the newest that is whole. A warning names newer ones that are damaged.
        weights: "params" are those of the last update, "ema" their exponential average (`RunOptions.ema`).
        make_block: of the run, if it has one; a folder holds the names of such parts.
        attention_fn: of the run, if it has one.

    Raises:
        InputError: the folder is not a run, or the checkpoint is missing or damaged; the message names the newest
            complete one. Or the parts are not those that the run was made with, or hold random numbers that are no
            parameters, which a checkpoint does not keep. Or the run has no average.
    """
    path = Path(path)
    folder = RunFolder(path)
    options, tokenizer, _ = folder.load()
    parts: Parts = {"make_block": make_block, "attention_fn": attention_fn}
    folder.require_parts(parts)
    if weights == "ema" and options.ema is None:
        raise InputError(f"{path} has no average of its parameters, because it was trained without --ema.")
    if not checkpoint_steps(folder.checkpoints):
        raise InputError(f"{path} has no checkpoint yet.")
    # Not initialised: that would take JAX longer than restoring the checkpoint.
    graphdef, state, rest = _abstract(options.model, parts)
    shapes = nnx.to_pure_dict(state)
    likes: dict[str, Any] = {weights: shapes if weights == "params" else jax.eval_shape(widen, shapes)}
    _, items = restore_items(folder.checkpoints, likes, step=step, owner=folder.owner)
    params = jax.tree.map(lambda array, shape: array.astype(dtype or shape.dtype), items[weights], shapes)
    if dtype is not None:
        graphdef, state, rest = _abstract(dataclasses.replace(options.model, dtype=dtype, param_dtype=dtype), parts)
    nnx.replace_by_pure_dict(state, params)
    return TextModel(path, nnx.merge(graphdef, state, *rest), tokenizer.codec)


def _abstract(config: TransformerConfig, parts: Parts) -> Any:
    """The structure of a model, the shapes of its parameters, and dropout streams and constants.

    Generation does not use the streams.
    """
    model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config, **parts))
    graphdef, *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
    params, streams, constants = states
    if jax.tree.leaves(constants):
        constants = _constants(config, parts)

    def stream(x: Any) -> jax.Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jnp.broadcast_to(jax.random.key(0), x.shape) if is_key else jax.device_put(np.zeros(x.shape, x.dtype))

    return graphdef, params, (jax.tree.map(stream, streams), constants)


def _constants(config: TransformerConfig, parts: Parts) -> Any:
    """What the parts of a user hold beside parameters: the same in every model of the config.

    Raises:
        InputError: some of it differs between two models, so that it is random.
    """

    def make(seed: int) -> Any:
        return nnx.state(TransformerLM(nnx.Rngs(seed), config, **parts), nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))

    made = make(0)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(make(1)), strict=True):
        if not np.array_equal(one, two):
            raise InputError(
                f"the model has random numbers that are no parameters, {jax.tree_util.keystr(path)}: a checkpoint does "
                "not keep them. Make them an nnx.Param, or draw them from a key of their own, jax.random.key(0)."
            )
    return made
