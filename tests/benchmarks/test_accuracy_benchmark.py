"""The benchmark of accuracy: its formula in float64, its words, and its tables of made-up results."""

import dataclasses

import accuracy
import jax
import numpy as np
import pytest
from accuracy import Problem, exact

from attnax import flash_attention, masks, memory_efficient_attention

SMALL = Problem("causal", length=13)


@pytest.mark.parametrize(
    ("results", "side", "problem"),
    [
        (accuracy.kernel_results, "standard", Problem("soft-cap", length=13, query_scale=8.0)),
        (accuracy.kernel_results, "standard", dataclasses.replace(SMALL, mask="lost query", key_mean=3.0)),
        (accuracy.function_results, "jax.nn", SMALL),
        (accuracy.function_results, "flax.nnx", Problem("alibi", length=13)),
    ],
    ids=["soft cap", "lost query", "causal", "alibi"],
)
def test_a_library_is_compared_with_its_own_formula(results, side, problem):
    want = exact(problem, problem.arrays("float32"))
    have = results(side, problem, "float32")
    assert [x.dtype for x in want] == [np.float64] * 4
    assert max(accuracy.errors(*pair)[0] for pair in zip(have, want, strict=True)) < 5e-6


def test_on_a_cpu_flash_attention_is_the_tiles_to_the_bit():
    query, key, value, _ = Problem("causal", length=31, heads=2).arrays("bfloat16")
    results = [
        jax.jit(lambda *x, kernel=kernel: kernel(*x, mask=masks.causal()))(query, key, value)
        for kernel in (flash_attention, memory_efficient_attention)
    ]
    np.testing.assert_array_equal(*results)


def test_inputs_are_numbers_of_the_dtype():
    (query, *_), (exact_query, *_) = SMALL.arrays("bfloat16"), SMALL.arrays("float32")
    assert query.dtype == np.float32 and not (query.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(query, exact_query, rtol=2**-8)


def test_a_result_is_told_in_words():
    problem = Problem("full", length=13, mask="lost query")
    arrays = problem.arrays("float32")
    want = exact(problem, arrays)
    mean, nan, other = (np.copy(want[0]) for _ in range(3))
    mean[:, :, accuracy.LOST], nan[:, :, accuracy.LOST], other[:, :, accuracy.LOST] = arrays[2].mean(2), np.nan, 7.0
    said = [
        accuracy.answer("lost output", [output, *want[1:]], want, arrays[2]) for output in (want[0], mean, nan, other)
    ]
    assert said == ["0", "mean of all values", "NaN", "other numbers"]
    assert accuracy.answer("gradients", want, want, arrays[2]) == "right"
    assert accuracy.answer("gradients", want[:1], want, arrays[2]) == "none on a CPU"
    assert accuracy.answer("gradients", [*want[:3], want[3] * np.nan], want, arrays[2]) == "NaN (33%)"
    assert accuracy.answer("output", [nan, *want[1:]], want, arrays[2]) == "NaN (8%)"
    assert accuracy.answer("output", [want[0] * 1.5], want, arrays[2]) == "error of 5.0e-01"


def test_a_table_has_a_line_for_each_problem_and_a_bar_for_each_library(monkeypatch, capsys):
    hidden = dataclasses.replace(SMALL, case="full", mask="hidden keys", spoiled="value")
    monkeypatch.setattr(accuracy, "PROBLEMS", {"causal": SMALL})
    monkeypatch.setattr(accuracy, "QUESTIONS", {"NaN": (hidden, "float32", "gradients")})

    def ask(library, problem, dtype):
        if library == "torch SDPA":
            return "refused"
        want = exact(problem, problem.arrays(dtype))
        return want[:1] if library == accuracy.FLEX else [1.25 * x for x in want]

    text = accuracy.tables(ask, ["Attnax flash", "torch SDPA", accuracy.FLEX])
    output, gradients = text.split("## bfloat16")[1:3]
    row = next(line for line in output.splitlines() if line.startswith("| causal |")).split(" | ")
    assert row[1].startswith("2.5e-01 (") and row[2:4] == ["refused", "0.0e+00 (0.0e+00)"]
    assert 1e-3 < float(row[4].split()[0]) < 3e-3  # rounded once
    assert accuracy.FLEX in output and accuracy.FLEX not in gradients.partition("## ")[0]
    assert text.count(":values: Attnax flash, torch SDPA\n") == len(accuracy.DTYPES)
    assert text.endswith("| NaN | error of 2.5e-01 | refused | none on a CPU |")
    assert "refused" in capsys.readouterr().out
