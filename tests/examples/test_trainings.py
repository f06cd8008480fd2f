"""The examples of `Trainer` learn a little in a short run: labels of texts, hidden bytes, images in folders."""

import numpy as np
import pytest


@pytest.mark.contract
@pytest.mark.parametrize("main", ["label_source"], indirect=True)
def test_labels_of_texts(main, capsys, tmp_path):
    out = tmp_path / "picture.png"
    accuracy = main(steps=60, batch_size=16, learning_rate=1e-2, d_model=16, length=32, per_package=60, out=out)
    printed = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"held-out accuracy {accuracy:.3f}" in printed and accuracy > 0.35  # six packages: chance is 0.17


@pytest.mark.contract
@pytest.mark.parametrize("main", ["masked_source"], indirect=True)
def test_hidden_bytes(main, capsys, tmp_path, monkeypatch):
    out, drawn, draw = tmp_path / "picture.png", [], main.__globals__["draw_guesses"]
    monkeypatch.setitem(main.__globals__, "draw_guesses", lambda *args: drawn.append(args) or draw(*args))
    bits = main(steps=60, batch_size=16, learning_rate=1e-2, d_model=16, num_layers=1, length=32, files=20, out=out)
    printed = capsys.readouterr().out.splitlines()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert printed[-1] == f"held out: {bits:.2f} bits for a hidden byte" and bits < 0.7 * np.log2(257)
    [(guesses, probabilities, words, _)] = drawn
    likeliest = [word.replace("?", places[0].strip("'")) for word, places in zip(words, guesses, strict=True)]
    assert [word in line for word, line in zip(likeliest, printed[2:5], strict=True)] == [True] * 3
    assert np.all(np.diff(probabilities) <= 0) and probabilities.shape == (3, 5)


@pytest.mark.contract
@pytest.mark.parametrize("main", ["digit_folder"], indirect=True)
def test_images_in_folders(main, capsys, tmp_path):
    out = tmp_path / "picture.png"
    accuracy = main(steps=60, batch_size=32, learning_rate=1e-2, d_model=32, num_layers=1, out=out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"test accuracy {accuracy:.4f}" in capsys.readouterr().out and accuracy > 0.4  # ten digits: chance is 0.1
