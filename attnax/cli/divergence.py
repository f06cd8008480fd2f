"""Updates after which a run must not go on, in words."""

from __future__ import annotations

import math

from attnax.training import DivergenceError, Metrics, RunOptions

__all__ = ["DIVERGED", "advice", "require_finite"]

DIVERGED = 3  # the exit code; `attnax launch` does not start such a run again


def require_finite(step: int, metrics: Metrics, *, skipped: int, max_skipped: int) -> None:
    """Raises DivergenceError for an update that the run must not go on after.

    Args:
        step: number of the update.
        metrics: of the update, read from the devices.
        skipped: number of updates of the run that were skipped, this one included.
        max_skipped: number of those that may be skipped.
    """
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    if metrics.is_skipped and skipped > max_skipped:
        cause = "the parameters would not be finite"
        if not math.isfinite(grad_norm):
            cause = f"the norm of the gradient is {grad_norm}"
        if not math.isfinite(loss):
            cause = f"the loss is {loss}"
        made = "the update was not made" if max_skipped == 0 else f"of {max_skipped} to skip none is left"
        raise DivergenceError(f"step {step}: {cause}, and {made}.", is_skippable=True)
    if not (metrics.is_finite or metrics.is_skipped):
        raise DivergenceError(f"step {step}: the update made parameters that are not finite.")


def advice(options: RunOptions, kept: int | None) -> str:
    """What to try after a divergence, and which checkpoint is kept."""
    tries = [f"a smaller --learning-rate than {options.optimizer.learning_rate:g}", "a larger --warmup"]
    if "float16" in (options.model.param_dtype, options.model.dtype):
        tries.append("--dtype and --param-dtype bfloat16 or float32 in place of float16")
    words = "No checkpoint was saved yet." if kept is None else f"The checkpoint of step {kept} is kept."
    return f"In a new run, try {' or '.join(tries)}. {words}"
