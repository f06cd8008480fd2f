"""The machine of a table: its processor, and the speed of a large product on the cores that the benchmarks use.

python benchmarks/_machine.py    # prints the line that begins every table
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import platform
from pathlib import Path

import numpy as np
from _pairs import Work, compare, peer_version, serve, side_command

SIZE = 2048  # of the square matrices of the product
# Instructions that matter to products; those of AVX-512 and AMX are hidden together.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
LIBRARIES = ("JAX", "torch")
_CPUINFO = Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What figures depend on. Tables in docs/ have a section for each `kind`.

    Attributes:
        kind: "AVX-512", "AVX2", or the name of another architecture.
        flags: of `FLAGS`, those that a process finds.
        hidden: the processor has AVX-512, but processes do not find it (`without_avx512.py`).
        products: GFLOP/s of the float32 product of each library, the best of several; empty if none was timed.
    """

    processor: str
    cores: int
    kind: str
    flags: tuple[str, ...]
    hidden: bool
    products: dict[str, float]

    @property
    def peak(self) -> float:
        """GFLOP/s of the faster product; shares refer to it.

        Raises:
            ValueError: no product was timed.
        """
        if not self.products:
            raise ValueError("Machine: a peak needs the speed of a product; got products={}. Call measure().")
        return max(self.products.values())

    @property
    def instructions(self) -> str:
        """The processor and what it can do, for figures that are not times."""
        return (
            f"{self.processor}, {self.cores} {'core' if self.cores == 1 else 'cores'}, {self.kind} "
            f"({' '.join(self.flags)}){', AVX-512 hidden' if self.hidden else ''}"
        )

    @property
    def line(self) -> str:
        products = ", ".join(f"{library} {speed:.0f}" for library, speed in self.products.items())
        return f"{self.instructions}; peak {self.peak:.0f} GFLOP/s (float32 product of {SIZE} x {SIZE}: {products})"


def measure(rounds: int = 10) -> Machine:
    """Describes this machine and times the product of each library that is installed, in turns.

    From then on this process and its children run on the cores that were measured.
    """
    libraries = [name for name in LIBRARIES if name != "torch" or peer_version("torch") is not None]
    sides = {name: side_command(__file__, name, torch=name == "torch") for name in libraries}
    seconds, _ = compare(sides, rounds=rounds, environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    return this_machine({name: 2e-9 * SIZE**3 / min(values) for name, values in seconds.items()})


def this_machine(products: dict[str, float]) -> Machine:
    """The machine of this process, with the speeds of products that the caller measured."""
    found = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__  # this process asks CPUID
    return describe(_CPUINFO.read_text() if _CPUINFO.exists() else "", found, products)


def describe(cpuinfo: str, found: dict[str, bool], products: dict[str, float]) -> Machine:
    """The machine of Linux's `cpuinfo`, which lists hidden flags too, and of the features that NumPy found by CPUID."""
    facts = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    wide, flags = found.get("AVX512F", False), facts.get("flags", "").split()
    return Machine(
        processor=facts.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        kind="AVX-512" if wide else "AVX2" if found.get("AVX2") else platform.machine(),
        flags=tuple(flag for flag in FLAGS if flag in flags and (wide or not flag.startswith(("avx512", "amx")))),
        hidden="avx512f" in flags and not wide,
        products=products,
    )


def product(library: str) -> Work:
    numbers = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    if library == "torch":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        matrix = torch.from_numpy(numbers)
        return lambda: matrix @ matrix
    import jax

    operand, multiply = jax.device_put(numbers), jax.jit(lambda x: x @ x)
    return lambda: jax.block_until_ready(multiply(operand))


def main() -> None:
    parser = argparse.ArgumentParser(description="The machine, in the line that begins every table.")
    parser.add_argument("--side", choices=LIBRARIES, help=argparse.SUPPRESS)
    side = parser.parse_args().side
    if side is None:
        print(measure().line)
        return
    work = product(side)
    work()  # compiles
    serve(work)


if __name__ == "__main__":
    main()
