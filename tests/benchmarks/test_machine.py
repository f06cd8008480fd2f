"""The machine of a table, the share of its peak that a time reaches, and a command without AVX-512."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import _flops
import _machine
import decode
import jax
import models
import moe
import numpy as np
import pytest
import train
import without_avx512
from _cpu_cases import CASES, HEAD_DIM, Job
from first_token import equations
from flax import nnx

FLAGS = without_avx512.cpu_flags()
CANNOT_HIDE = without_avx512.why_not(FLAGS) if "avx512f" in FLAGS else None
CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu fma avx2 cpuid_fault avx512f avx512_bf16 amx_tile

processor\t: 1
"""
PRODUCTS = {"JAX": 97.4, "torch": 133.2}


def test_the_machine_is_what_a_process_finds():
    seen = _machine.describe(CPUINFO, {"AVX2": True, "AVX512F": True}, PRODUCTS)
    hidden = _machine.describe(CPUINFO, {"AVX2": True, "AVX512F": False}, PRODUCTS)
    old = _machine.describe(CPUINFO.replace("avx512f avx512_bf16 amx_tile", ""), {"AVX2": True}, PRODUCTS)
    other = _machine.describe("", {"NEON": True}, PRODUCTS)
    assert (seen.kind, seen.flags, seen.hidden) == (
        "AVX-512",
        ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile"),
        False,
    )
    assert (hidden.kind, hidden.flags, hidden.hidden) == ("AVX2", ("avx2", "fma"), True)
    assert (old.kind, old.flags, old.hidden) == ("AVX2", ("avx2", "fma"), False)
    assert (other.kind, other.flags) == (platform.machine(), ())
    assert hidden.line == (
        f"A Processor, {hidden.cores} core{'s' * (hidden.cores != 1)}, AVX2 (avx2 fma), AVX-512 hidden; "
        "peak 133 GFLOP/s (float32 product of 2048 x 2048: JAX 97, torch 133)"
    )
    assert "hidden" not in seen.line + old.line
    untimed = _machine.describe(CPUINFO, {"AVX2": True}, {})
    assert hidden.line.startswith(untimed.instructions)
    with pytest.raises(ValueError, match=r"Machine: a peak needs .*; got products=\{\}\. Call measure"):
        _ = untimed.peak


def test_share_is_the_time_at_the_peak_over_the_time():
    # 10 GFLOP in half a second at a peak of 40 GFLOP/s
    assert _flops.share(1e10, 0.5, 40.0) == "50%"


@pytest.mark.parametrize("case", CASES)
def test_attention_counts_the_products_of_allowed_pairs(case):
    length, batch = 101, CASES[case].batch
    b, h, q, kv = np.indices((batch, 8 // batch, length, length))
    keep = CASES[case].keep
    extra = CASES[case].extra(length, 8)
    pairs = b.size if keep is None else np.count_nonzero(np.broadcast_to(keep(b, h, q, kv, extra), b.shape))
    assert Job(case, False, length).flops == 2 * 2 * HEAD_DIM * pairs
    assert Job(case, True, length).flops == 7 * 2 * HEAD_DIM * pairs


def product_flops(function, *arguments):
    """The operations of the products in the traced function."""
    total = 0
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name == "conv_general_dilated":  # of patches that do not overlap
            total += 2 * equation.invars[1].aval.size * np.prod(equation.outvars[0].aval.shape[1:3])
    return total


@pytest.mark.parametrize("name", models.CASES)
def test_models_count_the_products_of_the_model(name):
    size = {"layers": 3, "width": 10, "heads": 2, "hidden": 7, "length": 32 if name == "vision transformer" else 13}
    model, arguments = models.attnax_model(name, size, attention_type="standard")
    # standard_attention computes all pairs
    assert models.flops(name, size, causal=False) == product_flops(model, *arguments)
    fewer = models.flops(name, size, causal=False) - models.flops(name, size)
    assert fewer == (3 * 4 * 10 * (13 * 12 // 2) if name in ("language model", "encoder-decoder") else 0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_training_and_decoding_count_every_weight_for_every_token():
    tokens = train.BATCH * train.LENGTH
    weights = count(train.trainer_of().shapes.params)
    pairs = train.LAYERS * train.BATCH * train.HEADS * train.LENGTH * (train.LENGTH + 1) / 2
    attention = 14 * pairs * train.WIDTH / train.HEADS
    assert train.flops() == pytest.approx(
        6 * weights * tokens + attention, rel=1e-3
    )  # the weights of norms take part in none

    size = decode.SMALL
    model = nnx.eval_shape(lambda: decode.attnax_model.__wrapped__(**size))
    table = size["vocabulary"] * size["width"]
    weights = sum(2 * leaf.size for path, leaf in nnx.to_flat_state(nnx.state(model)) if path[-1] == "kernel")
    case = {"work": "generate", "size": size, "batch": 3, "prompt": 5, "new": 4}
    pairs = 36  # 8 tokens, each attends itself and those before
    attention = 4 * pairs * size["width"] * size["layers"]
    assert decode.flops(case) == 3 * (8 * weights + 4 * 2 * table + attention)
    case = {"work": "steps", "size": size, "batch": 3, "filled": 100}
    pairs = sum(100 + step for step in range(1, decode.STEPS + 1))
    attention = 4 * pairs * size["width"] * size["layers"]
    assert decode.flops(case) == 3 * (decode.STEPS * (weights + 2 * table) + attention)


def test_an_expert_counts_for_its_tokens_only():
    hidden, num_experts = 11, 5
    assert moe.flops(num_experts, hidden) == 6 * moe.TOKENS * moe.WIDTH * (2 * 3 * hidden + num_experts)


@pytest.mark.skipif(CANNOT_HIDE is not None, reason=f"AVX-512 cannot be hidden: {CANNOT_HIDE}")
def test_a_command_and_its_children_find_no_avx512():
    found = (
        "from numpy._core._multiarray_umath import __cpu_features__ as f; print(f['AVX2'], f['AVX512F'], flush=True)"
    )
    code = f"import subprocess, sys; {found}; subprocess.run([sys.executable, '-c', {found!r}]); sys.exit(5)"
    command = [sys.executable, without_avx512.__file__, sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    avx2 = "avx2" in FLAGS
    assert (done.returncode, done.stdout, done.stderr) == (5, f"{avx2} False\n" * 2, "")


def test_a_machine_that_cannot_hide_avx512_says_why(monkeypatch, capsys):
    monkeypatch.setattr(without_avx512, "cpu_flags", lambda: ["avx2", "avx512f"])
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert without_avx512.main(["true"]) == 2
    assert "lacks the flag cpuid_fault" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C compiler, cc" in without_avx512.why_not(["cpuid_fault"])
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert without_avx512.why_not([]) == "needs Linux on x86_64; got Linux on aarch64"


def test_the_peak_is_measured_in_a_process_of_each_library(monkeypatch):
    asked = {}

    def compare(sides, **options):
        asked.update(sides)
        return {name: [0.5, 0.25] for name in sides}, {}

    monkeypatch.setattr(_machine, "compare", compare)
    monkeypatch.setattr(_machine, "peer_version", lambda package: "2.13")
    machine = _machine.measure()
    assert machine.peak == machine.products["torch"] == 2 * 2048**3 / 0.25 / 1e9
    assert [command[1:] for command in asked.values()] == [
        [_machine.__file__, "--side", name] for name in ("JAX", "torch")
    ]
    monkeypatch.setattr(_machine, "peer_version", lambda package: None)
    assert set(_machine.measure().products) == {"JAX"}


def test_pages_have_a_section_for_each_kind_of_machine():
    root = Path(__file__).parents[2]
    pages = {}
    target = ""
    for line in (root / "Makefile").read_text().splitlines():
        target = line.split(":")[0] if line.startswith("bench") else target
        if "-cpu.md" in line and target != "bench-accuracy":  # its figures are no times
            pages[target] = root / line.split("--markdown ")[1]
    assert len(pages) == 5
    for target, page in pages.items():
        text = page.read_text()
        for kind in ("AVX-512", "AVX2"):
            assert text.count(f"<!-- make {target}, {kind} -->\n") == 1, (page, kind)
        assert text.count("<!-- end -->") == 2
