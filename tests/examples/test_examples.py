"""The examples run, and show what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.contract
def test_custom_mask(tmp_path, capsys):
    assert example("custom_mask")(["--length", "300", "--out", str(tmp_path / "mask.png")]) < 1e-5
    assert "the kernel can skip" in capsys.readouterr().out and (tmp_path / "mask.png").stat().st_size > 1000


@pytest.mark.thorough
def test_moe_lm(capsys, tmp_path):
    first, last = example("moe_lm")(["--steps", "12", "--data", str(EXAMPLES), "--out", str(tmp_path / "moe.png")])
    assert (tmp_path / "moe.png").stat().st_size > 1000
    assert last < 0.8 * first and "experts" in capsys.readouterr().out


@pytest.mark.thorough
def test_data_parallel(capsys):
    one, many = example("data_parallel")(8)
    assert one == pytest.approx(many, rel=1e-4) and one[-1] < 0.5 * one[0]
    assert "8 devices" in capsys.readouterr().out
