"""The cases, the sizes and the attention of each side of `attention.py`, in JAX or PyTorch.

A side makes the work to be timed and facts about it from a job, or gives the reason why it cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from _cases import CAP, CLIP, Arrays, Case, common_cases, jax_results
from _flops import attention_flops
from _pairs import Work, serve_cases

HEADS, HEAD_DIM, WINDOW = 8, 64, 512
MOST_BYTES = 6e9
_COMMON = common_cases(WINDOW)
CASES = {
    **{name: _COMMON[name] for name in ("full", "causal", "window", "documents")},
    "prefix": Case(
        "causal after a prefix of a quarter of the length",
        keep=lambda b, h, q, kv, extra: (kv <= q) | (kv < extra["lengths"][b]),
        extra=lambda length, heads: {"lengths": np.array([length // 4], np.int32)},
    ),
    **{name: _COMMON[name] for name in ("alibi", "soft-cap", "learned bias")},
    "one line": Case(
        "a function of one line, given to Attnax as a function: near tokens and the first 64",
        keep=lambda b, h, q, kv, extra: (kv <= q) & ((q - kv < 256) | (kv < 64)),
    ),
    "padding": Case(
        "4 rows of 2 heads, padded from 4/4, 3/4, 2/4 and 1/4 of the length",
        keep=lambda b, h, q, kv, extra: kv < extra["lengths"][b],
        batch=4,
        extra=lambda length, heads: {"lengths": np.arange(4, 0, -1, dtype=np.int32) * length // 4},
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the table."""

    case: str
    backward: bool
    length: int
    heads: int = HEADS  # times the batch
    timed: bool = True  # else it is only compiled

    @property
    def name(self) -> str:
        """The name in the table."""
        heads = "" if self.heads == HEADS else f", {self.heads} head"
        return f"{self.case}, {'forward + backward' if self.backward else 'forward'}, T={self.length}{heads}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of query, key, value and the result: (B, N, T, H)."""
        batch = CASES[self.case].batch
        return batch, self.heads // batch, self.length, HEAD_DIM

    @property
    def extra(self) -> Arrays:
        """The arrays of the case."""
        return CASES[self.case].extra(self.length, HEADS)

    def arrays(self) -> list[np.ndarray]:
        """Query, key, value, cotangent: unit normal."""
        rng = np.random.default_rng(self.length)
        return [rng.standard_normal(self.shape, np.float32) for _ in range(4)]

    def dense_mask(self, extra: Arrays) -> np.ndarray:
        """The mask as an array (B or 1, 1, T or 1, S)."""
        if self.case == "padding":
            return self._padding(extra)
        mask = np.empty((1, 1, self.length, self.length), bool)
        for rows, block in self._mask_rows(extra):
            mask[0, 0, rows] = block
        return mask

    def _padding(self, extra: Arrays) -> np.ndarray:
        keep = CASES["padding"].keep
        assert keep is not None
        return np.asarray(keep(np.arange(self.shape[0]).reshape(-1, 1, 1, 1), 0, 0, np.arange(self.length), extra))

    def _mask_rows(self, extra: Arrays) -> Iterator[tuple[slice, np.ndarray]]:
        """The mask by rows, to save memory."""
        keep = CASES[self.case].keep
        assert keep is not None
        keys = np.arange(self.length, dtype=np.int32)
        for first in range(0, self.length, 1024):
            rows = slice(first, first + 1024)
            yield rows, keep(0, 0, keys[rows, None], keys, extra)

    @functools.cached_property
    def flops(self) -> float:
        """The operations of the products of the pairs that the mask allows."""
        if CASES[self.case].keep is None:
            pairs = self.heads * self.length**2
        elif self.case == "padding":
            pairs = self.shape[1] * self.length * int(np.count_nonzero(self._padding(self.extra)))
        else:
            pairs = self.heads * sum(int(np.count_nonzero(block)) for _, block in self._mask_rows(self.extra))
        return attention_flops(pairs, HEAD_DIM, backward=self.backward)


class CannotError(Exception):
    """This side lacks the attention or the memory of a job; the message is short."""


def _fingerprint(arrays: Sequence[np.ndarray]) -> list[list[float]]:
    """(rms, a random projection) of each result; these must agree between the sides."""
    prints = []
    for array in arrays:
        values = np.asarray(array, np.float32).ravel()
        random = np.random.default_rng(7).standard_normal(values.size, np.float32)
        prints.append([float(np.sqrt(np.mean(values**2))), float(values @ random / np.sqrt(values.size))])
    return prints


def attnax_attention(case: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    from attnax import masks
    from attnax.kernels.score_mods import alibi_mod, soft_cap_mod

    make_mask = {
        "window": lambda extra: masks.sliding_window(WINDOW),
        "documents": lambda extra: masks.causal() & masks.documents(extra["ids"]),
        "prefix": lambda extra: masks.prefix(extra["lengths"]),
        "padding": lambda extra: masks.padding(extra["lengths"]),
        "one line": lambda extra: lambda b, h, q, kv: (kv <= q) & ((q - kv < 256) | (kv < 64)),
        "full": lambda extra: None,
        "learned bias": lambda extra: None,
    }.get(case, lambda extra: masks.causal())

    def learned_bias(extra: Arrays) -> Any:
        import jax.numpy as jnp

        table = extra["table"]
        return lambda scores, b, h, q, kv: scores + table[h, jnp.clip(q - kv, -CLIP, CLIP) + CLIP]

    make_mod = {
        "alibi": lambda extra: alibi_mod(HEADS),
        "soft-cap": lambda extra: soft_cap_mod(CAP),
        "learned bias": learned_bias,
    }.get(case, lambda extra: None)
    return lambda query, key, value, extra: kernel(query, key, value, mask=make_mask(extra), score_mod=make_mod(extra))


def jax_nn_attention(case: str) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    if case == "soft-cap":
        raise CannotError("no score mods")
    change = CASES[case].change

    def attend(query: Any, key: Any, value: Any, extra: Arrays) -> Any:
        bias = extra.get("bias")
        if case == "learned bias":
            assert change is not None
            index = jnp.arange(query.shape[1])
            heads = jnp.arange(HEADS)[:, None, None]
            bias = change(0.0, 0, heads, index[:, None], index[None, :], extra, jnp)[None]
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=extra.get("mask"),
            is_causal=case in ("causal", "window", "alibi"),
            local_window_size=(WINDOW - 1, 0) if case == "window" else None,
            key_value_seq_lengths=extra["lengths"] if case == "padding" else None,
            implementation="xla",
        )

    return attend


def dense_bias(job: Job, extra: Arrays) -> np.ndarray:
    """A bias that is not learned, as an array (1, N, T, S)."""
    change = CASES[job.case].change
    assert change is not None
    index = np.arange(job.length, dtype=np.int32)
    bias = np.empty((1, HEADS, job.length, job.length), np.float32)
    for head in range(HEADS):
        bias[0, head] = change(0.0, 0, head, index[:, None], index, extra, np)
    return bias


def prepare_jax(side: str, job: Job) -> tuple[Work | None, dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    own_layout = side == "jax.nn"  # (B, T, N, H)
    if own_layout:
        attend = jax_nn_attention(job.case)
    else:
        from attnax import standard_attention
        from attnax.kernels.flash import flash_attention

        kernel = standard_attention if side == "standard" else flash_attention
        attend = attnax_attention(job.case, kernel)

    arrays, extra = job.arrays(), job.extra
    if own_layout:
        arrays = [np.swapaxes(x, 1, 2) for x in arrays]
        if job.case in ("documents", "prefix", "one line"):
            extra = {"mask": jax.ShapeDtypeStruct((1, 1, job.length, job.length), bool)}
        elif job.case == "alibi":
            extra = {"bias": jax.ShapeDtypeStruct((1, HEADS, job.length, job.length), jnp.float32)}
    start_time = time.perf_counter()
    results_of = jax_results(attend, backward=job.backward, learn=CASES[job.case].learned)
    program = jax.jit(results_of).lower(*arrays, extra).compile()
    about: dict[str, Any] = {"compile_seconds": time.perf_counter() - start_time}
    memory = program.memory_analysis()
    assert memory is not None
    about["temporary_bytes"] = memory.temp_size_in_bytes
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if total > MOST_BYTES:
        raise CannotError(f"needs {total / 1e9:.0f} GB")
    if side == "attnax":
        about["error_at_512"] = _error_at_512(job.case, job.backward)
    if not job.timed:
        return None, about
    given = job.extra
    if "mask" in extra:
        extra = {"mask": job.dense_mask(given)}
    elif "bias" in extra:
        extra = {"bias": dense_bias(job, given)}
    operands = jax.device_put((*arrays, extra))
    results = [np.asarray(x) for x in program(*operands)]
    if own_layout:
        results = [np.swapaxes(x, 1, 2) if x.ndim == 4 else x for x in results]
    about["fingerprint"] = _fingerprint(results)
    return lambda: jax.block_until_ready(program(*operands)), about


@functools.cache
def _error_at_512(case: str, backward: bool) -> float:
    """Largest rms error of a result against standard_attention, relative to its rms."""
    import jax

    from attnax import standard_attention
    from attnax.kernels.flash import flash_attention

    job = Job(case, backward, 512)
    arrays, extra = job.arrays(), job.extra
    attends = [attnax_attention(case, kernel) for kernel in (flash_attention, standard_attention)]
    results = [
        jax.jit(jax_results(attend, backward=backward, learn=CASES[case].learned))(*arrays, extra) for attend in attends
    ]
    return max(
        float(np.sqrt(np.mean(np.square(np.asarray(have) - want)) / np.mean(np.square(want))))
        for have, want in zip(*results, strict=True)
    )


def prepare_torch(side: str, job: Job) -> tuple[Work | None, dict[str, Any]]:
    import torch

    case = CASES[job.case]
    if side == "flex" and job.backward:
        raise CannotError("no backward on CPU")
    arrays, extra = job.arrays(), job.extra
    query, key, value, cotangent = (torch.from_numpy(x) for x in arrays)
    extra = {name: torch.from_numpy(x) for name, x in extra.items()}
    inputs = [query, key, value, *(extra[name] for name in case.learned)]
    for x in inputs:
        x.requires_grad_(job.backward)
    start_time = time.perf_counter()
    attend = flex_attention(case, job.length, extra) if side == "flex" else sdpa_attention(job, extra)

    def forward() -> Any:
        with torch.no_grad():
            return (attend(query, key, value),)

    def both() -> Any:
        out = attend(query, key, value)
        return out, *torch.autograd.grad(out, inputs, cotangent)

    work = both if job.backward else forward
    results = [x.detach().numpy() for x in work()]
    about: dict[str, Any] = {"fingerprint": _fingerprint(results)}
    if side == "flex":
        about["compile_seconds"] = time.perf_counter() - start_time
    return work, about


def sdpa_attention(job: Job, extra: Arrays) -> Callable[..., Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    case = CASES[job.case]
    if job.case == "soft-cap":
        raise CannotError("no score mods")
    if job.case in ("full", "causal"):
        return functools.partial(scaled_dot_product_attention, is_causal=job.case == "causal")
    pairs = 4.0 * job.length**2
    scores = pairs * HEADS
    # With a learned bias SDPA keeps arrays of all scores: bias, scores, weights, and the gradients of each.
    needed = pairs if case.change is None else scores if not case.learned else scores * (6 if job.backward else 3)
    if needed > MOST_BYTES:
        raise CannotError(f"needs {needed / 1e9:.0f} GB")
    if case.learned:
        assert case.change is not None
        index, heads = torch.arange(job.length), torch.arange(HEADS)[:, None, None]

        def attend(query: Any, key: Any, value: Any) -> Any:
            assert case.change is not None
            bias = case.change(0.0, 0, heads, index[:, None], index, extra, torch)
            return scaled_dot_product_attention(query, key, value, attn_mask=bias[None])

        return attend
    arrays = {name: x.numpy() for name, x in extra.items()}
    mask = torch.from_numpy(job.dense_mask(arrays))
    if case.change is not None:
        bias = torch.from_numpy(dense_bias(job, arrays))
        mask = bias.masked_fill_(~mask, -torch.inf)
    return functools.partial(scaled_dot_product_attention, attn_mask=mask)


def flex_attention(case: Case, length: int, extra: Arrays) -> Callable[..., Any]:
    import torch
    from torch.nn.attention import flex_attention as flex

    torch.compiler.reset()  # or PyTorch limits the number of shapes that it compiles for
    keep, change = case.keep, case.change
    options: dict[str, Any] = {}
    if keep is not None:
        options["block_mask"] = flex.create_block_mask(
            lambda b, h, q, kv: keep(b, h, q, kv, extra), case.batch, None, length, length, device="cpu"
        )
    if change is not None:
        options["score_mod"] = lambda scores, b, h, q, kv: change(scores, b, h, q, kv, extra, torch)
    return functools.partial(torch.compile(flex.flex_attention, dynamic=False), **options)


def run_side(side: str) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers would run on after compilation
    if side in ("sdpa", "flex"):
        import torch

        torch.set_num_threads(2)
    prepare = prepare_torch if side in ("sdpa", "flex") else prepare_jax

    def prepare_job(line: dict[str, Any]) -> tuple[Work | None, dict[str, Any]]:
        gc.collect()
        try:
            return prepare(side, Job(**line))
        except CannotError as reason:
            return None, {"reason": str(reason)}

    serve_cases(prepare_job)
