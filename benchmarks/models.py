"""The forward pass of every model at batch 1 beside the same model in PyTorch, and the time that scan_layers saves.

    python benchmarks/models.py           # needs torch; `make bench-models` installs it in .venv-torch

Both sides have the same sizes, float32, pre-norm, exact GELU, and run in turns in processes of their own. PyTorch's
models are built from torch.nn.TransformerEncoder and torch.nn.Transformer, as users build them, and run eager and
compiled. The second table is a training step (forward, backward) of a decoder of 24 layers, d_model 256, 512 tokens.
"Of peak" is the share of a median that the products of the model would take at the peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _flops import attention_flops, linear_flops, share

VOCABULARY, PATCH, CLASSES = 8192, 16, 1000
CASES: dict[str, dict[str, int]] = {
    "encoder": {"layers": 12, "width": 768, "heads": 12, "hidden": 3072, "length": 128},
    "language model": {"layers": 12, "width": 768, "heads": 12, "hidden": 3072, "length": 512},
    "encoder-decoder": {"layers": 6, "width": 512, "heads": 8, "hidden": 2048, "length": 128},
    "vision transformer": {"layers": 12, "width": 384, "heads": 6, "hidden": 1536, "length": 224},
}
LEGEND = '"Of peak" is the share of the median that the products of the model would take at the peak.'
DEPTH = {"layers": 24, "width": 256, "heads": 4, "hidden": 1024, "length": 512}


def flops(name: str, size: dict[str, int], *, backward: bool = False, causal: bool = True) -> float:
    """The operations of a model's products; without `causal`, those of all pairs of a decoder's self-attention."""
    layers, width, hidden, length = (size[key] for key in ("layers", "width", "hidden", "length"))
    # Products of (weights, tokens), and of the pairs of one head.
    every_pair, layer = length**2, 4 * width**2 + 2 * width * hidden
    decoder_pairs = length * (length + 1) // 2 if causal else every_pair
    if name == "vision transformer":
        patches = (length // PATCH) ** 2
        linear = [(3 * PATCH**2 * width, patches), (layers * layer, patches + 1), (width * CLASSES, 1)]
        pairs = (patches + 1) ** 2
    elif name == "encoder":
        linear, pairs = [(layers * layer, length)], every_pair
    elif name == "encoder-decoder":  # and cross-attention
        linear = [(layers * (2 * layer + 4 * width**2) + width * VOCABULARY, length)]
        pairs = every_pair + decoder_pairs + every_pair
    else:
        linear, pairs = [(layers * layer + width * VOCABULARY, length)], decoder_pairs
    products = sum(linear_flops(weights, tokens, backward=backward) for weights, tokens in linear)
    head_dim = width // size["heads"]
    return products + attention_flops(layers * size["heads"] * pairs, head_dim, backward=backward)


def attnax_model(name: str, size: dict[str, int], **change: Any) -> tuple[Any, tuple[Any, ...]]:
    """The model of Attnax's side and its arguments; `change` holds more fields of its configuration."""
    import jax.numpy as jnp
    from flax import nnx

    import attnax

    common: dict[str, Any] = {
        "d_model": size["width"],
        "num_heads": size["heads"],
        "d_ff": size["hidden"],
        "dropout_rate": 0.0,
        **change,
    }
    layers, length = size["layers"], size["length"]
    model: Any
    if name == "vision transformer":
        sizes: dict[str, Any] = {"image_size": length, "num_classes": CLASSES, "num_layers": layers}
        model = attnax.VisionTransformer(nnx.Rngs(0), **sizes, **common)
        return model, (jnp.ones((1, length, length, 3)),)
    config = attnax.TransformerConfig(
        vocab_size=VOCABULARY,
        num_layers=layers,
        max_len=length,
        pos_emb_type="learned",
        scan_layers=name == "scan",
        **common,
    )
    ids = jnp.arange(length)[None, :] % VOCABULARY
    if name == "encoder-decoder":
        return attnax.Transformer(nnx.Rngs(0), encoder=config, decoder=config), (ids, ids)
    kind = attnax.TransformerEncoder if name == "encoder" else attnax.TransformerLM
    return kind(nnx.Rngs(0), config), (ids,)


def attnax_case(case: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    name = case["name"]
    model, arguments = attnax_model(name, case["size"])
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)

    def forward(params: Any, *arguments: Any) -> Any:
        return nnx.merge(graphdef, params, *rest)(*arguments)

    def step(params: Any, *arguments: Any) -> Any:
        return jax.grad(lambda params: jnp.square(forward(params, *arguments)).mean())(params)

    start = time.perf_counter()
    run = jax.jit(step if name in ("scan", "loop") else forward).lower(params, *arguments).compile()
    about = {"compile_s": time.perf_counter() - start, "parameters": sum(x.size for x in jax.tree.leaves(params))}
    return (lambda: jax.block_until_ready(run(params, *arguments))), about


def torch_case(case: dict[str, Any], compiled: bool) -> tuple[Callable[[], Any], dict[str, Any]]:
    import torch
    from torch import nn

    torch.set_num_threads(2)
    torch.manual_seed(0)
    name, size = case["name"], case["size"]
    width, length = size["width"], size["length"]
    common: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    sizes: dict[str, Any] = {"d_model": width, "nhead": size["heads"], "dim_feedforward": size["hidden"]}

    def encoder() -> Any:
        layer = nn.TransformerEncoderLayer(**sizes, **common)
        return nn.TransformerEncoder(layer, size["layers"], norm=nn.LayerNorm(width), enable_nested_tensor=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if name == "vision transformer":
                self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
                self.first = nn.Parameter(torch.zeros(1, 1, width))
                self.positions = nn.Parameter(torch.zeros(1, (length // PATCH) ** 2 + 1, width))
                self.body, self.head = encoder(), nn.Linear(width, CLASSES)
                return
            self.embed, self.target = nn.Embedding(VOCABULARY, width), nn.Embedding(VOCABULARY, width)
            self.positions = nn.Parameter(torch.zeros(1, length, width))
            self.mask = nn.Transformer.generate_square_subsequent_mask(length)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            if name == "encoder-decoder":
                layers: dict[str, Any] = {"num_encoder_layers": size["layers"], "num_decoder_layers": size["layers"]}
                self.body = nn.Transformer(**sizes, **layers, **common)
            else:
                self.body = encoder()

        def forward(self, x: Any) -> Any:
            if name == "vision transformer":
                tokens = self.patches(x).flatten(2).transpose(1, 2)
                tokens = torch.cat([self.first, tokens], dim=1) + self.positions
                return self.head(self.body(tokens)[:, 0])
            tokens = self.embed(x) + self.positions
            if name == "encoder":
                return self.body(tokens)
            if name == "encoder-decoder":
                target = self.target(x) + self.positions
                return self.head(self.body(tokens, target, tgt_mask=self.mask, tgt_is_causal=True))
            return self.head(self.body(tokens, mask=self.mask, is_causal=True))

    model = Model().eval()
    x = torch.ones(1, 3, length, length) if name == "vision transformer" else torch.arange(length)[None] % VOCABULARY
    run: Any = torch.compile(model) if compiled else model

    def work() -> None:
        with torch.inference_mode():
            run(x)

    start = time.perf_counter()
    work()
    return work, {"compile_s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["attnax", "torch", "torch-compile"], help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=Path, help="also write the tables here, by kind of machine")
    options = parser.parse_args()
    from _machine import measure
    from _pages import bars, markdown_table, write_kind
    from _pairs import peer_version, serve_cases, side_command, started, take_turns

    if options.side == "attnax":
        serve_cases(attnax_case)
        return
    if options.side:
        serve_cases(lambda case: torch_case(case, options.side == "torch-compile"))
        return
    machine, environment = measure(), {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

    def cells(values: list[float], flops: float) -> list[str]:
        median = statistics.median(values)
        return [f"{1e3 * median:.1f} ({1e3 * min(values):.1f})", share(flops, median, machine.peak)]

    names = ("attnax", "torch", "torch-compile")
    columns = [column for name in names for column in (f"{name} ms", "of peak")]
    forward = [["forward, batch 1", "tokens", *columns, "ratio to the faster"]]
    with started({name: side_command(__file__, name, torch=name != "attnax") for name in names}, environment) as sides:
        for case, size in CASES.items():
            for side in sides.values():
                side.ask(json.dumps({"name": case, "size": size}))
            seconds = take_turns(sides, options.rounds)
            best = min(statistics.median(seconds[name]) for name in names[1:])
            tokens = (size["length"] // PATCH) ** 2 + 1 if case == "vision transformer" else size["length"]
            times = [cell for name in names for cell in cells(seconds[name], flops(case, size))]
            ratio = f"{best / statistics.median(seconds['attnax']):.2f}x"
            forward.append([case, str(tokens), *times, ratio])
            print("  ".join(forward[-1]), flush=True)
    step = [["24 layers, forward + backward", "compile s", "step ms", "of peak"]]
    with started({name: side_command(__file__, "attnax") for name in ("loop", "scan")}, environment) as sides:
        about = {name: side.ask(json.dumps({"name": name, "size": DEPTH})) for name, side in sides.items()}
        seconds = take_turns(sides, options.rounds)
        for name in sides:
            times = cells(seconds[name], flops(name, DEPTH, backward=True))
            step.append([name, f"{about[name]['compile_s']:.1f}", *times])
    versions = f"jax {version('jax')}, torch {peer_version('torch')}"
    title = f"{machine.line}; float32, {versions}; medians (minima)"
    drawn = bars(*(f"{name} ms" for name in names), unit="ms, less is better", scale="own")
    deep = bars("compile s", "step ms", by="column", scale="own", unit="s and ms, less is better", attnax="all")
    text = "\n\n".join([title, markdown_table(forward), drawn, markdown_table(step), deep, LEGEND])
    print(f"\n{text}")
    if options.markdown:
        write_kind(options.markdown, "make bench-models", machine.kind, text)


if __name__ == "__main__":
    main()
