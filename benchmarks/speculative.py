"""The speed-up by a draft: a large and a small byte-level model are trained, and write the source of Python together.

    python benchmarks/speculative.py              # trains for a few minutes, then measures
    python benchmarks/speculative.py --quick      # tiny sizes, to check that everything runs

Both models are trained on the standard library of the running interpreter, without the held-out files; the prompts come
from these. The large model is so large that the time of a step is the time to read its weights, for one token or a few.
All runs are in one process, in turns: without a draft, then with drafts of each length. As their times are those of
reading, there is no share of the machine's peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _pages import bars
from decode import forced_log_probs, head, rate, ratio, row

PLAIN, ALONE = "no draft", "the draft alone"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of the two models, their training and the texts to write."""

    target: tuple[int, int] = (8, 512)  # layers, d_model
    draft: tuple[int, int] = (2, 96)
    target_steps: int = 1000  # with the first two layers alone, a quarter of the work
    grown_steps: int = 60  # with all layers
    draft_steps: int = 300
    target_batch: int = 4
    draft_batch: int = 8
    window: int = 128
    prompt: int = 64
    new: int = 128
    num_prompts: int = 6
    drafted: tuple[int, ...] = (2, 4, 6)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    probe_windows: int = 64  # of held-out text, to score
    rounds: int = 5


FEW_LAYERS = 2
QUICK: dict[str, Any] = {"target": (3, 64), "draft": (1, 32), "target_steps": 20, "grown_steps": 5, "draft_steps": 20}
QUICK |= {"window": 64, "prompt": 16, "new": 16, "num_prompts": 2, "drafted": (2, 4), "probe_windows": 8, "rounds": 1}


@dataclasses.dataclass(frozen=True)
class Text:
    """The standard library as tokens, one for each byte."""

    train: Any  # TokenStream
    probe: np.ndarray  # (probe_windows, window + 1), held out
    prompts: np.ndarray  # (num_prompts, prompt), held out


def read_text(plan: Plan) -> Text:
    from attnax.text import byte_tokenizer
    from attnax.training import Batches, TokenStream, read_corpus

    corpus, tokenizer = read_corpus(), byte_tokenizer()
    train = tokenizer.encode_documents([document.text for document in corpus.train])
    held_out = tokenizer.encode_documents([document.text for document in corpus.held_out])
    # Pieces from all held-out files: the first files are all alike.
    windows = Batches(TokenStream(held_out, plan.window), batch_size=plan.probe_windows)[0]["tokens"][0]
    starts = np.linspace(0, len(held_out) - plan.prompt, plan.num_prompts + 2, dtype=int)[1:-1]
    prompts = held_out[starts[:, None] + np.arange(plan.prompt)].astype(np.int32)
    return Text(TokenStream(train, plan.window), windows, prompts)


def config_of(plan: Plan, layers: int, width: int) -> Any:
    from attnax import TransformerConfig

    return TransformerConfig(
        vocab_size=257,
        d_model=width,
        num_heads=max(1, width // 64),
        num_layers=layers,
        d_ff=4 * width,
        ff_activation="gelu_tanh",
        max_len=plan.window,
        dropout_rate=0.0,
        use_bias=False,
        norm_type="rms",
        pos_emb_type="rope",
    )


def learn(
    config: Any, text: Text, *, steps: int, batch: int, learning_rate: float, seed: int = 0, start: Any = None
) -> Any:
    """The parameters after some steps of AdamW, which begin with the parameters `start` if given."""
    from attnax.training import Batches, OptimizerConfig, Trainer, causal_lm

    batches = Batches(text.train, batch_size=batch, seed=seed)
    trainer = Trainer(config, causal_lm(), OptimizerConfig(steps=steps, learning_rate=learning_rate, batch_size=batch))
    state = trainer.init()
    if start is not None:
        state = dataclasses.replace(state, params=grown(start, state.params))
    for index in range(steps):
        state, metrics = trainer.step(state, batches[index])
        if index % max(1, steps // 10) == 0:
            progress = f"{config.num_layers} layers of {config.d_model}: step {index} of {steps}"
            print(f"{progress}, {metrics.loss / np.log(2):.2f} bits per byte", file=sys.stderr, flush=True)
    return state.params


def grown(shallow: Any, deep: Any) -> Any:
    """The parameters of a deep model that computes the same as a shallow one: its other blocks add nothing yet."""
    import jax
    import jax.numpy as jnp

    known = {str(path): x for path, x in jax.tree_util.tree_leaves_with_path(shallow)}

    def one(path: Any, initial: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        adds = name.endswith(("attention.out.kernel", "feed_forward.down.kernel"))
        return known.get(str(path), jnp.zeros_like(initial) if adds else initial)

    return jax.tree_util.tree_map_with_path(one, deep)


def train(plan: Plan, text: Text, which: str) -> tuple[Any, dict[str, Any]]:
    """A trained model, and facts about its training."""
    import jax
    from flax import nnx

    from attnax import TransformerLM

    start = time.perf_counter()
    if which == "draft":
        config, steps, batch = config_of(plan, *plan.draft), plan.draft_steps, plan.draft_batch
        params = learn(config, text, steps=steps, batch=batch, learning_rate=4e-3)
    else:
        (layers, width), batch, steps = plan.target, plan.target_batch, plan.target_steps + plan.grown_steps
        options: dict[str, Any] = {"batch": batch, "learning_rate": 1e-3}
        few = learn(config_of(plan, FEW_LAYERS, width), text, steps=plan.target_steps, **options)
        config = config_of(plan, layers, width)
        params = learn(config, text, steps=plan.grown_steps, start=few, seed=1, **options)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    model = TransformerLM(nnx.Rngs(0), config)
    nnx.update(model, params)
    return model, {
        "layers": config.num_layers,
        "width": config.d_model,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "tokens": steps * batch * plan.window,
        "seconds": seconds,
        "bits": bits_per_byte(model, text.probe),
    }


def bits_per_byte(model: Any, windows: np.ndarray) -> float:
    """Bits per byte of windows (rows, window + 1), without the first byte of each, from whole forward passes."""
    import jax.numpy as jnp
    from flax import nnx

    @nnx.jit
    def bits(model: Any, ids: Any) -> Any:
        log_probs = model.log_probs(ids[:, :-1])
        return -jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1).mean() / jnp.log(2)

    return float(np.mean([float(bits(model, jnp.asarray(rows))) for rows in np.split(windows, len(windows) // 8)]))


def write(plan: Plan, text: Text, target: Any, draft: Any, temperature: float) -> list[dict[str, Any]]:
    """Seconds, tokens and steps of the target without a draft, with drafts of each length, and of the draft alone."""
    import jax

    from attnax.generation import Sampler

    options: dict[str, Any] = {"max_new_tokens": plan.new, "sampler": Sampler(temperature=temperature)}
    variants: dict[str, Any] = {PLAIN: functools.partial(target.generate, **options)}
    for count in plan.drafted:
        variants[str(count)] = functools.partial(target.generate, draft=draft, num_draft_tokens=count, **options)
    variants[ALONE] = functools.partial(draft.generate, **options)

    def one_round(generate: Any) -> tuple[float, list[Any]]:
        start = time.perf_counter()
        written = [
            jax.block_until_ready(generate(prompt[None], key=jax.random.key(seed)))
            for seed, prompt in enumerate(text.prompts)
        ]
        return time.perf_counter() - start, written

    written = {name: one_round(generate)[1] for name, generate in variants.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(plan.rounds):
        for name, generate in variants.items():
            seconds[name].append(one_round(generate)[0])
    same = {
        name: sum(bool((a.tokens == b.tokens).all()) for a, b in zip(runs, written[PLAIN], strict=True))
        for name, runs in written.items()
    }
    return [
        {
            "name": name,
            "seconds": seconds[name],
            "tokens": sum(int(run.lengths.sum()) for run in runs),
            "steps": sum(int(run.steps.sum()) for run in runs),
            "same": same[name],
            "distinct": distinct_pieces(runs),
        }
        for name, runs in written.items()
    ]


def distinct_pieces(runs: list[Any], length: int = 8) -> float:
    """The share of different pieces of `length` tokens; low for texts that repeat themselves and are easy to draft."""
    texts = [run.tokens[0].tolist() for run in runs]
    pieces = [tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)]
    return len(set(pieces)) / len(pieces)


def store(plan: Plan, text: Text, target: Any) -> dict[str, float]:
    """The change by 8-bit keys and values in the target's log-probabilities of held-out text."""
    import jax.numpy as jnp

    ids = text.probe[:8, :-1]
    exact, stored = (forced_log_probs(target, ids, plan.prompt, dtype) for dtype in ("float32", "int8"))
    following = jnp.asarray(text.probe[:8, plan.prompt + 1 :]).T[..., None]

    def bits(log_probs: Any) -> float:
        return float(-jnp.take_along_axis(log_probs, following, axis=-1).mean() / jnp.log(2))

    error = exact - stored
    return {
        "largest": float(jnp.abs(error).max()),
        "rms": float(jnp.sqrt(jnp.square(error).mean())),
        "exact_bits": bits(exact),
        "stored_bits": bits(stored),
    }


def side(plan: Plan) -> None:
    """Trains, measures and prints a line of JSON."""
    text = read_text(plan)
    (target, about_target), (draft, about_draft) = (train(plan, text, which) for which in ("target", "draft"))
    written = {str(t): write(plan, text, target, draft, t) for t in plan.temperatures}
    about = {"target": about_target, "draft": about_draft, "written": written, "storage": store(plan, text, target)}
    print(json.dumps(about), flush=True)


def tables(plan: Plan, about: dict[str, Any]) -> list[str]:
    lines = head("", "layers", "d_model", "parameters", "bytes read", "training s", "held-out bits per byte")
    for which in ("target", "draft"):
        it = about[which]
        numbers = f"{it['parameters']:,}", f"{it['tokens']:,}", f"{it['seconds']:.0f}", f"{it['bits']:.2f}"
        lines.append(row(which, it["layers"], it["width"], *numbers))
    for temperature, runs in about["written"].items():
        lines += ["", f"Temperature {temperature}, batch 1, {len(runs[0]['seconds'])} rounds of {plan.num_prompts} "]
        lines[-1] += f"held-out prompts of {plan.prompt} bytes, {plan.new} new bytes. {runs[0]['distinct']:.0%} of the "
        lines[-1] += "pieces of 8 bytes that the target writes alone are different; fewer are easier to draft."
        columns = "tokens a second", "tokens a step", "drafted tokens kept", "speed-up", "same texts"
        lines += ["", *head("tokens drafted", *columns)]
        seconds = {run["name"]: run["seconds"] for run in runs}
        for run in runs:
            name, tokens, steps = run["name"], run["tokens"], run["steps"]
            kept, same = "", ""
            if name.isdigit():
                # The prompt's step gives one token; tokens that the last step drafts past the end count as lost.
                kept = f"{(tokens - steps) / (int(name) * (steps - plan.num_prompts)):.0%}"
                # With a temperature the texts have the same distribution, but differ.
                same = f"{run['same']} of {plan.num_prompts}" if float(temperature) == 0 else ""
            speed = ratio(seconds, name, PLAIN)
            lines.append(row(name, rate(run["seconds"], tokens), f"{tokens / steps:.2f}", kept, speed, same))
        lines += ["", bars("tokens a second", without=ALONE, unit="tokens a second, more is better", attnax="all")]
    it = about["storage"]
    lines += [
        "",
        "Keys and values of the target in 8 bits against float32, held-out text read byte by byte: log-probabilities "
        f"differ by at most {it['largest']:.1e}, root mean square {it['rms']:.1e}; bits per byte "
        f"{it['stored_bits']:.4f} against {it['exact_bits']:.4f}.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a smoke test, no measurement")
    parser.add_argument("--rounds", type=int, help=f"instead of {Plan.rounds}")
    parser.add_argument("--target-steps", type=int, help=f"instead of {Plan.target_steps}")
    parser.add_argument("--grown-steps", type=int, help=f"instead of {Plan.grown_steps}")
    parser.add_argument("--draft-steps", type=int, help=f"instead of {Plan.draft_steps}")
    parser.add_argument("--markdown", type=Path, help="also write the tables here, by kind of machine")
    options = parser.parse_args()
    if options.side:
        side(Plan(**json.loads(options.side)))
        return
    from _machine import measure
    from _pages import write_kind
    from _pairs import side_command, started

    given = {name: getattr(options, name) for name in ("rounds", "target_steps", "grown_steps", "draft_steps")}
    fields = (QUICK if options.quick else {}) | {name: value for name, value in given.items() if value is not None}
    plan = Plan(**fields)
    machine = measure()
    command = side_command(__file__, json.dumps(dataclasses.asdict(plan)))
    with started({"attnax": command}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}) as sides:
        about = sides["attnax"].about
    lines = [
        f"{machine.line}; float32, jax {version('jax')}; medians (of the fastest round)",
        "",
        "`python benchmarks/speculative.py`: two byte-level models (RoPE, RMSNorm, no biases) are trained by AdamW on "
        f"the standard library of Python {platform.python_version()}, in windows of {plan.window} bytes, and are "
        f"scored on {plan.probe_windows} such windows of held-out files. The target is trained with its first "
        f"{FEW_LAYERS} layers, and at the end with all layers. Then it writes without a draft and with drafts of "
        "each length, in turns.",
        "",
        *tables(plan, about),
    ]
    print("\n" + "\n".join(lines))
    if options.markdown:
        write_kind(options.markdown, "make bench-speculative", machine.kind, "\n".join(lines))


if __name__ == "__main__":
    main()
