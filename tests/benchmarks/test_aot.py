"""The command that compiles programs for accelerators: its table and its messages, without the compilers."""

import importlib
import os
import platform
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import SingleDeviceSharding

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPILED = """
  %splash_mha_fwd_residuals.1 = bf16[2] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={}
  %splash_mha_fwd_residuals.2.1 = bf16[2] custom-call(%x), custom_call_target="tpu_custom_call", backend_config={}
  %pallas_call.0 = bf16[2] custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", backend_config={name = "attnax_forward", num_warps = 4 : i32}
  %f.1 = bf16[2] custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={}
  %b.1 = bf16[2] custom-call(%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={}
  %gemm.1 = bf16[2] custom-call(%q), custom_call_target="__cublas$gemm", backend_config={}
"""  # noqa: E501


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("aot")


@pytest.fixture
def compiler(aot):
    """A Compiler for this machine."""
    made = aot.Compiler.__new__(aot.Compiler)
    made.target, made.sharding = "cpu", SingleDeviceSharding(jax.devices()[0])
    return made


def program(function):
    return lambda: (function, (jax.ShapeDtypeStruct((3, 5), "float32"),))


@pytest.mark.parametrize(
    ("system", "machine", "python", "target", "words"),
    [
        ("Darwin", "arm64", (3, 13, 0), "tpu", "Linux on x86_64, and this is Darwin on arm64"),
        ("Linux", "aarch64", (3, 13, 0), "cuda", "this is Linux on aarch64"),
        ("Linux", "x86_64", (3, 15, 0), "tpu", "Python 3.11 to 3.14, and this is 3.15"),
        ("Linux", "x86_64", (3, 11, 0), "cuda", "Python 3.12 to 3.14, and this is 3.11"),
        ("Linux", "x86_64", (3, 11, 0), "tpu", None),
        ("Linux", "x86_64", (3, 13, 0), "cuda", None),
    ],
)
def test_a_machine_without_a_compiler_is_skipped_with_the_reason(
    aot, monkeypatch, capsys, system, machine, python, target, words
):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(sys, "argv", ["aot.py", target, "--why-not"])
    aot.main()
    said = capsys.readouterr().out.strip()
    assert words in said if words else said == ""


def test_kernels_are_counted_by_name(aot):
    want = {"splash_mha_fwd_residuals": 2, "attnax_forward": 1, "cuDNN forward": 1, "cuDNN backward": 1}
    assert aot.kernels_in(COMPILED) == want


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_names_of_rows_are_unique(aot, target):
    names = [row.name for row in aot.rows(target)]
    assert len(names) == len(set(names)) > 12


def test_a_program_is_as_promised_or_the_table_says_what_is_wrong(aot, compiler):
    rows = [
        aot.Row("good", program(lambda x: x @ x.T), {}),
        aot.Row("no kernel", program(lambda x: x + 1), {"attnax_forward": 1}),
        aot.Row("broken", program(lambda x: x @ x), {}),
        aot.Row("known", program(lambda x: x @ x), {}, limitation="a | reason"),
    ]
    results = [(row, compiler(row)) for row in rows]
    assert [bool(aot.verdict(*result)) for result in results] == [False, True, True, True]
    text = aot.section("tpu", {"TPU v5e": results})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| program | compiles | seconds |") and len(lines) == 2 + len(rows)
    assert "| good | yes |" in lines[2] and lines[2].endswith("| none | 0.0 | 0.0 |")
    assert "no: holds no kernel, and should hold 1 attnax_forward" in lines[3]
    assert "no: TypeError" in lines[4]
    assert "(known: a \\| reason)" in lines[5]
    assert text.startswith("By `make aot`: jax")


def test_a_complaint_of_a_compiler_is_an_error(aot, compiler):
    def alarming(x):
        os.write(2, f"E1 x.cc:74] {aot.ALARM} > 1s:\n\n  %reduce = pred[2] reduce(%a)\n\nThis".encode())
        return x

    result = compiler(aot.Row("alarm", program(alarming), {}))
    assert "XLA computes constants for seconds: %reduce = pred[2] reduce(%a)" in result.error
