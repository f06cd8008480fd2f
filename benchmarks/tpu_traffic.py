"""The bytes that TPU kernels copy and the products that they compute, counted from their grids: an estimate.

    python benchmarks/tpu_traffic.py                                    # on any machine
    python benchmarks/tpu_traffic.py --markdown docs/understand/accelerators.md   # also writes the table into this page

A TPU runs the programs of a kernel one after another. The blocks of a program are copied into vector memory, and a
block that is the same as the one before is not copied again; results are copied back. The command takes the grid, the
blocks and the lists of each kernel as it is called, for Attnax's kernels and for JAX's splash attention, and counts.
Nothing runs. It does not count what XLA does around the kernels. Needs jax.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from _cases import document_ids
from _pages import markdown_table, write_section
from jax.experimental import pallas as pl

from attnax import masks, pallas_flash_attention
from attnax.kernels._core.tile_codes import PARTIAL
from attnax.kernels._tpu import splash

COMMAND = "python benchmarks/tpu_traffic.py"
HEADS, KV_HEADS, HEAD = 8, 4, 128
LENGTHS = 2048, 8192
WINDOW = 1024
MIB = 2**20
# Products of a tile: scores, then weights and values, or d_out and values and one for each gradient.
PRODUCTS = {"forward": 2, "d_query": 3, "d_key_value": 4, "fwd": 2, "dq": 3, "dkv": 4}


class Traffic(NamedTuple):
    """What a kernel does in a call."""

    kernel: str
    read: int  # bytes copied into vector memory
    written: int  # bytes copied out of it
    flops: int
    programs: int

    @classmethod
    def total(cls, kernels: Sequence[Traffic]) -> Traffic:
        return cls("", *(sum(column) for column in zip(*(x[1:] for x in kernels), strict=True)))


def count(function: Callable[..., Any], *arguments: Any) -> list[Traffic]:
    """The traffic of each kernel that `function(*arguments)` calls; its results mean nothing."""
    found: list[Traffic] = []

    def pallas_call(kernel: Any, out_shape: Any, *, grid_spec: Any, name: str = "", **_: Any) -> Any:
        def call(*arrays: Any) -> Any:
            number = grid_spec.num_scalar_prefetch
            found.append(_traffic(name, grid_spec, arrays[:number], arrays[number:], out_shape))
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return call

    patch = mock.patch.object(pl, "pallas_call", pallas_call)
    with patch, jax.disable_jit(), jax.numpy_rank_promotion("allow"):  # splash attention promotes ranks
        function(*arguments)
    return found


def _traffic(name: str, grid_spec: Any, known: Any, arrays: Any, outputs: Any) -> Traffic:
    grid = tuple(map(int, grid_spec.grid))
    programs = tuple(jnp.asarray(x.reshape(-1), jnp.int32) for x in np.indices(grid))
    known = jax.tree.map(jnp.asarray, known)

    def copied(specs: Any, values: Any) -> int:
        """The bytes of all blocks that differ from the block before."""
        total = 0
        for spec, x in zip(jax.tree.leaves(specs, is_leaf=_is_spec), jax.tree.leaves(values), strict=True):
            if spec.index_map is None:  # in scalar memory, once
                continue
            index = jax.vmap(partial(_index, spec, known))(programs)
            changes = np.stack([np.diff(axis) != 0 for axis in index]).any(0)
            size = math.prod(n or 1 for n in spec.block_shape) * (HEAD if spec.block_shape[-1] == 1 else 1)
            total += (1 + int(changes.sum())) * size * x.dtype.itemsize
        return total

    query, key = jax.tree.leaves(grid_spec.in_specs, is_leaf=_is_spec)[:2]
    block_q, block_kv = query.block_shape[-2], key.block_shape[-2]
    seq_q, seq_kv = (x.shape[-2] for x in jax.tree.leaves(arrays)[:2])
    if is_ours := name.startswith("attnax_"):
        active = _visited(known[0], grid, -(-seq_q // block_q) * -(-seq_kv // block_kv))
    else:
        block_mask = known[1]
        visited = np.ones(grid, bool) if block_mask is None else np.asarray(block_mask) != 0
        active = int(visited.sum()) * (math.prod(grid) // visited.size)
    phase = name.removeprefix("attnax_") if is_ours else name.split("_")[2]
    pairs = block_q * block_kv
    flops = 2 * PRODUCTS[phase] * active * pairs * HEAD
    return Traffic(phase, copied(grid_spec.in_specs, arrays), copied(grid_spec.out_specs, outputs), flops, active)


def _is_spec(x: Any) -> bool:
    return isinstance(x, pl.BlockSpec)


def _index(spec: Any, known: Any, program: Any) -> tuple[Any, ...]:
    return tuple(jnp.asarray(x, jnp.int32) for x in spec.index_map(*program, *known))


def _visited(words: Any, grid: tuple[int, ...], most: int) -> int:
    """The programs of Attnax's kernels that compute: a list has room for `most` words, and the grid reads the first."""
    batch, outer, count, inner = grid
    kinds = ((np.asarray(words) >> 2) & 3).reshape(-1, most)[:, :count]
    return int((kinds <= PARTIAL).sum()) * (batch * outer // len(kinds)) * inner


def attnax_kernels(length: int, mask: Any, score_mod: Any = None, dtype: Any = jnp.bfloat16) -> list[Traffic]:
    """Attnax's kernels, forward and backward."""

    def run(query: Any, key: Any, value: Any) -> Any:
        return pallas_flash_attention(query, key, value, mask=mask, score_mod=score_mod, interpret="tpu")

    def both(*arrays: Any) -> None:
        out, pull = jax.vjp(run, *arrays)
        pull(out)

    return count(both, *_arrays(length, dtype))


def splash_kernels(length: int, mask: Any, dtype: Any = jnp.bfloat16) -> list[Traffic]:
    """The kernels of JAX's splash attention, as `flash_attention` calls them."""
    arrays = _arrays(length, dtype)
    scale = 1.0
    options: dict[str, Any] = {"mask": mask, "score_mod": None}

    def forward(query: Any, key: Any, value: Any) -> None:
        splash.splash_forward(query, key, value, scale, **options)

    def backward(query: Any, key: Any, value: Any) -> None:
        lse = jnp.zeros(query.shape[:3], jnp.float32)
        splash.splash_backward(query, key, value, scale, query, lse, query, **options)

    again = count(backward, *arrays)
    return count(forward, *arrays) + [x for x in again if x.kernel != "fwd"]


def _arrays(length: int, dtype: Any) -> list[Any]:
    """query, key and value of zeros, with one number for each `HEAD` of them: what they hold is not counted."""
    return [jnp.zeros((1, heads, length, 1), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def cases(length: int) -> dict[str, tuple[Any, Any, bool]]:
    """Mask, score mod and whether splash attention serves them."""
    documents = masks.documents(jnp.asarray(document_ids(length))[None])
    return {
        "causal": (masks.causal(), None, True),
        f"causal window of {WINDOW}": (masks.sliding_window(WINDOW), None, True),
        "8 packed documents, causal": (masks.causal() & documents, None, False),
        "causal, a user's score mod": (masks.causal(), lambda s, b, h, q, kv: s - 0.1 * jnp.log1p(q - kv), False),
    }


def lines(lengths: Sequence[int] = LENGTHS) -> list[list[str]]:
    """The table, with its header."""
    found = [["length", "case", "kernels", "pass", "programs", "read MiB", "written MiB", "GFLOP", "FLOP per byte"]]
    for length in lengths:
        for words, (mask, score_mod, has_splash) in cases(length).items():
            sides = {"Attnax": attnax_kernels(length, mask, score_mod)}
            if has_splash:
                sides["splash"] = splash_kernels(length, mask)
            for side, kernels in sides.items():
                for name, part in (("forward", kernels[:1]), ("backward", kernels[1:])):
                    x = Traffic.total(part)
                    cells = (
                        f"{x.programs:,}",
                        f"{x.read / MIB:,.1f}",
                        f"{x.written / MIB:,.1f}",
                        f"{x.flops / 1e9:,.1f}",
                    )
                    found.append([f"{length:,}", words, side, name, *cells, f"{x.flops / (x.read + x.written):,.0f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="also write the table into this page")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    options = parser.parse_args()
    table = markdown_table(lines(options.lengths))
    print(table)
    if options.markdown is not None:
        text = (
            f"An estimate by `{COMMAND}`: the bytes that kernels copy between main and vector memory, and the products "
            f"of the tiles that they visit, with forbidden pairs. Batch 1, {HEADS} heads, {KV_HEADS} key heads, head "
            f"size {HEAD}, bfloat16. Counted from grids and lists: nothing ran, and XLA's work around them is left out."
        )
        write_section(options.markdown, COMMAND, f"{text}\n\n{table}")


if __name__ == "__main__":
    main()
