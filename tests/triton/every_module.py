"""The product of `calls.py`: every module is lowered and verified; `make modules` exits 1 if one is invalid."""

import concurrent.futures
import multiprocessing
import os
import sys
import time

import calls
import jax
from _lowered import parse


def faults(levels):
    """How many modules a call has, and the words of those that are invalid."""
    kernels, found = calls.kernels(levels), []
    for kernel in kernels:
        try:
            parse(kernel)
        except ValueError as error:
            found.append(f"{' '.join(levels)}: {error}")
    return len(kernels), found


def main():
    """Prints each invalid module, then how many there were of how many."""
    begin, products = time.perf_counter(), list(calls.product())
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=100) as pool:
        results = list(pool.map(faults, products, chunksize=20))
    invalid = [words for _, found in results for words in found]
    print(*invalid, sep="\n")
    print(
        f"JAX {jax.__version__}: {len(invalid)} invalid of {sum(count for count, _ in results)} modules "
        f"of {len(products)} calls, {time.perf_counter() - begin:.0f} s"
    )
    sys.exit(bool(invalid))


if __name__ == "__main__":
    main()
