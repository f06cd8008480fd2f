"""What a training would take, printed before anything is allocated."""

from __future__ import annotations

import dataclasses
import math

import jax

from attnax.cli.layout import layout_anywhere
from attnax.cli.options import Train
from attnax.cli.tables import in_bytes
from attnax.errors import InputError
from attnax.sharding import Layout
from attnax.text.published_tokenizer import TextTokenizer
from attnax.training import PEAK_FLOPS, Plan, RunFolder, RunOptions, memory_of_device, plan_training
from attnax.training.run_data import look_at_data

__all__ = ["print_plan"]

_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "moments": "moments of {algorithm}",
    "ema": "exponential average of the parameters",
    "activations": "hidden states between layers, and logits",
}


def print_plan(options: Train) -> None:
    """Prints the parameters, the memory of a device, the layout, and the tokens and operations of a run.

    Args:
        options: of a new run, or of one to go on with.

    Raises:
        InputError: the model is not possible, or the layout does not divide it; the data cannot be used, or the options
            ask for what a store or a tokenizer has itself; or the folder to go on with is no run.
    """
    settings, tokenizer = _settings(options)
    layout = layout_anywhere(options.layout, settings)
    try:
        plan = plan_training(settings.model, settings.optimizer, layout=layout, ema=settings.ema is not None)
    except ValueError as error:
        raise InputError(f"this model cannot be trained: {error}") from error
    _print("model", f"{plan.num_parameters:,} parameters, {settings.model.param_dtype}")
    if tokenizer is None:
        _print("", "with all of --vocab-size; a small text has fewer tokens")
    _print("layout", "one device" if layout is None else f"{layout}, {plan.num_devices} devices")
    _print("memory", *_memory(plan, settings, layout))
    _print("update", *_update(plan, settings))
    _print("run", *_run(plan, settings, options.peak_flops))


def _settings(options: Train) -> tuple[RunOptions, TextTokenizer | None]:
    """The options of the run, and its tokenizer, or None if it would be learned from a text."""
    if options.resume is not None:
        settings, of_run, _ = RunFolder(options.resume).load()
        return settings, of_run
    tokenizer = look_at_data(options)
    if tokenizer is None:
        return options, None
    model = dataclasses.replace(options.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(options, model=model), tokenizer


def _memory(plan: Plan, settings: RunOptions, layout: Layout | None) -> list[str]:
    lines = ["of a device, at least"]
    for name, size in plan.memory._asdict().items():
        if size:
            lines.append(f"{in_bytes(size):>10}  {_NAMES[name].format(algorithm=settings.optimizer.algorithm)}")
    lines.append(f"{in_bytes(sum(plan.memory)):>10}  together")
    here = memory_of_device()
    if math.isfinite(here):
        what = "this machine" if jax.default_backend() == "cpu" else f"this {jax.devices()[0].device_kind}"
        lines.append(f"{in_bytes(here):>10}  {what}")
    return lines


def _update(plan: Plan, settings: RunOptions) -> list[str]:
    optimizer = settings.optimizer
    sizes = [optimizer.batch_size, settings.model.max_len]
    sizes = sizes if optimizer.accumulate == 1 else [optimizer.accumulate, *sizes]
    return [
        f"{' x '.join(f'{size:,}' for size in sizes)} = {plan.tokens:,} tokens",
        f"{_in_flops(plan.flops.total)}: {_in_flops(plan.flops.matrices)} of matrices, "
        f"{_in_flops(plan.flops.attention)} of attention",
    ]


def _run(plan: Plan, settings: RunOptions, peak: float | None) -> list[str]:
    steps, kind = settings.optimizer.steps, jax.devices()[0].device_kind
    total = steps * plan.flops.total
    lines = [f"{steps:,} updates, {steps * plan.tokens:,} tokens, {_in_flops(total)}"]
    peak = peak or PEAK_FLOPS.get(kind)
    if peak is not None:
        seconds = total / (peak * plan.num_devices)
        time = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"
        lines.append(f"{time} seconds if {plan.num_devices:,} x {_in_flops(peak)}/s were used in full")
    return lines


def _in_flops(flops: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:,.4g} {unit}"
    return f"{flops / 1e6:,.4g} MFLOP"


def _print(title: str, *lines: str) -> None:
    for index, line in enumerate(lines):
        print(f"{'' if index else title:<11}{line}")
