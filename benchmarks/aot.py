"""Compiles Attnax's programs for TPUs and NVIDIA GPUs with their own compilers, on a machine without a TPU or GPU.

    python benchmarks/aot.py tpu     # libtpu, for v4, v5e, v5p and v6e; `make aot` installs it in its own environment
    python benchmarks/aot.py tpu --tiles    # the vector memory and compile time of each tile, for `_tpu/tile_sizes.py`
    python benchmarks/aot.py cuda    # XLA for an H100, from the CUDA plugin; `make aot-cuda` installs it

Nothing runs on an accelerator. The command shows that programs compile, their kernels and their memory, but no results
and no speed. It fails if a program does not compile, if it holds other kernels than the documentation promises, or if
XLA complains that it computes constants for more than a second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from _pages import write_section

COMMANDS = {"tpu": "make aot", "cuda": "make aot-cuda"}
ALARM = "Constant folding an instruction is taking"
MIB = 2**20
LENGTH, HEADS, KV_HEADS, HEAD = 2048, 8, 4, 128
ROWS, CACHED, PAGE = 8, 4096, 64
TPUS = {"TPU v5e": "v5e:2x2", "TPU v4": "v4:2x2x1", "TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}
EXPERTS, TOKENS = 8, 2048

Program = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
"""Makes a function and the shapes of its arguments."""

# XLA's description of an H100.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Row(NamedTuple):
    """A program, and the kernels that the documentation promises."""

    name: str
    program: Program
    kernels: dict[str, int]  # the compiled program must hold these kernels and no others
    limitation: str = ""  # why it may fail
    devices: int = 1  # in a mesh with the axis "data"; the last argument is cut over it


class Result(NamedTuple):
    """The compiled program's kernels and memory, or the compiler's error."""

    error: str = ""
    seconds: float = 0.0
    kernels: Mapping[str, int] = MappingProxyType({})
    temporaries: int = 0  # bytes
    arguments: int = 0


def why_not(target: str) -> str | None:
    """The reason why this machine cannot install the compiler; None if it can."""
    system, machine, python = platform.system(), platform.machine(), sys.version_info[:2]
    if (system, machine) != ("Linux", "x86_64"):
        return f"its compiler exists for Linux on x86_64, and this is {system} on {machine}"
    oldest = (3, 11) if target == "tpu" else (3, 12)
    if not oldest <= python <= (3, 14):
        return f"its compiler exists for Python {oldest[0]}.{oldest[1]} to 3.14, and this is {python[0]}.{python[1]}"
    return None


def attention(
    attend: str,
    *,
    dtype: str = "bfloat16",
    length: int = LENGTH,
    gradient: bool = True,
    extra: tuple[tuple[tuple[int, ...], str], ...] = (),
    learn: bool = False,
    **given: Any,
) -> Program:
    """An attention function of Attnax, and the gradient of its sum.

    Args:
        attend: its name.
        dtype: of query, key and value.
        length: of all.
        gradient: of query, key and value, too.
        extra: shapes and dtypes of more arguments.
        learn: whether these get gradients.
        given: functions of the arrays `extra` that make the options.
    """

    def program() -> Any:
        import jax

        import attnax

        shapes = [((1, heads, length, HEAD), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        arguments = tuple(jax.ShapeDtypeStruct(*x) for x in (*shapes, *extra))

        def run(query: Any, key: Any, value: Any, *extra: Any) -> Any:
            options = {name: make(*extra) for name, make in given.items()}
            return getattr(attnax, attend)(query, key, value, **options)

        def loss(*arguments: Any) -> Any:
            return run(*arguments).astype("float32").sum()

        wrt = tuple(range(len(arguments) if learn else 3))
        return jax.value_and_grad(loss, wrt) if gradient else run, arguments

    return program


def decoding(*, paged: bool) -> Program:
    """One new token for each row of a cache."""

    def program() -> Any:
        import jax

        import attnax

        def init() -> Any:
            sizes: dict[str, Any] = {"num_kv_heads": KV_HEADS, "head_dim": HEAD, "dtype": "bfloat16"}
            if not paged:
                return attnax.init_kv_layer_cache(ROWS, max_len=CACHED, **sizes)
            pages = {"num_blocks": ROWS * CACHED // PAGE, "block_size": PAGE, "max_blocks_per_seq": CACHED // PAGE}
            return attnax.init_paged_kv_cache(batch_size=ROWS, **pages, **sizes)

        cache = jax.eval_shape(init)
        query = jax.ShapeDtypeStruct((ROWS, HEADS, 1, HEAD), "bfloat16")
        positions = jax.ShapeDtypeStruct((ROWS, 1), "int32")

        def run(query: Any, cache: Any, positions: Any) -> Any:
            return attnax.cached_attention(query, cache, positions, mask=attnax.masks.causal())

        return run, (query, cache, positions)

    return program


def experts() -> Any:
    """A mixture of experts, forward and backward."""
    import jax
    from flax import nnx

    from attnax.nn.moe import MixtureOfExperts

    def make() -> Any:
        return MixtureOfExperts(nnx.Rngs(0), d_model=512, d_ff=2048, num_experts=EXPERTS, top_k=2, dtype="bfloat16")

    graphdef, *_ = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params, rest = jax.eval_shape(lambda: nnx.split(make(), nnx.Param, ...)[1:])

    def loss(params: Any, rest: Any, x: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(x)[0].astype("float32").sum()

    return jax.grad(loss, (0, 2)), (params, rest, jax.ShapeDtypeStruct((TOKENS, 512), "bfloat16"))


def training_step(dtype: str) -> Program:
    """One step of the model of `benchmarks/train.py`."""

    def program() -> Any:
        import jax
        import train

        trainer = train.trainer_of(dtype=dtype)
        tokens = jax.ShapeDtypeStruct((1, train.BATCH, train.LENGTH + 1), "int32")
        return trainer.step, (trainer.shapes, {"tokens": tokens})

    return program


def step_over_devices(*, check_vma: bool, **change: Any) -> Program:
    """A gradient step of the model of `benchmarks/train.py` inside `jax.shard_map`, the batch cut over the devices."""

    def program() -> Any:
        import jax
        import optax
        import train
        from jax.sharding import PartitionSpec

        trainer = train.trainer_of(**{"dtype": "bfloat16"} | change)
        params = trainer.shapes.params
        tokens = jax.ShapeDtypeStruct((train.BATCH, train.LENGTH + 1), "int32")

        def step(params: Any, tokens: Any) -> Any:
            def loss(params: Any) -> Any:
                logits = trainer.merge(params)(tokens[:, :-1]).astype("float32")
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
                return jax.lax.pmean(losses.mean(), "data")

            value, grads = jax.value_and_grad(loss)(params)
            if not check_vma:  # nothing else sums the gradients over the devices
                grads = jax.lax.pmean(grads, "data")
            return value, jax.tree.map(lambda x, dx: x - 0.1 * dx, params, grads)

        whole = PartitionSpec()
        return jax.shard_map(step, in_specs=(whole, PartitionSpec("data")), out_specs=whole, check_vma=check_vma), (
            params,
            tokens,
        )

    return program


def causal(*_: Any) -> Any:
    from attnax import masks

    return masks.causal()


def documents(ids: Any) -> Any:
    from attnax import masks

    return masks.causal() & masks.documents(ids)


def padding(lengths: Any) -> Any:
    from attnax import masks

    return masks.padding(lengths)


def a_users_mask(*_: Any) -> Any:
    return lambda b, h, q, kv: (abs(q - kv) < 20) | (kv < 3 * h)


def soft_cap(*_: Any) -> Any:
    from attnax.kernels.score_mods import soft_cap_mod

    return soft_cap_mod(30.0)


def alibi(*slopes: Any) -> Any:
    from attnax.kernels.score_mods import alibi_mod

    if not slopes:
        return alibi_mod(HEADS)
    return lambda scores, b, h, q, kv: scores - slopes[0][h] * (q - kv)


def t5(table: Any) -> Any:
    from attnax.kernels.score_mods import relative_bias_mod

    return relative_bias_mod(table)


def bias(table: Any) -> Any:
    return lambda scores, b, h, q, kv: scores + table[h, q, kv]


def a_users_mod(*_: Any) -> Any:
    import jax.numpy as jnp

    return lambda scores, b, h, q, kv: scores - 0.1 * jnp.log1p(jnp.abs(q - kv))


def a_mod_for_no_kernel(*_: Any) -> Any:
    import jax.numpy as jnp

    return lambda scores, b, h, q, kv: scores + jnp.arcsin(scores)


def dropout(key: Any) -> Any:
    import jax

    return jax.random.wrap_key_data(key)


SPLASH = {"splash_mha_fwd_residuals": 1}
SPLASH_GRADIENT = SPLASH | {"splash_mha_dq_no_residuals": 1, "splash_mha_dkv_no_residuals": 1}
CUDNN = {"cuDNN forward": 1}
CUDNN_GRADIENT = CUDNN | {"cuDNN backward": 1}
PALLAS = {"attnax_forward": 1}
PALLAS_GRADIENT = PALLAS | {"attnax_d_query": 1, "attnax_d_key_value": 1}
PALLAS_TABLE = PALLAS_GRADIENT | {"attnax_d_table": 1}
PALLAS_PAIRS = PALLAS_GRADIENT | {"attnax_d_pairs": 1}


def both(name: str, forward: dict[str, int], gradient: dict[str, int], **given: Any) -> list[Row]:
    """A case of attention, forward alone and with its gradients."""
    given = {"attend": "flash_attention", **given}
    return [
        Row(name, attention(gradient=False, **given), forward),
        Row(f"{name}, and gradients", attention(**given), gradient),
    ]


def times(count: int, kernels: dict[str, int]) -> dict[str, int]:
    return {name: count * number for name, number in kernels.items()}


def rows(target: str) -> list[Row]:
    """The table of a target."""
    if target == "tpu":
        drop: dict[str, Any] = {"dropout_rng": dropout, "dropout_rate": lambda _: 0.1, "deterministic": lambda _: False}
        pairs, table = ((HEADS, LENGTH, LENGTH), "float32"), ((32, HEADS), "float32")
        learned = {"extra": (((HEADS,), "float32"),), "learn": True}
        return [
            *both("flash_attention, causal", SPLASH, SPLASH_GRADIENT, mask=causal),
            *both("causal, a user's score mod", PALLAS, PALLAS_GRADIENT, mask=causal, score_mod=a_users_mod),
            *both("no mask", SPLASH, SPLASH_GRADIENT),
            *both("causal, soft cap", SPLASH, SPLASH_GRADIENT, mask=causal, score_mod=soft_cap),
            *both("causal, float32", SPLASH, SPLASH_GRADIENT, mask=causal, dtype="float32"),
            *both(f"causal, length {LENGTH - 1}", PALLAS, PALLAS_GRADIENT, mask=causal, length=LENGTH - 1),
            *both("documents", PALLAS, PALLAS_GRADIENT, mask=documents, extra=(((1, LENGTH), "int32"),)),
            *both(
                "documents, float32",
                PALLAS,
                PALLAS_GRADIENT,
                mask=documents,
                extra=(((1, LENGTH), "int32"),),
                dtype="float32",
            ),
            *both("padding", PALLAS, PALLAS_GRADIENT, mask=padding, extra=(((1,), "int32"),)),
            *both("a user's mask in a line", PALLAS, PALLAS_GRADIENT, mask=a_users_mask),
            *both(
                "an array of booleans as mask",
                PALLAS,
                PALLAS_GRADIENT,
                mask=lambda keep: keep,
                extra=(((1, 1, LENGTH, LENGTH), "bool"),),
            ),
            *both(
                "causal, ALiBi with learned slopes", PALLAS, PALLAS_GRADIENT, mask=causal, score_mod=alibi, **learned
            ),
            *both("T5's table, learned", PALLAS, PALLAS_TABLE, score_mod=t5, extra=(table,), learn=True),
            *both(
                "a learned bias read at [h, q, kv]", PALLAS, PALLAS_PAIRS, score_mod=bias, extra=(pairs,), learn=True
            ),
            *both("causal, dropout", PALLAS, PALLAS_GRADIENT, mask=causal, extra=(((2,), "uint32"),), **drop),
            *both("causal, a score mod for no kernel", {}, {}, mask=causal, score_mod=a_mod_for_no_kernel),
            Row("cached_attention, one token", decoding(paged=False), {"attnax_decode": 1}),
            Row("the same from pages", decoding(paged=True), {"attnax_decode": 1}),
            Row("mixture of experts, and gradients", experts, {}),
            Row("training step, float32", training_step("float32"), times(6, SPLASH_GRADIENT)),
            Row("training step, bfloat16", training_step("bfloat16"), times(6, SPLASH_GRADIENT)),
            *(
                Row(
                    f"gradient step over 4 devices, {words}, check_vma={check_vma}",
                    step_over_devices(check_vma=check_vma, **change),
                    times(6, SPLASH_GRADIENT if splash else PALLAS_GRADIENT),
                    devices=4,
                )
                for words, change, check_vma, splash in (
                    ("RoPE", {}, True, False),
                    ("RoPE", {}, False, True),
                    ("ALiBi", {"pos_emb_type": "alibi"}, True, False),
                    ("ALiBi", {"pos_emb_type": "alibi"}, False, False),
                )
            ),
        ]
    pallas: dict[str, Any] = {"attend": "pallas_flash_attention", "mask": causal}
    return [
        *both("flash_attention, causal", CUDNN, CUDNN_GRADIENT, mask=causal),
        *both("no mask", CUDNN, CUDNN_GRADIENT),
        *both("causal, float32", PALLAS, PALLAS_GRADIENT, mask=causal, dtype="float32"),
        *both("causal, ALiBi", PALLAS, PALLAS_GRADIENT, mask=causal, score_mod=alibi),
        *both("causal, soft cap", PALLAS, PALLAS_GRADIENT, mask=causal, score_mod=soft_cap),
        *both("causal, a user's score mod", PALLAS, PALLAS_GRADIENT, mask=causal, score_mod=a_users_mod),
        *both(f"causal, length {LENGTH - 1}", PALLAS, PALLAS_GRADIENT, mask=causal, length=LENGTH - 1),
        *both("causal, a score mod for no kernel", {}, {}, mask=causal, score_mod=a_mod_for_no_kernel),
        *both("pallas_flash_attention, causal", PALLAS, PALLAS_GRADIENT, **pallas),
        *both("memory_efficient_attention, causal", {}, {}, attend="memory_efficient_attention", mask=causal),
        Row("cached_attention, one token", decoding(paged=False), {"attnax_decode": 1}),
        Row("the same from pages", decoding(paged=True), {"attnax_decode": 1}),
        Row("mixture of experts, and gradients", experts, {}),
        Row("training step, float32", training_step("float32"), times(6, PALLAS_GRADIENT)),
        Row("training step, bfloat16", training_step("bfloat16"), times(6, CUDNN_GRADIENT)),
    ]


QUICK = 3  # rows


def kernels_in(text: str) -> Counter[str]:
    """The kernels that a compiled program calls, and how often."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            found[re.sub(r"(\.\d+)+$", "", line.split()[0].lstrip("%"))] += 1
        elif 'custom_call_target="__gpu$xla.gpu.triton"' in line:
            found[re.findall(r'\bname = "(\w+)"', line)[-1]] += 1
        elif backward := re.search(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"', line):
            found["cuDNN backward" if backward[1] else "cuDNN forward"] += 1
    return found


@contextlib.contextmanager
def captured(report: list[str]) -> Iterator[None]:
    """Appends to `report` the text that is written to standard error, by compilers in C++ too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            report.append(file.read().decode(errors="replace"))


class Compiler:
    """The compiler for a device that this machine does not have."""

    def __init__(self, target: str, device: str):
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        self.target = target
        options: dict[str, Any] = {"topology_name": device}
        if target == "cuda":
            options = {"target_config": H100, "topology": "1x1x1"}  # hosts, processes, devices
        with captured([]):  # libtpu complains that it finds no TPU
            topology = topologies.get_topology_desc(platform=target, **options)
        self.devices: Any = topology.devices
        self.sharding = SingleDeviceSharding(topology.devices[0])

    def place(self, count: int, arguments: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """(the mesh to trace under, the arguments on its devices)."""
        import jax
        import numpy as np
        from _lowered import gpu_mesh
        from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

        def put(tree: Any, sharding: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        if count > 1:
            mesh = Mesh(np.array(self.devices[:count]), ("data",))
            whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
            return mesh.abstract_mesh, (*put(arguments[:-1], whole), put(arguments[-1], cut))
        around: Any = None
        if self.target == "cuda":
            around = gpu_mesh()
        elif self.target == "tpu":  # Pallas reads the generation from the mesh
            around = AbstractMesh((), (), abstract_device=AbstractDevice(self.devices[0].device_kind, 1, "tpu"))
        return around, put(arguments, self.sharding)

    def compile(self, function: Any, arguments: Any, devices: int = 1) -> Any:
        """The program of a function, for so many devices."""
        import jax

        mesh, placed = self.place(devices, tuple(arguments))
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            traced = (function if hasattr(function, "trace") else jax.jit(function)).trace(*placed)
            return traced.lower(lowering_platforms=(self.target,)).compile()

    def __call__(self, row: Row) -> Result:
        """The compiled program, or its error: the table shows errors of any kind."""
        report: list[str] = []
        try:
            with captured(report):
                function, arguments = row.program()
                start = time.perf_counter()
                compiled = self.compile(function, arguments, row.devices)
                seconds = time.perf_counter() - start
        except (TypeError, ValueError, RuntimeError) as error:  # JAX's, and its compilers'
            return Result(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        memory = compiled.memory_analysis()
        sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
        kernels = kernels_in(compiled.as_text())
        if ALARM in report[0]:
            folded = re.findall(rf"{ALARM}.*?\n\n\s*(.*?)\n", report[0], re.S)
            return Result(f"XLA computes constants for seconds: {folded[0][:200]}", seconds, kernels, *sizes)
        return Result("", seconds, kernels, *sizes)


def verdict(row: Row, result: Result) -> str:
    """One line that says what is wrong with a program; empty if it is as promised."""
    if result.error:
        return result.error
    have, want = (" + ".join(f"{n} {name}" for name, n in sorted(x.items())) for x in (result.kernels, row.kernels))
    return "" if have == want else f"holds {have or 'no kernel'}, and should hold {want or 'none'}"


def table(results: list[tuple[Row, Result]]) -> str:
    lines = [
        "| program | compiles | seconds | kernels in it | temporaries MiB | arguments MiB |",
        "|---|---|---:|---|---:|---:|",
    ]
    for row, result in results:
        wrong = verdict(row, result)
        compiles = "yes" if not wrong else f"no: {wrong}" + (f" (known: {row.limitation})" if row.limitation else "")
        kernels = ", ".join(f"{n} `{name}`" for name, n in sorted(result.kernels.items())) or "none"
        sizes = [f"{size / MIB:,.1f}" for size in (result.temporaries, result.arguments)]
        cells = (row.name, compiles.replace("|", "\\|"), f"{result.seconds:.1f}", kernels, *sizes)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tiles_of(devices: Mapping[str, str]) -> None:
    """Prints the vector memory and the compile time of the kernels, for each size of tile and each TPU."""
    from _pages import show
    from _tpu_tiles import DTYPES, KERNELS, SIZES, TILES, search

    for name, device in devices.items():
        compiler = Compiler("tpu", device)
        for use in search(compiler.compile, KERNELS, DTYPES, SIZES, TILES):
            tile = f"{use.block_q} x {use.block_kv}"
            show(
                [
                    [
                        name,
                        use.kernel,
                        use.dtype,
                        str(use.size),
                        tile,
                        f"{use.mib:.2f} MiB",
                        f"{use.seconds:.1f} s",
                        use.error,
                    ]
                ]
            )


def head(target: str) -> str:
    """Versions and processor, which a reader needs to compare figures."""

    def of(package: str) -> str:
        with contextlib.suppress(PackageNotFoundError):
            return f"{package} {version(package)}, "
        return ""

    lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    model = re.search(r"Model name:\s*(.*)", lscpu)
    packages = ("jax", "jaxlib", *(("libtpu",) if target == "tpu" else ("jax-cuda13-pjrt", "nvidia-cudnn-cu13")))
    return (
        f"{''.join(map(of, packages))}Python {platform.python_version()}; compiled on {os.cpu_count()} cores of "
        f"{model[1] if model else platform.machine()}."
    )


def section(target: str, tables: dict[str, list[tuple[Row, Result]]]) -> str:
    """The section of a target in docs/understand/accelerators.md."""
    shape = f"batch 1, {HEADS} heads, {KV_HEADS} key heads, length {LENGTH}, head size {HEAD}"
    parts = [
        f"By `{COMMANDS[target]}`: {head(target)}",
        f"Attention has {shape}, and bfloat16 unless a line says otherwise. Decoding has {ROWS} rows, caches for "
        f"{CACHED} tokens and pages of {PAGE}. The mixture of experts chooses 2 of {EXPERTS} experts for each of "
        f"{TOKENS} tokens. The training step is that of `benchmarks/train.py`.",
        *(f"### {device}\n\n{table(results)}" for device, results in tables.items()),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("tpu", "cuda"))
    parser.add_argument("--why-not", action="store_true", help="only print why this machine cannot, if so")
    parser.add_argument("--quick", action="store_true", help="only the first case, for one device")
    parser.add_argument("--tiles", action="store_true", help="the vector memory and the compile time of each tile")
    parser.add_argument("--device", default="", help="devices whose name has these words")
    parser.add_argument("--only", default="", help="rows whose name has these words")
    parser.add_argument("--markdown", type=Path, help="also write the tables into this page")
    options = parser.parse_args()
    if options.why_not:
        print(why_not(options.target) or "")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.target == "tpu":
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    else:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    devices = TPUS if options.target == "tpu" else {"NVIDIA H100": ""}
    if options.tiles:
        tiles_of(devices)
        return
    tables: dict[str, list[tuple[Row, Result]]] = {}
    failed = 0
    devices = {name: device for name, device in devices.items() if options.device in name}
    for name, device in list(devices.items())[: 1 if options.quick else None]:
        compiler, tables[name] = Compiler(options.target, device), []
        for row in rows(options.target)[: QUICK if options.quick else None]:
            if options.only not in row.name:
                continue
            result = compiler(row)
            wrong = verdict(row, result)
            failed += bool(wrong) and not row.limitation
            print(f"{name}, {row.name}: {wrong or 'compiles'}, {result.seconds:.1f} s", flush=True)
            tables[name].append((row, result))
    if options.markdown is not None:
        write_section(options.markdown, COMMANDS[options.target], section(options.target, tables))
    sys.exit(f"{failed} programs are not as promised." if failed else 0)


if __name__ == "__main__":
    main()
