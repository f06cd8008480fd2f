"""A training step of Attnax beside PyTorch: the same decoder, the same batch, AdamW, clipping, on the CPU.

    python benchmarks/train.py                  # needs torch; `make bench-train` installs it in .venv-torch
    python benchmarks/train.py --pages small    # without huge pages for malloc, for both sides

The model has 6 layers, d_model 384, 6 heads, SwiGLU of 1024, RoPE, RMSNorm, tied embeddings; batch 8 of 256 tokens,
vocabulary 4096, float32. PyTorch uses scaled_dot_product_attention, fused AdamW, and runs both eager and compiled.
"Of peak" is the share of a median step that its products would take at the peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _flops import attention_flops, linear_flops, share

LAYERS, WIDTH, HEADS, HIDDEN, LENGTH, BATCH, VOCABULARY = 6, 384, 6, 1024, 256, 8, 4096
STEPS = 4  # in a round


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1), dtype=np.int32) for _ in range(STEPS)]


def trainer_of(**change: Any) -> Any:
    """The trainer of Attnax's side; `change` holds other fields of the model's configuration."""
    from attnax import TransformerConfig
    from attnax.training import OptimizerConfig, Trainer, causal_lm

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "d_ff": HIDDEN,
        "max_len": LENGTH,
        "dropout_rate": 0.0,
        "use_bias": False,
        "norm_type": "rms",
        "ff_activation": "swiglu",
        "pos_emb_type": "rope",
        "tie_embeddings": True,
    }
    config = TransformerConfig(**{**fields, **change})
    return Trainer(config, causal_lm(), OptimizerConfig(steps=1000, learning_rate=1e-3))


def flops() -> float:
    """The operations of the products of a step."""
    weights = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN) + WIDTH * VOCABULARY
    pairs = LAYERS * BATCH * HEADS * LENGTH * (LENGTH + 1) / 2
    return linear_flops(weights, BATCH * LENGTH, backward=True) + attention_flops(pairs, WIDTH // HEADS, backward=True)


def attnax_side() -> None:
    import jax
    from _pairs import serve

    trainer = trainer_of()
    state, data, losses = trainer.init(), batches(), []

    def work() -> None:
        nonlocal state
        for batch in data:
            state, metrics = trainer.step(state, {"tokens": batch[None]})
            losses.append(float(metrics.loss))
        jax.block_until_ready(state)

    work()
    serve(work, parameters=sum(x.size for x in jax.tree.leaves(state.params)), first_loss=losses[0])


def torch_side(compiled: bool) -> None:
    import torch
    from _pairs import serve
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(2)
    torch.manual_seed(0)
    frequency = 10000.0 ** -(torch.arange(0, WIDTH // HEADS, 2).double() / (WIDTH // HEADS))
    angles = torch.arange(LENGTH).double()[:, None] * frequency
    cos, sin = angles.cos().float(), angles.sin().float()

    def rotate(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
            self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
            self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

        def forward(self, x: Any) -> Any:
            y = self.norm_1(x)
            query, key, value = (
                layer(y).view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
            )
            heads = functional.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
            x = x + self.out(heads.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))
            y = self.norm_2(x)
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            nn.init.normal_(self.embed.weight, std=0.02)
            self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
            self.norm = nn.RMSNorm(WIDTH)

        def forward(self, ids: Any) -> Any:
            logits = functional.linear(self.norm(self.blocks(self.embed(ids[:, :-1]))), self.embed.weight)
            return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    model = Model()
    run: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    data, losses = [torch.from_numpy(batch).long() for batch in batches()], []

    def work() -> None:
        for batch in data:
            optimizer.zero_grad(set_to_none=True)
            loss = run(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())

    work()
    serve(work, parameters=sum(p.numel() for p in model.parameters()), first_loss=losses[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["attnax", "torch", "torch-compile"], help=argparse.SUPPRESS)
    parser.add_argument("--pages", choices=["huge", "small"], default="huge")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.side == "attnax":
        attnax_side()
        return
    if options.side:
        torch_side(compiled=options.side == "torch-compile")
        return

    from _machine import measure
    from _pairs import compare, peer_version, side_command

    machine = measure()
    names = ("attnax", "torch", "torch-compile")
    sides = {name: side_command(__file__, name, torch=name != "attnax") for name in names}
    tunables = "glibc.malloc.hugetlb=1" if options.pages == "huge" else ""
    seconds, about = compare(sides, rounds=options.rounds, environment={"GLIBC_TUNABLES": tunables})
    tokens = BATCH * LENGTH * STEPS
    figures = {
        name: {
            **about[name],
            "step_ms_min": 1000 * min(values) / STEPS,
            "step_ms_median": 1000 * statistics.median(values) / STEPS,
            "tokens_per_second": tokens / statistics.median(values),
        }
        for name, values in seconds.items()
    }
    best = min((name for name in figures if name != "attnax"), key=lambda name: figures[name]["step_ms_median"])
    ratio = figures["attnax"]["tokens_per_second"] / figures[best]["tokens_per_second"]
    print(f"{machine.line}; {options.pages} pages, jax {version('jax')}, torch {peer_version('torch')}")
    print(f"{'':14}{'parameters':>12}{'first loss':>12}{'min ms':>10}{'median ms':>11}{'of peak':>9}{'tokens/s':>10}")
    for name, row in figures.items():
        print(
            f"{name:14}{row['parameters']:12,}{row['first_loss']:12.3f}{row['step_ms_min']:10.0f}"
            f"{row['step_ms_median']:11.0f}{share(flops(), row['step_ms_median'] / 1e3, machine.peak):>9}"
            f"{row['tokens_per_second']:10,.0f}"
        )
    print(f"attnax / {best}: {ratio:.2f}x tokens per second")
    if options.json:
        found = {"machine": machine.line, "pages": options.pages, "sides": figures, "ratio": ratio}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
