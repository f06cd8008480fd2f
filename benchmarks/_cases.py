"""The attention cases of the CPU and the GPU benchmark: a mask and a change of the scores in NumPy, JAX and PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CLIP, CAP = 128, 30.0
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask and a change of the scores, written for NumPy, JAX and PyTorch alike (`xp`)."""

    words: str
    keep: Callable[..., Any] | None = None  # (b, h, q, kv, extra) -> may attend
    change: Callable[..., Any] | None = None  # (scores, b, h, q, kv, extra, xp) -> scores
    learned: tuple[str, ...] = ()  # the arrays of `extra` that get gradients
    batch: int = 1  # rows that `keep` needs
    extra: Callable[[int, int], Arrays] = lambda length, heads: {}


def document_ids(length: int) -> np.ndarray:
    """Ids of 8 packed documents of unequal lengths."""
    ends = np.cumsum([5, 3, 9, 2, 7, 4, 6, 4]) * length // 40
    return np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)


def keep_causal(b: Any, h: Any, q: Any, kv: Any, extra: Arrays) -> Any:
    return kv <= q


def common_cases(window: int) -> dict[str, Case]:
    """The cases of both benchmarks."""
    return {
        "full": Case("no mask"),
        "causal": Case("causal", keep=keep_causal),
        "window": Case(f"causal window of {window}", keep=lambda b, h, q, kv, extra: (kv <= q) & (q - kv < window)),
        "documents": Case(
            "8 packed documents of unequal lengths, causal",
            keep=lambda b, h, q, kv, extra: (kv <= q) & (extra["ids"][q] == extra["ids"][kv]),
            extra=lambda length, heads: {"ids": document_ids(length)},
        ),
        "alibi": Case(
            "causal, ALiBi",
            keep=keep_causal,
            change=lambda scores, b, h, q, kv, extra, xp: scores - extra["slopes"][h] * abs(q - kv),
            extra=lambda length, heads: {"slopes": (2.0 ** (-8 * np.arange(1, 1 + heads) / heads)).astype(np.float32)},
        ),
        "soft-cap": Case(
            f"causal, scores capped softly at {CAP:.0f}",
            keep=keep_causal,
            change=lambda scores, b, h, q, kv, extra, xp: CAP * xp.tanh(scores / CAP),
        ),
        "learned bias": Case(
            f"a learned bias for each head and distance, clipped at {CLIP}; its gradient too",
            change=_add_table,
            learned=("table",),
            extra=lambda length, heads: {
                "table": np.random.default_rng(3).standard_normal((heads, 2 * CLIP + 1)).astype(np.float32)
            },
        ),
    }


def _add_table(scores: Any, b: Any, h: Any, q: Any, kv: Any, extra: Arrays, xp: Any) -> Any:
    return scores + extra["table"][h, xp.clip(q - kv, -CLIP, CLIP) + CLIP]


def jax_results(attend: Callable[..., Any], *, backward: bool, learn: Sequence[str] = ()) -> Callable[..., Any]:
    """A function of the inputs that returns (out,), or out and the gradients of query, key, value and `learn`."""
    import jax

    def forward(query: Any, key: Any, value: Any, cotangent: Any, extra: Arrays) -> Any:
        return (attend(query, key, value, extra),)

    def both(query: Any, key: Any, value: Any, cotangent: Any, extra: Arrays) -> Any:
        def of(query: Any, key: Any, value: Any, *learned: Any) -> Any:
            return attend(query, key, value, {**extra, **dict(zip(learn, learned, strict=True))})

        out, pull = jax.vjp(of, query, key, value, *(extra[name] for name in learn))
        return out, *pull(cotangent)

    return both if backward else forward
