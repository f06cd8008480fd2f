"""Shared memory, registers and spills of the GPU kernels, from Triton's own compiler, on any machine.

    make aot-triton                                       # the table of docs/understand/accelerators.md
    python benchmarks/aot_triton.py --json figures.json --markdown docs/understand/accelerators.md
    python benchmarks/aot_triton.py --search backward 128                 # the tiles that fit: blocks, warps, stages
    python benchmarks/aot_triton.py --search forward 64 --dtype float32 --case "soft cap"

A program is lowered here, and `_triton_compiler.py` compiles its modules in an environment with triton. No kernel runs,
so there are no results and no times. XLA compiles the same modules with its own Triton, so its figures can differ a
little. Modules that were compiled before are read from `.cache/aot-triton`. The exit code is 1 if a module needs more
shared memory than a card has or than `tile_sizes.Footprint` computes, or spills more than is promised.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _lowered import Kernel, gpu_mesh, kernels_of, parse
from _pages import write_section

from attnax import masks, pallas_flash_attention
from attnax.cache import init_kv_layer_cache
from attnax.kernels import score_mods
from attnax.kernels._gpu import tile_sizes
from attnax.kernels._gpu.tile_sizes import Tile
from attnax.kernels.cached import cached_attention
from attnax.kernels.paged import paged_attention
from attnax.paged_cache import init_paged_kv_cache

ROOT = Path(__file__).resolve().parent.parent
BATCH, HEADS, KV_HEADS, LENGTH, PAGE = 2, 4, 2, 512, 16


class Card(NamedTuple):
    """A card to compile for."""

    capability: int
    name: str  # JAX's name
    unit: str  # the instruction of its tensor cores

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program may take."""
        return tile_sizes.shared_memory(self.capability)


CARDS = (
    Card(80, "NVIDIA A100-SXM4-80GB", "mma"),
    Card(86, "NVIDIA A10", "mma"),
    Card(90, "NVIDIA H100 80GB HBM3", "wgmma"),
    Card(100, "NVIDIA B200", "tcgen05"),
)
UNKNOWN = CARDS[1]  # its tiles are those for an unknown card


class Case(NamedTuple):
    """A call whose kernels are compiled."""

    words: str
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return jnp.dtype(self.dtype).itemsize * 8

    def kernels(self, card: Card, block_size: tuple[int, int] | None = None) -> list[Kernel]:
        """The kernels of its program, lowered for a card."""
        dtype, mesh = jnp.dtype(self.dtype), gpu_mesh(name=card.name)
        if self.words in DECODING:
            return kernels_of(*DECODING[self.words](self.head_dim, dtype), mesh=mesh)
        options, captured, length = CALLS[self.words]
        block_q, block_kv = block_size or (None, None)

        def loss(query: Any, key: Any, value: Any, captured: Any) -> Any:
            out: Any = pallas_flash_attention(
                query, key, value, **options(captured), block_q=block_q, block_kv=block_kv
            )
            return out.astype(jnp.float32).sum()

        query, key = (jax.ShapeDtypeStruct((BATCH, heads, length, self.head_dim), dtype) for heads in (HEADS, KV_HEADS))
        arguments = query, key, key, captured
        learned = (0, 1, 2) if captured is None else (0, 1, 2, 3)
        return kernels_of(jax.grad(loss, learned), *arguments, mesh=mesh)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _dropout(_: None) -> dict[str, Any]:
    return {"dropout_rng": jax.random.key(0), "dropout_rate": 0.1, "deterministic": False, "mask": masks.causal()}


# For each case: the options of the call as a function of the captured array, the captured array, and the length.
CALLS: dict[str, tuple[Callable[[Any], dict[str, Any]], Any, int]] = {
    "no mask": (lambda _: {}, None, LENGTH),
    "causal": (lambda _: {"mask": masks.causal()}, None, LENGTH),
    "soft cap": (lambda _: {"mask": masks.causal(), "score_mod": score_mods.soft_cap_mod(30.0)}, None, LENGTH),
    "mask as an array": (lambda _: {"mask": np.tri(LENGTH, dtype=np.bool_)}, None, LENGTH),
    "odd length": (lambda _: {}, None, LENGTH + 1),
    "dropout": (_dropout, None, LENGTH),
    "learned ALiBi": (
        lambda slopes: {"mask": masks.causal(), "score_mod": lambda s, b, h, q, kv: s - slopes[h] * abs(q - kv)},
        _floats(HEADS),
        LENGTH,
    ),
    "learned table": (
        lambda table: {"score_mod": lambda s, b, h, q, kv: s + table[h, jnp.clip(q - kv, -64, 64) + 64]},
        _floats(HEADS, 129),
        LENGTH,
    ),
    "learned bias": (
        lambda bias: {"score_mod": score_mods.additive_bias_mod(bias)},
        _floats(1, HEADS, LENGTH, LENGTH),
        LENGTH,
    ),
}

PAIR_BYTES = {"learned table": 4, "learned bias": 4, "mask as an array": 4}  # loaded by a kernel for each pair
PROMISED = "no mask", "causal", "soft cap"  # have few spills with 16 bits and heads up to 128
MOST_SPILLS = {"forward": 0, "decode": 0, "backward": 64}  # bytes


def _cached(head_dim: int, dtype: Any) -> tuple[Any, ...]:
    cache = jax.eval_shape(lambda: init_kv_layer_cache(BATCH, KV_HEADS, head_dim, max_len=4096, dtype=dtype))
    query = jax.ShapeDtypeStruct((BATCH, HEADS, 1, head_dim), dtype)
    return cached_attention, query, cache, jax.ShapeDtypeStruct((1,), jnp.int32)


def _paged(head_dim: int, dtype: Any) -> tuple[Any, ...]:
    cache = jax.eval_shape(
        partial(
            init_paged_kv_cache,
            num_blocks=64,
            block_size=PAGE,
            num_kv_heads=KV_HEADS,
            head_dim=head_dim,
            batch_size=BATCH,
            max_blocks_per_seq=32,
            dtype=dtype,
        )
    )
    return paged_attention, jax.ShapeDtypeStruct((BATCH, HEADS, 1, head_dim), dtype), cache


DECODING: dict[str, Callable[[int, Any], tuple[Any, ...]]] = {"decoding": _cached, "paged decoding": _paged}

CASES = [
    *(Case(words, head_dim) for head_dim in (64, 128) for words in CALLS),
    *(Case(words, head_dim) for head_dim in (32, 80) for words in PROMISED),
    *(Case("causal", head_dim, "float16") for head_dim in (64, 128)),
    Case("causal", 256),
    *(Case("causal", head_dim, "float32") for head_dim in (64, 128, 256)),
    *(Case("decoding", head_dim) for head_dim in (64, 128, 256)),
    Case("decoding", 128, "float32"),
    *(Case("paged decoding", head_dim) for head_dim in (64, 128)),
]


class Compiler:
    """Triton's compiler in a process of its own, with a cache of its results."""

    def __init__(self, python: Path, cache: Path) -> None:
        command = [str(python), str(Path(__file__).with_name("_triton_compiler.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.versions: dict[str, str] = self._answer()
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"Triton's compiler ended with exit code {self.process.wait()}. Type: make .venv-triton/.made"
            )
        return dict(json.loads(line))

    def __call__(self, kernel: Kernel, card: Card, num_warps: int, num_stages: int) -> dict[str, Any]:
        """The result of `_triton_compiler.compile_module`."""
        job = {
            "text": str(parse(kernel)),
            "capability": card.capability,
            "num_warps": num_warps,
            "num_stages": num_stages,
        }
        line = json.dumps(job)
        known = self.cache / (hashlib.sha256(f"{self.versions} {line}".encode()).hexdigest()[:32] + ".json")
        if not known.exists():
            assert self.process.stdin is not None
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            known.write_text(json.dumps(self._answer()))
        return dict(json.loads(known.read_text()))


def kind_of(name: str) -> str:
    """The kind of tiles that a kernel has."""
    return {"attnax_forward": "forward", "attnax_decode": "decode"}.get(name, "backward")


def rows(compiler: Compiler, cases: Iterable[Case]) -> Iterator[dict[str, Any]]:
    """A row for each case, kernel and tile: the needs of the kernel on the cards for which that tile is chosen.

    The tile for an unknown card is compiled for all cards.
    """
    for case in cases:
        found: dict[tuple[str, Tile], dict[str, Any]] = {}
        for chosen_for in (UNKNOWN, *(card for card in CARDS if card != UNKNOWN)):
            for kernel in case.kernels(chosen_for):
                is_busy = case.words in (*PAIR_BYTES, "dropout")
                sizes = case.head_dim, case.bits, chosen_for.capability
                tile = tile_sizes.choose(kind_of(kernel.name), *sizes, busy=is_busy)
                tile = tile._replace(num_stages=kernel.num_stages)
                tile = tile._replace(block_kv=PAGE) if case.words == "paged decoding" else tile
                cells = found.setdefault((kernel.name, tile), {})
                for card in CARDS if chosen_for == UNKNOWN else (chosen_for,):
                    if card.name not in cells:
                        cells[card.name] = compiled(compiler, kernel, case, tile, card)
        for (name, tile), cells in found.items():
            yield {**case._asdict(), "kernel": name.removeprefix("attnax_"), "tile": list(tile), "cards": cells}


def compiled(compiler: Compiler, kernel: Kernel, case: Case, tile: Tile, card: Card) -> dict[str, Any]:
    """The compiler's result for a kernel with the warps and stages of a tile, and the bound by `tile_sizes`."""
    sizes = case.head_dim, case.head_dim, case.bits, PAIR_BYTES.get(case.words, 0)
    footprint = tile_sizes.Footprint(kind_of(kernel.name), tile, *sizes)
    return {**compiler(kernel, card, tile.num_warps, tile.num_stages), "bound": footprint.bytes_on(card.capability)}


def faults(row: dict[str, Any]) -> list[str]:
    """The faults of a row: no kernel, more shared memory than `tile_sizes` computes or a card has, or more spills."""
    found = []
    is_promised = row["words"] in (*PROMISED, *DECODING) and row["head_dim"] <= 128 and row["dtype"] != "float32"
    most = MOST_SPILLS[kind_of(f"attnax_{row['kernel']}")] if is_promised else None
    for card in CARDS:
        cell = row["cards"].get(card.name)
        if cell is not None and not cell.get("shared", card.shared + 1) <= cell["bound"] <= card.shared:
            found.append(f"{card.name}: {_cell(cell, card)}; at most {cell['bound']} bytes were expected")
        elif cell is not None and most is not None and cell["spills"] > most:
            found.append(f"{card.name}: {_cell(cell, card)}; at most {most} bytes of spills are promised")
    return found


def markdown(table: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The section of docs/understand/accelerators.md."""
    cards = " | ".join(
        f"{card.name}, sm_{card.capability}, {card.shared / 1024:.0f} KiB, {card.unit}" for card in CARDS
    )
    tools = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        f"By `make aot-triton`: jax {jax.__version__}, {tools}. No kernel was run.",
        "",
        "A cell holds KiB of shared memory, registers of a thread, **bytes of spill stores**, and the unit that",
        "computes the products if it is not the instruction that its column names. A tile is queries x keys, warps,",
        "stages. A row with all cells has the tile for an unknown card; a card with an empty cell has another tile.",
        f"Batch {BATCH}, {HEADS} heads, {KV_HEADS} key heads, length {LENGTH}, forward and gradient.",
        "",
        f"| case | head size | dtype | kernel | tile | {cards} |",
        "|---|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for row in table:
        block_q, block_kv, warps, stages = row["tile"]
        cells = " | ".join(_cell(row["cards"].get(card.name), card) for card in CARDS)
        names = f"{row['words']} | {row['head_dim']} | {row['dtype']} | {row['kernel']}"
        lines.append(f"| {names} | {block_q}x{block_kv}, {warps}, {stages} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None, card: Card) -> str:
    if cell is None or "error" in cell:
        return "" if cell is None else cell["error"]
    unit = "" if card.unit in cell["units"] else f", {'/'.join(cell['units']) or 'no tensor cores'}"
    return f"{cell['shared'] / 1024:.1f}, {cell['registers']}, **{cell['spills']}**{unit}"


def search(compiler: Compiler, kind: str, case: Case, choices: dict[str, tuple[int, ...]]) -> None:
    """Prints the needs of every tile on the cards: KiB of shared memory, and bytes of spill stores."""
    cards = [card for card in CARDS if card.capability in choices["capability"]]
    print(f"{kind}, {case}: on {', '.join(f'sm_{card.capability}' for card in cards)}")
    for block_q, block_kv in itertools.product(choices["block_q"], choices["block_kv"]):
        for kernel in case.kernels(UNKNOWN, (block_q, block_kv)):
            if kind_of(kernel.name) != kind:
                continue
            for warps, stages in itertools.product(choices["warps"], choices["stages"]):
                tile = Tile(block_q, block_kv, warps, stages)
                cells = [compiled(compiler, kernel, case, tile, card) for card in cards]
                print(f"{kernel.name:20} {tuple(tile)}:", ", ".join(map(_found, cells)), flush=True)


def _found(cell: dict[str, Any]) -> str:
    return cell.get("error") or f"{cell['shared'] / 1024:.1f} of {cell['bound'] / 1024:.0f} KiB {cell['spills']:4d} B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table into this page")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-triton/bin/python", help="a Python with triton")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/aot-triton")
    parser.add_argument("--search", nargs=2, metavar=("KIND", "HEAD_DIM"), help="forward, backward or decode")
    parser.add_argument("--case", default="causal", help=f"case of a search: {', '.join((*CALLS, *DECODING))}")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of a search")
    several: dict[str, Any] = {"type": int, "nargs": "+", "help": "choices of a search"}
    parser.add_argument("--block_q", default=(128, 64), **several)
    parser.add_argument("--block_kv", default=(128, 64, 32), **several)
    parser.add_argument("--warps", default=(4, 8), **several)
    parser.add_argument("--stages", default=(1, 2, 3), **several)
    parser.add_argument("--capability", default=tuple(card.capability for card in CARDS), **several)
    options = parser.parse_args()
    compiler = Compiler(options.python, options.cache)
    if options.search:
        kind, head_dim = options.search
        names = ("block_q", "block_kv", "warps", "stages", "capability")
        choices = {name: tuple(getattr(options, name)) for name in names}
        search(compiler, kind, Case(options.case, int(head_dim), options.dtype), choices)
        return
    table = []
    for row in rows(compiler, CASES):
        table.append(row)
        print(
            *list(row.values())[:5],
            *(_cell(row["cards"].get(card.name), card) for card in CARDS),
            sep=" | ",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"versions": compiler.versions, "rows": table}, indent=1) + "\n")
    if options.markdown:
        write_section(options.markdown, "make aot-triton", markdown(table, compiler.versions))
    wrong = [f"{list(row.values())[:5]}, {fault}" for row in table for fault in faults(row)]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
