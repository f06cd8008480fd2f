"""The floating-point operations of the products that a result needs, and their time at the peak as a share of a time.

Work that a side does besides is not counted: forbidden pairs, the scores that a backward pass computes again, routing.
"""

from __future__ import annotations

__all__ = ["FLOPS_OF_PAIR", "attention_flops", "linear_flops", "share"]

# FlashAttention's convention: for each pair of a query and a key, and each number of a head, a multiplication and an
# addition in each of 2 products forward and of 5 backward.
FLOPS_OF_PAIR = {"forward": 4, "backward": 10, "forward + backward": 14}


def attention_flops(pairs: float, head_dim: int, *, backward: bool = False) -> float:
    """Those of attention; with `backward`, of both passes."""
    return FLOPS_OF_PAIR["forward + backward" if backward else "forward"] * pairs * head_dim


def linear_flops(weights: float, tokens: float, *, backward: bool = False) -> float:
    """Those of linear layers; the backward pass has two more products, for the gradients of inputs and weights."""
    return (6 if backward else 2) * weights * tokens


def share(flops: float, seconds: float, peak: float) -> str:
    """The time of `flops` at a peak in GFLOP/s, as a percentage of `seconds`."""
    return f"{flops / (1e9 * peak * seconds):.0%}"
