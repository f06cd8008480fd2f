"""A mixture of experts beside computing every expert: forward + backward on the CPU, compiled, in turns.

    python benchmarks/moe.py

All sides have the same weights and the same routing. `sparse` is `MixtureOfExperts`. `dense` computes all experts for
all tokens and weighs them: as one product over the experts, or one expert after the other (the faster one counts).
`ideal` is one dense feed-forward as wide as the chosen experts together: the same number of products, and no routing.
Decoding is one token, forward only. "Of peak" is the share of a median that the products of the chosen experts and of
the router would take at the peak, on every side. One token has none: its time is that of reading weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _flops import linear_flops, share
from _machine import measure
from flax import nnx

from attnax.nn.feedforward import FeedForward
from attnax.nn.moe import MixtureOfExperts

Step = Callable[..., Any]
WIDTH, TOKENS, TOP_K = 512, 2048, 2
EXPERTS = {8: 2048, 64: 256}  # number: hidden width


def functional(module: nnx.Module) -> tuple[Step, Any]:
    """The module as (function of its parameters and x, parameters)."""
    graphdef, params = nnx.split(module, nnx.Param)
    return lambda params, x: nnx.merge(graphdef, params)(x), params


def weights_of(params: Any, x: jax.Array) -> jax.Array:
    """The weight of each expert for each token (tokens, experts); 0 for experts that are not chosen."""
    chosen, experts = jax.lax.top_k(x @ params["router"][...], TOP_K)
    one_hot = jax.nn.one_hot(experts, params["up"].shape[0])
    return (jax.nn.softmax(chosen)[..., None] * one_hot).sum(1)


def dense_at_once(params: Any, x: jax.Array) -> jax.Array:
    up, gate, down = (params[name][...] for name in ("up", "gate", "down"))
    hidden = jax.nn.silu(jnp.einsum("MD,EDF->EMF", x, gate)) * jnp.einsum("MD,EDF->EMF", x, up)
    outs = jnp.einsum("EMF,EFD->EMD", hidden, down)
    return (weights_of(params, x).T[..., None] * outs).sum(0)


def dense_in_turn(params: Any, x: jax.Array) -> jax.Array:
    weights, out = weights_of(params, x), jnp.zeros_like(x)
    up, gate, down = (params[name][...] for name in ("up", "gate", "down"))
    for e in range(up.shape[0]):
        out = out + weights[:, e, None] * ((jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return out


def training_step(run: Step) -> Step:
    return jax.jit(jax.grad(lambda params, x: (run(params, x) ** 2).sum(), (0, 1)))


def seconds(step: Step, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


def take_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round of each side; the first round compiles and does not count."""
    times = [{name: 1000 * seconds(side) for name, side in sides.items()} for _ in range(rounds + 1)]
    return {name: [round_[name] for round_ in times[1:]] for name in sides}


def flops(num_experts: int, hidden: int) -> float:
    """The operations of the products of a training step."""
    return linear_flops(TOP_K * 3 * WIDTH * hidden + WIDTH * num_experts, TOKENS, backward=True)


def report(title: str, times: dict[str, list[float]], of_peak: Callable[[float], str] | None = None) -> None:
    """Prints a table; `of_peak` is the share of some seconds."""
    columns = f"{'min ms':>10}{'median ms':>11}{'ratio of mins':>15}{'of medians':>12}"
    print(f"{title:34}{columns}{'' if of_peak is None else '  of peak'}")
    for name, values in times.items():
        least, middle = (f(values) / f(times["sparse"]) for f in (min, statistics.median))
        part = "" if of_peak is None else f"{of_peak(statistics.median(values) / 1e3):>9}"
        print(f"  {name:32}{min(values):10.1f}{statistics.median(values):11.1f}{least:14.2f}x{middle:11.2f}x{part}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    machine = measure()  # before JAX starts its threads, one for each core that was measured
    print(f"{machine.line}; jax {jax.__version__}, {TOKENS} tokens, d_model {WIDTH}, top {TOP_K}, float32, swiglu")
    for num_experts, hidden in EXPERTS.items():
        common: dict[str, Any] = {"d_model": WIDTH, "ff_activation": "swiglu", "use_bias": False}
        sparse, params = functional(
            MixtureOfExperts(nnx.Rngs(0), d_ff=hidden, num_experts=num_experts, top_k=TOP_K, **common)
        )
        ideal, ideal_params = functional(FeedForward(nnx.Rngs(0), d_ff=TOP_K * hidden, **common))
        x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
        steps = {
            "sparse": (training_step(lambda params, x, run=sparse: run(params, x)[0]), params),
            "dense, at once": (training_step(dense_at_once), params),
            "dense, in turn": (training_step(dense_in_turn), params),
            "ideal": (training_step(ideal), ideal_params),
        }
        times = take_turns({name: partial(step, tree, x) for name, (step, tree) in steps.items()}, rounds)
        needed = flops(num_experts, hidden)
        report(f"{num_experts} experts of {hidden}, training", times, partial(share, needed, peak=machine.peak))
        steps = {
            "sparse": (jax.jit(sparse), params),
            "dense, at once": (jax.jit(dense_at_once), params),
            "ideal": (jax.jit(ideal), ideal_params),
        }
        times = take_turns({name: partial(step, tree, x[:1]) for name, (step, tree) in steps.items()}, 20 * rounds)
        report(f"{num_experts} experts of {hidden}, one token", times)


if __name__ == "__main__":
    main()
