"""Generation beside Hugging Face transformers, and the time and memory of each cache.

    python benchmarks/decode.py                  # needs torch and transformers; `make bench-decode` installs them
    python benchmarks/decode.py --parts steps    # one of the three parts
    python benchmarks/decode.py --quick          # tiny sizes, to check that everything runs

Both sides have the shape of GPT-2 (12 layers, d_model 768, 12 heads, feed-forward 3072, tanh GELU, learned positions,
tied embeddings) with a vocabulary of 8192, random weights, float32, and run in turns in processes of their own.
PyTorch's model is GPT2LMHeadModel with its defaults: eager, scaled_dot_product_attention, DynamicCache.

- `generate`: greedy, whole calls, with the time to read the prompt.
- `steps`: decode steps after tokens that are written into the cache directly.
- `storage`: 8-bit keys and values, and the ring of a window: speed, error, bytes.

"Of peak" is the share of a median that the products would take at the peak. A step of one token is mostly the time to
read weights and caches, so its share is small.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _flops import attention_flops, linear_flops, share
from _pages import bars

Prepared = tuple[Callable[[], Any] | None, dict[str, Any]]

SIZE = {"layers": 12, "width": 768, "heads": 12, "hidden": 3072, "vocabulary": 8192, "positions": 4096}
SMALL = {"layers": 2, "width": 64, "heads": 4, "hidden": 128, "vocabulary": 512, "positions": 256}
HUGGING_FACE, CONTIGUOUS, PAGED, INT8 = "transformers", "contiguous", "paged", "int8"
STEPS = 16  # decode steps of one call in the second part
WINDOW = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes to measure."""

    size: dict[str, int]
    prompt: int
    new: int
    batches: tuple[int, ...]
    step_batches: tuple[int, ...]
    filled: tuple[int, ...]  # tokens in the largest cache
    capacities: tuple[int, ...]  # of caches that hold filled[0] tokens


FULL = Plan(SIZE, 64, 64, (1, 8, 32), (1, 8), (128, 512, 1024, 2048, 4000), (144, 1024, 4096))
QUICK = Plan(SMALL, 8, 8, (1, 2), (1, 2), (32, 128), (48, 256))


def flops(case: dict[str, Any]) -> float:
    """The operations of the products of a call."""
    size, batch = case["size"], case["batch"]
    layers, width, hidden = size["layers"], size["width"], size["hidden"]
    before = case.get("filled", 0)
    # The last token that is written is not read; the prompt's logits are needed after its last token only.
    tokens, logits = (STEPS, STEPS) if case["work"] == "steps" else (case["prompt"] + case["new"] - 1, case["new"])
    pairs = before * tokens + tokens * (tokens + 1) // 2
    return batch * (
        linear_flops(layers * (4 * width**2 + 2 * width * hidden), tokens)
        + linear_flops(width * size["vocabulary"], logits)
        + attention_flops(layers * size["heads"] * pairs, width // size["heads"])
    )


# Attnax's side.


@functools.cache
def attnax_model(**size: int) -> Any:
    from flax import nnx

    import attnax

    return attnax.TransformerLM(nnx.Rngs(0), attnax_config(**size))


def attnax_config(*, window: int | None = None, **size: int) -> Any:
    import attnax

    return attnax.TransformerConfig(
        vocab_size=size["vocabulary"],
        d_model=size["width"],
        num_heads=size["heads"],
        num_layers=size["layers"],
        d_ff=size["hidden"],
        max_len=size["positions"],
        ff_activation="gelu_tanh",
        pos_emb_type="learned",
        tie_embeddings=True,
        dropout_rate=0.0,
        attention_window=window,
    )


def attnax_case(case: dict[str, Any], side: str) -> Prepared:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from attnax.cache import init_decoder_kv_caches_from_config
    from attnax.paged_cache import init_paged_kv_caches_from_config

    kind: Any = PAGED if side == PAGED else CONTIGUOUS
    dtype, batch = "int8" if side == INT8 else "float32", case["batch"]
    if case["work"] == "bytes":
        config = attnax_config(**case["size"], window=case["window"])
        init = functools.partial(init_decoder_kv_caches_from_config, config)
        cache = jax.eval_shape(lambda: init(batch_size=batch, max_len=case["capacity"], dtype=dtype))
        return None, {"bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))}
    model = attnax_model(**case["size"])
    if case["work"] == "errors":
        ids = jax.random.randint(
            jax.random.key(2), (batch, case["prompt"] + case["new"]), 0, case["size"]["vocabulary"]
        )
        exact, stored = (forced_log_probs(model, ids, case["prompt"], dtype) for dtype in ("float32", "int8"))
        error = jnp.abs(exact - stored)
        return None, {"max": float(error.max()), "rms": float(jnp.sqrt(jnp.square(error).mean()))}
    if case["work"] == "generate":
        ids = jax.random.randint(jax.random.key(1), (batch, case["prompt"]), 0, case["size"]["vocabulary"])
        options: dict[str, Any] = {"max_new_tokens": case["new"], "cache": kind, "cache_dtype": dtype}
        return (lambda: jax.block_until_ready(model.generate(ids, **options))), {}

    inits: dict[Any, Any] = {PAGED: init_paged_kv_caches_from_config, CONTIGUOUS: init_decoder_kv_caches_from_config}
    sizes = {"batch_size": batch, "max_len": case["capacity"], "dtype": dtype}
    layers = jax.eval_shape(lambda: inits[kind](model.config, **sizes))
    held = tuple(noise_cache(layer, seed) for seed, layer in enumerate(layers))
    state, filled = nnx.split(model)[1], jnp.int32(case["filled"])
    ids = jnp.zeros((batch, 1), jnp.int32)

    begin, step = step_of(model)

    def work() -> None:
        nonlocal held
        tokens, held, finite = ids, begin(held, filled), []
        for index in range(STEPS):
            tokens, held, is_finite = step(state, held, tokens, np.int32(case["filled"] + index))
            finite.append(is_finite)
        assert all(finite), "the cache has overflowed"

    return work, {}


@functools.cache
def step_of(model: Any) -> tuple[Any, Any]:
    """The caches with their first tokens, and a greedy step, as programs; both donate the caches.

    A step is a program, as in `stream`: XLA compiled a loop of steps as one function, without the threads of its
    products.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graphdef = nnx.split(model)[0]

    def begin(cache: Any, filled: Any) -> Any:
        return tuple(holding(layer, filled) for layer in cache)

    def step(state: Any, cache: Any, ids: Any, position: Any) -> tuple[Any, Any, Any]:
        out = nnx.merge(graphdef, state).run(ids, position_ids=position[None], caches=cache, deterministic=True)
        return out.logits.argmax(-1), out.caches, jnp.isfinite(out.logits).all()

    return jax.jit(begin, donate_argnums=0), jax.jit(step, donate_argnums=1)


def noise_cache(layer: Any, seed: int) -> Any:
    """The cache of one layer with numbers in every slot; `layer` gives shapes and dtypes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from attnax.int8_rows import encode_rows

    rng = np.random.default_rng(seed)

    def noise(rows: Any) -> Any:  # the same in every row or page, because drawing takes long
        return encode_rows(jnp.broadcast_to(rng.standard_normal(rows.shape[1:], np.float32), rows.shape), rows)

    names = ("key_pool", "value_pool") if hasattr(layer, "key_pool") else ("keys", "values")
    rows = {name: noise(getattr(layer, name)) for name in names}
    empty = dataclasses.replace(layer, **dict.fromkeys(names))
    return dataclasses.replace(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty), **rows)


def holding(layer: Any, filled: Any) -> Any:
    """The cache with exactly its first `filled` slots in use."""
    import jax.numpy as jnp

    clean = dataclasses.replace(layer, overflowed=jnp.zeros_like(layer.overflowed))
    if not hasattr(layer, "block_table"):
        slots = jnp.arange(layer.max_len)
        positions = jnp.broadcast_to(jnp.where(slots < filled, slots, -1), layer.positions.shape)
        return dataclasses.replace(clean, length=filled, positions=positions)
    column = jnp.arange(layer.block_table.shape[1])
    blocks = jnp.arange(layer.block_table.size).reshape(layer.block_table.shape)
    table = jnp.where(column < -(-filled // layer.block_size), blocks, -1)
    return dataclasses.replace(clean, block_table=table, seq_lengths=jnp.full_like(layer.seq_lengths, filled))


def forced_log_probs(model: Any, ids: Any, prompt: int, dtype: str) -> Any:
    """Log-probabilities (T - prompt, B, V) of the next token after each token of `ids` (B, T) from index `prompt` on.

    The tokens after the prompt are read one at a time, as in generation.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnax.cache import init_decoder_kv_caches_from_config

    graphdef, state = nnx.split(model)

    @jax.jit
    def read(state: Any, ids: Any) -> Any:
        def step(cache: Any, ids: Any) -> tuple[Any, Any]:
            out = nnx.merge(graphdef, state).run(ids, caches=cache, deterministic=True)
            return out.caches, jax.nn.log_softmax(out.logits[:, -1])

        cache = init_decoder_kv_caches_from_config(
            model.config, batch_size=ids.shape[0], max_len=ids.shape[1], dtype=dtype
        )
        cache, _ = step(cache, ids[:, :prompt])
        return jax.lax.scan(step, cache, ids[:, prompt:].T[..., None])[1]

    return read(state, jnp.asarray(ids))


# PyTorch's side.


@functools.cache
def torch_model(**size: int) -> Any:
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    transformers: Any = importlib.import_module("transformers")  # as Any, or mypy reads all of transformers
    config = transformers.GPT2Config(
        vocab_size=size["vocabulary"],
        n_positions=size["positions"],
        n_embd=size["width"],
        n_layer=size["layers"],
        n_head=size["heads"],
        n_inner=size["hidden"],
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def torch_case(case: dict[str, Any]) -> Prepared:
    import torch

    transformers: Any = importlib.import_module("transformers")
    model, size, batch = torch_model(**case["size"]), case["size"], case["batch"]
    if case["work"] == "generate":
        ids = torch.randint(0, size["vocabulary"], (batch, case["prompt"]))
        new: dict[str, Any] = {"min_new_tokens": case["new"], "max_new_tokens": case["new"]}

        def write() -> None:
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **new)
            assert out.shape == (batch, case["prompt"] + case["new"])

        return write, {}
    cache = transformers.DynamicCache(config=model.config)
    for layer in range(size["layers"]):
        rows = torch.randn(2, 1, size["heads"], case["filled"], size["width"] // size["heads"])
        cache.update(*(x.repeat(batch, 1, 1, 1) for x in rows), layer)

    def step() -> None:
        with torch.inference_mode():
            ids = torch.zeros(batch, 1, dtype=torch.long)
            for _ in range(STEPS):
                ids = model(input_ids=ids, cache=cache, use_cache=True).logits.argmax(-1)
            cache.crop(-STEPS)

    return step, {}


# The tables.


def measure(names: tuple[str, ...], cases: list[dict[str, Any]], rounds: int) -> list[dict[str, list[float]]]:
    """Seconds of each round of each side, for every case."""
    from _pairs import side_command, started, take_turns

    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "HF_HUB_OFFLINE": "1"}
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    seconds = []
    with started(
        {name: side_command(__file__, name, torch=name == HUGGING_FACE) for name in names}, environment
    ) as sides:
        for case in cases:
            for side in sides.values():
                side.ask(json.dumps(case))
            seconds.append(take_turns(sides, rounds))
            medians = ", ".join(f"{name} {statistics.median(values):.4f}" for name, values in seconds[-1].items())
            shown = {name: value for name, value in case.items() if name != "size"}
            print(f"{shown}: {medians} s", flush=True)
    return seconds


def ask(case: dict[str, Any], side: str = CONTIGUOUS) -> dict[str, Any]:
    """A side's facts about a case that is not timed."""
    from _pairs import side_command, started

    with started({side: side_command(__file__, side)}) as sides:
        return sides[side].ask(json.dumps(case))


def milliseconds(values: list[float], parts: int = 1) -> str:
    return f"{1e3 * statistics.median(values) / parts:.1f} ({1e3 * min(values) / parts:.1f})"


def rate(values: list[float], tokens: int) -> str:
    return f"{tokens / statistics.median(values):.1f} ({tokens / min(values):.1f})"


def ratio(seconds: dict[str, list[float]], name: str, reference: str = HUGGING_FACE) -> str:
    """How many times faster `name` is."""
    return f"{statistics.median(seconds[reference]) / statistics.median(seconds[name]):.2f}x"


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def with_share(names: tuple[str, ...]) -> list[str]:
    return [column for name in names for column in (name, "of peak")]


def shared(shown: str, case: dict[str, Any], values: list[float], peak: float) -> tuple[str, str]:
    """The cells of a side: a figure, and the share of its median that the products would take at the peak."""
    return shown, share(flops(case), statistics.median(values), peak)


def generate_tables(plan: Plan, rounds: int, peak: float) -> list[str]:
    names = (CONTIGUOUS, PAGED, HUGGING_FACE)
    common: dict[str, Any] = {"work": "generate", "size": plan.size, "prompt": plan.prompt}
    lengths = list(itertools.product(plan.batches, (plan.new, 1)))
    cases = [common | {"batch": batch, "new": new} for batch, new in lengths]
    measured = list(zip(cases, measure(names, cases, rounds), strict=True))
    ratios = [f"{name} / {HUGGING_FACE}" for name in names[:2]]
    lines = [f"Greedy, {plan.prompt} tokens of prompt and {plan.new} new tokens, tokens a second of whole calls.", ""]
    columns = head("batch", *with_share(names), *ratios)
    ours = f"{CONTIGUOUS}, {PAGED}"
    lines += columns
    for case, times in measured[::2]:
        cells = [shared(rate(times[name], case["batch"] * plan.new), case, times[name], peak) for name in names]
        lines.append(row(case["batch"], *itertools.chain(*cells), *(ratio(times, name) for name in names[:2])))
    lines += ["", bars(*names, attnax=ours, unit="tokens a second, more is better")]
    lines += ["", f"Time to the first token, {plan.prompt} tokens of prompt, ms.", "", *columns]
    for case, times in measured[1::2]:
        cells = [shared(milliseconds(times[name]), case, times[name], peak) for name in names]
        lines.append(row(case["batch"], *itertools.chain(*cells), *(ratio(times, name) for name in names[:2])))
    return [*lines, "", bars(*names, attnax=ours, unit="ms, less is better", scale="own")]


def steps_tables(plan: Plan, rounds: int, peak: float) -> list[str]:
    names = (CONTIGUOUS, PAGED, HUGGING_FACE)
    largest = max(plan.capacities)
    places = [(capacity, plan.filled[0]) for capacity in plan.capacities]
    places += [(largest, filled) for filled in plan.filled[1:]]
    cases = [
        {"work": "steps", "size": plan.size, "batch": batch, "capacity": capacity, "filled": filled}
        for batch in plan.step_batches
        for capacity, filled in places
    ]
    lines = [
        f"A decode step, ms, mean of {STEPS} steps after the tokens in the cache; {HUGGING_FACE} has no capacity.",
        "",
        *head(
            "batch",
            "capacity",
            "tokens in it",
            *with_share(names),
            *(f"{name} / {HUGGING_FACE}" for name in names[:2]),
        ),
    ]
    for case, times in zip(cases, measure(names, cases, rounds), strict=True):
        cells = [shared(milliseconds(times[name], STEPS), case, times[name], peak) for name in names]
        ratios = [ratio(times, name) for name in names[:2]]
        lines.append(row(case["batch"], case["capacity"], case["filled"], *itertools.chain(*cells), *ratios))
    labels, ours = "batch, capacity, tokens in it", f"{CONTIGUOUS}, {PAGED}"
    return [*lines, "", bars(*names, labels=labels, attnax=ours, unit="ms, less is better", scale="own")]


def storage_tables(plan: Plan, rounds: int, peak: float) -> list[str]:
    batch, capacity, names = plan.step_batches[-1], max(plan.capacities), (CONTIGUOUS, INT8)
    common: dict[str, Any] = {"size": plan.size, "batch": batch, "prompt": plan.prompt, "new": plan.new}
    full = {"work": "steps", "capacity": capacity, "filled": plan.filled[-1]}
    cases = [common | {"work": "generate"}, common | full]
    whole, steps = measure(names, cases, rounds)
    lines = [
        f"Keys and values in 8 bits, contiguous, batch {batch}.",
        "",
        *head("", *with_share(("float32", "int8")), "int8 / float32"),
        row(
            f"tokens a second, {plan.prompt} + {plan.new}",
            *itertools.chain(*(shared(rate(x, batch * plan.new), cases[0], x, peak) for x in whole.values())),
            ratio(whole, INT8, CONTIGUOUS),
        ),
        row(
            f"ms a step, {plan.filled[-1]} tokens in the cache",
            *itertools.chain(*(shared(milliseconds(x, STEPS), cases[1], x, peak) for x in steps.values())),
            ratio(steps, INT8, CONTIGUOUS),
        ),
    ]
    error = ask(common | {"work": "errors"})
    lines += [
        "",
        bars("float32", "int8", unit="tokens a second, or ms", scale="own", attnax="all"),
        "",
        f"Log-probabilities after each of {plan.new} forced tokens that follow a prompt of {plan.prompt}, random "
        f"weights, int8 against float32: largest difference {error['max']:.1e}, root mean square {error['rms']:.1e}.",
        "",
        f"Bytes of the caches of all layers, batch {batch}, {capacity} tokens, MiB.",
        "",
        *head("", "float32", "int8"),
    ]
    window = min(WINDOW, capacity // 4)
    for label, size in (("contiguous", None), (f"ring of attention_window={window}", window)):
        case = common | {"work": "bytes", "capacity": capacity, "window": size}
        lines.append(row(label, *(f"{ask(case, name)['bytes'] / 2**20:.1f}" for name in names)))
    return [*lines, "", bars("float32", "int8", unit="MiB, less is better", scale="own", attnax="all")]


PARTS = {"generate": generate_tables, "steps": steps_tables, "storage": storage_tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=[CONTIGUOUS, PAGED, INT8, HUGGING_FACE], help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a smoke test, no measurement")
    parser.add_argument("--markdown", type=Path, help="also write the tables here, by kind of machine")
    options = parser.parse_args()
    if options.side:
        from _pairs import serve_cases

        serve_cases(torch_case if options.side == HUGGING_FACE else lambda case: attnax_case(case, options.side))
        return
    plan, rounds = (QUICK, 1) if options.quick else (FULL, options.rounds)
    from _machine import measure as measure_machine
    from _pages import write_kind
    from _pairs import peer_version

    machine = measure_machine()
    peers = (f"{name} {peer_version(name)}" for name in ("torch", "transformers"))
    versions = ", ".join([f"jax {version('jax')}", *peers])
    lines = [
        f"{machine.line}; float32, {versions}; medians (of the fastest round)",
        "",
        f"`python benchmarks/decode.py`: {plan.size['layers']} layers, d_model {plan.size['width']}, vocabulary "
        f"{plan.size['vocabulary']}, random weights, {rounds} rounds. The sides are processes of their own, and take "
        "turns. transformers runs GPT2LMHeadModel, eager, with its DynamicCache. With a ratio above 1 Attnax is "
        'faster. "Of peak" is the share of the median that the products would take at the peak; a step is mostly the '
        "time to read weights and caches.",
    ]
    for part in options.parts:
        lines += ["", *PARTS[part](plan, rounds, machine.peak)]
    print("\n" + "\n".join(lines))
    if options.markdown:
        write_kind(options.markdown, "make bench-decode", machine.kind, "\n".join(lines))


if __name__ == "__main__":
    main()
