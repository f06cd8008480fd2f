"""Pictures; the only file that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["plot_training"]


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a run's training loss, and its held-out bits per byte, over the tokens seen, as a PNG.

    Args:
        metrics: rows with "tokens" and either "loss" (nats per token) or "held_out_bits_per_byte".
        path: of the PNG.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    losses = [(row["tokens"], row["loss"]) for row in metrics if "loss" in row]
    tokens, values = zip(*losses, strict=True)
    axes.plot(tokens, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, _smooth(values), color="tab:blue", label="training loss")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("nats per token", color="tab:blue")
    axes.grid(alpha=0.3)
    probes = [(row["tokens"], row["held_out_bits_per_byte"]) for row in metrics if "held_out_bits_per_byte" in row]
    if probes:
        right = axes.twinx()
        right.plot(*zip(*probes, strict=True), color="tab:orange", marker="o", label="held out")
        right.set_ylabel("bits per byte, on a part of the held-out text", color="tab:orange")
    figure.savefig(path, dpi=150)


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without its bias towards the start."""
    total, norm, smooth = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(total / norm)
    return smooth
