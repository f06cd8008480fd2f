"""Benchmarks that run in one process: their tables, of few cases and without a measured machine."""

import re

import data
import jax
import prefill
import pytest
import rows
import sampling
from _machine import Machine


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments, traced=False):
        machine = Machine("A Processor", 2, "AVX2", ("avx2",), False, {"JAX": 1.0})
        monkeypatch.setattr(script, "measure", lambda: machine)
        if traced:  # every line runs, and nothing is compiled
            jax.eval_shape(lambda: script.main(arguments))
        else:
            script.main(arguments)
        printed = capsys.readouterr().out
        assert printed.startswith(machine.line)
        return [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()[2:]]

    return run


def test_a_step_is_timed_for_every_kind_of_cache(run):
    head, *lines = run(rows, "--cases", "8 of 100", "--layers", "1", traced=True)
    assert head == ["rows", *rows.KINDS]
    assert lines[-1][0] == "8 of 100" and all(float(cell) > 0 for cell in lines[-1][1:])


def test_a_draw_is_timed_beside_one_that_sorts(run):
    head, *lines = run(sampling, "--rows", "2", "--vocabularies", "11", "--rounds", "1", "--cases", "top_p=0.9")
    assert lines[-1][:3] == ["2", "11", "top_p=0.9"] and len(lines[-1]) == len(head)
    assert all(float(cell) >= 0 for cell in lines[-1][3:])


def test_a_prompt_is_read_in_chunks_and_at_once(monkeypatch):
    monkeypatch.setattr(prefill, "SHAPE", {"vocab_size": 7, "d_model": 8, "num_heads": 2, "d_ff": 8})
    cell = prefill.read_prompt(5, 2, "contiguous", 1, 1)
    assert cell.keys() == {"caches", "temporary", "memory", "seconds"} and cell["caches"] > 0 and cell["seconds"] > 0


@pytest.mark.contract
def test_steps_of_tokenizing_and_orders_are_timed(run, tmp_path):
    for index in range(9):
        (tmp_path / f"{index}.txt").write_text("some words of text\n" * 200)
    lines = run(data, "--source", str(tmp_path), "--vocab-size", "260", "--windows", "1000")
    steps, orders = lines[: lines.index([""])], lines[lines.index([""]) + 1 :]
    assert float(steps[-1][2].replace(",", "")) > 0 and int(steps[-1][4].replace(",", "")) > 0
    assert orders[0][0] == "windows" and orders[-1][0] == "1,000"
    assert all(float(cell.replace(",", "")) > 0 for line in orders[-2:] for cell in line)
