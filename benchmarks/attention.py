"""Attention beside jax.nn and PyTorch on the CPU: masks, biases, documents; forward and backward; time and memory.

    python benchmarks/attention.py                                   # with `make bench`'s .venv-torch, or torch here
    python benchmarks/attention.py --cases causal window --lengths 1024 --json figures.json --markdown table.md

The sides are flash_attention and, if asked for, standard_attention of Attnax; jax.nn.dot_product_attention; PyTorch's
scaled_dot_product_attention (SDPA) and compiled flex_attention. All sides compute the same attention in float32 from
the same numbers; a comparison of sums of every result checks this. Each side has its own layout, and masks in the
leanest form that it takes. Masks and biases that a side needs as arrays are made before it is timed, except for the
learned bias. Batch * heads is 8, head_dim 64. Times are per call; a ratio is the other side's median over that of
Attnax.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _pairs import Side, Work, peer_version, serve_cases, side_command, started, take_turns

HEADS, HEAD_DIM = 8, 64
WINDOW, CLIP, CAP = 512, 128, 30.0
MOST_BYTES = 6e9
SIDES = {
    "attnax": "Attnax",
    "standard": "Attnax standard",
    "jax.nn": "jax.nn",
    "sdpa": "torch SDPA",
    "flex": "torch Flex",
}
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask and a change of the scores, written for NumPy, JAX and PyTorch alike (`xp`)."""

    words: str
    keep: Callable[..., Any] | None = None  # (b, h, q, kv, extra) -> may attend
    change: Callable[..., Any] | None = None  # (scores, b, h, q, kv, extra, xp) -> scores
    adds: bool = True  # whether `change` is a bias
    learned: str | None = None  # the array of `extra` that gets a gradient
    batch: int = 1
    extra: Callable[[int], Arrays] = lambda length: {}


def _documents(length: int) -> Arrays:
    ends = np.cumsum([5, 3, 9, 2, 7, 4, 6, 4]) * length // 40
    return {"ids": np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)}


CASES = {
    "full": Case("no mask"),
    "causal": Case("causal", keep=lambda b, h, q, kv, extra: kv <= q),
    "window": Case(f"causal window of {WINDOW}", keep=lambda b, h, q, kv, extra: (kv <= q) & (q - kv < WINDOW)),
    "documents": Case(
        "8 packed documents of unequal lengths, causal",
        keep=lambda b, h, q, kv, extra: (kv <= q) & (extra["ids"][q] == extra["ids"][kv]),
        extra=_documents,
    ),
    "prefix": Case(
        "causal after a prefix of a quarter of the length",
        keep=lambda b, h, q, kv, extra: (kv <= q) | (kv < extra["lengths"][b]),
        extra=lambda length: {"lengths": np.array([length // 4], np.int32)},
    ),
    "alibi": Case(
        "causal, ALiBi",
        keep=lambda b, h, q, kv, extra: kv <= q,
        change=lambda scores, b, h, q, kv, extra, xp: scores + extra["slopes"][h] * (kv - q),
        extra=lambda length: {"slopes": (2.0 ** -np.arange(1, 1 + HEADS)).astype(np.float32)},
    ),
    "soft-cap": Case(
        f"causal, scores capped softly at {CAP:.0f}",
        keep=lambda b, h, q, kv, extra: kv <= q,
        change=lambda scores, b, h, q, kv, extra, xp: CAP * xp.tanh(scores / CAP),
        adds=False,
    ),
    "learned bias": Case(
        f"a learned bias for each head and distance, clipped at {CLIP}; its gradient too",
        change=lambda scores, b, h, q, kv, extra, xp: scores + extra["table"][h, xp.clip(q - kv, -CLIP, CLIP) + CLIP],
        learned="table",
        extra=lambda length: {
            "table": np.random.default_rng(3).standard_normal((HEADS, 2 * CLIP + 1)).astype(np.float32)
        },
    ),
    "one line": Case(
        "a function of one line, given to Attnax as a function: near tokens and the first 64",
        keep=lambda b, h, q, kv, extra: (kv <= q) & ((q - kv < 256) | (kv < 64)),
    ),
    "padding": Case(
        "4 rows of 2 heads, padded from 4/4, 3/4, 2/4 and 1/4 of the length",
        keep=lambda b, h, q, kv, extra: kv < extra["lengths"][b],
        batch=4,
        extra=lambda length: {"lengths": np.arange(4, 0, -1, dtype=np.int32) * length // 4},
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

    def arrays(self) -> tuple[list[np.ndarray], Arrays]:
        """Query, key, value, cotangent: unit normal; and the case's own arrays."""
        rng = np.random.default_rng(self.length)
        return [rng.standard_normal(self.shape, np.float32) for _ in range(4)], CASES[self.case].extra(self.length)

    def dense_mask(self, extra: Arrays) -> np.ndarray:
        """The mask as an array (B or 1, 1, T or 1, S), computed by rows to save memory."""
        keep, (batch, _, length, _) = CASES[self.case].keep, self.shape
        assert keep is not None
        if self.case == "padding":
            return np.asarray(keep(np.arange(batch).reshape(-1, 1, 1, 1), 0, 0, np.arange(length), extra))
        mask = np.empty((1, 1, length, length), bool)
        keys = np.arange(length, dtype=np.int32)
        for first in range(0, length, 1024):
            rows = keys[first : first + 1024, None]
            mask[0, 0, first : first + 1024] = keep(0, 0, rows, keys, extra)
        return mask


@dataclasses.dataclass(frozen=True)
class Goal:
    """A value that one line of the table, or two, should reach."""

    job: Job
    words: str
    value: Callable[[Figures], float | None]
    wanted: float
    at_least: bool = True
    unit: str = "x"


Figures = Mapping[Job, Mapping[str, Mapping[str, Any]]]


def _ratio(job: Job, side: str) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        rows = figures.get(job, {})
        if not all("median" in rows.get(name, {}) for name in ("attnax", side)):
            return None
        return float(rows[side]["median"] / rows["attnax"]["median"])

    return value


def _said(job: Job, key: str, scale: float = 1.0) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        said = figures.get(job, {}).get("attnax", {}).get(key)
        return None if said is None else said * scale

    return value


def _growth(job: Job, longer: Job) -> Callable[[Figures], float | None]:
    def value(figures: Figures) -> float | None:
        times = [_said(which, "median")(figures) for which in (longer, job)]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    return value


def _goals() -> list[Goal]:
    forward, step_2k, step_4k = Job("causal", False, 4096), Job("causal", True, 2048), Job("causal", True, 4096)
    window, longer = Job("window", False, 16384), Job("window", False, 32768)
    documents, long = Job("documents", True, 8192), Job("causal", True, 32768, heads=1, timed=False)
    against = [
        (forward, "sdpa", 1.3),
        (forward, "flex", 1.3),
        (forward, "jax.nn", 5.0),
        (step_2k, "sdpa", 1.4),
        (step_2k, "jax.nn", 5.0),
        (step_4k, "sdpa", 1.4),
        (step_4k, "jax.nn", 8.0),
        (window, "flex", 1.5),
        (documents, "sdpa", 4.0),
    ]
    goals = [
        Goal(job, f"{job.name}: faster than {SIDES[side]}", _ratio(job, side), wanted) for job, side, wanted in against
    ]
    goals.append(
        Goal(longer, "window, forward: time at T=32768 over T=16384", _growth(window, longer), 2.3, at_least=False)
    )
    for words, value, wanted, unit in (
        ("time to compile", _said(long, "compile_seconds"), 2.0, "s"),
        ("temporary memory", _said(long, "temporary_bytes", 2**-20), 64.0, "MiB"),
    ):
        goals.append(Goal(long, f"{long.name}: {words}", value, wanted, at_least=False, unit=f" {unit}"))
    return goals


GOALS = _goals()
SIDES_OF_GOALS = {
    Job("window", False, 16384): {"attnax", "flex"},
    Job("window", False, 32768): {"attnax"},
    Job("documents", True, 8192): {"attnax", "sdpa"},
    Job("causal", True, 32768, heads=1, timed=False): {"attnax"},
}


# The sides. Each makes the work to be timed and facts about it from a job, or gives the reason why it cannot.


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

    if not CASES[case].adds:
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


def _dense_bias(job: Job, extra: Arrays) -> np.ndarray:
    """A bias that is not learned, as an array (1, N, T, S)."""
    change = CASES[job.case].change
    assert change is not None
    index = np.arange(job.length, dtype=np.int32)
    bias = np.empty((1, HEADS, job.length, job.length), np.float32)
    for head in range(HEADS):
        bias[0, head] = change(0.0, 0, head, index[:, None], index, extra, np)
    return bias


def _jax_program(attend: Callable[..., Any], job: Job) -> Callable[..., Any]:
    """A function (query, key, value, cotangent, extra) -> all results, out first."""
    import jax

    learned = CASES[job.case].learned

    def forward(query: Any, key: Any, value: Any, cotangent: Any, extra: Arrays) -> Any:
        return (attend(query, key, value, extra),)

    def both(query: Any, key: Any, value: Any, cotangent: Any, extra: Arrays) -> Any:
        own = extra[learned] if learned else ()
        out, pull = jax.vjp(
            lambda q, k, v, own: attend(q, k, v, {**extra, learned: own} if learned else extra), query, key, value, own
        )
        return out, *jax.tree.leaves(pull(cotangent))

    return both if job.backward else forward


def prepare_jax(side: str, job: Job) -> tuple[Work | None, dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    own_layout = side == "jax.nn"  # (B, T, N, H)
    if own_layout:
        program = _jax_program(jax_nn_attention(job.case), job)
    else:
        from attnax import standard_attention
        from attnax.kernels.flash import flash_attention

        kernel = standard_attention if side == "standard" else flash_attention
        program = _jax_program(attnax_attention(job.case, kernel), job)

    arrays, extra = job.arrays()
    if own_layout:
        arrays = [np.swapaxes(x, 1, 2) for x in arrays]
        if job.case in ("documents", "prefix", "one line"):
            extra = {"mask": jax.ShapeDtypeStruct((1, 1, job.length, job.length), bool)}
        elif job.case == "alibi":
            extra = {"bias": jax.ShapeDtypeStruct((1, HEADS, job.length, job.length), jnp.float32)}
    start_time = time.perf_counter()
    program = jax.jit(program).lower(*arrays, extra).compile()
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
    given = CASES[job.case].extra(job.length)
    if "mask" in extra:
        extra = {"mask": job.dense_mask(given)}
    elif "bias" in extra:
        extra = {"bias": _dense_bias(job, given)}
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
    arrays, extra = job.arrays()
    results = [
        jax.jit(_jax_program(attnax_attention(case, kernel), job))(*arrays, extra)
        for kernel in (flash_attention, standard_attention)
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
    arrays, extra = job.arrays()
    query, key, value, cotangent = (torch.from_numpy(x) for x in arrays)
    extra = {name: torch.from_numpy(x) for name, x in extra.items()}
    inputs = [query, key, value, *([extra[case.learned]] if case.learned else [])]
    for x in inputs:
        x.requires_grad_(job.backward)
    start_time = time.perf_counter()
    attend = (flex_attention if side == "flex" else sdpa_attention)(job, extra)

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
    if not case.adds:
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
        bias = torch.from_numpy(_dense_bias(job, arrays))
        mask = bias.masked_fill_(~mask, -torch.inf)
    return functools.partial(scaled_dot_product_attention, attn_mask=mask)


def flex_attention(job: Job, extra: Arrays) -> Callable[..., Any]:
    import torch
    from torch.nn.attention import flex_attention as flex

    case, (batch, _, length, _) = CASES[job.case], job.shape
    torch.compiler.reset()  # or PyTorch limits the number of shapes that it compiles for
    keep, change = case.keep, case.change
    options: dict[str, Any] = {}
    if keep is not None:
        options["block_mask"] = flex.create_block_mask(
            lambda b, h, q, kv: keep(b, h, q, kv, extra), batch, None, length, length, device="cpu"
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


# The table.


def measure(job: Job, sides: Mapping[str, Side], rounds: int) -> dict[str, dict[str, Any]]:
    """For each side: facts about a job, its times, or the reason why there are none."""
    rows = {name: side.ask(json.dumps(dataclasses.asdict(job))) for name, side in sides.items()}
    prints = {name: np.array(row["fingerprint"]) for name, row in rows.items() if "fingerprint" in row}
    for name, values in prints.items():
        first = next(iter(prints.values()))
        if not (abs(values - first) <= 1e-3 * first[:, :1]).all():
            rows[name]["reason"] = "another result"
    if job.timed:
        able = {name: side for name, side in sides.items() if "reason" not in rows[name]}
        for name, seconds in take_turns(able, rounds).items():
            rows[name] |= {"seconds": seconds, "min": min(seconds), "median": statistics.median(seconds)}
    return rows


def header(sides: Sequence[str]) -> list[str]:
    cells = ["case", "pass", "T"]
    for side in sides:
        cells.append(f"{SIDES[side]} ms")
        if side in ("attnax", "standard", "jax.nn"):
            cells.append("MiB")
        if side != "sdpa":
            cells.append("compile s")
        if side != "attnax" and "attnax" in sides:
            cells.append("ratio")
    return cells


def cells_of(job: Job, sides: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    heads = "" if job.heads == HEADS else f" ({job.heads} head)"
    cells = [job.case + heads, "fwd + bwd" if job.backward else "fwd", str(job.length)]
    for side in sides:
        row = rows.get(side, {"reason": "-"})
        timed = f"{1e3 * row['min']:.1f} / {1e3 * row['median']:.1f}" if "median" in row else "not timed"
        cells.append(row.get("reason", timed))
        if side in ("attnax", "standard", "jax.nn"):
            cells.append(f"{row['temporary_bytes'] / 2**20:.1f}" if "temporary_bytes" in row else "-")
        if side != "sdpa":
            cells.append(f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "-")
        if side != "attnax" and "attnax" in sides:
            ratio = _ratio(job, side)({job: rows})
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
    return cells


def goal_cells(figures: Figures) -> list[list[str]]:
    lines = [["goal", "wanted", "reached", ""]]
    for goal in GOALS:
        if goal.job not in figures:
            continue
        value, sign = goal.value(figures), ">=" if goal.at_least else "<="
        met = value is not None and (value >= goal.wanted if goal.at_least else value <= goal.wanted)
        lines.append(
            [
                goal.words,
                f"{sign} {goal.wanted:g}{goal.unit}",
                "-" if value is None else f"{value:.2f}{goal.unit}",
                "" if value is None else "yes" if met else "no",
            ]
        )
    return lines


def markdown(title: str, tables: Sequence[Sequence[Sequence[str]]]) -> str:
    text = [title]
    for table in tables:
        lines = ["| " + " | ".join(cells) + " |" for cells in table]
        text.append("\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]))
    cases = "\n".join(f"- {name}: {case.words}" for name, case in CASES.items())
    legend = (
        "Times are minimum / median of a call; MiB is temporary memory; a ratio is the side's median over that of "
        "Attnax, so above 1 Attnax is faster."
    )
    return "\n\n".join([*text, legend, cases]) + "\n"


def show(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="by default 512 2048 4096")
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=("forward", "backward"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=("attnax", "jax.nn", "sdpa", "flex"))
    parser.add_argument(
        "--goals",
        choices=("add", "only", "skip"),
        help="the lines that have a goal; by default added unless --cases or --lengths is given",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--pages", choices=("small", "huge"), default="small", help="size of malloc's pages, for all sides"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here, after each line")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.goals is None:
        options.goals = "add" if options.cases is None and options.lengths is None else "skip"
    if options.rounds < 1 or any(length < 1 for length in options.lengths or ()):
        parser.error("--rounds and --lengths must be at least 1")
    return options


def jobs_of(options: argparse.Namespace) -> dict[Job, set[str]]:
    """The lines of the table, and the sides of each line."""
    jobs: dict[Job, set[str]] = {}
    if options.goals != "only":
        for case in options.cases or CASES:
            for name in options.passes:
                for length in options.lengths or (512, 2048, 4096):
                    jobs[Job(case, name == "backward", length)] = set(options.sides)
    if options.goals != "skip":
        for job in [*(goal.job for goal in GOALS), Job("window", False, 16384)]:
            jobs.setdefault(job, SIDES_OF_GOALS.get(job, set(options.sides)))
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    if options.side:
        run_side(options.side)
        return 0
    sides, torch = list(options.sides), peer_version("torch")
    missing = [side for side in sides if side in ("sdpa", "flex") and torch is None]
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if options.pages == "huge" else {}
    versions = f"jax {version('jax')}, torch {torch or 'not installed'}"
    title = (
        f"{platform.machine()}, 2 threads, {options.pages} pages, {versions}; float32, "
        f"batch * heads {HEADS}, head_dim {HEAD_DIM}; {options.rounds} rounds"
    )
    print(title, flush=True)
    figures: dict[Job, dict[str, dict[str, Any]]] = {}
    table = [header(sides)]
    commands = {name: side_command(__file__, name, torch=name in ("sdpa", "flex")) for name in sides}
    with started({name: commands[name] for name in sides if name not in missing}, tunables) as processes:
        for job, wanted in jobs_of(options).items():
            rows = measure(job, {name: side for name, side in processes.items() if name in wanted}, options.rounds)
            rows |= {name: {"reason": "not installed"} for name in missing}
            figures[job] = rows
            table.append(cells_of(job, sides, rows))
            print("  ".join(f"{name} {cell}" for name, cell in zip(table[0], table[-1], strict=True)), flush=True)
            if options.json:
                lines = [{**dataclasses.asdict(job), "sides": rows} for job, rows in figures.items()]
                options.json.write_text(json.dumps({"about": title, "lines": lines}, indent=2) + "\n")
    goals = goal_cells(figures)
    print()
    show(table)
    if len(goals) > 1:
        print()
        show(goals)
    if options.markdown:
        options.markdown.write_text(markdown(title, [table, goals] if len(goals) > 1 else [table]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
