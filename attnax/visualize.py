"""Pictures: masks, attention weights, a run's losses. The only file that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from attnax.kernels.standard import attention_weights
from attnax.masks import Mask, TileCounts, count_tiles, resolve_masks
from attnax.typing import ArrayLike, Float, MaskMod, ScoreMod

__all__ = ["TileCounts", "attention_weights", "plot_attention", "plot_mask", "plot_training"]

# Pairs of empty tiles, masked pairs of partial tiles, allowed pairs of partial tiles, pairs of full tiles.
_EMPTY, _MASKED, _PARTIAL, _FULL = map(to_rgb, ("#ececea", "#f9e4bf", "#e59b2c", "#2d5d88"))
_MAX_PAIRS = 4096 * 4096  # of a mask's picture
_MAX_CELLS = 1024 * 1024  # of all panels of attention weights
_MAX_PANELS = 64


def plot_mask(
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    *,
    path: str | Path,
    seq_q: int,
    seq_kv: int | None = None,
    batch_size: int = 1,
    num_heads: int = 1,
    batch: int = 0,
    head: int = 0,
    tile: tuple[int, int] = (64, 64),
) -> TileCounts:
    """Draws the mask of one row and head, and the tiles that a kernel can skip.

    With a score mod the colour of a pair shows the result of the mod for a score of 0. A mod that carries a mask
    (`causal_mod()`) saves the same tiles as the mask does. A pair that any other mod sets to -inf is drawn as masked,
    but saves nothing.

    Args:
        mask: True to attend: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array.
        score_mod: `(scores, b, h, q, kv) -> scores`.
        path: of the picture; the suffix, as in mask.png, is the format.
        seq_q: number of queries.
        seq_kv: number of keys, by default seq_q.
        batch_size: number of rows of the mask.
        num_heads: number of heads of the mask.
        batch: the row to draw.
        head: the head to draw.
        tile: number of queries and of keys in a tile.

    Returns:
        The numbers of the legend.

    Raises:
        ValueError: nothing to draw, a size below 1, a row or head that is not there, a mask that does not fit the
            sizes, or more than 4096 * 4096 pairs.

    Example:
        >>> import tempfile
        >>> from attnax import masks
        >>> from attnax.visualize import plot_mask
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_mask(masks.causal(), seq_q=256, path=f"{folder}/causal.png")
        TileCounts(empty=6, partial=4, full=6)
    """
    shape = seq_q, seq_q if seq_kv is None else seq_kv
    _check_plot_mask(mask, score_mod, (batch_size, num_heads, *shape), (batch, head), tile)
    only_mask, only_mod = resolve_masks("plot_mask", mask, score_mod, (batch_size, num_heads, *shape))
    pairs = jnp.array([[batch]]), jnp.array([[head]]), jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None, :]
    keep = np.broadcast_to(True if only_mask is None else np.asarray(only_mask(*pairs)), shape)
    counts, empty, full = count_tiles(keep, tile)
    empty, full = (x.repeat(tile[0], 0).repeat(tile[1], 1)[: shape[0], : shape[1], None] for x in (empty, full))

    longest = max(shape)
    figure = Figure(figsize=(2.2 + 5 * max(0.3, shape[1] / longest), 1.8 + 5 * max(0.3, shape[0] / longest)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    marks: dict[str, Any] = {"full": _FULL, "partial": _PARTIAL, "empty, skipped": _EMPTY}
    image = np.where(full, _FULL, _PARTIAL)
    if only_mod is not None:
        scores = np.broadcast_to(np.asarray(only_mod(jnp.zeros(shape), *pairs), np.float64), shape)
        keep = keep & ~(scores <= np.finfo(np.float32).min)
        colors = ScalarMappable(_color_scale(scores[keep]), "viridis")
        image = colors.to_rgba(scores)[..., :3]
        figure.colorbar(colors, ax=axes, label="result of the score mod for a score of 0", aspect=30)
        marks |= {"full": colors.get_cmap()(0.5), "partial": _MASKED}
    image = np.where(keep[..., None], image, np.where(empty, _EMPTY, _MASKED))
    axes.imshow(image, aspect="auto" if min(shape) < 0.3 * longest else "equal")
    _name_axes(axes)
    for set_ticks, draw, length, size in (
        (axes.set_yticks, axes.axhline, shape[0], tile[0]),
        (axes.set_xticks, axes.axvline, shape[1], tile[1]),
    ):
        starts = range(0, length, size)
        set_ticks(starts[:: math.ceil(len(starts) / 8)])
        for start in starts[1:]:
            draw(start - 0.5, color="white", linewidth=min(0.8, 25 / len(starts)))
    axes.set_title(
        f"{sum(counts):,} tiles of {tile[0]} x {tile[1]}, {100 * counts.skipped:.1f}% skipped", fontsize="medium"
    )
    _count_in_legend(figure, marks, counts)
    figure.savefig(path, dpi=150)
    return counts


def plot_attention(
    weights: Float[ArrayLike, "B N T S"],
    *,
    path: str | Path,
    batch: int = 0,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
) -> None:
    """Draws attention weights as heat maps, a panel for each head, all in one scale of colours.

    Args:
        weights: (batch, num_heads, seq_q, seq_kv), as from `attention_weights`.
        path: of the picture; the suffix, as in weights.png, is the format.
        batch: the row to draw.
        query_labels: a token for each query.
        key_labels: a token for each key.

    Raises:
        ValueError: nothing to draw, a row that is not there, a wrong number of labels, or more than 64 heads or
            1024 * 1024 weights a row.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from attnax.visualize import attention_weights, plot_attention
        >>> tokens, x = ["to", "be", "or"], jnp.eye(3).reshape(1, 1, 3, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_attention(
        ...         attention_weights(x, x), path=f"{folder}/weights.png", query_labels=tokens, key_labels=tokens
        ...     )
    """
    weights = np.asarray(weights, np.float32)
    _check_plot_attention(weights, batch, query_labels, key_labels)
    _, heads, seq_q, seq_kv = weights.shape
    columns = math.ceil(math.sqrt(heads))
    lines = math.ceil(heads / columns)
    longest = max(seq_q, seq_kv)
    side = max(2.2, 0.2 * longest if query_labels or key_labels else 0, 4.5 / columns)
    figure = Figure(
        figsize=(1.4 + columns * side * max(0.3, seq_kv / longest), 0.8 + lines * side * max(0.3, seq_q / longest)),
        layout="constrained",
    )
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    colors = Normalize(0.0, float(np.nanmax(weights[batch], initial=0.0)) or 1.0)
    for head, panel in enumerate(panels[:heads]):
        image = panel.imshow(weights[batch, head], cmap="viridis", norm=colors, aspect="auto")
        panel.set_title(f"head {head}", fontsize="medium")
        is_lowest = head + columns >= heads  # also above a panel that is left out
        panel.tick_params(labelbottom=is_lowest)
        _name_axes(panel, x=is_lowest, y=head % columns == 0)
        # In a token, $ signs mark no mathematics, and a line break is shown as text.
        if key_labels is not None:
            panel.set_xticks(range(seq_kv), [repr(token)[1:-1] for token in key_labels], rotation=90, parse_math=False)
        if query_labels is not None:
            panel.set_yticks(range(seq_q), [repr(token)[1:-1] for token in query_labels], parse_math=False)
    for panel in panels[heads:]:
        panel.set_axis_off()
    figure.colorbar(image, ax=panels.tolist(), label="attention weight", aspect=30)
    figure.savefig(path, dpi=150)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a run's training loss, and its held-out bits per byte, over the tokens seen, as a PNG.

    Args:
        metrics: rows with "tokens" and either "loss" (nats per token; None is left out) or "held_out_bits_per_byte".
        path: of the PNG.

    Raises:
        ValueError: no row has a loss.
    """
    losses = [(row["tokens"], row["loss"]) for row in metrics if row.get("loss") is not None]
    if not losses:
        raise ValueError(f"plot_training: metrics must have a row with a loss; got {len(metrics)} rows without.")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
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


def _count_in_legend(figure: Figure, marks: Mapping[str, Any], counts: TileCounts) -> None:
    """A colour for each kind of tile, with its number; `marks` go from full to empty."""
    figure.legend(
        handles=[
            Patch(facecolor=color, edgecolor="#a0a0a0", label=f"{name}: {count:,} ({100 * count / sum(counts):.0f}%)")
            for (name, color), count in zip(marks.items(), reversed(counts), strict=True)
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _check_plot_mask(
    mask: Any, score_mod: Any, score_shape: tuple[int, int, int, int], row: tuple[int, int], tile: tuple[int, int]
) -> None:
    """Raises ValueError unless the arguments of `plot_mask` make a picture."""
    if mask is None and score_mod is None:
        raise ValueError("plot_mask: give a mask or a score_mod to draw; got mask=None, score_mod=None.")
    names = ("batch_size", "num_heads", "seq_q", "seq_kv", "tile", "tile")
    for name, size in zip(names, (*score_shape, *tile), strict=True):
        if size < 1:
            raise ValueError(f"plot_mask: {name} must be at least 1; got {name}={tile if name == 'tile' else size}.")
    for name, index, many, size in zip(("batch", "head"), row, names, score_shape, strict=False):
        if not 0 <= index < size:
            raise ValueError(f"plot_mask: {name} must be below {many}; got {name}={index}, {many}={size}.")
    if score_shape[2] * score_shape[3] > _MAX_PAIRS:
        raise ValueError(
            f"plot_mask: at most {_MAX_PAIRS:,} pairs of queries and keys can be drawn; "
            f"got seq_q={score_shape[2]}, seq_kv={score_shape[3]}. Draw a shorter text, with smaller tiles."
        )


def _check_plot_attention(
    weights: np.ndarray, batch: int, query_labels: Sequence[str] | None, key_labels: Sequence[str] | None
) -> None:
    """Raises ValueError unless the arguments of `plot_attention` make a picture."""
    if weights.ndim != 4 or weights.size == 0:
        raise ValueError(
            "plot_attention: weights must be (batch, num_heads, seq_q, seq_kv), each at least 1; "
            f"got weights.shape={weights.shape}."
        )
    rows, heads, seq_q, seq_kv = weights.shape
    if not 0 <= batch < rows:
        raise ValueError(f"plot_attention: batch must be a row of the weights, below {rows}; got batch={batch}.")
    if heads > _MAX_PANELS or weights[0].size > _MAX_CELLS:
        raise ValueError(
            f"plot_attention: at most {_MAX_PANELS} heads and {_MAX_CELLS:,} weights of a row can be seen; got "
            f"weights.shape={weights.shape}. Slice them."
        )
    labels = {"query_labels": (query_labels, seq_q), "key_labels": (key_labels, seq_kv)}
    for name, (given, length) in labels.items():
        if given is not None and len(given) != length:
            raise ValueError(f"plot_attention: {name} must be {length} tokens; got len({name})={len(given)}.")


def _color_scale(values: np.ndarray) -> Normalize:
    """From the least to the greatest finite value."""
    finite = values[np.isfinite(values)]
    least, greatest = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return Normalize(least, greatest) if least < greatest else Normalize(least - 0.5, greatest + 0.5)


def _name_axes(axes: Axes, *, x: bool = True, y: bool = True) -> None:
    """Keys go to the right, queries down; ticks only at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    if x:
        axes.set_xlabel("key")
    if y:
        axes.set_ylabel("query")
