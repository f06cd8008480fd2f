"""Compiles modules with Triton's compiler: reads a line of JSON for each module, and prints a line of results.

`aot_triton.py` runs it in an environment of its own, with triton and without JAX. A line that is read holds the
arguments of `compile_module`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.compiler import make_backend
from triton.errors import TritonError

UNITS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}  # instructions of tensor cores


def compile_module(text: str, capability: int, num_warps: int, num_stages: int) -> dict[str, Any]:
    """Bytes of shared memory and of spills, registers of a thread, and the tensor cores' instructions in the PTX."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttir")
        path.write_text(text)
        target, options = GPUTarget("cuda", capability, 32), {"num_warps": num_warps, "num_stages": num_stages}
        with contextlib.redirect_stdout(log):
            try:
                path.write_text(_simplified(str(path), target, options))
                kernel = triton.compile(str(path), target=target, options=options)
            except (RuntimeError, ValueError, TritonError) as error:
                return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    said = log.getvalue()
    spills = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills and registers, said
    return {
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0,
        "registers": int(registers[1]),
        "spills": int(spills[1]),
        "units": [name for name, instruction in UNITS.items() if instruction in kernel.asm["ptx"]],
    }


def _simplified(path: str, target: GPUTarget, options: dict[str, Any]) -> str:
    """The module after passes that XLA runs and `triton.compile` skips for a file: they fuse sums into products."""
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = ir.parse_mlir_module(path, context)
    module.context = context
    return str(backend.make_ttir(module, {}, backend.parse_options(options), target.arch))


def versions() -> dict[str, str]:
    """Versions of the compiler and of NVIDIA's assemblers in it."""
    return {
        "triton": version("triton"),
        "ptxas": get_ptxas(90).version,
        "ptxas for sm_100": get_ptxas(100).version,
    }


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # or a module from Triton's cache prints no registers and spills
    print(json.dumps(versions()), flush=True)
    for line in sys.stdin:
        print(json.dumps(compile_module(**json.loads(line))), flush=True)
