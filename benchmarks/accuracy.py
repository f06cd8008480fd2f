"""The errors of attention and of its gradients against the same formula in float64, beside other libraries.

    python benchmarks/accuracy.py         # needs torch; `make bench-accuracy` installs it in .venv-torch

Every library gets the same arrays, rounded to the dtype of a table, so the rounding of the inputs is no error. The
exact result is that of `exact`, in NumPy. An error is the root mean square of the difference, relative to that of the
exact array, and in parentheses the largest difference, relative to the same root mean square. Of the gradients of
query, key and value the worst counts. "Rounded once" is the exact result, rounded to the dtype: no result in that dtype
has a smaller error.

Each library runs in a process of its own, and its results come back in a file. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _cases import CAP, Arrays, Case, jax_results
from _cpu_cases import (
    CASES,
    HEADS,
    CannotError,
    Job,
    attnax_attention,
    dense_bias,
    flex_attention,
    jax_nn_attention,
    sdpa_attention,
)

DTYPES = ("float32", "bfloat16", "float16")
# In the order of the columns: the side of each library, and whether it runs in PyTorch's environment.
LIBRARIES = {
    "Attnax flash": ("flash", False),
    "Attnax standard": ("standard", False),
    "jax.nn": ("jax.nn", False),
    "flax.nnx, dropout": ("flax.nnx", False),
    "torch SDPA": ("sdpa", True),
    "torch FlexAttention": ("flex", True),
}
FLASH, STANDARD, FLEX = "Attnax flash", "Attnax standard", "torch FlexAttention"
NO_GRADIENTS = "none on a CPU"  # of FlexAttention
FLOOR = "rounded once"
RESULTS = ("output", "query", "key", "value")  # the last three are gradients
COMPARED = ("full", "causal", "alibi", "soft-cap")  # cases that `exact` and all libraries have, or refuse in words
SMALL = 256  # the length of the cases with an array as a mask
LOST, HIDDEN = 3, 5  # the query without keys, and the number of hidden keys at the end


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs, a mask and a change of the scores.

    Attributes:
        case: "full", "causal", "alibi" or "soft-cap" of `_cpu_cases.CASES`.
        query_scale, key_scale: factors of unit normal arrays.
        key_mean: added to every number of every key.
        mask: "lost query" or "hidden keys", an array (T, S); of the case "full".
        spoiled: the input whose last `HIDDEN` rows are NaN.

    Raises:
        ValueError: another case, ALiBi with another number of heads, or a mask beside that of the case.
    """

    case: str
    length: int = 1024
    heads: int = HEADS
    query_scale: float = 1.0
    key_scale: float = 1.0
    key_mean: float = 0.0
    mask: str = ""
    spoiled: str = ""

    def __post_init__(self) -> None:
        if self.case not in COMPARED:
            raise ValueError(f"Problem: case must be one of {', '.join(COMPARED)}; got case={self.case!r}.")
        if self.case == "alibi" and self.heads != HEADS:
            raise ValueError(f"Problem: ALiBi has slopes for {HEADS} heads; got heads={self.heads}.")
        if self.mask and self.case != "full":
            raise ValueError(f'Problem: a mask needs the case "full"; got case={self.case!r}, mask={self.mask!r}.')

    @property
    def job(self) -> Job:
        return Job(self.case, True, self.length, self.heads)

    def arrays(self, dtype: str) -> list[np.ndarray]:
        """Query, key, value and the cotangent: numbers of `dtype`, stored in float32."""
        query, key, value, cotangent = self.job.arrays()
        arrays = [self.query_scale * query, self.key_scale * key + self.key_mean, value, cotangent]
        arrays = [_rounded(x, dtype) for x in arrays]
        if self.spoiled:
            arrays[RESULTS.index(self.spoiled) - 1][:, :, -HIDDEN:] = np.nan
        return arrays

    def keep(self) -> np.ndarray:
        """The mask as an array (T, S)."""
        query, key = np.indices((self.length, self.length), np.int32, sparse=True)
        if self.mask == "lost query":
            return np.array((key <= query) & (query != LOST))
        if self.mask == "hidden keys":
            return np.array((key < self.length - HIDDEN) & (query >= 0))
        keep = CASES[self.case].keep
        return np.ones((self.length,) * 2, bool) if keep is None else np.array(keep(0, 0, query, key, {}))


PROBLEMS = {
    "causal, 1024 tokens": Problem("causal"),
    "no mask, 4096 tokens": Problem("full", length=4096, heads=2),
    "causal, queries times 8": Problem("causal", query_scale=8.0),
    "causal, keys of mean 10": Problem("causal", key_mean=10.0),
    "causal, ALiBi": Problem("alibi"),
    "causal, queries times 8, soft cap": Problem("soft-cap", query_scale=8.0),
}
# In words: a problem, the dtype, and the results that the cell is about.
LOST_QUERY = Problem("full", SMALL, mask="lost query")
NAN_KEYS = Problem("full", SMALL, mask="hidden keys", spoiled="key")
NAN_VALUES = Problem("full", SMALL, mask="hidden keys", spoiled="value")
QUESTIONS = {
    "a query without keys: its output": (LOST_QUERY, "float32", "lost output"),
    "a query without keys: all gradients": (LOST_QUERY, "float32", "gradients"),
    "NaN in hidden keys: output": (NAN_KEYS, "float32", "output"),
    "NaN in hidden keys: gradients": (NAN_KEYS, "float32", "gradients"),
    "NaN in hidden values: output": (NAN_VALUES, "float32", "output"),
    "NaN in hidden values: gradients": (NAN_VALUES, "float32", "gradients"),
    "scores beyond the range of float16: output": (
        Problem("full", SMALL, query_scale=128.0, key_scale=128.0),
        "float16",
        "output",
    ),
}


def _rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of `dtype`, in float32."""
    import ml_dtypes

    return np.asarray(array).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)


def exact(problem: Problem, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """softmax(scores) @ value and its gradients of query, key and value, in float64; NaN in the inputs counts as 0.

    A query without keys has an output and a gradient of 0.
    """
    inputs = [np.nan_to_num(x.astype(np.float64)) for x in arrays]
    results = [np.zeros_like(inputs[0]) for _ in RESULTS]
    case, keep, index = CASES[problem.case], problem.keep(), np.arange(problem.length)
    scale = inputs[0].shape[-1] ** -0.5
    for head in range(problem.heads):
        query, key, value, cotangent = (x[0, head] for x in inputs)
        out, *gradients = (x[0, head] for x in results)
        scores = scale * query @ key.T
        if case.change is not None:
            scores = case.change(scores, 0, head, index[:, None], index, problem.job.extra, np)
        slope = 1 - (scores / CAP) ** 2 if problem.case == "soft-cap" else 1.0  # of the change
        scores = np.where(keep, scores, -np.inf)
        greatest = scores.max(1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(greatest), greatest, 0))
        sums = weights.sum(1, keepdims=True)
        weights /= np.where(sums == 0, 1, sums)
        out[:] = weights @ value
        of_weights = cotangent @ value.T
        of_scores = scale * slope * weights * (of_weights - (weights * of_weights).sum(1, keepdims=True))
        gradients[0][:], gradients[1][:] = of_scores @ key, of_scores.T @ query
        gradients[2][:] = weights.T @ cotangent
    return results


def flax_attention(problem: Problem) -> Callable[..., Any]:
    """flax.nnx as a layer with dropout calls it in evaluation; without dropout it calls jax.nn."""
    from flax import nnx

    if problem.case == "soft-cap":
        raise CannotError("no score mods")
    causal = problem.case in ("causal", "alibi")

    def attend(query: Any, key: Any, value: Any, extra: Arrays) -> Any:
        return nnx.dot_product_attention(
            query,
            key,
            value,
            bias=extra.get("bias"),
            mask=extra.get("mask"),
            is_causal=causal,
            dropout_rate=0.1,
            deterministic=True,
        )

    return attend


def kernel_results(side: str, problem: Problem, dtype: str) -> list[np.ndarray]:
    """The results of a kernel of Attnax."""
    from attnax import flash_attention, standard_attention

    kernel = flash_attention if side == "flash" else standard_attention
    attend = attnax_attention(problem.case, kernel)
    if problem.mask:
        mask = problem.keep()

        def attend(query: Any, key: Any, value: Any, extra: Arrays) -> Any:
            return kernel(query, key, value, mask=mask)

    return _jax_results(attend, problem.arrays(dtype), dtype, {})


def function_results(side: str, problem: Problem, dtype: str) -> list[np.ndarray]:
    """The results of a function of another library in JAX, whose arrays are (B, T, N, H)."""
    attend = jax_nn_attention(problem.case) if side == "jax.nn" else flax_attention(problem)
    extra: Arrays = {}
    if problem.mask:
        extra["mask"] = problem.keep()[None, None]
    elif problem.case == "alibi":
        extra["bias"] = dense_bias(problem.job, problem.job.extra)
    arrays = [np.swapaxes(x, 1, 2) for x in problem.arrays(dtype)]
    return [np.swapaxes(x, 1, 2) for x in _jax_results(attend, arrays, dtype, extra)]


def _jax_results(
    attend: Callable[..., Any], arrays: Sequence[np.ndarray], dtype: str, extra: Arrays
) -> list[np.ndarray]:
    import jax
    import jax.numpy as jnp

    run = jax.jit(jax_results(attend, backward=True))
    return [np.asarray(x, np.float32) for x in run(*(jnp.asarray(x, dtype) for x in arrays), extra)]


def torch_results(side: str, problem: Problem, dtype: str) -> list[np.ndarray]:
    """The results of a function of PyTorch; FlexAttention has no backward on a CPU, so the output alone."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value, cotangent = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in problem.arrays(dtype))
    extra = {name: torch.from_numpy(x) for name, x in problem.job.extra.items()}
    keep = torch.from_numpy(problem.keep())
    if side == "flex":
        masked = Case(problem.mask, keep=lambda b, h, q, kv, extra: keep[q, kv])
        attend = flex_attention(masked if problem.mask else CASES[problem.case], problem.length, extra)
        with torch.no_grad():
            return [attend(query, key, value).float().numpy()]
    if problem.mask:
        attend = functools.partial(scaled_dot_product_attention, attn_mask=keep)
    else:
        attend = sdpa_attention(problem.job, extra)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = attend(*inputs)
    return [x.detach().float().numpy() for x in (out, *torch.autograd.grad(out, inputs, cotangent))]


def run_side(library: str) -> None:
    """Writes the results of each problem into the file that is asked for, or gives the reason why there are none."""
    from _pairs import serve_cases

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers would run on after compilation
    side, torch = LIBRARIES[library]
    compute = torch_results if torch else kernel_results if side in ("flash", "standard") else function_results

    def prepare(line: dict[str, Any]) -> tuple[None, dict[str, Any]]:
        problem = Problem(**line["problem"])
        try:
            results = compute(side, problem, line["dtype"])
        except CannotError as reason:
            return None, {"reason": str(reason)}
        except ValueError as error:  # of jax.nn on the CPU, in float16
            if "not supported" not in str(error):
                raise
            return None, {"reason": "refused", "words": str(error)}
        np.savez(line["file"], *results)
        return None, {}

    serve_cases(prepare)


def errors(have: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """The root mean square of the difference and the largest one, relative to the root mean square of `want`."""
    size, difference = np.sqrt(np.mean(np.square(want))), have - want
    return float(np.sqrt(np.mean(np.square(difference))) / size), float(np.abs(difference).max() / size)


def error_cell(have: Sequence[np.ndarray] | str, want: Sequence[np.ndarray], results: Sequence[int]) -> str:
    """The errors of the worst of some results, or the reason why there are none."""
    if isinstance(have, str):
        return have
    pairs = [errors(have[index], want[index]) for index in results]
    mean, largest = (max(values) for values in zip(*pairs, strict=True))
    return f"{mean:.1e} ({largest:.1e})"


def answer(about: str, have: Sequence[np.ndarray], want: Sequence[np.ndarray], value: np.ndarray) -> str:
    """What a library gives, in a word or two."""
    if about == "lost output":
        row = have[0][:, :, LOST]
        if np.isnan(row).any():
            return "NaN"
        if (row == 0).all():
            return "0"
        return "mean of all values" if np.allclose(row, value.mean(2), atol=1e-5) else "other numbers"
    if about == "gradients" and len(have) == 1:
        return NO_GRADIENTS
    chosen = [0] if about == "output" else [1, 2, 3]
    share = np.mean([np.isnan(have[index]).mean() for index in chosen])
    if share:
        return f"NaN ({share:.0%})" if share >= 0.01 else "NaN (below 1%)"
    error = max(errors(have[index], want[index])[0] for index in chosen)
    return "right" if error < 1e-3 else f"error of {error:.1e}"


def measured(
    ask: Callable[[str, Problem, str], list[np.ndarray] | str], libraries: Sequence[str]
) -> dict[str, list[list[str]]]:
    """The tables by their headings; `ask` gives a library's results of a problem in a dtype, or a reason in words."""
    tables: dict[str, list[list[str]]] = {}
    others = [name for name in libraries if name != FLEX]
    for dtype in DTYPES:
        output = tables[f"{dtype}, output"] = [["case", *libraries, FLOOR]]
        gradients = tables[f"{dtype}, gradients"] = [["case", *others, FLOOR]]
        for words, problem in PROBLEMS.items():
            want = exact(problem, problem.arrays(dtype))
            found = {library: ask(library, problem, dtype) for library in libraries}
            found[FLOOR] = [_rounded(x, dtype) for x in want]
            for table, results in ((output, [0]), (gradients, [1, 2, 3])):
                table.append([words, *(error_cell(found[name], want, results) for name in table[0][1:])])
                print(dtype, *table[-1], sep="  ", flush=True)
    rows = tables["Hidden NaN and empty rows"] = [["case", *libraries]]
    for words, (problem, dtype, about) in QUESTIONS.items():
        arrays = problem.arrays(dtype)
        want = exact(problem, arrays)
        given = [ask(library, problem, dtype) for library in libraries]
        rows.append([words, *(x if isinstance(x, str) else answer(about, x, want, arrays[2]) for x in given)])
        print(*rows[-1], sep="  ", flush=True)
    return tables


def section(tables: dict[str, list[list[str]]]) -> str:
    """The tables and their bars."""
    from _pages import bars, markdown_table

    parts = []
    for heading, table in tables.items():
        parts += [f"## {heading}", markdown_table(table)]
        libraries = [name for name in table[0][1:] if name != FLOOR]
        if FLOOR in table[0]:
            parts.append(bars(*libraries, unit="relative error, less is better", scale="log"))
    return "\n\n".join(parts)


def _mean(cell: str) -> float | None:
    """The first number of a cell; None for words."""
    return float(cell.partition(" ")[0]) if cell[:1].isdigit() else None


def summary(tables: dict[str, list[list[str]]]) -> str:
    """Two tables: the greatest errors of each library, and where one is more exact than `flash_attention`."""
    from _pages import markdown_table

    compared = {heading: table for heading, table in tables.items() if FLOOR in table[0]}
    names = next(iter(compared.values()))[0][1:]
    greatest = [["dtype and result", *names]]
    closer = [["dtype and result", "case", FLASH, "more exact"]]
    for heading, (header, *rows) in compared.items():
        cells: list[str] = []
        for name in names:
            column = [row[header.index(name)] for row in rows] if name in header else [NO_GRADIENTS]
            errors_of = [error for cell in column if (error := _mean(cell)) is not None]
            cells.append(f"{max(errors_of):.1e}" if errors_of else column[0])
        greatest.append([heading, *cells])
        for row in rows:
            have = dict(zip(header, row, strict=True))
            ours = _mean(have[FLASH])
            assert ours is not None
            errors_in = {name: _mean(have[name]) for name in header[1:] if name not in (FLASH, STANDARD, FLOOR)}
            less = [f"{name} {error:.1e}" for name, error in errors_in.items() if error is not None and error < ours]
            if less:
                closer.append([heading, row[0], f"{ours:.1e}", "; ".join(less)])
    parts = [
        markdown_table(greatest),
        "**Every case in which another library is more exact than `flash_attention`**:",
        markdown_table(closer),
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--summary", type=Path, help="also write the greatest errors, and who is more exact, here")
    options = parser.parse_args(arguments)
    if options.side:
        run_side(options.side)
        return
    from _machine import this_machine
    from _pages import write_section
    from _pairs import peer_version, side_command, started

    refusals: dict[tuple[str, str], str] = {}
    commands = {name: side_command(__file__, name, torch=torch) for name, (_, torch) in LIBRARIES.items()}
    with started(commands) as sides, tempfile.TemporaryDirectory() as folder:

        def ask(library: str, problem: Problem, dtype: str) -> list[np.ndarray] | str:
            file = Path(folder, "results.npz")
            line = {"problem": dataclasses.asdict(problem), "dtype": dtype, "file": str(file)}
            about = sides[library].ask(json.dumps(line))
            if "words" in about:
                refusals[library, dtype] = about["words"]
            if "reason" in about:
                return str(about["reason"])
            with np.load(file) as results:
                return [x.astype(np.float64) for x in results.values()]

        tables = measured(ask, list(LIBRARIES))
    machine, torch = this_machine({}), peer_version("torch")
    versions = f"jax {version('jax')}, flax {version('flax')}, torch {torch}, NumPy {version('numpy')}"
    words = [f'Refused: {library} in {dtype}, with "{said}".' for (library, dtype), said in refusals.items()]
    text = "\n\n".join([f"{machine.instructions}; {versions}", section(tables), *words])
    print(f"\n{text}\n\n{summary(tables)}")
    if options.markdown:
        write_section(options.markdown, "make bench-accuracy", text)
    if options.summary:
        write_section(options.summary, "make bench-accuracy", summary(tables))


if __name__ == "__main__":
    main()
