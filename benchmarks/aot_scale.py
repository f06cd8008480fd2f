"""Training steps of models of 1 and 8 billion parameters on 8 and 256 TPUs, compiled on a machine without a TPU.

    python benchmarks/aot_scale.py            # each layout of the table in docs/guides/devices.md: `make aot-scale`
    python benchmarks/aot_scale.py --quick    # a small model on 4 devices: `make aot-scale-quick`

Parameters are shapes, and nothing runs. The command fails if a program does not compile, does not fit a device, gathers
an activation, or has a layer without kernels of attention.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from _flops import attention_flops
from _pages import bars, markdown_table, write_section
from _tpu_collectives import Collective, Program
from aot import captured, head

COMMAND = "make aot-scale"
GB, TERA = 1e9, 1e12
MEMORY = 16 * GB  # of a TPU v5e
SMALL = 1e6  # bytes of the collectives that the table leaves out: norms, counts, losses
LLAMA: dict[str, Any] = {
    "ff_activation": "swiglu",
    "use_bias": False,
    "norm_type": "rms",
    "pos_emb_type": "rope",
    "rope_base": 500_000.0,
    "dropout_rate": 0.0,
    "dtype": "bfloat16",
    "scan_layers": True,
    "remat": "full",
}


class Model(NamedTuple):
    """A model and the devices that train it."""

    name: str
    topology: str
    sizes: dict[str, Any]


class Row(NamedTuple):
    """A layout of a model's training step."""

    model: Model
    layout: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.layout}"


SHAPES = {
    "1 B": Model(
        "1 B",
        "v5e:2x4",
        {
            "vocab_size": 128_256,
            "d_model": 2048,
            "num_layers": 16,
            "num_heads": 32,
            "num_kv_heads": 8,
            "d_ff": 8192,
            "tie_embeddings": True,
        },
    ),
    "8 B": Model(
        "8 B",
        "v5e:16x16",
        {
            "vocab_size": 128_256,
            "d_model": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "d_ff": 14_336,
        },
    ),
}
ROWS = [
    Row(SHAPES["1 B"], "fsdp=8", 32, 4096),
    Row(SHAPES["1 B"], "fsdp=4,tensor=2", 32, 4096),
    Row(SHAPES["1 B"], "fsdp=4,context=2", 4, 32_768),
    Row(SHAPES["8 B"], "fsdp=256", 256, 4096),
    Row(SHAPES["8 B"], "data=8,fsdp=32", 256, 4096),
    Row(SHAPES["8 B"], "fsdp=32,tensor=8", 32, 8192),
    Row(SHAPES["8 B"], "fsdp=64,context=4", 64, 32_768),
]
TINY = {"vocab_size": 768, "d_model": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 640}
PURPOSES = ("weights", "gradients", "sums of activations", "ring of keys")
SMALL_MODEL = Model("small", "v5e:2x2", TINY)
QUICK = [Row(SMALL_MODEL, "fsdp=2,tensor=2", 8, 256), Row(SMALL_MODEL, "fsdp=2,context=2", 4, 512)]


@dataclass
class Facts:
    """What a compiled step is, for each device."""

    seconds: float = 0.0  # of all processors together, to compile
    arguments: int = 0  # bytes
    temporaries: int = 0
    products: float = 0.0  # operations
    kernels: dict[str, int] = field(default_factory=dict)  # calls in a step
    received: dict[str, float] = field(default_factory=dict)  # bytes by purpose
    by_kind: dict[str, float] = field(default_factory=dict)  # the same bytes by the kind of collective
    gathered: list[str] = field(default_factory=list)  # activations
    error: str = ""


def shapes_of(trainer: Any) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """The shapes of a layer's parameters on a device, as the layout cuts them and without the cut by fsdp."""
    from flax import nnx
    from jax.sharding import NamedSharding

    from attnax import TransformerLM
    from attnax.nn.axes import parameter_axes
    from attnax.sharding import partition

    model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), trainer.config))
    params = nnx.state(model, nnx.Param)
    axes, found = parameter_axes(params), (set[tuple[int, ...]](), set[tuple[int, ...]]())
    for path, variable in nnx.to_flat_state(params):
        shape = variable.shape[len(variable.shape) - len(axes[path]) :]
        for shapes, without in zip(found, ((), ("fsdp",)), strict=True):
            spec = partition(trainer.mesh, shape, axes[path], without=without)
            shapes.add(plain(NamedSharding(trainer.mesh, spec).shard_shape(shape)))
    return found


def plain(shape: Any) -> tuple[int, ...]:
    """A shape without axes of one element; XLA orders the others as it likes."""
    return tuple(sorted(size for size in shape if size > 1))


def purpose(one: Collective, cut: set[tuple[int, ...]], whole: set[tuple[int, ...]]) -> str:
    """What a collective is for; "gathers activations" is what a layout must not do."""
    shapes = {plain(shape) for _, shape in one.arrays}
    if one.kind == "collective-permute":  # XLA turns a product and its reduction into a ring of permutations
        return "ring of keys" if "ppermute" in one.place else "gradients"
    if one.kind == "all-gather":
        is_known = shapes <= whole or all(kind[0] in "su" for kind, _ in one.arrays)
        return "weights" if is_known else "gathers activations"
    if one.kind == "all-to-all":
        return "gathers activations"
    if one.kind == "reduce-scatter":  # of matrices whose rows XLA pads, too
        return "gradients"
    if not shapes <= cut | whole:
        return "sums of activations"
    # libtpu gathers a matrix that is cut into few rows by a sum with zeros.
    is_gather = one.place.endswith("remat2") or (one.place and "transpose(" not in one.place)
    return "weights" if is_gather else "gradients"


def compile_row(row: Row, text: Path | None) -> Facts:
    """The facts of a row's program, or the compiler's error."""
    import numpy as np
    from jax.experimental import topologies

    from attnax import TransformerConfig
    from attnax.sharding import Layout
    from attnax.training import OptimizerConfig, Trainer, causal_lm

    with captured([]):  # libtpu complains that it finds no TPU
        topology = topologies.get_topology_desc(platform="tpu", topology_name=row.model.topology)
    config = TransformerConfig(**row.model.sizes, **LLAMA, max_len=row.length)
    optimizer = OptimizerConfig(batch_size=row.batch)
    trainer = Trainer(config, causal_lm(), optimizer, layout=Layout.parse(row.layout), devices=topology.devices)
    try:
        with captured([]):
            lowered = trainer.lower_step({"tokens": np.zeros((1, row.batch, row.length + 1), np.int32)})
            start = time.process_time()
            compiled = lowered.compile()
            seconds = time.process_time() - start
    except (TypeError, ValueError, RuntimeError) as error:  # JAX's, and its compilers'
        return Facts(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None  # libtpu gives both
    if text is not None:
        (text / f"{row.name.replace(' ', '')}.txt").write_text(hlo)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    facts = Facts(seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes + new)
    return read(facts, hlo, *shapes_of(trainer))


def read(facts: Facts, hlo: str, cut: set[tuple[int, ...]], whole: set[tuple[int, ...]]) -> Facts:
    """Adds what the program's text says."""
    program = Program(hlo)
    facts.products, facts.kernels = program.product_flops(), dict(program.kernels())
    for one in program.collectives():
        why = purpose(one, cut, whole)
        facts.received[why] = facts.received.get(why, 0) + one.received
        facts.by_kind[one.kind] = facts.by_kind.get(one.kind, 0) + one.received
        if why == "gathers activations":
            facts.gathered.append(f"{one.kind} of {one.arrays} in {one.place}")
    return facts


class Sizes(NamedTuple):
    """The sizes of a layout, and of its model's matrices in parameters."""

    data: int
    fsdp: int
    tensor: int
    context: int
    layer: int  # all matrices of a layer
    down: int  # the last one
    table: int  # of the embeddings, and as large a head
    num_tables: int

    @classmethod
    def of(cls, row: Row) -> Sizes:
        from attnax.sharding import Layout

        layout, sizes = Layout.parse(row.layout), row.model.sizes
        width, hidden = sizes["d_model"], sizes["d_ff"]
        heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
        attention = 2 * width * width * (heads + kv_heads) // heads
        tables = 1 if sizes.get("tie_embeddings") else 2
        return cls(
            layout.data,
            max(layout.fsdp, 1),
            layout.tensor,
            layout.context,
            attention + 3 * width * hidden,
            width * hidden,
            sizes["vocab_size"] * width,
            tables,
        )

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor * self.context


def products_of(row: Row) -> float:
    """The operations of products on a device.

    A product is computed forward, again in the backward pass, and twice for its gradients; the backward pass needs no
    result of a layer's last product, and the head is not computed again.
    """
    sizes, layers = Sizes.of(row), row.model.sizes["num_layers"]
    once = layers * (8 * sizes.layer - 2 * sizes.down) + 6 * sizes.table
    return once * row.batch * row.length / sizes.devices


def attention_of(row: Row) -> float:
    """The operations of the scores and sums of attention on a device: two passes forward and one backward."""
    config = row.model.sizes
    pairs = row.batch * config["num_heads"] * row.length * (row.length + 1) / 2
    head_dim = config["d_model"] // config["num_heads"]
    passes = attention_flops(pairs, head_dim) + attention_flops(pairs, head_dim, backward=True)
    return config["num_layers"] * passes / Sizes.of(row).devices


def formulas(row: Row) -> dict[str, float]:
    """The bytes that a device must receive in a step, by purpose, in rings.

    - weights: each matrix of a layer forward and again in the backward pass, tables once, in bfloat16.
    - gradients: of the layers' matrices in bfloat16, of the tables' two uses in float32; cut, and then summed over the
      copies of data and context.
    - sums of activations, of tensor: after the two halves of a layer forward, after the first in the backward pass,
      which needs no result of the second, and the gradients of the inputs of both, in bfloat16; also the embeddings
      and their gradients, in float32, and those of the head's inputs.
    - ring of keys: keys and values in bfloat16 forward and again, in the backward pass their gradients beside them in
      float32, which go home in bfloat16; into zigzag order and back, in bfloat16, queries, keys, values and outputs
      forward and again, and their gradients.
    """
    sizes, config = Sizes.of(row), row.model.sizes
    layers, width = config["num_layers"], config["d_model"]
    copies = sizes.data * sizes.context
    fsdp, tensor, copied = ((size - 1) / size for size in (sizes.fsdp, sizes.tensor, copies))
    of_layers, of_table = layers * sizes.layer / sizes.tensor, sizes.table / sizes.tensor
    gradients = 2 * of_layers + 2 * 4 * of_table
    tokens = row.batch * row.length / (sizes.fsdp * copies)
    queries, hops = tokens * width / sizes.tensor, sizes.context - 1
    keys = 2 * queries * config["num_kv_heads"] / config["num_heads"]  # and values
    found = {
        "weights": fsdp * 2 * (2 * of_layers + sizes.num_tables * of_table),
        "gradients": fsdp * gradients + 2 * copied * gradients / sizes.fsdp,
        "sums of activations": 2 * tensor * tokens * width * (2 * 5 * layers + 2 + 4 + 2),
        "ring of keys": layers * (keys * (10 * hops + 2) + 3 * 2 * (2 * queries + keys)) if hops else 0.0,
    }
    return {name: size for name, size in found.items() if size}


def wrong(row: Row, facts: Facts) -> str:
    """What is not as it must be; empty if nothing is."""
    if facts.error:
        return facts.error
    layers, size = row.model.sizes["num_layers"], facts.arguments + facts.temporaries
    if facts.gathered:
        return f"gathers activations: {facts.gathered[0]}"
    if size > MEMORY:
        return f"needs {size / GB:.1f} GB of {MEMORY / GB:.0f}"
    forward = sum(count for name, count in facts.kernels.items() if "fwd" in name or "forward" in name)
    backward = sum(count for name, count in facts.kernels.items() if "dkv" in name or "d_key_value" in name)
    if forward < 2 * layers or backward < layers:  # two forward: remat
        return f"has {forward} kernels forward and {backward} backward in {layers} layers"
    return ""


def section(results: list[tuple[Row, Facts]]) -> str:
    """The tables of docs/guides/devices.md."""
    of_device = [
        ["model", "layout", "batch", "state GB", "temporaries GB", "products Tflop", "attention Tflop", "kernels", "s"]
    ]
    of_bytes = [["model", "layout", *PURPOSES, "activations gathered", "by kind"]]
    for row, facts in results:
        name = [row.model.name, f"`{row.layout}`"]
        if facts.error:
            of_device.append([*name, "", f"does not compile: {facts.error}".replace("|", "\\|"), *[""] * 5])
            continue
        kernels = ", ".join(
            f"{count // row.model.sizes['num_layers']} `{kernel}`" for kernel, count in sorted(facts.kernels.items())
        )
        of_device.append(
            [
                *name,
                f"{row.batch} x {row.length:,}",
                f"{facts.arguments / GB:.2f}",
                f"{facts.temporaries / GB:.2f}",
                f"{facts.products / TERA:.1f} / {products_of(row) / TERA:.1f}",
                f"{attention_of(row) / TERA:.1f}",
                kernels,
                f"{facts.seconds:.0f}",
            ]
        )
        wanted = formulas(row)
        cells = [
            f"{facts.received.get(name, 0) / GB:.2f} / {wanted.get(name, 0) / GB:.2f}"
            if name in wanted or facts.received.get(name, 0) > SMALL
            else ""
            for name in PURPOSES
        ]
        kinds = sorted((kind, size) for kind, size in facts.by_kind.items() if size > SMALL)
        by_kind = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in kinds)
        of_bytes.append([*name, *cells, "; ".join(facts.gathered) or "none", by_kind])
    return "\n\n".join(
        [
            f"By `{COMMAND}`: {head('tpu')}",
            "For each device and step. Products are those of the compiled program, loops multiplied by their turns, / "
            "by the formula of `benchmarks/aot_scale.py`; the operations inside of the kernels are by formula. "
            "Kernels are calls in each layer. The last column is the compiler's time on all processors together.",
            markdown_table(of_device),
            bars("state GB", "temporaries GB", labels="model, layout, batch", unit="GB, less is better", attnax="all"),
            "GB that a device receives in a step, in the program / by formula:",
            markdown_table(of_bytes),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only a small model, on 4 devices")
    parser.add_argument("--only", default="", help="rows whose name has these words")
    parser.add_argument("--text", type=Path, help="also write each program into this folder")
    parser.add_argument("--json", type=Path, help="a file that keeps results; what it has is not compiled again")
    parser.add_argument("--markdown", type=Path, help="also write the tables into this page")
    options = parser.parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    kept: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    results, failed = list[tuple[Row, Facts]](), 0
    for row in QUICK if options.quick else ROWS:
        if options.only not in row.name:
            continue
        facts = Facts(**kept[row.name]) if row.name in kept else compile_row(row, options.text)
        kept[row.name] = asdict(facts)
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1))
        problem = wrong(row, facts)
        failed += bool(problem)
        print(f"{row.name}: {problem or 'compiles'}, {facts.seconds:.0f} s", flush=True)
        results.append((row, facts))
    if options.markdown is not None:
        write_section(options.markdown, COMMAND, section(results))
    sys.exit(f"{failed} programs are not as promised." if failed else 0)


if __name__ == "__main__":
    main()
