"""The bytes of a layout: those that a device holds, and those that it moves in a step of `Trainer`.

The formulas are those of the program that XLA makes of a step; `tests/training/test_traffic.py` compares them with it.
A device moves, for a gather of an array over n devices, the (n - 1) / n of it that it receives; for a reduction, its
operand; for a hop of a ring, what it sends. Sums of numbers and of a token's few numbers are left out where they are
small. So is what an optimizer moves: AdamW nothing, Muon the products of its matrices.

Sizes of the axes: d data, f fsdp, e expert, c context, n tensor. t = batch * length / (d f e c) is the number of a
device's tokens, a the bytes of a number in the dtype of the computation. A parameter has W bytes on a device while it
is used: uncut by fsdp, cut by tensor and expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from attnax.config import BlockConfig, TransformerConfig
from attnax.nn._routing import DOWN
from attnax.nn.axes import parameter_axes
from attnax.sharding import AXES, BATCH, RULES, Axis, Layout, cut_of
from attnax.training.optimizer import OptimizerConfig

__all__ = ["Held", "Placed", "Traffic", "abstract_mesh", "held_bytes", "place_parameters", "step_traffic"]


class Placed(NamedTuple):
    """A parameter on a layout.

    Attributes:
        path: of the parameter in its model.
        shape: of all of it.
        axes: the name of each axis, as in `attnax.sharding.RULES`; None for one that is never cut.
        cuts: the axes of the mesh that cut each axis.
        dtype: of the parameter.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    cuts: tuple[tuple[str, ...], ...]
    dtype: Any

    @property
    def name(self) -> str:
        """Such as "decoder.embed.tokens.embedding"."""
        return ".".join(map(str, self.path))

    def size(self, mesh: AbstractMesh, *, without: Sequence[str] = ()) -> int:
        """The number of elements on a device, if the axes `without` cut nothing."""
        names = [name for cut in self.cuts for name in cut if name not in without]
        return math.prod(self.shape) // math.prod(mesh.shape[name] for name in names)

    def undivided(self, mesh: AbstractMesh) -> Iterator[tuple[str, int, str]]:
        """(name, number, mesh axes) of each axis that a rule would cut, and whose number its devices do not divide."""
        for size, axis, cut in zip(self.shape, self.axes, self.cuts, strict=True):
            name, parts = axis if isinstance(axis, tuple) else (axis, size)
            wanted = [x for x in RULES.get(name or "", ()) if mesh.shape[x] > 1]
            if name is not None and wanted and not cut:
                yield name, parts, ", ".join(f"{x}={mesh.shape[x]}" for x in wanted)


def abstract_mesh(layout: Layout) -> AbstractMesh:
    """The mesh of a layout without -1, without its devices."""
    sizes = tuple(getattr(layout, name) for name in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place_parameters(params: Any, mesh: AbstractMesh) -> list[Placed]:
    """Where a layout puts each parameter.

    Args:
        params: an `nnx.State` of parameters or of their shapes.
        mesh: of the layout.

    Raises:
        ValueError: a matrix states no axes; see `attnax.nn.axes.parameter_axes`.
    """
    axes, placed = parameter_axes(params), []
    for path, variable in nnx.to_flat_state(params):
        shape = tuple(variable.shape)
        named = (None,) * (len(shape) - len(axes[path])) + axes[path]
        cuts = tuple(cut_of(mesh, size, axis) for size, axis in zip(shape, named, strict=True))
        placed.append(Placed(path, shape, named, cuts, jnp.dtype(variable.dtype)))
    return placed


class Held(NamedTuple):
    """Bytes of a state, on a device or in all."""

    parameters: int
    moments: int


def held_bytes(placed: Iterable[Placed], optimizer: OptimizerConfig, mesh: AbstractMesh | None = None) -> Held:
    """The bytes of parameters and of the optimizer's state on a device of the mesh, or in all without a mesh.

    Moments lie like their parameters. Other arrays, such as the sums by row and column of Adafactor, are whole on every
    device.
    """
    each = {one.path: one for one in placed}
    shapes = {path: jax.ShapeDtypeStruct(one.shape, one.dtype) for path, one in each.items()}
    state = jax.eval_shape(optimizer.build().init, nnx.traversals.unflatten_mapping(shapes))

    def size(one: Placed) -> int:
        return math.prod(one.shape) if mesh is None else one.size(mesh)

    moments = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        of = next((each[names[start:]] for start in range(len(names)) if names[start:] in each), None)
        count = size(of) if of is not None and of.shape == x.shape else math.prod(x.shape)
        moments += count * x.dtype.itemsize
    return Held(sum(size(one) * one.dtype.itemsize for one in placed), moments)


class Traffic(NamedTuple):
    """The bytes that a device moves in a step, forward and backward.

    Attributes:
        gathers: of parameters that fsdp cuts.
        gradients: reductions of the parameters' gradients.
        tensor: sums of activations over the devices of tensor.
        ring: keys, values and their gradients that go round the devices of context.
        to_experts: gathers of tokens, and of the gradients of experts' outputs.
        from_experts: reductions of the experts' outputs, and of the gradients of tokens.
    """

    gathers: float
    gradients: float
    tensor: float
    ring: float
    to_experts: float
    from_experts: float


def step_traffic(
    config: TransformerConfig, placed: Sequence[Placed], mesh: AbstractMesh, batch_size: int, length: int
) -> Traffic:
    """The bytes that a device moves in a step of `Trainer` with one microbatch; each one more reduces gradients again.

    Args:
        config: of a `TransformerLM`, with attention of the library.
        placed: its parameters.
        mesh: of the layout.
        batch_size: of the step, a multiple of d f e.
        length: of the sequences that the model reads.
    """
    step = _Step(config, mesh, batch_size, length)
    layers = [config.layer(index) for index in range(config.num_layers)]
    mixtures = [layer for layer in layers if layer.num_experts is not None]
    return Traffic(
        gathers=math.fsum(map(step.gathers, placed)),
        gradients=math.fsum(map(step.gradients, placed)),
        tensor=math.fsum(map(step.tensor, placed)),
        ring=math.fsum(map(step.ring, layers)),
        to_experts=math.fsum(map(step.to_experts, mixtures)),
        from_experts=math.fsum(map(step.from_experts, mixtures)),
    )


class _Step:
    """A step on a device: each method has the formula of one kind of traffic, for one parameter or layer."""

    def __init__(self, config: TransformerConfig, mesh: AbstractMesh, batch_size: int, length: int):
        self.config, self.mesh, self.length = config, mesh, length
        self.data, self.fsdp, self.expert, self.context, self.num = (mesh.shape[name] for name in AXES)
        if length % self.context:
            self.context = 1  # every device of the axis has whole sequences
        self.tokens = batch_size * length / (math.prod(mesh.shape[name] for name in BATCH) * self.context)
        self.bytes = jnp.dtype(config.dtype).itemsize

    def gathers(self, p: Placed) -> float:
        """W (f - 1) / f each time that a parameter is gathered.

        A parameter of a layer is gathered once and kept for the backward pass; with `remat` it is gathered again. A
        table that is the head too is gathered once for both, and once for each where tensor cuts.
        """
        if not _has(p, "fsdp"):
            return 0.0
        times = 1 + (self.config.remat != "none")
        if _is_table(p) or _is_head(p):
            times = 1 + (_is_table(p) and self.config.tie_embeddings and self.num > 1)
        return times * self._whole(p) * (self.fsdp - 1) / self.fsdp

    def gradients(self, p: Placed) -> float:
        """W over fsdp, then W / f over d e c, of a parameter that fsdp cuts.

        W over d f e and W over c of another parameter of a layer; W over d f c of an expert's matrix; W over d f e c of
        another head or table of tokens, and of a head that tensor cuts too. A table that is the head has the
        gradients of both. A reduction over one device is none.
        """
        whole, others = self._whole(p), self.data * self.expert * self.context
        cut, uncut = whole + whole / self.fsdp * (others > 1), whole * (self.fsdp * others > 1)
        of_head = cut if _has(p, "fsdp") and self.num == 1 else uncut
        if _is_head(p):
            return of_head
        if _is_expert(p):
            return whole * (self.data * self.fsdp * self.context > 1)
        if _is_table(p):
            return (cut if _has(p, "fsdp") else uncut) + of_head * self.config.tie_embeddings
        if _has(p, "fsdp"):
            return cut
        return whole * ((self.data * self.fsdp * self.expert > 1) + (self.context > 1))

    def tensor(self, p: Placed) -> float:
        """a t O of a matrix (I, O) whose inputs tensor cuts, forward; a t I of one whose outputs it cuts, backward.

        A table whose rows tensor cuts has t D twice: the rows, and their gradient. A head, and so a table that is one,
        has a t D, backward, and three numbers of 4 bytes a token, for the softmax. Keys and values whose heads tensor
        does not cut have the sum of their own gradients, a t O. An expert's second matrix (F, D) has e a t D forward,
        and e a t D and a t D backward.
        """
        if self.num == 1 or len(p.shape) < 2:
            return 0.0
        *_, into, out = p.shape
        repeats, of_token = p.shape[0] if "periods" in p.path else 1, self.tokens * self.bytes
        by_tensor = ["tensor" in cut for cut in p.cuts]
        if _is_table(p) or _is_head(p):
            of_head = of_token * self.config.d_model + 3 * 4 * self.tokens
            of_rows = 2 * self.tokens * out * p.dtype.itemsize
            if not any(by_tensor):
                return 0.0
            return of_head if _is_head(p) else of_rows + (of_head if self.config.tie_embeddings else 0)
        if _is_expert(p):
            is_down = p.axes[-len(DOWN) :] == DOWN and any(by_tensor)
            return repeats * of_token * out * (2 * self.expert + 1) if is_down else 0.0
        if by_tensor[-1]:
            return repeats * of_token * into
        if by_tensor[-2]:  # with remat all but the last output of a block is computed again
            again = self.config.remat != "none" and "feed_forward" not in p.path
            return repeats * of_token * out * (1 + again)
        is_of_heads = isinstance(p.axes[-1], tuple)
        return repeats * of_token * out if is_of_heads else 0.0

    def ring(self, layer: BlockConfig) -> float:
        """(c - 1) (K + V) forward and (2 c - 1) (K + V) backward, for K and V bytes of a device's keys and values.

        With c = 2 the backward pass takes the keys and values that the forward pass has received, unless layers are
        scanned or computed again: 2 (K + V) backward. Causal attention without a narrow window has its queries, keys,
        values and outputs in zigzag order: 2 (Q + K + V + O) in all, of which half stays where it is with c = 2.
        """
        if self.context == 1:
            return 0.0
        heads, kv_heads = layer.num_heads // self.num, max(1, layer.kv_heads // self.num)
        key, value = layer.head_size, layer.value_head_size
        keys, around = kv_heads * (key + value), self.context - 1
        is_kept = self.context == 2 and not self.config.scan_layers and self.config.remat == "none"
        again = self.config.remat not in ("none", "attention_out")
        hops = around * (1 + again) * keys + (2 if is_kept else 2 * around + 1) * keys
        window = layer.attention_window
        is_zigzag = self.length % (2 * self.context) == 0 and (window is None or window >= self.length // 2)
        exchanges = (2 + again) * (heads * (key + value) + keys) / (1 + (self.context == 2)) if is_zigzag else 0
        return self.tokens * self.bytes * (hops + exchanges)

    def to_experts(self, layer: BlockConfig) -> float:
        """(e - 1) t (2 a D + 8 C): the inputs and the gradients of the outputs; numbers and weights of C experts.

        With dropout C F / n bytes of each token besides, that say what is kept.
        """
        features = 2 * self.bytes * layer.d_model + 8 * layer.top_k
        features += layer.top_k * layer.d_ff / self.num * (layer.dropout_rate > 0)
        return (self.expert - 1) * self.tokens * features

    def from_experts(self, layer: BlockConfig) -> float:
        """e t (2 a D + 4 C): the outputs and the gradients of the inputs; the gradients of the weights."""
        features = 2 * self.bytes * layer.d_model + 4 * layer.top_k
        return self.expert * self.tokens * features * (self.expert > 1)

    def _whole(self, p: Placed) -> float:
        """W. Tables and heads travel as they are, a router in float32, other parameters as the computation has them."""
        dtype = jnp.dtype(self.config.dtype)
        if _is_table(p) or _is_head(p):
            dtype = p.dtype
        elif "router" in p.path:
            dtype = jnp.promote_types(dtype, jnp.float32)
        return float(p.size(self.mesh, without=("fsdp",)) * dtype.itemsize)


def _has(p: Placed, axis: str) -> bool:
    return any(axis in cut for cut in p.cuts)


def _is_table(p: Placed) -> bool:
    return "embed" in p.path and "tokens" in p.path


def _is_head(p: Placed) -> bool:
    return "head" in p.path


def _is_expert(p: Placed) -> bool:
    return "experts" in p.axes
