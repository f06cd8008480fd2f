"""The examples run, each at a small size, and print their results."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_example_is_run_by_a_test_that_each_change_must_pass():
    run = []
    for path in Path(__file__).parent.glob("test_*.py"):
        for test in vars(importlib.import_module(path.stem)).values():
            marks = {mark.name: mark.args for mark in getattr(test, "pytestmark", ())}
            if "thorough" not in marks and marks.get("parametrize", ("",))[0] == "main":
                run += marks["parametrize"][1]
    assert sorted(run) == sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.contract
@pytest.mark.parametrize("main", ["custom_mask"], indirect=True)
def test_custom_mask(main, tmp_path, capsys):
    assert main(["--length", "300", "--out", str(tmp_path / "mask.png")]) < 1e-5
    assert "the kernel can skip" in capsys.readouterr().out and (tmp_path / "mask.png").stat().st_size > 1000


@pytest.mark.contract
@pytest.mark.parametrize("main", ["moe_lm"], indirect=True)
def test_moe_lm(main, capsys, tmp_path):
    first, last = main(["--steps", "12", "--data", str(EXAMPLES), "--out", str(tmp_path / "moe.png")])
    assert (tmp_path / "moe.png").stat().st_size > 1000
    assert last < 0.8 * first and "experts" in capsys.readouterr().out


@pytest.mark.contract
@pytest.mark.parametrize("main", ["many_devices"], indirect=True)
def test_many_devices(main, capsys, tmp_path):
    one, many = main(8, out=tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert one == pytest.approx(many, rel=1e-4) and one[-1] < 0.5 * one[0]
    assert "fsdp=4,tensor=2" in capsys.readouterr().out


@pytest.mark.contract
@pytest.mark.parametrize("main", ["component_demo"], indirect=True)
def test_component_demo_shows_every_piece(main, capsys, tmp_path):
    main(out=tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    *table, last = capsys.readouterr().out.splitlines()
    shapes = {line[:38].strip(): line[line.rindex("(") :] for line in table}
    assert len(shapes) == 16
    assert shapes["scaled dot-product attention"] == "(2, 4, 5, 8)"
    assert shapes["encoder"] == "(2, 7, 32)" and shapes["decoder"] == "(2, 5, 32)"
    assert shapes["encoder-decoder, log-probabilities"] == shapes["language model, log-probabilities"] == "(2, 5, 100)"
    assert last.endswith("are finite: True")


@pytest.mark.contract
@pytest.mark.parametrize("main", ["seq2seq_skeleton"], indirect=True)
def test_seq2seq_skeleton_learns_to_reverse_a_little(main, capsys, tmp_path):
    options = {"steps": 120, "batch_size": 128, "max_length": 3, "vocab_size": 6, "d_model": 32, "num_layers": 1}
    right = main(**options, learning_rate=1e-2, out=tmp_path / "reverse.png")
    assert (tmp_path / "reverse.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("loss") == 10 and f"{256 * right:.0f} of 256 right" in printed
    assert right > 0.5
