"""The layout of a training: the flag, checked against the devices, the model and the batch."""

from __future__ import annotations

import dataclasses
import math

import jax

from attnax.cli.options import read_layout, refused_layout
from attnax.sharding import Layout, check_batch_size, check_layout
from attnax.training.devices import Devices
from attnax.training.run_options import RunOptions

__all__ = ["layout_anywhere", "layout_here"]


def layout_here(text: str | None, settings: RunOptions) -> Layout | None:
    """The layout of the flag for all devices; without the flag the default one in several processes, else None.

    Raises:
        InputError: it does not divide the devices, the model or the batch.
    """
    layout = read_layout(text)
    if layout is None and jax.process_count() > 1:
        layout = Layout()
    if layout is None:
        return None
    try:
        sized = layout.sized(jax.device_count())
    except ValueError as error:
        more = ""
        if jax.default_backend() == "cpu":
            known = math.prod(size for size in dataclasses.astuple(layout) if size != -1)
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={known}"
            more = f" {flag} in the environment makes {known} devices of a CPU."
        raise refused_layout(error, more) from error
    _require_fit(sized, settings)
    try:
        Devices(layout.mesh())
    except ValueError as error:
        raise refused_layout(error) from error
    return layout


def layout_anywhere(text: str | None, settings: RunOptions) -> Layout | None:
    """The sizes of the flag, or None; the devices are counted only for an axis without a size.

    Raises:
        InputError: it does not divide the model or the batch, or the devices that are counted.
    """
    layout = read_layout(text)
    if layout is None:
        return None
    sizes = dataclasses.astuple(layout)
    try:
        sized = layout.sized(jax.device_count() if -1 in sizes else math.prod(sizes))
    except ValueError as error:
        raise refused_layout(error, " Or name every size, such as fsdp=4,tensor=2.") from error
    _require_fit(sized, settings)
    return sized


def _require_fit(layout: Layout, settings: RunOptions) -> None:
    try:
        check_layout(settings.model, layout)
        check_batch_size(settings.optimizer.batch_size, layout)
        if settings.model.max_len % layout.context:
            raise ValueError(
                f"Layout: context must divide the length of the windows; got {layout} and --max-len "
                f"{settings.model.max_len}. Take a multiple."
            )
    except ValueError as error:
        raise refused_layout(error) from error
