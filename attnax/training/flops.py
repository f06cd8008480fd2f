"""The floating-point operations of an update, and the peaks of devices; MFU is operations / (seconds * peak).

XLA's own count (`cost_analysis`) takes each loop for one turn, and counts what a program computes twice or for nothing.
These formulas count what the mathematics of a model needs: a multiplication and an addition for each number of a matrix
and each token, in one product forward and two backward; likewise for each pair of a query and a key that attend.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from flax import nnx

from attnax.config import AttentionType, BlockConfig, StackConfig, TransformerConfig, VisionTransformerConfig
from attnax.nn.axes import parameter_axes

__all__ = ["PEAK_FLOPS", "Flops", "attention_pairs", "update_flops"]

PEAK_FLOPS: dict[str, float] = {
    # https://cloud.google.com/tpu/docs/v3, and v4, v5e, v5p, v6e, tpu7x in its place; v2: JAX's own table (tpu_info).
    # These are peaks of a chip. A chip of v2, v3 and TPU7x is two devices, one for each core; any other is one device.
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    # https://www.nvidia.com/en-us/data-center/v100, t4, a10, l4, l40s, a100, h100, h200; half of a figure with sparsity
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla T4": 65e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    # https://www.nvidia.com/en-us/data-center/hgx and gb200-nvl72: of all GPUs together, with sparsity
    "NVIDIA B200": 36e15 / 8 / 2,
    "NVIDIA B300 SXM6 AC": 36e15 / 8 / 2,
    "NVIDIA GB200": 360e15 / 72 / 2,
}
"""Peaks in dense bfloat16 (float16 where a card has none), in operations a second, by `jax.Device.device_kind`."""


class Flops(NamedTuple):
    """Operations of an update, forward and backward.

    Attributes:
        matrices: products with matrices: 6 for each number of a matrix and each token that it multiplies.
        attention: products of queries with keys, and of weights with values.
    """

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.matrices + self.attention


def update_flops(config: StackConfig, params: Any, *, sequences: int, length: int, is_causal: bool = True) -> Flops:
    """The operations of an update of a model.

    A mixture counts the experts that a token goes through. Tables of which rows are read count nothing; a table that is
    also the head counts once. Not counted: the scores that attention computes again in the backward pass, layers that
    `remat` computes again, elementwise functions, and the optimizer. Documents that are packed in a row count as one.

    Args:
        config: of a `TransformerLM`, a `MaskedLM` or a `VisionTransformer`.
        params: an `nnx.State` of its parameters, or of their shapes.
        sequences: number of sequences or images in an update, of all devices and accumulated batches.
        length: number of tokens that the model reads of each; of an image, its patches and learned tokens.
        is_causal: whether a token attends itself and the tokens before it alone.

    Example:
        >>> from flax import nnx
        >>> from attnax import TransformerConfig, TransformerLM
        >>> from attnax.training.flops import update_flops
        >>> config = TransformerConfig(vocab_size=7, d_model=8, num_heads=2, num_layers=1, d_ff=16)
        >>> params = nnx.state(nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config)), nnx.Param)
        >>> update_flops(config, params, sequences=2, length=6)
        Flops(matrices=40896.0, attention=4032.0)

    References:
        A. Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, https://arxiv.org/abs/2204.02311,
        appendix B (model FLOPs utilization).
    """
    is_vision = isinstance(config, VisionTransformerConfig)
    axes, matrices = parameter_axes(params), 0.0
    for path, variable in nnx.to_flat_state(params):
        uses = sequences if is_vision and path[0] == "head" else sequences * length
        matrices += 6.0 * uses * _numbers_of_a_token(config, path, tuple(variable.shape), axes[path])
    layers = [config.layer(index) for index in range(config.num_layers)]
    return Flops(matrices, float(sequences * math.fsum(_attention(layer, length, is_causal) for layer in layers)))


def _numbers_of_a_token(
    config: StackConfig, path: tuple[Any, ...], shape: tuple[int, ...], axes: tuple[Any, ...]
) -> float:
    """How many numbers of a parameter multiply a token's features."""
    name, is_tied = str(path[-1]), isinstance(config, TransformerConfig) and config.tie_embeddings
    if name in ("embedding", "table", "class_token", "register_tokens"):
        return float(math.prod(shape)) if is_tied and "tokens" in path else 0.0
    if name.endswith("bias") or len(axes) < 2:
        return 0.0
    share = 1.0
    if "experts" in axes:
        number = shape[len(shape) - len(axes) + axes.index("experts")]
        share = _top_k(config, number) / number
    return share * math.prod(shape)


def _top_k(config: StackConfig, num_experts: int) -> float:
    """The experts of a token, a mean where layers of as many experts differ."""
    chosen = [layer.top_k for layer in map(config.layer, range(config.num_layers)) if layer.num_experts == num_experts]
    return math.fsum(chosen) / len(chosen)


def attention_pairs(length: int, *, window: int | None = None, is_causal: bool = True) -> int:
    """The number of pairs (q, k) of `length` tokens with |q - k| < window and, if causal, k <= q.

    Example:
        >>> from attnax.training.flops import attention_pairs
        >>> attention_pairs(4), attention_pairs(4, window=2), attention_pairs(4, window=2, is_causal=False)
        (10, 7, 10)
    """
    reach = length if window is None else min(window, length)
    below = reach * length - reach * (reach - 1) // 2  # q itself, and the tokens before it
    return below if is_causal else 2 * below - length


def _attention(layer: BlockConfig, length: int, is_causal: bool) -> float:
    """2 (H + Hv) for each pair and head forward, and twice as much backward."""
    features = layer.head_size + layer.value_head_size
    if layer.attention_type == AttentionType.LITE:  # one gate for a token: no pairs, and no product of two matrices
        return 0.0
    if layer.attention_type == AttentionType.LINEAR:
        # The pairs of a chunk; a sum of key-value products, to which each token adds, and which each token reads.
        size = min(layer.linear_attention_chunk_size, length) if is_causal else 0
        pairs = length * (size + 1) / 2 if is_causal else 0.0
        sums = 4 * layer.head_size * layer.value_head_size * length
        return 3.0 * layer.num_heads * (2 * features * pairs + sums)
    pairs = attention_pairs(length, window=layer.attention_window, is_causal=is_causal)
    return 3.0 * layer.num_heads * 2 * features * pairs
