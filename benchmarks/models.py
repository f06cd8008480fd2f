"""The forward pass of every model at batch 1 beside the same model in PyTorch, and the time that scan_layers saves.

    python benchmarks/models.py           # needs torch; `make bench-models` installs it in .venv-torch

Both sides have the same sizes, float32, pre-norm, exact GELU, and run in turns in processes of their own. PyTorch's
models are built from torch.nn.TransformerEncoder and torch.nn.Transformer, as users build them, and run eager and
compiled. The second table is a training step (forward, backward) of a decoder of 24 layers, d_model 256, 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCABULARY = 8192
CASES: dict[str, dict[str, int]] = {
    "encoder": {"layers": 12, "width": 768, "heads": 12, "hidden": 3072, "length": 128},
    "language model": {"layers": 12, "width": 768, "heads": 12, "hidden": 3072, "length": 512},
    "encoder-decoder": {"layers": 6, "width": 512, "heads": 8, "hidden": 2048, "length": 128},
    "vision transformer": {"layers": 12, "width": 384, "heads": 6, "hidden": 1536, "length": 224},
}
DEPTH = {"layers": 24, "width": 256, "heads": 4, "hidden": 1024, "length": 512}


def attnax_case(case: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import attnax

    name, size = case["name"], case["size"]
    common: dict[str, Any] = {
        "d_model": size["width"],
        "num_heads": size["heads"],
        "d_ff": size["hidden"],
        "dropout_rate": 0.0,
    }
    layers, length = size["layers"], size["length"]
    model: Any
    if name == "vision transformer":
        model = attnax.VisionTransformer(nnx.Rngs(0), image_size=length, num_classes=1000, num_layers=layers, **common)
        arguments: tuple[Any, ...] = (jnp.ones((1, length, length, 3)),)
    else:
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
            model, arguments = attnax.Transformer(nnx.Rngs(0), encoder=config, decoder=config), (ids, ids)
        else:
            kind = attnax.TransformerEncoder if name == "encoder" else attnax.TransformerLM
            model, arguments = kind(nnx.Rngs(0), config), (ids,)
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
                self.patches = nn.Conv2d(3, width, 16, stride=16)
                self.first = nn.Parameter(torch.zeros(1, 1, width))
                self.positions = nn.Parameter(torch.zeros(1, (length // 16) ** 2 + 1, width))
                self.body, self.head = encoder(), nn.Linear(width, 1000)
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
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    options = parser.parse_args()
    from _pairs import peer_version, serve_cases, side_command, started, take_turns

    if options.side == "attnax":
        serve_cases(attnax_case)
        return
    if options.side:
        serve_cases(lambda case: torch_case(case, options.side == "torch-compile"))
        return
    versions = f"jax {version('jax')}, torch {peer_version('torch')}"
    lines = [
        f"{platform.machine()}, 2 cores, float32, {versions}; medians (minima)",
        "",
    ]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

    def cell(values: list[float]) -> str:
        return f"{1e3 * statistics.median(values):.1f} ({1e3 * min(values):.1f})"

    names = ("attnax", "torch", "torch-compile")
    lines += [
        "| forward, batch 1 | tokens | " + " ms | ".join(names) + " ms | ratio to the faster |",
        "|---|---|---|---|---|---|",
    ]
    with started({name: side_command(__file__, name, torch=name != "attnax") for name in names}, environment) as sides:
        for case, size in CASES.items():
            for side in sides.values():
                side.ask(json.dumps({"name": case, "size": size}))
            seconds = take_turns(sides, options.rounds)
            best = min(statistics.median(seconds[name]) for name in names[1:])
            tokens = (size["length"] // 16) ** 2 + 1 if case == "vision transformer" else size["length"]
            lines.append(
                f"| {case} | {tokens} | "
                + " | ".join(cell(seconds[name]) for name in names)
                + f" | {best / statistics.median(seconds['attnax']):.2f}x |"
            )
            print(lines[-1], flush=True)
    lines += ["", "| 24 layers, forward + backward | compile s | step ms |", "|---|---|---|"]
    with started({name: side_command(__file__, "attnax") for name in ("loop", "scan")}, environment) as sides:
        about = {name: side.ask(json.dumps({"name": name, "size": DEPTH})) for name, side in sides.items()}
        seconds = take_turns(sides, options.rounds)
        for name in sides:
            lines.append(f"| {name} | {about[name]['compile_s']:.1f} | {cell(seconds[name])} |")
    print("\n" + "\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
