"""Time and memory to load a Llama-shaped checkpoint of about 500 MB, and time to its first token, beside transformers.

    python benchmarks/load.py            # needs torch and transformers; `make bench-load` installs them

Each side loads in processes of its own, alternated; memory is how much the peak of the process grew from before the
call, in which its libraries and the first array are already there. The file is in the page cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {"vocab_size": 16000, "d_model": 1024, "num_heads": 16, "num_kv_heads": 4, "num_layers": 8, "d_ff": 3072}
KIND = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False, "dropout_rate": 0.0}


def make(folder: str) -> None:
    from flax import nnx

    from attnax import TransformerLM
    from attnax.pretrained import save_pretrained

    fields: dict[str, Any] = {**SIZES, **KIND}
    save_pretrained(TransformerLM(nnx.Rngs(0), **fields, max_len=2048), folder)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attnax_side(folder: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnax.pretrained import load_pretrained

    jnp.zeros(3).block_until_ready()
    before, start = peak(), time.perf_counter()
    model, _ = load_pretrained(folder)
    jax.block_until_ready(nnx.state(model))
    loaded, grown = time.perf_counter() - start, peak() - before
    model.generate(jnp.ones((1, 16), int), max_new_tokens=1).tokens.block_until_ready()
    return {"seconds": loaded, "MiB": grown, "first token": time.perf_counter() - start}


def transformers_side(folder: str) -> dict[str, float]:
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    torch.zeros(3)
    kind = transformers.LlamaForCausalLM
    before, start = peak(), time.perf_counter()
    model = kind.from_pretrained(folder)
    for parameter in model.parameters():  # a file that is mapped is read when it is used
        parameter.sum()
    loaded, grown = time.perf_counter() - start, peak() - before
    model.generate(torch.ones((1, 16), dtype=torch.long), max_new_tokens=1, do_sample=False, eos_token_id=None)
    return {"seconds": loaded, "MiB": grown, "first token": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading a checkpoint beside transformers.")
    parser.add_argument("--side", choices=["make", "attnax", "transformers"])
    parser.add_argument("--folder")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.side is not None:
        side = {"make": make, "attnax": attnax_side, "transformers": transformers_side}[arguments.side]
        print(json.dumps(side(arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:

        def run(side: str) -> Any:
            command = [sys.executable, __file__, "--side", side, "--folder", folder]
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        run("make")
        size = (Path(folder) / "model.safetensors").stat().st_size / 2**20
        sides = ("attnax", "transformers")
        rounds = [{side: run(side) for side in sides} for _ in range(arguments.pairs)]
    print(f"checkpoint: {size:.0f} MiB, {arguments.pairs} pairs, minimum and median")
    for measure in ("seconds", "first token", "MiB"):
        values = {side: [each[side][measure] for each in rounds] for side in sides}
        said = ", ".join(f"{side} {min(row):.2f} {statistics.median(row):.2f}" for side, row in values.items())
        ratio = statistics.median(values["transformers"]) / statistics.median(values["attnax"])
        print(f"{measure}: {said}; transformers / attnax {ratio:.2f}")


if __name__ == "__main__":
    main()
