"""Training on layouts beside training on one device, on eight devices of the CPU: losses, gradients, flops, bytes.

For each model and layout, 20 updates from equal initial parameters: the greatest difference of the losses, and of the
gradients of the first update relative to the largest gradient. Then the program of a step: flops of a device times the
number of devices over those of one device, and the bytes that a device moves beside the formulas of
`attnax.training.traffic`. XLA counts a loop once, so the sizes are those of a single tile; rings are loops, and their
flops are left out.

    python benchmarks/layouts.py [--updates 20] [--only WORDS]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from _collectives import collectives_of
from _pages import show
from flax import nnx

from attnax import Layout, TransformerConfig, TransformerLM
from attnax.training import OptimizerConfig, Trainer, TrainState, causal_lm
from attnax.training.traffic import abstract_mesh, place_parameters, step_traffic

MODEL = TransformerConfig(
    vocab_size=96,
    d_model=64,
    num_heads=8,
    num_kv_heads=2,
    num_layers=2,
    d_ff=96,
    max_len=64,
    pos_emb_type="rope",
    norm_type="rms",
    ff_activation="swiglu",
    use_bias=False,
    dropout_rate=0.0,
)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scan and remat": {"scan_layers": True, "remat": "full"},
    "packed": {},
    "ALiBi, biases": {"pos_emb_type": "alibi", "norm_type": "layer", "use_bias": True, "ff_activation": "gelu"},
    "dropout": {"dropout_rate": 0.1, "attention_dropout_rate": 0.1},
    "mixture": {"num_experts": 4, "top_k": 2},
}
LAYOUTS = ("data=8", "fsdp=8", "fsdp=2,tensor=4", "data=2,context=4", "data=2,expert=4", "fsdp=2,tensor=2,context=2")
BATCH, LENGTH = 16, 64
SHAPES = {"tokens": jax.ShapeDtypeStruct((1, BATCH, LENGTH + 1), "int32")}


def trainer_of(name: str, layout: str | None, updates: int) -> Trainer:
    """The trainer of a model."""
    model = dataclasses.replace(MODEL, **MODELS[name])
    optimizer = OptimizerConfig(steps=updates, batch_size=BATCH)
    objective = causal_lm(document_token=0 if name == "packed" else None)
    return Trainer(model, objective, optimizer, layout=None if layout is None else Layout.parse(layout))


def train(trainer: Trainer, updates: int) -> tuple[list[float], Any]:
    """The losses of the updates, and the first moments after one update: a tenth of its clipped gradients."""
    rng, losses, moments = np.random.default_rng(0), [], None
    state: TrainState = trainer.init()
    for _ in range(updates):
        start, step = rng.integers(0, 96, (BATCH, 1)), rng.integers(1, 7, (BATCH, 1))
        tokens = (start + step * np.arange(LENGTH + 1)) % 96
        state, metrics = trainer.step(state, {"tokens": tokens[None].astype(np.int32)})
        losses.append(float(metrics.loss))
        if moments is None:
            moments = [np.asarray(x) for x in jax.tree.leaves(state.opt_state) if x.ndim]
    return losses, moments


def flops_of(compiled: Any) -> float:
    """The flops of a device in a program, with each loop counted once."""
    return float(compiled.cost_analysis()["flops"])


def said(trainer: Trainer, layout: str) -> float:
    """The bytes that a device moves in a step, by the formulas."""
    config, mesh = trainer.config, abstract_mesh(Layout.parse(layout).sized(8))
    shapes = nnx.state(nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config)), nnx.Param)
    return math.fsum(step_traffic(config, place_parameters(shapes, mesh), mesh, BATCH, LENGTH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--only", default="", help="models whose name has these words")
    options = parser.parse_args()
    rows = [["model", "layout", "loss, difference", "gradients, relative", "flops", "KB moved", "by the formulas"]]
    for name in MODELS:
        if options.only not in name:
            continue
        one = trainer_of(name, None, options.updates)
        losses, moments = train(one, options.updates)
        flops = flops_of(one.lower_step(SHAPES).compile())
        for layout in LAYOUTS:
            if "expert" in layout and name != "mixture":
                continue
            trainer = trainer_of(name, layout, options.updates)
            have, have_moments = train(trainer, options.updates)
            worst = max(abs(x - y) for x, y in zip(have, losses, strict=True))
            largest = max(float(np.abs(x).max()) for x in moments)
            pairs = zip(have_moments, moments, strict=True)
            gradients = max(float(np.abs(x - y).max()) for x, y in pairs) / largest
            compiled = trainer.lower_step(SHAPES).compile()
            ratio = "-" if "context" in layout else f"{flops_of(compiled) * 8 / flops:.2f}x"
            bytes_moved = math.fsum(each.num_bytes for each in collectives_of(str(compiled.as_text())))
            moved = f"{bytes_moved / 1e3:,.0f}", f"{said(trainer, layout) / 1e3:,.0f}"
            cells = [f"{worst:.1e}", f"{gradients:.1e}", ratio, *moved]
            rows.append([name, layout, *cells])
            print("  ".join(rows[-1]), flush=True)
    show(rows)


if __name__ == "__main__":
    main()
