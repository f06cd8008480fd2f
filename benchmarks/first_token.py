"""The time until a first token, and the size of training programs.

    python benchmarks/first_token.py            # make bench-first-token

A decoder in the shape of GPT-2 (12 layers, d_model 768, vocabulary 50,257, random weights) writes its first token in a
process of its own: with nothing compiled before ("cold"), and with JAX's compilation cache filled by an earlier process
("cache"). The same process then reads prompts of two other lengths, one that is padded to the length of the first and
one that is not, and writes 64 tokens. Times are seconds. Tracing, lowering and XLA are durations of JAX's monitoring
events; nested events count once. The second table has the traced equations (those of an inner function count for each
call) and the compile time of a training step of the same layers, beside AttentionType.STANDARD. These are times of
Python and of compilers, so there is no share of the machine's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _machine import Machine, measure
from _pages import bars, markdown_table, write_kind

SHAPE: dict[str, Any] = {"vocab_size": 50257, "d_model": 768, "num_heads": 12, "num_layers": 12, "d_ff": 3072}
SHAPE["max_len"] = 2048
PROMPT, SAME, OTHER = 50, 61, 150  # lengths of prompts; the first two are padded to the same length, the third is not
NEW_TOKENS = 64
PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "XLA",
}


class Clock:
    """Seconds by phase, and the number of compiled programs, since the last reading."""

    def __init__(self) -> None:
        import jax

        self.spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.begun = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in PHASES:
            now = time.perf_counter()
            self.spans[PHASES[event]].append((now - duration_secs, now))

    def read(self) -> dict[str, float]:
        result = {phase: _covered(self.spans[phase]) for phase in PHASES.values()}
        result |= {"programs": len(self.spans["XLA"]), "all": time.perf_counter() - self.begun}
        self.spans.clear()
        self.begun = time.perf_counter()
        return result


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union: the span of a trace holds the spans of inner functions."""
    total, end = 0.0, float("-inf")
    for begin, finish in sorted(spans):
        total += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return total


def measure_tokens() -> dict[str, dict[str, float]]:
    """The first table's figures of one process; runs in a process of its own."""
    import jax
    import numpy as np
    from flax import nnx

    from attnax import TransformerLM

    model = jax.block_until_ready(TransformerLM(nnx.Rngs(0), **SHAPE))
    prompts = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, 512)).astype(np.int32)
    clock, result = Clock(), {}
    for name, length in (("first token", PROMPT), ("same padded length", SAME), ("longer padded length", OTHER)):
        next(model.stream(prompts[:, :length], max_new_tokens=NEW_TOKENS))
        result[name] = clock.read()
    jax.block_until_ready(model.generate(prompts[:, :PROMPT], max_new_tokens=NEW_TOKENS).tokens)
    result["64 tokens"] = clock.read()
    return result


def measure_step(attention_type: str, length: int) -> dict[str, float]:
    """A line of the second table; runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnax import TransformerLM

    model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), attention_type=attention_type, **SHAPE))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, others = states
    ids = jax.ShapeDtypeStruct((max(1, 512 // length), length), jnp.int32)

    def loss(params: Any, ids: Any) -> Any:
        return -nnx.merge(graphdef, params, others).log_probs(ids, deterministic=True)[..., 0].mean()

    clock = Clock()
    traced = jax.jit(jax.grad(loss)).trace(params, ids)
    traced.lower().compile()
    return clock.read() | {"equations": sum(1 for _ in equations(traced.jaxpr.jaxpr))}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations; those of an inner function for each call."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def run(*arguments: str, cache: str | None = None) -> Any:
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | settings
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def report(machine: Machine, rounds: int) -> str:
    """Both tables."""
    columns = ("tracing", "lowering", "XLA", "all")
    rows: list[tuple[str, ...]] = [("", *columns, "programs")]
    with tempfile.TemporaryDirectory() as folder:
        cold = [run("--side", "tokens") for _ in range(rounds)]
        run("--side", "tokens", cache=folder)
        cached = [run("--side", "tokens", cache=folder) for _ in range(rounds)]
    for kind, results in (("cold", cold), ("cache", cached)):
        for name in results[0]:
            seconds = medians([result[name] for result in results])
            cells = [f"{seconds[column]:.2f}" for column in columns]
            rows.append((f"{name}, {kind}", *cells, f"{seconds['programs']:.0f}"))
    drawn = bars(*columns, unit="s, less is better", attnax="all")
    tokens = markdown_table(rows)
    rows = [("training step", "equations", *columns)]
    for length in (64, 1024):
        for attention_type in ("standard", "flash"):
            step = medians([run("--side", attention_type, "--length", str(length)) for _ in range(rounds)])
            cells = [f"{step[column]:.2f}" for column in columns]
            rows.append((f"{attention_type}, T={length}", f"{step['equations']:.0f}", *cells))
    title = f"{machine.line}; jax {version('jax')}, Python {platform.python_version()}; medians of {rounds} processes"
    return f"{title}, in seconds.\n\n{tokens}\n\n{drawn}\n\n{markdown_table(rows)}\n\n{drawn}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds until a first token, by phase.")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind; the table has medians")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file, by kind of machine")
    parser.add_argument("--side", choices=("tokens", "standard", "flash"), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None:
        machine = measure()
        text = report(machine, arguments.rounds)
        print(text)
        if arguments.markdown is not None:
            write_kind(arguments.markdown, "make bench-first-token", machine.kind, text)
    elif arguments.side == "tokens":
        print(json.dumps(measure_tokens()))
    else:
        print(json.dumps(measure_step(arguments.side, arguments.length)))


if __name__ == "__main__":
    main()
