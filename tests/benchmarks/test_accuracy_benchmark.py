"""The benchmark of accuracy: its formula in float64, its words, and its tables of made-up results."""

import dataclasses
import re
from pathlib import Path

import accuracy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accuracy import Problem, exact

from attnax import flash_attention, masks, memory_efficient_attention

SMALL = Problem("causal", length=13)
PAGES = Path(__file__).parents[2] / "docs/understand"


@pytest.mark.parametrize(
    ("results", "side", "problem"),
    [
        (accuracy.kernel_results, "standard", Problem("soft-cap", length=13, query_scale=8.0)),
        (accuracy.kernel_results, "standard", Problem("full", length=13, mask="lost query", key_mean=3.0)),
        (accuracy.kernel_results, "standard", Problem("alibi", length=13)),  # its mod is another formula than `exact`
        (accuracy.function_results, "jax.nn", SMALL),
        (accuracy.function_results, "flax.nnx", Problem("alibi", length=13)),
    ],
    ids=["soft cap", "lost query", "alibi, a mod", "causal", "alibi, a bias"],
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

    tables = accuracy.measured(ask, ["Attnax flash", "torch SDPA", accuracy.FLEX])
    text = accuracy.section(tables)
    output, gradients = text.split("## bfloat16")[1:3]
    row = next(line for line in output.splitlines() if line.startswith("| causal |")).split(" | ")
    assert row[1].startswith("2.5e-01 (") and row[2:4] == ["refused", "0.0e+00 (0.0e+00)"]
    assert 1e-3 < float(row[4].split()[0]) < 3e-3  # rounded once
    assert accuracy.FLEX in output and accuracy.FLEX not in gradients.partition("## ")[0]
    assert text.count(":values: Attnax flash, torch SDPA\n") == len(accuracy.DTYPES)
    assert text.endswith("| NaN | error of 2.5e-01 | refused | none on a CPU |")
    greatest, _, closer = accuracy.summary(tables).split("\n\n")
    output, gradients = (line.split(" | ")[:4] for line in greatest.splitlines()[2:4])
    assert output == ["| float32, output", "2.5e-01", "refused", "0.0e+00"]
    assert gradients == ["| float32, gradients", "2.5e-01", "refused", "none on a CPU"]
    assert closer.splitlines()[2:] == [
        f"| {dtype}, output | causal | 2.5e-01 | torch FlexAttention 0.0e+00 |" for dtype in accuracy.DTYPES
    ]
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"case": "documents"}, "case must be one of full, causal, alibi, soft-cap; got case='documents'"),
        ({"case": "alibi", "heads": 2}, "ALiBi has slopes for 8 heads; got heads=2"),
        ({"case": "causal", "mask": "lost query"}, "got case='causal', mask='lost query'"),
    ],
)
def test_a_problem_that_a_library_would_compute_otherwise_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Problem(**options)


def written_tables():
    """The tables of the page by their headings, as `accuracy.measured` gives them."""
    for part in (PAGES / "accuracy-cpu.md").read_text().split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        yield part.partition("\n")[0], [line.strip("| ").split(" | ") for line in lines]


def test_the_summary_is_of_the_tables_of_the_page():
    tables, text = dict(written_tables()), (PAGES / "accuracy.md").read_text()
    assert list(tables) == [
        *(f"{dtype}, {of}" for dtype in accuracy.DTYPES for of in ("output", "gradients")),
        "Hidden NaN and empty rows",
    ]
    assert f"<!-- make bench-accuracy -->\n\n{accuracy.summary(tables)}\n\n<!-- end -->" in text


def test_the_counts_of_the_summary_are_those_of_its_table():
    summary = accuracy.summary(dict(written_tables())).rpartition("\n\n")[2]
    closer = re.findall(r"^\| (\w+, \w+) \|.*\| (.*) \|$", summary, re.MULTILINE)
    assert {of.partition(",")[0] for of, _ in closer} == {"float32"}
    outputs = sum("torch FlexAttention" in others for of, others in closer if of == "float32, output")
    gradients = sum("jax.nn" in others for of, others in closer if of == "float32, gradients")
    assert (outputs, gradients) == (5, 4)
    words = " ".join((PAGES / "accuracy.md").read_text().split())
    assert "outputs of FlexAttention are more exact than those of `flash_attention` in five of six cases" in words
    assert "gradients of `jax.nn` in four of five" in words


def test_the_gradient_of_a_softmax_in_16_bits_loses_a_sum_above_256():
    """JAX's divides by the square of the sum of exponentials, which is beyond the range of float16."""

    def gradient(length):
        return jax.grad(lambda scores: jax.nn.softmax(scores).sum())(jnp.zeros(length, jnp.float16))

    assert np.abs(gradient(251)).max() < 0.01 / 251  # the exact gradient is 0
    np.testing.assert_allclose(gradient(263), 1 / 263, rtol=1e-3)
