"""Time and memory to load a Llama-shaped checkpoint of about 500 MB, and time to its first token, beside transformers.

    python benchmarks/load.py            # needs torch and transformers; `make bench-load` installs them in .venv-torch

Each side loads in processes of its own, in turns. Memory is the growth of the process's peak from just before the load,
when libraries are imported, a first array is made, and Python's garbage collector has run (after these imports a full
run takes 0.1 s, and falls into a load by chance). The file is in the page cache. The time of the first token includes
the load. For it, Attnax compiles the program that reads the prompt: all layers, one layer (`with_scan_layers`), or
nothing if an earlier process left its program in JAX's compilation cache. These are times of memory and compilers, so
there is no share of the machine's peak.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from _machine import measure
from _pairs import side_command

SIZES = {"vocab_size": 16000, "d_model": 1024, "num_heads": 16, "num_kv_heads": 4, "num_layers": 8, "d_ff": 3072}
SCANNED, CACHED = "attnax, layers scanned", "attnax, compiled before"
SIDES = ("attnax", SCANNED, CACHED, "transformers")
KIND = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False, "dropout_rate": 0.0}


def make(folder: str) -> None:
    from flax import nnx

    from attnax import TransformerLM
    from attnax.pretrained import save_pretrained

    fields: dict[str, Any] = {**SIZES, **KIND}
    save_pretrained(TransformerLM(nnx.Rngs(0), **fields, max_len=2048), folder)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attnax_side(folder: str, *, scan_layers: bool) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnax.nn import with_scan_layers
    from attnax.pretrained import load_pretrained

    jnp.zeros(3).block_until_ready()
    gc.collect()
    before, start = peak(), time.perf_counter()
    model, _ = load_pretrained(folder)
    jax.block_until_ready(nnx.state(model))
    loaded, grown = time.perf_counter() - start, peak() - before
    if scan_layers:
        model = with_scan_layers(model, True)
    model.generate(jnp.ones((1, 16), int), max_new_tokens=1).tokens.block_until_ready()
    return {"seconds": loaded, "MiB": grown, "first token": time.perf_counter() - start}


def transformers_side(folder: str) -> dict[str, float]:
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    torch.zeros(3)
    gc.collect()
    kind = transformers.LlamaForCausalLM
    before, start = peak(), time.perf_counter()
    model = kind.from_pretrained(folder)
    for parameter in model.parameters():  # a mapped file is read at the first use
        parameter.sum()
    loaded, grown = time.perf_counter() - start, peak() - before
    model.generate(torch.ones((1, 16), dtype=torch.long), max_new_tokens=1, do_sample=False, eos_token_id=None)
    return {"seconds": loaded, "MiB": grown, "first token": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description="Loading a checkpoint beside transformers.")
    parser.add_argument("--side", choices=["make", *SIDES])
    parser.add_argument("--folder")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.side is not None:
        side, folder = arguments.side, arguments.folder
        if side == "make":
            make(folder)
        else:
            result = (
                transformers_side(folder)
                if side == "transformers"
                else attnax_side(folder, scan_layers=side == SCANNED)
            )
            print(json.dumps(result))
        return
    machine = measure()
    with tempfile.TemporaryDirectory() as folder:

        def run(side: str) -> Any:
            command = [*side_command(__file__, side, torch=side == "transformers"), "--folder", folder]
            cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            environment = os.environ | (cache if side == CACHED else {})
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            return json.loads(done.stdout or "null")

        run("make")
        run(CACHED)
        size = (Path(folder) / "model.safetensors").stat().st_size / 2**20
        rounds = [{side: run(side) for side in SIDES} for _ in range(arguments.pairs)]
    print(f"{machine.line}; {size:.0f} MiB, {arguments.pairs} rounds, minimum and median\n")
    print("| | load, s | first token, s | memory, MiB |\n|---|---|---|---|")
    for side in SIDES:
        columns = [[each[side][measure] for each in rounds] for measure in ("seconds", "first token", "MiB")]
        cells = [f"{min(values):.2f}, {statistics.median(values):.2f}" for values in columns[:2]]
        print(f"| {side} | {' | '.join(cells)} | {statistics.median(columns[2]):.0f} |")


if __name__ == "__main__":
    main()
